"""q = clip(rint(x / scale) + zero_point, -128, 127): float32 rows to int8 codes.

x       (M, K)       float32
scale   (1,) | (K,)  float32, static; quantize_dynamic takes max |x| / 127 of each row instead, and returns it (M,)
returns (M, K)       int8
"""

from __future__ import annotations

from torch import Tensor

from pyvit_accel.formats import affine


def quantize(x: Tensor, scale: Tensor, zero_point: int) -> Tensor:
    return affine.quantize(x, scale, zero_point)


def quantize_dynamic(x: Tensor) -> tuple[Tensor, Tensor]:
    amax = x.abs().amax(dim=1) if x.shape[1] else x.new_zeros(x.shape[0])
    scale = affine.scale_of(amax)
    return affine.quantize(x, scale[:, None]), scale
