"""y = x @ w.T with w 2:4 sparse, and everything that follows a matmul in a transformer block: the CUDA C++ launcher.

    16-bit  acc = sum_k x[m, k] w[n, k]                              float32
            y   = acc + bias, activation, * layer_scale, + residual          float32, in this order; then rounded once
    int8    acc = sum_k (x[m, k] - x_zero_point) w[n, k]             exact
            y   = acc * (x_scale * w_scale) + bias, activation, * layer_scale, + residual
    both    q   = clip(rint(y * (1 / out_scale)) + out_zero_point) to out_bits bits   when out_scale is given

x             (M, K)       float16 | bfloat16 | int8, as values
values, meta  packed       P24 v1 of w (out_features, K), formats/sparse24.py
bias, layer_scale  (N,)    float32 or None; N is out_features
x_scale       (1,) | (M,)  float32: one, or one per row; int8 only
w_scale       (N,)         float32; int8 only
w_sum         (N,)         int32: sum_k w[n, k]; int8 only, None where x_zero_point is 0
residual      (M, N)       float32 or None
activation    "none" | "gelu" | "gelu_tanh" | "quick_gelu"
out_scale     (1,) | (N,)  float32 or None
w_dense       of kernels that multiply with the unpacked weight; not read here
returns       (M, N)       dtype of x, float32 for int8; int8 when out_scale is given. int8: the reference's bits

Inputs that the weight's pattern leaves out are not read. csrc/cuda/sparse24_linear.cu plans, on the host, and
csrc/cuda/sparse24_linear_sm80.cu and _sm90.cu compute.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int32, c_int64, c_void_p

import torch
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

ELEMENTS = (torch.int8, torch.float16, torch.bfloat16)  # enum Elements of csrc/cuda/sparse24_linear.h


class Sparse24Linear(ctypes.Structure):
    """csrc/cuda/sparse24_linear.h."""

    _fields_ = (
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("values", c_void_p),
        ("meta", c_void_p),
        ("rows", c_void_p),
        ("K", c_int32),
        ("elements", c_int32),
        ("epilogue", Epilogue),
    )


# Its kernels: sparse24_linear_sm<arch>_<s8 | f16 | bf16>[_rows]_<features>x<tokens of a block>.
OP = Op("sparse24_linear", Sparse24Linear)


def _padded_sums(w_sum: Tensor | None) -> Tensor | None:
    """The sums of whole tiles of 16 features, at a multiple of 16 bytes."""
    if w_sum is None:
        return None
    return aligned(torch.nn.functional.pad(w_sum, (0, -len(w_sum) % 16)) if len(w_sum) % 16 else w_sum)


def problem(
    y: Tensor, x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, x_scale: Tensor | None,
    w_scale: Tensor | None, w_sum: Tensor | None, x_zero_point: int, activation: str, layer_scale: Tensor | None,
    residual: Tensor | None, out_scale: Tensor | None, out_zero_point: int, out_bits: int, K: int,
    rows: Tensor | None = None,
) -> Sparse24Linear:  # fmt: skip
    """The C structure of a call. It owns nothing: the tensors must outlive it, aligned and contiguous as launched."""
    return Sparse24Linear(
        x.data_ptr(), x.stride(0) * x.element_size(), values.data_ptr(), meta.data_ptr(),
        None if rows is None else rows.data_ptr(), K, ELEMENTS.index(x.dtype),
        epilogue(
            y, x_scale, w_scale, bias, layer_scale, residual, out_scale, w_sum, 64, x_zero_point, activation,
            out_zero_point, out_bits,
        ),
    )  # fmt: skip


def arguments(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, out_features: int, x_scale: Tensor | None,
    w_scale: Tensor | None, w_sum: Tensor | None, x_zero_point: int, activation: str, layer_scale: Tensor | None,
    residual: Tensor | None, out_scale: Tensor | None, out_zero_point: int, out_bits: int,
) -> tuple:  # fmt: skip
    """The arguments of the reference as `problem` takes them after y: contiguous, aligned, rows of x padded.

    Raises ValueError when they are not all where x is.
    """
    others = (values, meta, bias, x_scale, w_scale, w_sum, layer_scale, residual, out_scale)
    check_devices("sparse24_linear", x, *others)
    residual, bias, x_scale, w_scale, layer_scale, out_scale = laid_out(
        residual, bias, x_scale, w_scale, layer_scale, out_scale
    )
    return (
        aligned_rows(x), aligned(values), aligned(meta), bias, x_scale, w_scale, _padded_sums(w_sum), x_zero_point,
        activation, layer_scale, residual, out_scale, out_zero_point, out_bits, x.shape[1],
    )  # fmt: skip


def sparse24_linear(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    out_features: int,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    w_sum: Tensor | None,
    x_zero_point: int,
    activation: str,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out_zero_point: int,
    out_bits: int,
    w_dense: Tensor | None = None,
    *,
    config: str | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """config: the name of the kernel, one of OP.configs(), which runs on this GPU and has this dtype; None chooses.

    rows: sparse24.rows_of(values), which the kernels with _rows_ in their name need; without, they are not chosen.
    """
    y = empty_result(x, out_features, out_scale)
    if y.numel():
        kept = arguments(
            x, values, meta, bias, out_features, x_scale, w_scale, w_sum, x_zero_point, activation, layer_scale,
            residual, out_scale, out_zero_point, out_bits,
        )  # fmt: skip
        OP.launch(problem(y, *kept, rows), x, config)
    return y


def takes(index: int) -> bool:
    """Whether calls on this GPU are theirs: from sm_80 on, by a driver they can use."""
    return device(index)[0] >= 80 and has_driver()


def before(otherwise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The launcher for every GPU: these kernels where `takes` says so, else the other launcher."""

    def launch(x: Tensor, *args) -> Tensor:
        return (sparse24_linear if takes(x.device.index) else otherwise)(x, *args)

    return launch
