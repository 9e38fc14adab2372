"""quantize: float rows to codes of 2 to 8 bits in int8, with a static scale or one per row."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel import reference

from ._library import check_bits, check_clip, check_index, check_rows, check_table, check_vector, define


def _codes_like(x: Tensor, index: Tensor | None) -> Tensor:
    return x.new_empty(_rows(x, index), x.shape[1], dtype=torch.int8)


def _rows(x: Tensor, index: Tensor | None) -> int:
    return (x if index is None else index).shape[0]


_static = define(
    "quantize",
    "(Tensor x, Tensor scale, int zero_point, int bits, Tensor? index=None) -> Tensor",
    reference.quantize,
    lambda x, scale, zero_point, bits, index=None: _codes_like(x, index),
)
_dynamic = define(
    "quantize_dynamic",
    "(Tensor x, float? minimum, int bits, float clip, Tensor? table, Tensor? index=None) -> (Tensor, Tensor)",
    reference.quantize_dynamic,
    lambda x, minimum, bits, clip, table, index=None: (_codes_like(x, index), x.new_empty(_rows(x, index))),
)


def quantize(
    x: Tensor,
    scale: Tensor | None = None,
    zero_point: int = 0,
    minimum: float | None = None,
    bits: int = 8,
    clip: float = 1.0,
    table: Tensor | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q = clip(rint(x / scale) + zero_point) to -2^(bits-1) .. 2^(bits-1)-1.

    x           (..., K)     float; computed in float32
    scale       (1,) | (K,)  float32, static; None: max |x| clip / (2^(bits-1)-1) of each row
    minimum     float        without a scale, a lower bound of x: x ~ (q + 2^(bits-1)) * scale + minimum
    bits        int          2 to 8
    clip        float        of scales per row: the part of the range that the codes span, in 0..1
    table       (256,) int8  without a scale: what takes the place of the codes -128 .. 127, for levels unevenly spaced
    index       (M,) int32   row m is of row index[m] of x, taken as (R, K); code 0 and scale 1 where that is below 0,
                             at no cost. Checked against R on the CPU only
    returns     codes (..., K) int8, (M, K) by an index, and the scale: the one given, or (rows,) float32

    NaN has no defined code. Raises ValueError when the scale does not fit x, bits or clip are out of range, a zero
    point comes without a scale, a minimum, a clip or a table with one. No gradient.
    """
    K = check_rows("quantize", x)
    rows = x.reshape(-1, K).float()
    check_bits("quantize", bits)
    check_table("quantize", table, bits)
    check_index("quantize", "index", index)
    if scale is None:
        if zero_point:
            raise ValueError(f"quantize: zero_point={zero_point} needs a static scale; per-row scales are symmetric")
        check_clip("quantize", clip)
        codes, scale = _dynamic(rows, minimum, bits, clip, table, index)
    elif clip != 1:
        raise ValueError(f"quantize: clip={clip} is for scales per row; a static scale says itself what it spans")
    elif table is not None:
        raise ValueError("quantize: a table is for scales per row; give no scale with it")
    elif minimum is not None:
        raise ValueError(f"quantize: minimum={minimum} is for scales per row; a static scale takes a zero_point")
    else:
        check_vector("quantize", "scale", scale, 1, K)
        codes = _static(rows, scale, zero_point, bits, index)
    return codes if index is not None else codes.reshape(x.shape), scale
