"""y[b, m] = base[b, m] + sum over list m of weight[b, t] x[b, col[b, t]]: gather, merge, un-merge, reconstruct.

x        (B, N, C)      float
col      (B, L) int32   which rows; -1 adds nothing
ptr      (B, M + 1)     list m has the entries ptr[m] .. ptr[m + 1]; None: lists of `width`, M = L / width
weight   (B, L) float32 None: ones
base     (B, M, C)      float; None: zeros
reduce   "sum"
         "mean"     divided by the sum of the list's weights; a list of one row is that row
         "mlerp"    the mean, made as long as the longest row of the list (ToFu); without a base
returns  (B, M, C)      dtype of x

Sums are float32, in the order of the list, rounded once. An empty list gives base, or zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mix_tokens(
    x: Tensor, col: Tensor, ptr: Tensor | None, weight: Tensor | None, base: Tensor | None, width: int, reduce: str
) -> Tensor:
    B, L = col.shape
    if ptr is None:
        ptr = torch.arange(0, L + 1, width, device=col.device).expand(B, -1)
    ptr = ptr.long()
    start, length = ptr[:, :-1], ptr[:, 1:] - ptr[:, :-1]
    wide = x.double() if x.dtype == torch.float64 else x.float()
    y = wide.new_zeros(B, start.shape[1], x.shape[2])
    total, longest, count = (y.new_zeros(y.shape[:2]) for _ in range(3))
    only = torch.zeros_like(start)
    norms = wide.norm(dim=2) if reduce == "mlerp" else None
    weight = torch.ones_like(col, dtype=torch.float32) if weight is None else weight
    for t in range(int(length.max()) if length.numel() else 0):  # one entry of every list at a time
        at = (start + t).clamp(max=L - 1)
        row = col.long().gather(1, at)
        there = (t < length) & (row >= 0)
        row = row.clamp(min=0)
        w = torch.where(there, weight.gather(1, at).to(y.dtype), 0.0)
        part = w[..., None] * wide.gather(1, row[..., None].expand(-1, -1, x.shape[2]))
        y = torch.where(there[..., None], y + part, y)
        total, count = total + w, count + there
        only = torch.where(there, row, only)
        if norms is not None:
            longest = torch.where(there, torch.maximum(longest, norms.gather(1, row)), longest)
    if reduce != "sum":
        y = torch.where(total[..., None] == 0, 0.0, y / total[..., None])
        alone = wide.gather(1, only[..., None].expand_as(y)) if x.shape[1] else y
        y = torch.where(count[..., None] == 1, alone, y)
    if reduce == "mlerp":
        y = torch.where(count[..., None] == 1, y, y * (longest / y.norm(dim=2).clamp(min=1e-12))[..., None])
    if base is not None:
        y = base.to(y.dtype) + y
    return y.to(x.dtype)
