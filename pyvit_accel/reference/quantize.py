"""q = clip(rint(x / scale) + zero_point): float32 rows to codes of `bits` bits, -2^(bits-1) .. 2^(bits-1)-1.

x       (M, K)       float32
scale   (1,) | (K,)  float32, static; quantize_dynamic finds one per row instead, and returns it (M,):
                     scale = max |x| clip / (2^(bits-1)-1), zero_point 0
minimum float        a known lower bound of x: the codes then start there,
                     q = rint((x - minimum) / scale) - 2^(bits-1), scale = (max x - minimum) clip / (2^bits-1)
clip    float        the part of a row's range that the codes span; what lies beyond gets the last code
table   (256,) int8  what takes the place of the codes -128 .. 127, of 8 bits then: levels unevenly spaced
returns (M, K)       int8
"""

from __future__ import annotations

from torch import Tensor

from pyvit_accel.formats import affine


def quantize(x: Tensor, scale: Tensor, zero_point: int, bits: int) -> Tensor:
    return affine.quantize(x, scale, zero_point, bits).contiguous()


def quantize_dynamic(
    x: Tensor, minimum: float | None, bits: int, clip: float, table: Tensor | None
) -> tuple[Tensor, Tensor]:
    lo, hi = affine.q_range(bits)
    if minimum is None:
        scale = affine.scale_of(x.abs().amax(dim=1) * clip, hi)
        codes = affine.quantize(x, scale[:, None], 0, bits)
    else:
        x = x - minimum
        scale = affine.scale_of(x.amax(dim=1) * clip, hi - lo)
        codes = affine.quantize(x, scale[:, None], lo, bits)
    return (codes if table is None else table[codes.long() + 128]).contiguous(), scale
