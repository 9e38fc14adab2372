"""The shared library of the CUDA kernels: where it is, whether it fits, and what its launches are made of."""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_char_p, c_int, c_uint8, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path

from torch import Tensor

PATH = Path(__file__).parents[1] / "libpyvit_accel_cuda.so"
ABI = 2  # PYVIT_ACCEL_ABI of csrc/cuda/launch.h
BUILD = "python setup.py build_cuda builds it, with nvcc"


class TensorMap(ctypes.Structure):
    """csrc/cuda/launch.h."""

    _fields_ = (
        ("base", c_uint64),
        ("dims", c_uint64 * 5),
        ("strides", c_uint64 * 4),
        ("box", c_uint32 * 5),
        ("rank", c_uint32),
        ("swizzle", c_uint32),
        ("element_bytes", c_uint32),
        ("offset", c_uint32),
    )


class Launch(ctypes.Structure):
    """csrc/cuda/launch.h."""

    _fields_ = (
        ("kernel", c_char * 64),
        ("function", c_void_p),
        ("grid", c_uint32),
        ("block", c_uint32),
        ("cluster", c_uint32),
        ("shared_bytes", c_uint32),
        ("param_bytes", c_uint32),
        ("num_maps", c_uint32),
        ("dependent", c_uint32),
        ("maps", TensorMap * 4),
        ("_to_64", c_uint8 * 56),
        ("params", c_uint8 * 1024),
    )


@cache
def _load() -> ctypes.CDLL | None:
    if not PATH.exists():
        return None
    loaded = ctypes.CDLL(str(PATH))
    loaded.pyvit_accel_error.restype = c_char_p
    loaded.pyvit_accel_device_error.restype = c_char_p
    loaded.pyvit_accel_launch.argtypes = (ctypes.POINTER(Launch), c_void_p)
    loaded.pyvit_accel_launch.restype = c_int
    return loaded


def library() -> ctypes.CDLL | None:
    """The library, or None when it was not built, or for another version of this package."""
    loaded = _load()
    return loaded if loaded is not None and loaded.pyvit_accel_abi_version() == ABI else None


def device_error() -> str | None:
    """Why the library, which must be there, cannot launch here; None when it can. Asks the driver."""
    error = library().pyvit_accel_device_error()
    return None if error is None else error.decode()


def status() -> str:
    """The state of the library in one line. Asks the driver."""
    loaded = _load()
    if loaded is None:
        return f"not built; {BUILD}"
    if library() is None:
        return f"built for ABI version {loaded.pyvit_accel_abi_version()}, this is {ABI}; {BUILD} anew"
    error = device_error()
    return "yes" if error is None else f"yes, but nothing to run it on: {error}"


def check_devices(op: str, x: Tensor, *others: Tensor | None) -> None:
    """Raise unless all tensors are where x is: a kernel would take the address of another device for one of its own."""
    for t in others:
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: x is on {x.device}, and one of the others on {t.device}; move them to one device")


def check(code: int) -> None:
    """Raise what a function of the library returned: ValueError for what was asked, RuntimeError from the driver."""
    if code:
        text = library().pyvit_accel_error().decode()
        raise (RuntimeError if code == 3 else ValueError)(text)
