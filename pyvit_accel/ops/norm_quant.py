"""norm_quant: LayerNorm and quantisation in one pass, with a static scale or one per row."""

from __future__ import annotations

from torch import Tensor

from pyvit_accel import reference

from ._library import check_rows, check_vector, define
from .quantize import _codes_like

_static = define(
    "norm_quant",
    "(Tensor x, Tensor weight, Tensor bias, Tensor scale, float eps) -> Tensor",
    reference.norm_quant,
    lambda x, weight, bias, scale, eps: _codes_like(x),
)
_dynamic = define(
    "norm_quant_dynamic",
    "(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    reference.norm_quant_dynamic,
    lambda x, weight, bias, eps: (_codes_like(x), x.new_empty(x.shape[0])),
)


def norm_quant(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """q = clip(rint(LayerNorm(x) / scale), -128, 127).

    x             (..., C)     float; computed in float32
    weight, bias  (C,)         float32, LayerNorm's
    scale         (1,) | (C,)  float32, static; None: max |LayerNorm(x)| / 127 of each row
    returns       codes (..., C) int8, and the scale: the one given, or (rows,) float32

    Raises ValueError when a shape does not fit x. No gradient. Reference: reference/norm_quant.py.
    """
    C = check_rows("norm_quant", x)
    check_vector("norm_quant", "weight", weight, C)
    check_vector("norm_quant", "bias", bias, C)
    rows = x.reshape(-1, C).float()
    if scale is None:
        codes, scale = _dynamic(rows, weight, bias, eps)
    else:
        check_vector("norm_quant", "scale", scale, 1, C)
        codes = _static(rows, weight, bias, scale, eps)
    return codes.reshape(x.shape), scale
