"""The nearest tokens of another set, and who merges with whom.

    value[b, i, t], index[b, i, t]   the t-th best of f(a[b, i], b[b, j]) over j, and its j

    cosine   a b / (max(|a|, 1e-12) max(|b|, 1e-12)), largest first
    dot      a b, largest first
    l2       |a - b|^2, smallest first

float32 (float64 where the inputs are); equal values in the order of j; NaN ranks last.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .select_tokens import comparable


def match_tokens(
    a: Tensor, b: Tensor, metric: str, topk: int, first: int, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    """a (B, Na, D), b (B, Nb, D); only j >= first, and not j = exclude[b, i], (B, Na) int32 or None.

    value (B, Na, topk) float32, index (B, Na, topk) int32. Where fewer than topk j are left the others have index -1
    and value -inf (l2: inf).
    """
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    a, b = a.to(dtype), b.to(dtype)
    if metric == "cosine":
        a, b = (x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12) for x in (a, b))
    score = -(a[:, :, None] - b[:, None]).square().sum(-1) if metric == "l2" else a @ b.mT
    j = torch.arange(b.shape[1], device=b.device)
    out = (j < first).expand(score.shape)
    if exclude is not None:
        out = out | (j == exclude[..., None])
    ranked = comparable(score).sort(dim=-1, descending=True, stable=True).indices
    allowed_first = out.gather(-1, ranked).int().sort(dim=-1, stable=True).indices
    index = ranked.gather(-1, allowed_first)[..., :topk]
    out = out.gather(-1, index)
    value = torch.where(out, -torch.inf, comparable(score).gather(-1, index))
    missing = (0, topk - index.shape[-1])  # an empty b
    value, index = pad(value, missing, value=-torch.inf), pad(torch.where(out, -1, index), missing, value=-1)
    return (-value if metric == "l2" else value).contiguous(), index.int().contiguous()


def merge_pairs(value: Tensor, index: Tensor, num_tokens: int, merges: int, num_prefix_tokens: int) -> Tensor:
    """Where each of N tokens goes when the `merges` most similar pairs of a bipartite matching become one.

    value   (B, Na) float32  of the tokens 0, 2, 4, ...: the similarity to their best of the tokens 1, 3, 5, ...
    index   (B, Na) int32    which one, counted among those
    returns (B, N) int32     the new row of each token, of N - merges

    New rows: the prefix, then the even tokens that stay, ascending (without a prefix by descending value), then the odd
    ones. Of equal values the lower token merges first. Even tokens of the prefix do not merge.
    """
    B, Na = value.shape
    N, p = num_tokens, num_prefix_tokens
    device = value.device
    even, odd = (p + 1) // 2, p // 2  # of the prefix
    rank = comparable(value[:, even:]).sort(dim=1, descending=True, stable=True).indices + even
    stay = rank[:, merges:] if p == 0 else rank[:, merges:].sort(dim=1).values
    to_odd = N - merges - (N // 2)  # new row of odd token j is to_odd + j, but for the prefix
    odd_rows = torch.arange(N // 2, device=device) + to_odd
    odd_rows[:odd] = 2 * torch.arange(odd, device=device) + 1
    even_rows = torch.empty(B, Na, dtype=torch.long, device=device)
    even_rows[:, :even] = 2 * torch.arange(even, device=device)
    even_rows.scatter_(1, stay, (p + torch.arange(stay.shape[1], device=device)).expand(B, -1))
    merged = rank[:, :merges]
    even_rows.scatter_(1, merged, odd_rows[index.long().gather(1, merged)])
    rows = torch.empty(B, N, dtype=torch.int32, device=device)
    rows[:, ::2], rows[:, 1::2] = even_rows.int(), odd_rows.int()
    return rows


def mean_heads(x: Tensor, scale: Tensor) -> Tensor:
    """x (B, H, N, D) codes or floats, scale (B, H, N): the mean over H of x scale, (B, N, D) float32."""
    total = torch.zeros_like(x[:, 0], dtype=torch.float32)
    for h in range(x.shape[1]):
        total = total + x[:, h].float() * scale[:, h, :, None]
    return total / x.shape[1]
