"""quantize: float rows to int8 codes, with a static scale or one per row."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel import reference

from ._library import check_rows, check_vector, define


def _codes_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


_static = define(
    "quantize",
    "(Tensor x, Tensor scale, int zero_point) -> Tensor",
    reference.quantize,
    lambda x, scale, zero_point: _codes_like(x),
)
_dynamic = define(
    "quantize_dynamic",
    "(Tensor x, float? minimum) -> (Tensor, Tensor)",
    reference.quantize_dynamic,
    lambda x, minimum: (_codes_like(x), x.new_empty(x.shape[0])),
)


def quantize(
    x: Tensor, scale: Tensor | None = None, zero_point: int = 0, minimum: float | None = None
) -> tuple[Tensor, Tensor]:
    """q = clip(rint(x / scale) + zero_point, -128, 127).

    x           (..., K)     float; computed in float32
    scale       (1,) | (K,)  float32, static; None: max |x| / 127 of each row, zero_point 0
    minimum     float        a lower bound of x, without a scale: x ~ (q + 128) * scale + minimum, all 256 codes in use
    returns     codes (..., K) int8, and the scale: the one given, or (rows,) float32

    NaN has no defined code. Raises ValueError when the scale does not fit x, a zero point comes without a scale or a
    minimum with one. No gradient.
    """
    K = check_rows("quantize", x)
    rows = x.reshape(-1, K).float()
    if scale is None:
        if zero_point:
            raise ValueError(f"quantize: zero_point={zero_point} needs a static scale; per-row scales are symmetric")
        codes, scale = _dynamic(rows, minimum)
    elif minimum is not None:
        raise ValueError(f"quantize: minimum={minimum} is for scales per row; a static scale takes a zero_point")
    else:
        check_vector("quantize", "scale", scale, 1, K)
        codes = _static(rows, scale, zero_point)
    return codes.reshape(x.shape), scale
