"""Rows that an index names: index (M,) int32, row m is row index[m] of x, and nothing where index[m] < 0."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def take_rows(x: Tensor, index: Tensor | None) -> Tensor:
    """x (R, ...) by index, zeros where there is none; x itself without an index."""
    if index is None:
        return x
    return F.pad(x, (0, 0) * (x.dim() - 1) + (1, 0))[index.clamp(min=-1).long() + 1]


def leave_rows(y: Tensor, index: Tensor | None, value: float = 0) -> Tensor:
    """y (M, ...) with `value` in the rows that nothing was computed for."""
    return y if index is None else y.masked_fill((index < 0).view(-1, *(1,) * (y.dim() - 1)), value)
