"""y = x @ w.T with w 2:4 sparse, and everything that follows a matmul in a transformer block.

    16-bit  acc = sum_k x[m, k] w[n, k]                              float64 here, float32 in kernels
            y   = acc + bias, activation, * layer_scale, + residual          float32, in this order; then rounded once
    int8    acc = sum_k (x[m, k] - x_zero_point) w[n, k]             exact
            y   = acc * (x_scale * w_scale) + bias, activation, * layer_scale, + residual
    both    q   = clip(rint(y * (1 / out_scale)) + out_zero_point) to out_bits bits   when out_scale is given

x             (M, K)       float16 | bfloat16 | int8, as values
values, meta  packed       P24 v1 of w (out_features, K), formats/sparse24.py
bias, layer_scale  (N,)    float32 or None; N is out_features
x_scale       (1,) | (M,)  float32: one, or one per row; int8 only
w_scale       (N,)         float32; int8 only
w_sum         (N,)         int32: sum_k w[n, k], which kernels multiply with x_zero_point; int8 only
residual      (M, N)       float32 or None
activation    "none" | "gelu" | "gelu_tanh" | "quick_gelu", as in scalar.py
out_scale     (1,) | (N,)  float32 or None
w_dense       of kernels that multiply with the unpacked weight; not read here
returns       (M, N)       dtype of x, float32 for int8; int8 when out_scale is given

Sparse units read the inputs that are kept only: here an infinite or NaN input spoils its whole row.
"""

from __future__ import annotations

from torch import Tensor

from pyvit_accel.formats import sparse24

from .lowbit_linear import finish


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
) -> Tensor:
    w = sparse24.unpack(values, meta, out_features, x.shape[1])
    y = ((x.double() - x_zero_point) @ w.double().T).float()
    if w_scale is not None:
        y = y * (x_scale[:, None] * w_scale)
    y = finish(y, bias, activation, layer_scale, residual, out_scale, out_zero_point, out_bits)
    return y.to(x.dtype) if w_scale is None and out_scale is None else y
