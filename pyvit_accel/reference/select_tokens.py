"""Which tokens stay: by rank of their scores, by a mask, or in groups. Index arrays are int32 and 0-based.

Larger scores rank first and equal ones by their index; -0.0 equals 0.0, NaN ranks as -inf. The first
num_prefix_tokens always stay, come first and take no part.
"""

from __future__ import annotations

import torch
from torch import Tensor


def select_tokens(scores: Tensor, keep: int, num_prefix_tokens: int, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """scores (B, N); index (B, p + keep), dropped (B, N - p - keep) ascending, inverse (B, N), -1 where dropped."""
    B, N = scores.shape
    p = num_prefix_tokens
    ranked = comparable(scores[:, p:]).sort(dim=1, descending=True, stable=True).indices + p
    kept = ranked[:, :keep]
    if order == "index":
        kept = kept.sort(dim=1).values
    prefix = torch.arange(p, device=scores.device).expand(B, p)
    index = torch.cat([prefix, kept], dim=1)
    places = torch.arange(p + keep, device=scores.device).expand(B, -1)
    inverse = index.new_full((B, N), -1).scatter_(1, index, places)
    return _ints(index, ranked[:, keep:].sort(dim=1).values, inverse)


def _ints(*results: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.int().contiguous() for t in results)


def comparable(scores: Tensor) -> Tensor:
    """float32 or float64, NaN as -inf and -0.0 as 0.0."""
    x = scores if scores.dtype == torch.float64 else scores.float()
    return torch.where(x.isnan(), -torch.inf, x) + 0.0


def split_tokens(mask: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mask (B, N) bool, True stays.

    index       (B, N)      those that stay, ascending, then the others, ascending
    count       (B,)        how many stay
    cu_seqlens  (B + 1,)    0 and the running sum of count
    rows        (B N,)      b N + i of all that stay, image after image, then -1
    """
    B, N = mask.shape
    stays = mask.clone()
    stays[:, :num_prefix_tokens] = True
    index = (~stays).sort(dim=1, stable=True).indices
    count = stays.sum(dim=1)
    cu_seqlens = torch.cat([count.new_zeros(1), count.cumsum(0)])
    flat = stays.flatten()
    rows = (~flat).sort(stable=True).indices
    rows = torch.where(torch.arange(B * N, device=mask.device) < cu_seqlens[-1], rows, -1)
    return _ints(index, count, cu_seqlens, rows)


def group_tokens(assign: Tensor, groups: int, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """assign (B, N): the group 0 .. groups - 1 of a token, or -1; weight (B, N) float32, None: ones.

    ptr     (B, groups + 1)  group g has the entries ptr[g] .. ptr[g + 1]
    col     (B, N)           its tokens, ascending; -1 beyond the last group
    weight  (B, N) float32   of the entries; 0 beyond
    total   (B, groups) float32  the sum of a group's weights, in that order
    """
    B, N = assign.shape
    weight = torch.ones_like(assign, dtype=torch.float32) if weight is None else weight.float()
    key = torch.where(assign < 0, groups, assign.long())
    order = key.sort(dim=1, stable=True)
    counts = torch.zeros(B, groups + 1, dtype=torch.long, device=assign.device)
    counts.scatter_add_(1, key, torch.ones_like(key))
    ptr = torch.cat([counts.new_zeros(B, 1), counts[:, :groups].cumsum(1)], dim=1)
    inside = order.values < groups
    col = torch.where(inside, order.indices, -1)
    entry = torch.where(inside, weight.gather(1, order.indices), 0.0)
    total = torch.zeros(B, groups, dtype=torch.float32, device=assign.device)
    sizes = counts[:, :groups]
    for t in range(int(sizes.max()) if sizes.numel() else 0):  # one entry of every group at a time, in order
        at = (ptr[:, :groups] + t).clamp(max=max(N - 1, 0))
        total = torch.where(t < sizes, total + entry.gather(1, at), total)
    return *_ints(ptr, col), entry.contiguous(), total
