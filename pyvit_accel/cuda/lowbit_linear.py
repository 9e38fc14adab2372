"""y = x @ w.T on integer codes, and everything that follows a matmul in a transformer block: the CUDA C++ launcher.

    acc = sum_k (x[m, k] - x_zero_point) w[n, k]                              exact
    y   = acc * (x_scale * w_scale) + bias, activation, * layer_scale, + residual       float32, in this order
    q   = clip(rint(y * (1 / out_scale)) + out_zero_point) to out_bits bits   when out_scale is given

x            (M, K)       int8
x_scale      (1,) | (M,)  float32: one, or one per row
w_packed     packed       uint8, layout version 2; (N, K) codes of 4 or 8 bits, read off its shape
w_scale      (N,)         float32
bias, layer_scale  (N,)   float32 or None
residual     (M, N)       float32 or None
activation   "none" | "gelu" | "gelu_tanh" | "quick_gelu"
out_scale    (1,) | (N,)  float32 or None
returns      (M, N)       float32, or int8 when out_scale is given; the reference's bits

csrc/cuda/lowbit_linear.cu plans, on the host, and csrc/cuda/lowbit_linear_sm80.cu and _sm90.cu compute.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, byref, c_bool, c_char_p, c_int, c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from .library import Launch, check, check_devices, device_error, library

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu")  # enum Activation of csrc/cuda/epilogue.cuh
CAPABILITY = 90  # where wgmma is, whose int8 form Triton does not keep busy; elsewhere both use mma.sync


class Epilogue(ctypes.Structure):
    """csrc/cuda/lowbit_linear.h."""

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


class LowbitLinear(ctypes.Structure):
    """csrc/cuda/lowbit_linear.h."""

    _fields_ = (
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("K", c_int32),
        ("w_bits", c_int32),
        ("epilogue", Epilogue),
    )


@cache
def _functions() -> ctypes.CDLL:
    loaded = library()
    loaded.pyvit_accel_lowbit_linear.argtypes = (POINTER(LowbitLinear), c_int, c_int, c_int, c_void_p)
    loaded.pyvit_accel_lowbit_linear_plan.argtypes = (POINTER(LowbitLinear), c_int, c_int, c_int, POINTER(Launch))
    loaded.pyvit_accel_lowbit_linear_config.restype = c_char_p
    return loaded


@cache
def configs() -> tuple[str, ...]:
    """The names of the kernels: lowbit_linear_sm<arch>_w<bits>_<features>x<tokens of a block>."""
    names, name_of = [], _functions().pyvit_accel_lowbit_linear_config
    while name := name_of(len(names)):
        names.append(name.decode())
    return tuple(names)


def _config_index(config: str | None) -> int:
    if config is None:
        return -1
    if config not in configs():
        raise ValueError(f"lowbit_linear: there is no kernel {config!r}; use one of {', '.join(configs())}")
    return configs().index(config)


def bits_of(w_packed: Tensor, K: int) -> int:
    """The number of bits of the codes, from the length of a row of packed weights with K inputs."""
    return (w_packed.shape[1] - 64) // (64 * -(-K // 32)) if K else 8


def aligned_rows(x: Tensor) -> Tensor:
    """x (M, K), or a copy padded with zeros: columns, stride and address are multiples of 16, no rows overlap."""
    M, K = x.shape
    if K % 16 == 0 and x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.stride(0) >= K and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_zeros(M, -(-K // 16) * 16)
    padded[:, :K] = x
    return padded


def _aligned(t: Tensor) -> Tensor:
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def problem(
    y: Tensor, x: Tensor, x_scale: Tensor, w_packed: Tensor, w_scale: Tensor, bias: Tensor | None, x_zero_point: int,
    activation: str, layer_scale: Tensor | None, residual: Tensor | None, out_scale: Tensor | None,
    out_zero_point: int, out_bits: int, K: int,
) -> LowbitLinear:  # fmt: skip
    """The C structure of a call. It owns nothing: the tensors must outlive it, aligned and contiguous as launched."""
    M, N = y.shape
    out_scale_per_column = out_scale is not None and out_scale.shape[0] > 1
    return LowbitLinear(
        x.data_ptr(), x.stride(0), K, bits_of(w_packed, K),
        Epilogue(
            x_scale.data_ptr(), w_scale.data_ptr(), _pointer(bias), _pointer(layer_scale), _pointer(residual),
            _pointer(out_scale), y.data_ptr(), w_packed.data_ptr(), w_packed.shape[1],
            0 if residual is None else residual.stride(0), M, N, x_zero_point, out_zero_point, out_bits,
            ACTIVATIONS.index(activation), x_scale.shape[0] > 1, out_scale_per_column, False,
        ),
    )  # fmt: skip


def plan(of: LowbitLinear, capability: int, sm_count: int, config: str | None = None) -> Launch:
    """What would be launched on a GPU of this capability (10 major + minor); config: by this kernel. Needs no GPU.

    Raises ValueError when the problem cannot be computed, or not by this kernel there.
    """
    launch = Launch()
    check(_functions().pyvit_accel_lowbit_linear_plan(
        byref(of), capability, sm_count, _config_index(config), byref(launch)
    ))  # fmt: skip
    return launch


@cache
def _device(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


@cache
def _has_driver() -> bool:
    """Whether the driver, which may be older than the one that PyTorch needs, is new enough for the library."""
    return device_error() is None


def arguments(
    x: Tensor, x_scale: Tensor, w_packed: Tensor, w_scale: Tensor, bias: Tensor | None, x_zero_point: int,
    activation: str, layer_scale: Tensor | None, residual: Tensor | None, out_scale: Tensor | None,
    out_zero_point: int, out_bits: int,
) -> tuple:  # fmt: skip
    """The arguments of the reference as `problem` takes them after y: contiguous, aligned, x padded to 16 inputs.

    Raises ValueError when they are not all where x is.
    """
    check_devices("lowbit_linear", x, x_scale, w_packed, w_scale, bias, layer_scale, residual, out_scale)
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    vectors = (None if v is None else v.contiguous() for v in (bias, layer_scale, out_scale))
    bias, layer_scale, out_scale = vectors
    return (
        aligned_rows(x), x_scale.contiguous(), _aligned(w_packed), w_scale.contiguous(), bias, x_zero_point, activation,
        layer_scale, residual, out_scale, out_zero_point, out_bits, x.shape[1],
    )  # fmt: skip


def lowbit_linear(
    x: Tensor,
    x_scale: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_zero_point: int,
    activation: str,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out_zero_point: int,
    out_bits: int,
    index: Tensor | None = None,
    *,
    config: str | None = None,
) -> Tensor:
    """config: the name of the kernel, one of configs(), which runs on this GPU and has these bits; None chooses."""
    if index is not None:
        raise ValueError("lowbit_linear: these kernels take no index; select the rows of x first")
    y = torch.empty(
        x.shape[0], w_scale.shape[0], dtype=torch.float32 if out_scale is None else torch.int8, device=x.device
    )
    if y.numel():
        kept = arguments(
            x, x_scale, w_packed, w_scale, bias, x_zero_point, activation, layer_scale, residual, out_scale,
            out_zero_point, out_bits,
        )  # fmt: skip
        with torch.cuda.device_of(x):
            stream = torch.cuda.current_stream(x.device).cuda_stream
            capability, sm_count = _device(x.device.index)
            of, config_index = problem(y, *kept), _config_index(config)
            check(_functions().pyvit_accel_lowbit_linear(byref(of), capability, sm_count, config_index, stream))
    return y


def takes(x: Tensor, w_packed: Tensor, index: Tensor | None) -> bool:
    """Whether the call is theirs: on Hopper, of 4- or 8-bit weights, without an index, by a driver they can use."""
    if index is not None or bits_of(w_packed, x.shape[1]) not in (4, 8):
        return False
    return _device(x.device.index)[0] == CAPABILITY and _has_driver()


def before(otherwise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The launcher for every GPU: these kernels where `takes` says so, else the other launcher."""

    def launch(x, x_scale, w_packed, w_scale, bias, x_zero_point, activation, layer_scale, residual, out_scale,
               out_zero_point, out_bits, index=None):  # fmt: skip
        launcher = lowbit_linear if takes(x, w_packed, index) else otherwise
        return launcher(
            x, x_scale, w_packed, w_scale, bias, x_zero_point, activation, layer_scale, residual, out_scale,
            out_zero_point, out_bits, index,
        )  # fmt: skip

    return launch
