"""Affine integers: x ~ (q - zero_point) * scale.

    q = clip(rint(x * inv_scale) + zero_point, q_min, q_max),   inv_scale = 1 / scale in float32, rint half to even

Weights are symmetric, one scale per output feature: scale = max |w| / 127, codes -127..127. Activations are int8,
-128..127, symmetric (zero_point 0) or with an integer zero point.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_SCALE = 1e-30  # of an all-zero row: its codes are zero, and 1 / scale stays finite


def scale_of(amax: Tensor, q_max: int = 127) -> Tensor:
    """The symmetric scale that maps amax to q_max; float32, never zero."""
    return (amax.float() / q_max).clamp_min(MIN_SCALE)


def quantize(x: Tensor, scale: Tensor, zero_point: int = 0, q_min: int = -128, q_max: int = 127) -> Tensor:
    """int8 codes of float32 x; scale broadcasts against x."""
    return (torch.round(x * (1.0 / scale)) + zero_point).clamp(q_min, q_max).to(torch.int8)


def dequantize(q: Tensor, scale: Tensor, zero_point: int = 0) -> Tensor:
    return (q.to(scale.dtype) - zero_point) * scale


def error_bound(x: Tensor, scale: Tensor, zero_point: int = 0, q_min: int = -128, q_max: int = 127) -> Tensor:
    """Largest |x - dequantize(quantize(x))|: half a step inside the range, the distance to its end outside.

    The last term is the rounding of x * inv_scale and of the product with scale, four float32 roundings of x.
    """
    lo, hi = (q_min - zero_point) * scale, (q_max - zero_point) * scale
    clipped = torch.maximum(x - hi, lo - x).clamp_min(0)
    return clipped + scale / 2 + 4 * 2.0**-24 * (x.abs() + scale)


def quantize_weight(w: Tensor) -> tuple[Tensor, Tensor]:
    """w (N, K) float to codes (N, K) int8 in -127..127 and scale (N,) float32, symmetric per output feature."""
    w = w.detach().float()
    scale = scale_of(w.abs().amax(dim=1))
    return quantize(w, scale[:, None], q_min=-127), scale
