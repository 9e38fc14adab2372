"""norm_quant: LayerNorm and quantisation in one pass, with a static scale or one per row."""

from __future__ import annotations

from torch import Tensor

from pyvit_accel import reference

from ._library import check_bits, check_clip, check_index, check_rows, check_vector, define
from .quantize import _codes_like, _rows

_static = define(
    "norm_quant",
    "(Tensor x, Tensor weight, Tensor bias, Tensor scale, float eps, int bits, Tensor? index=None) -> Tensor",
    reference.norm_quant,
    lambda x, weight, bias, scale, eps, bits, index=None: _codes_like(x, index),
)
_dynamic = define(
    "norm_quant_dynamic",
    "(Tensor x, Tensor weight, Tensor bias, float eps, int bits, float clip, Tensor? index=None) -> (Tensor, Tensor)",
    reference.norm_quant_dynamic,
    lambda x, weight, bias, eps, bits, clip, index=None: (_codes_like(x, index), x.new_empty(_rows(x, index))),
)


def norm_quant(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    bits: int = 8,
    clip: float = 1.0,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q = clip(rint(LayerNorm(x) / scale)) to -2^(bits-1) .. 2^(bits-1)-1.

    x             (..., C)     float; computed in float32
    weight, bias  (C,)         float32, LayerNorm's
    scale         (1,) | (C,)  float32, static; None: one per row, max |LayerNorm(x)| clip / (2^(bits-1)-1)
    bits          int          2 to 8
    clip          float        of scales per row: the part of the range that the codes span, in 0..1
    index         (M,)         int32: row m is of row index[m] of x, taken as (R, C); code 0 and scale 1 where that is
                               below 0, at no cost. Checked against R on the CPU only
    returns       codes (..., C) int8, (M, C) by an index, and the scale: the one given, or (rows,) float32

    Raises ValueError when a shape does not fit x, or bits or clip are out of range. No gradient. Reference:
    reference/norm_quant.py.
    """
    C = check_rows("norm_quant", x)
    check_vector("norm_quant", "weight", weight, C)
    check_vector("norm_quant", "bias", bias, C)
    rows = x.reshape(-1, C).float()
    check_bits("norm_quant", bits)
    check_index("norm_quant", "index", index)
    if scale is None:
        check_clip("norm_quant", clip)
        codes, scale = _dynamic(rows, weight, bias, eps, bits, clip, index)
    else:
        check_vector("norm_quant", "scale", scale, 1, C)
        codes = _static(rows, weight, bias, scale, eps, bits, index)
    return codes if index is not None else codes.reshape(x.shape), scale
