"""local_assign: tokens of a grid softly assigned to the few centres near them."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel import reference

from ._library import define
from .select_tokens import FLOATS, check_rows_of


def _fake(x, centres, window, *rest):
    B, h, w, _ = x.shape
    shape = (B, h * w, window * window)
    return (
        x.new_empty(shape, dtype=torch.float32),
        x.new_empty(shape, dtype=torch.int32),
        x.new_empty(centres.shape, dtype=torch.float32),
    )


_op = define(
    "local_assign",
    "(Tensor x, Tensor centres, int window, str metric, float tau, int iterations, str border) "
    "-> (Tensor, Tensor, Tensor)",
    reference.local_assign,
    _fake,
)


def local_assign(
    x: Tensor,
    centres: Tensor,
    window: int,
    metric: str = "l2",
    tau: float = 1.0,
    iterations: int = 1,
    border: str = "mask",
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the tokens over the centres near their home cell, and the centres as weighted means of their tokens.

    x           (B, h, w, C)            float
    centres     (B, gh, gw, C)          dtype of x; gh <= h, gw <= w; token (y, x) is at home in (y gh // h, x gw // w)
    window      odd                     candidates are the centres at most window // 2 from home, in y and in x
    metric      "l2": softmax of -tau |x - c|^2; "dot": of tau x c
    iterations  at least 1; each moves the centres
    border      of candidates outside the grid: "mask", they do not exist; "zero", they are zero vectors
    returns     weight (B, h w, window^2) float32, of the last iteration before its centres moved
                index (B, h w, window^2)  int32, the candidates row after row, -1 outside the grid: mix_tokens' col
                centres (B, gh, gw, C)    float32

    Raises TypeError and ValueError for what does not fit. No gradient. Reference: reference/local_assign.py.
    """
    for name, t in (("x", x), ("centres", centres)):
        check_rows_of("local_assign", name, t, FLOATS, 4)
    if x.dtype != centres.dtype or x.shape[0] != centres.shape[0] or x.shape[3] != centres.shape[3]:
        came = f"x {x.dtype} {tuple(x.shape)} and centres {centres.dtype} {tuple(centres.shape)}"
        raise ValueError(f"local_assign: {came} do not fit")
    if not (1 <= centres.shape[1] <= x.shape[1] and 1 <= centres.shape[2] <= x.shape[2]):
        raise ValueError(f"local_assign: {tuple(centres.shape[1:3])} centres of {tuple(x.shape[1:3])} tokens")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"local_assign: window={window}; use an odd number")
    if metric not in ("l2", "dot") or border not in ("mask", "zero"):
        raise ValueError(f"local_assign: metric={metric!r}, border={border!r}; use 'l2' or 'dot', 'mask' or 'zero'")
    if iterations < 1:
        raise ValueError(f"local_assign: iterations={iterations}; use 1 or more")
    return _op(x, centres, window, metric, tau, iterations, border)
