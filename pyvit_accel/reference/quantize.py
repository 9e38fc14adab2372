"""q = clip(rint(x / scale) + zero_point): float32 rows to codes of `bits` bits, -2^(bits-1) .. 2^(bits-1)-1.

x       (R, K)       float32
scale   (1,) | (K,)  float32, static; quantize_dynamic finds one per row instead, and returns it (M,):
                     scale = max |x| clip / (2^(bits-1)-1), zero_point 0
minimum float        a known lower bound of x: the codes then start there,
                     q = rint((x - minimum) / scale) - 2^(bits-1), scale = (max x - minimum) clip / (2^bits-1)
clip    float        the part of a row's range that the codes span; what lies beyond gets the last code
table   (256,) int8  what takes the place of the codes -128 .. 127, of 8 bits then: levels unevenly spaced
index   (M,) int32   row m is of row index[m] of x, code 0 and scale 1 where that is below 0; None: of row m, M = R
returns (M, K)       int8
"""

from __future__ import annotations

from torch import Tensor

from pyvit_accel.formats import affine

from ._rows import leave_rows, take_rows


def quantize(x: Tensor, scale: Tensor, zero_point: int, bits: int, index: Tensor | None = None) -> Tensor:
    return leave_rows(affine.quantize(take_rows(x, index), scale, zero_point, bits), index).contiguous()


def quantize_dynamic(
    x: Tensor, minimum: float | None, bits: int, clip: float, table: Tensor | None, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    x, (lo, hi) = take_rows(x, index), affine.q_range(bits)
    if minimum is None:
        scale = affine.scale_of(x.abs().amax(dim=1) * clip, hi)
        codes = affine.quantize(x, scale[:, None], 0, bits)
    else:
        x = x - minimum
        scale = affine.scale_of(x.amax(dim=1) * clip, hi - lo)
        codes = affine.quantize(x, scale[:, None], lo, bits)
    codes = codes if table is None else table[codes.long() + 128]
    return leave_rows(codes, index).contiguous(), leave_rows(scale, index, 1)
