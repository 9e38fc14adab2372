"""q = clip(rint(x / scale) + zero_point, -128, 127): float32 rows to int8 codes.

x       (M, K)       float32
scale   (1,) | (K,)  float32, static; quantize_dynamic takes max |x| / 127 of each row instead, and returns it (M,)
minimum float        a known lower bound of x: the codes then span it to max x,
                     q = rint((x - minimum) / scale) - 128, scale = (max x - minimum) / 255
returns (M, K)       int8
"""

from __future__ import annotations

from torch import Tensor

from pyvit_accel.formats import affine


def quantize(x: Tensor, scale: Tensor, zero_point: int) -> Tensor:
    return affine.quantize(x, scale, zero_point).contiguous()


def quantize_dynamic(x: Tensor, minimum: float | None = None) -> tuple[Tensor, Tensor]:
    if minimum is None:
        scale = affine.scale_of(x.abs().amax(dim=1))
        return affine.quantize(x, scale[:, None]).contiguous(), scale
    x = x - minimum
    scale = affine.scale_of(x.amax(dim=1), q_max=255)
    return affine.quantize(x, scale[:, None], -128).contiguous(), scale
