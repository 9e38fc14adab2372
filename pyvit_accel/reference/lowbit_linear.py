"""y = x @ w.T on integer codes, and everything that follows a matmul in a transformer block.

    acc = sum_k (x[m, k] - x_zero_point) w[n, k]                              exact
    y   = acc * (x_scale * w_scale) + bias, activation, * layer_scale, + residual       float32, in this order
    q   = clip(rint(y * (1 / out_scale)) + out_zero_point) to out_bits bits   when out_scale is given

x            (M, K)       int8
x_scale      (1,) | (M,)  float32: one, or one per row
w_packed     packed       uint8, formats/packed.py; holds (N, K) codes of 2, 3, 4, 5, 6 or 8 bits
w_scale      (N,)         float32
bias, layer_scale  (N,)   float32 or None
residual     (M, N)       float32 or None
activation   "none" | "gelu" | "gelu_tanh" | "quick_gelu", as in scalar.py
out_scale    (1,) | (N,)  float32 or None
returns      (M, N)       float32, or int8 when out_scale is given
"""

from __future__ import annotations

from torch import Tensor

from pyvit_accel.formats import affine, packed

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
) -> Tensor:
    y = accumulate(x, w_packed, w_scale.shape[0], x_zero_point).float() * (x_scale[:, None] * w_scale)
    return finish(y, bias, activation, layer_scale, residual, out_scale, out_zero_point, out_bits)
