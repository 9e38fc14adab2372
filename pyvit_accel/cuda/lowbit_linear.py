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
from ctypes import c_int32, c_int64, c_void_p

from torch import Tensor

from .library import (
    Epilogue,
    Op,
    aligned,
    aligned_rows,
    check_devices,
    device,
    empty_result,
    epilogue,
    has_driver,
    laid_out,
)

CAPABILITY = 90  # where wgmma is, whose int8 form Triton does not keep busy; elsewhere both use mma.sync


class LowbitLinear(ctypes.Structure):
    """csrc/cuda/lowbit_linear.h."""

    _fields_ = (
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("K", c_int32),
        ("w_bits", c_int32),
        ("epilogue", Epilogue),
    )


OP = Op("lowbit_linear", LowbitLinear)  # its kernels: lowbit_linear_sm<arch>_w<bits>_<features>x<tokens of a block>


def bits_of(w_packed: Tensor, K: int) -> int:
    """The number of bits of the codes, from the length of a row of packed weights with K inputs."""
    return (w_packed.shape[1] - 64) // (64 * -(-K // 32)) if K else 8


def problem(
    y: Tensor, x: Tensor, x_scale: Tensor, w_packed: Tensor, w_scale: Tensor, bias: Tensor | None, x_zero_point: int,
    activation: str, layer_scale: Tensor | None, residual: Tensor | None, out_scale: Tensor | None,
    out_zero_point: int, out_bits: int, K: int,
) -> LowbitLinear:  # fmt: skip
    """The C structure of a call. It owns nothing: the tensors must outlive it, aligned and contiguous as launched."""
    return LowbitLinear(
        x.data_ptr(), x.stride(0), K, bits_of(w_packed, K),
        epilogue(
            y, x_scale, w_scale, bias, layer_scale, residual, out_scale, w_packed, w_packed.shape[1], x_zero_point,
            activation, out_zero_point, out_bits,
        ),
    )  # fmt: skip


def arguments(
    x: Tensor, x_scale: Tensor, w_packed: Tensor, w_scale: Tensor, bias: Tensor | None, x_zero_point: int,
    activation: str, layer_scale: Tensor | None, residual: Tensor | None, out_scale: Tensor | None,
    out_zero_point: int, out_bits: int,
) -> tuple:  # fmt: skip
    """The arguments of the reference as `problem` takes them after y: contiguous, aligned, x padded to 16 inputs.

    Raises ValueError when they are not all where x is.
    """
    check_devices("lowbit_linear", x, x_scale, w_packed, w_scale, bias, layer_scale, residual, out_scale)
    residual, x_scale, w_scale, bias, layer_scale, out_scale = laid_out(
        residual, x_scale, w_scale, bias, layer_scale, out_scale
    )
    return (
        aligned_rows(x), x_scale, aligned(w_packed), w_scale, bias, x_zero_point, activation, layer_scale, residual,
        out_scale, out_zero_point, out_bits, x.shape[1],
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
    """config: the name of the kernel, one of OP.configs(), which runs on this GPU and has these bits; None chooses."""
    if index is not None:
        raise ValueError("lowbit_linear: these kernels take no index; select the rows of x first")
    y = empty_result(x, w_scale.shape[0], out_scale)
    if y.numel():
        kept = arguments(
            x, x_scale, w_packed, w_scale, bias, x_zero_point, activation, layer_scale, residual, out_scale,
            out_zero_point, out_bits,
        )  # fmt: skip
        OP.launch(problem(y, *kept), x, config)
    return y


def takes(x: Tensor, w_packed: Tensor, index: Tensor | None) -> bool:
    """Whether the call is theirs: on Hopper, of 4- or 8-bit weights, without an index, by a driver they can use."""
    if index is not None or bits_of(w_packed, x.shape[1]) not in (4, 8):
        return False
    return device(x.device.index)[0] == CAPABILITY and has_driver()


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
