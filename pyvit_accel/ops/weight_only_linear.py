"""weight_only_linear: float activations x packed integer weights, for models whose memory matters more than speed."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel import reference

from ._library import check_rows, check_vector, define
from .lowbit_linear import check_packed

_op = define(
    "weight_only_linear",
    "(Tensor x, Tensor w_packed, Tensor w_scale, Tensor? w_zero_point, Tensor? bias) -> Tensor",
    reference.weight_only_linear,
    lambda x, w_packed, w_scale, w_zero_point, bias: x.new_empty(x.shape[0], w_scale.shape[0]),
)


def weight_only_linear(
    x: Tensor, w_packed: Tensor, w_scale: Tensor, bias: Tensor | None = None, w_zero_point: Tensor | None = None
) -> Tensor:
    """x @ w.T + bias, w ~ (q - w_zero_point) * w_scale.

    x             (..., K)       float; sums are float32. float16 and bfloat16 are multiplied as they are on a GPU
    w_packed      packed         uint8, formats/packed.py; holds (N, K) codes of 2, 3, 4, 5, 6 or 8 bits
    w_scale       (N,) | (N, G)  float32, one per output feature, or per group of K / G of its inputs
    bias          (N,) | None    float32
    w_zero_point  (N, G) | None  float32, integer-valued; with w_scale (N, G)
    returns       (..., N)       dtype of x

    Raises ValueError for shapes that disagree, TypeError for dtypes. No gradient.
    """
    K = check_rows("weight_only_linear", x)
    if w_scale.dtype != torch.float32:
        raise TypeError(f"weight_only_linear: w_scale must be float32, got {w_scale.dtype}")
    if w_scale.dim() not in (1, 2) or (w_scale.dim() == 2 and (w_scale.shape[1] == 0 or K % w_scale.shape[1])):
        raise ValueError(
            f"weight_only_linear: w_scale has shape {tuple(w_scale.shape)}; use (N,), or (N, G) where G divides K={K}"
        )
    if w_zero_point is not None:
        if w_zero_point.dtype != torch.float32:
            raise TypeError(f"weight_only_linear: w_zero_point must be float32, got {w_zero_point.dtype}")
        if w_scale.dim() != 2 or w_zero_point.shape != w_scale.shape:
            raise ValueError(
                f"weight_only_linear: w_zero_point {tuple(w_zero_point.shape)} needs a w_scale (N, G) of its shape, "
                f"got {tuple(w_scale.shape)}"
            )
    N = w_scale.shape[0]
    check_packed("weight_only_linear", w_packed, N, K)
    check_vector("weight_only_linear", "bias", bias, N)
    if not x.is_floating_point():
        raise TypeError(f"weight_only_linear: x must be float, got {x.dtype}; integer codes go to lowbit_linear")
    rows = x.reshape(-1, K)
    if not (x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)):
        rows = rows.float()
    y = _op(rows, w_packed, w_scale, w_zero_point, bias)
    return y.reshape(*x.shape[:-1], N).to(x.dtype)
