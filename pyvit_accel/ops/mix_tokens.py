"""mix_tokens: rows that are weighted sums of rows. Every move of tokens is one."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel import reference

from ._library import define
from .select_tokens import FLOATS, check_rows_of

REDUCES = ("sum", "mean", "mlerp")


def _fake(x, col, ptr, weight, base, width, reduce):
    M = col.shape[1] // width if ptr is None else ptr.shape[1] - 1
    return x.new_empty(x.shape[0], M, x.shape[2])


_op = define(
    "mix_tokens",
    "(Tensor x, Tensor col, Tensor? ptr, Tensor? weight, Tensor? base, int width, str reduce) -> Tensor",
    reference.mix_tokens,
    _fake,
)


def mix_tokens(
    x: Tensor,
    col: Tensor,
    ptr: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    base: Tensor | None = None,
    width: int = 1,
    reduce: str = "sum",
) -> Tensor:
    """y[b, m] = base[b, m] + reduce over list m of weight[b, t] x[b, col[b, t]].

    x        (B, N, C)      float
    col      (B, L)         int32: rows of x; -1 adds nothing; checked on the CPU only
    ptr      (B, M + 1)     int32: list m has the entries ptr[m] .. ptr[m + 1], as from group_tokens; None: every list
                            has `width` entries, M = L / width
    weight   (B, L)         float32; None: ones
    base     (B, M, C)      dtype of x, with reduce "sum"; None: zeros
    reduce   "sum"; "mean": divided by the sum of the list's weights, a list of one row is that row; "mlerp": the mean,
             made as long as the longest row
    returns  (B, M, C)      dtype of x; an empty list gives base, or zeros

    Gather: col of lists of one. Merge: group_tokens. Un-merge: col is the row each token went to. Scatter into base:
    lists of one with -1. Sums are float32, in the order of the list. Raises TypeError and ValueError for what does not
    fit. No gradient. Reference: reference/mix_tokens.py.
    """
    check_rows_of("mix_tokens", "x", x, FLOATS, 3)
    check_rows_of("mix_tokens", "col", col, (torch.int32,))
    B, L = col.shape
    if ptr is not None:
        check_rows_of("mix_tokens", "ptr", ptr, (torch.int32,))
        if ptr.shape[1] < 1 or width != 1:
            raise ValueError(f"mix_tokens: ptr {tuple(ptr.shape)} with width={width}; pass ptr (B, M + 1) or width")
    elif width < 1 or L % width:
        raise ValueError(f"mix_tokens: col has {L} entries, which are not lists of width={width}")
    M = L // width if ptr is None else ptr.shape[1] - 1
    if not x.shape[0] == B == (B if ptr is None else ptr.shape[0]):
        raise ValueError(f"mix_tokens: x {tuple(x.shape)} and col {tuple(col.shape)} differ in their number of images")
    if weight is not None:
        check_rows_of("mix_tokens", "weight", weight, (torch.float32,))
        if weight.shape != col.shape:
            raise ValueError(f"mix_tokens: weight {tuple(weight.shape)} must be like col {tuple(col.shape)}")
    if reduce not in REDUCES:
        raise ValueError(f"mix_tokens: reduce={reduce!r} is not one of {', '.join(REDUCES)}")
    if base is not None and (base.shape != (B, M, x.shape[2]) or base.dtype != x.dtype or reduce != "sum"):
        came = f"base {base.dtype} {tuple(base.shape)} with reduce={reduce!r}"
        raise ValueError(f"mix_tokens: {came}; expected {x.dtype} {(B, M, x.shape[2])} and 'sum'")
    return _op(x, col, ptr, weight, base, width, reduce)
