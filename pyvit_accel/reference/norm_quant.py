"""LayerNorm, then quantise: y = (x - mean) * rstd * weight + bias, q = clip(rint(y / scale)) to codes of `bits` bits.

x       (R, C)       float32; mean and variance are summed in float64 and rounded once, the rest is float32
weight  (C,)         float32
bias    (C,)         float32
scale   (1,) | (C,)  float32, static; norm_quant_dynamic finds one per row, as quantize_dynamic, and returns it
index   (M,) int32   row m is of row index[m] of x, code 0 and scale 1 where that is below 0; None: of row m, M = R
returns (M, C)       int8
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._rows import leave_rows, take_rows
from .quantize import quantize, quantize_dynamic


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = x.double()
    mean = wide.mean(dim=1, keepdim=True)
    rstd = 1.0 / torch.sqrt((wide - mean).square().mean(dim=1, keepdim=True) + eps)
    return (x - mean.float()) * rstd.float() * weight + bias


def norm_quant(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, eps: float, bits: int, index: Tensor | None = None
) -> Tensor:
    return leave_rows(quantize(_norm(take_rows(x, index), weight, bias, eps), scale, 0, bits), index)


def norm_quant_dynamic(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, bits: int, clip: float, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    codes, scale = quantize_dynamic(_norm(take_rows(x, index), weight, bias, eps), None, bits, clip, None)
    return leave_rows(codes, index), leave_rows(scale, index, 1)
