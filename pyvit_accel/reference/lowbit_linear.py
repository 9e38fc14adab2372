"""y = x @ w.T on integer codes, and everything that follows a matmul in a transformer block.

    acc = sum_k (x[m, k] - x_zero_point) w[n, k]                              exact
    y   = acc * (x_scale * w_scale) + bias, activation, * layer_scale, + residual       float32, in this order
    q   = clip(rint(y * (1 / out_scale)) + out_zero_point) to out_bits bits   when out_scale is given

x            (R, K)       int8
x_scale      (1,) | (R,)  float32: one, or one per row
w_packed     packed       uint8, formats/packed.py; holds (N, K) codes of 2, 3, 4, 5, 6 or 8 bits
w_scale      (N,)         float32
bias, layer_scale  (N,)   float32 or None
residual     (M, N)       float32 or None
activation   "none" | "gelu" | "gelu_tanh" | "quick_gelu", as in scalar.py
out_scale    (1,) | (N,)  float32 or None
index        (M,)         int32: row m is of row index[m] of x, zeros where that is below 0; None: of row m, M = R
returns      (M, N)       float32, or int8 when out_scale is given

lowbit_linear_scatter adds y, float32 and without a residual, to row out_index[m] of out (T, N) float32, nothing where
out_index[m] or index[m] is below 0. What is not below 0 in out_index (M,) int32 must differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel.formats import affine, packed

from ._rows import leave_rows, take_rows
from .scalar import ACTIVATIONS


def accumulate(x: Tensor, w_packed: Tensor, N: int, x_zero_point: int) -> Tensor:
    """The exact integer sums (M, N), as float64: they stay far below 2^53."""
    w = packed.unpack(w_packed, N, x.shape[1])
    return (x.double() - x_zero_point) @ w.double().T


def finish(
    y: Tensor,
    bias: Tensor | None,
    activation: str,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out_zero_point: int,
    out_bits: int,
) -> Tensor:
    """What follows the scaled sums y (M, N)."""
    if bias is not None:
        y = y + bias
    y = ACTIVATIONS[activation](y)
    if layer_scale is not None:
        y = y * layer_scale
    if residual is not None:
        y = y + residual
    return y if out_scale is None else affine.quantize(y, out_scale, out_zero_point, out_bits)


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
) -> Tensor:
    x_scale = x_scale if x_scale.shape[0] == 1 else take_rows(x_scale, index)
    sums = accumulate(take_rows(x, index), w_packed, w_scale.shape[0], x_zero_point)
    y = sums.float() * (x_scale[:, None] * w_scale)
    return leave_rows(
        finish(y, bias, activation, layer_scale, residual, out_scale, out_zero_point, out_bits), index
    )


def lowbit_linear_scatter(
    out: Tensor,
    out_index: Tensor,
    x: Tensor,
    x_scale: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_zero_point: int,
    activation: str,
    layer_scale: Tensor | None,
    index: Tensor | None = None,
) -> None:
    epilogue = (x_zero_point, activation, layer_scale, None, None, 0, 8)
    y = lowbit_linear(x, x_scale, w_packed, w_scale, bias, *epilogue, index)
    goes = out_index if index is None else torch.where(index < 0, -1, out_index)
    wide = torch.cat([out.new_zeros(1, out.shape[1]), out])  # its first row takes what goes nowhere
    out.copy_(wide.index_add_(0, goes.clamp(min=-1).long() + 1, leave_rows(y, goes))[1:])
