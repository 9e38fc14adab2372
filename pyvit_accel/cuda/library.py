"""The shared library of the CUDA kernels: where it is, whether it fits, and what the launchers of its ops share."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import (
    POINTER,
    addressof,
    byref,
    c_bool,
    c_char,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_uint8,
    c_uint32,
    c_uint64,
    c_void_p,
)
from functools import cache, cached_property
from itertools import count, takewhile
from pathlib import Path

import torch
from torch import Tensor

PATH = Path(__file__).parents[1] / "libpyvit_accel_cuda.so"
ABI = 2  # PYVIT_ACCEL_ABI of csrc/cuda/launch.h
BUILD = "python setup.py build_cuda builds it, with nvcc"
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu")  # enum Activation of csrc/cuda/epilogue.cuh
ALIGNMENT = 64  # of a Launch, in bytes: its parameters may be written by aligned stores


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

    @classmethod
    def empty(cls) -> Launch:
        """At a multiple of ALIGNMENT, as C lays it out; ctypes knows multiples of 8."""
        memory = _LaunchMemory()
        launch = cls.from_address((addressof(memory) + ALIGNMENT - 1) & -ALIGNMENT)
        launch._memory = memory  # lives as long
        return launch


_LaunchMemory = c_uint8 * (ctypes.sizeof(Launch) + ALIGNMENT)


class Epilogue(ctypes.Structure):
    """csrc/cuda/linear.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x_scale", "w_scale", "bias", "layer_scale", "residual", "out_scale")),
        ("y", c_void_p),
        ("w_packed", c_void_p),
        ("w_stride", c_int64),
        ("residual_stride", c_int64),
        ("M", c_int32),
        ("N", c_int32),
        ("x_zero_point", c_int32),
        ("out_zero_point", c_int32),
        ("out_bits", c_int32),
        ("activation", c_int32),
        ("x_scale_per_row", c_bool),
        ("out_scale_per_column", c_bool),
        ("vectors", c_bool),
    )


def epilogue(
    y: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, bias: Tensor | None, layer_scale: Tensor | None,
    residual: Tensor | None, out_scale: Tensor | None, w_packed: Tensor | None, w_stride: int, x_zero_point: int,
    activation: str, out_zero_point: int, out_bits: int,
) -> Epilogue:  # fmt: skip
    """Of y (M, N) and what follows the sums, tensors as `laid_out` returns them; it owns none."""
    M, N = y.shape
    return Epilogue(
        None if x_scale is None else x_scale.data_ptr(), None if w_scale is None else w_scale.data_ptr(),
        None if bias is None else bias.data_ptr(), None if layer_scale is None else layer_scale.data_ptr(),
        None if residual is None else residual.data_ptr(), None if out_scale is None else out_scale.data_ptr(),
        y.data_ptr(), None if w_packed is None else w_packed.data_ptr(), w_stride,
        0 if residual is None else residual.stride(0), M, N, x_zero_point, out_zero_point, out_bits,
        ACTIVATIONS.index(activation), x_scale is not None and x_scale.numel() > 1,
        out_scale is not None and out_scale.numel() > 1, False,
    )  # fmt: skip


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


@cache
def has_driver() -> bool:
    """Whether the driver, which may be older than the one that PyTorch needs, is new enough for the library."""
    return device_error() is None


@cache
def device(index: int) -> tuple[int, int]:
    """Of a GPU: its capability, 10 major + minor, and its number of multiprocessors."""
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


class Op:
    """The kernels of an op, and the plan that chooses one. structure: its problem. The library must be there."""

    def __init__(self, name: str, structure: type[ctypes.Structure]) -> None:
        self.name, self._structure = name, structure

    def configs(self) -> tuple[str, ...]:
        """The names of the kernels."""
        return tuple(self._indices)

    def plan(self, problem: ctypes.Structure, capability: int, sm_count: int, config: str | None = None) -> Launch:
        """What would be launched on a GPU of this capability (10 major + minor); config: by this kernel. Needs no GPU.

        Raises ValueError when the problem cannot be computed, or not by this kernel there.
        """
        launch = Launch.empty()
        index = -1 if config is None else self._index(config)
        check(self._plan(byref(problem), capability, sm_count, index, byref(launch)))
        return launch

    def launch(self, problem: ctypes.Structure, x: Tensor, config: str | None = None) -> None:
        """Plan it for the GPU where x is, and launch it on the current stream there. Raises as `plan` does."""
        index = -1 if config is None else self._index(config)
        with torch.cuda.device_of(x):
            stream = torch.cuda.current_stream(x.device).cuda_stream
            check(self._launch(byref(problem), *device(x.device.index), index, stream))

    def _index(self, config: str) -> int:
        if config not in self._indices:
            raise ValueError(f"{self.name}: there is no kernel {config!r}; use one of {', '.join(self._indices)}")
        return self._indices[config]

    @cached_property
    def _indices(self) -> dict[str, int]:
        name_of = getattr(library(), f"pyvit_accel_{self.name}_config")
        name_of.restype = c_char_p
        return {name.decode(): i for i, name in enumerate(takewhile(bool, map(name_of, count())))}

    @cached_property
    def _plan(self) -> Callable[..., int]:
        return self._function("_plan", POINTER(Launch))

    @cached_property
    def _launch(self) -> Callable[..., int]:
        return self._function("", c_void_p)

    def _function(self, end: str, last: type) -> Callable[..., int]:
        function = getattr(library(), f"pyvit_accel_{self.name}{end}")
        function.argtypes = (POINTER(self._structure), c_int, c_int, c_int, last)
        return function


def aligned(t: Tensor) -> Tensor:
    """t, or a copy: contiguous, at a multiple of 16 bytes."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def aligned_rows(x: Tensor) -> Tensor:
    """x (M, K), or a copy padded with zeros: rows, their stride and address are multiples of 16 bytes, none overlap."""
    (M, K), each = x.shape, 16 // x.element_size()
    whole = K % each == 0 and x.stride(1) == 1 and x.stride(0) % each == 0 and x.stride(0) >= K
    if whole and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_zeros(M, -(-K // each) * each)
    padded[:, :K] = x
    return padded


def laid_out(residual: Tensor | None, *vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same as an Epilogue takes them, or copies: vectors without gaps, and the residual's rows."""
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    return residual, *[None if v is None else v.contiguous() for v in vectors]


def empty_result(x: Tensor, N: int, out_scale: Tensor | None) -> Tensor:
    """y (M, N), not yet written: int8 codes, or floats of x's dtype, float32 for int8."""
    dtype = torch.int8 if out_scale is not None else torch.float32 if x.dtype == torch.int8 else x.dtype
    return torch.empty(x.shape[0], N, dtype=dtype, device=x.device)


def check_devices(op: str, x: Tensor, *others: Tensor | None) -> None:
    """Raise unless all tensors are where x is: a kernel would take the address of another device for one of its own."""
    where = x.device
    for t in others:
        if t is not None and t.device != where:
            raise ValueError(f"{op}: x is on {where}, and one of the others on {t.device}; move them to one device")


def check(code: int) -> None:
    """Raise what a function of the library returned: ValueError for what was asked, RuntimeError from the driver."""
    if code:
        text = library().pyvit_accel_error().decode()
        raise (RuntimeError if code == 3 else ValueError)(text)
