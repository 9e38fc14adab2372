"""Soft assignment of the tokens of a grid to the centres near them, and the centres' new places.

x        (B, h, w, C)    float
centres  (B, gh, gw, C)  float
returns  weight (B, h w, window^2) float32, index (B, h w, window^2) int32, centres (B, gh, gw, C) float32

The home of token (y, x) is the centre (y gh // h, x gw // w); its candidates are the centres at most window // 2 away
from home in y and in x, row after row. Logits, softmax over the candidates, then every centre is the mean of all tokens
that have it as a candidate, by their weights; `iterations` times. weight is of the last time, before its centres moved.

    metric "l2"   logit = -tau |x - c|^2
           "dot"  logit = tau x c
    border "mask" candidates outside the grid do not exist: weight 0
           "zero" they are zero vectors: they take their share of the softmax
    In both cases their index is -1.

"l2", "mask": Liang et al., Expediting Large-Scale Vision Transformer, arXiv:2210.01035. "dot", "zero": Huang et al.,
Vision Transformer with Super Token Sampling, arXiv:2211.11167.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-12  # of a centre's total weight


def local_assign(
    x: Tensor, centres: Tensor, window: int, metric: str, tau: float, iterations: int, border: str
) -> tuple[Tensor, Tensor, Tensor]:
    B, h, w, C = x.shape
    gh, gw = centres.shape[1:3]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    tokens, centres = x.reshape(B, h * w, C).to(dtype), centres.reshape(B, gh * gw, C).to(dtype)
    index = candidates(h, w, gh, gw, window, x.device)
    outside = index < 0
    at = index.clamp(min=0)
    for _ in range(iterations):
        near = centres[:, at].masked_fill(outside[..., None], 0.0)  # (B, h w, window^2, C)
        if metric == "l2":
            logit = -tau * (tokens[:, :, None] - near).square().sum(-1)
        else:
            logit = tau * (tokens[:, :, None] * near).sum(-1)
        if border == "mask":
            logit = logit.masked_fill(outside, -torch.inf)
        weight = logit.softmax(-1)
        share = torch.where(outside, 0.0, weight).flatten(1)
        rows = at.flatten().expand(B, -1)
        mass = share.new_zeros(B, gh * gw).scatter_add_(1, rows, share)
        parts = share.view(B, h * w, window * window, 1) * tokens[:, :, None]
        total = centres.new_zeros(B, gh * gw, C)
        total.scatter_add_(1, rows[..., None].expand(-1, -1, C), parts.flatten(1, 2))
        centres = total / mass.clamp(min=FLOOR)[..., None]
    return weight, index.int().expand(B, -1, -1).contiguous(), centres.view(B, gh, gw, C)


def candidates(h: int, w: int, gh: int, gw: int, window: int, device: torch.device) -> Tensor:
    """(h w, window^2): the centres a token may belong to; -1 outside the grid."""
    near = torch.arange(window, device=device) - window // 2
    rows = (torch.arange(h, device=device) * gh // h)[:, None] + near
    columns = (torch.arange(w, device=device) * gw // w)[:, None] + near
    inside = ((rows >= 0) & (rows < gh))[:, None, :, None] & ((columns >= 0) & (columns < gw))[None, :, None, :]
    index = rows[:, None, :, None] * gw + columns[None, :, None, :]
    return torch.where(inside, index, -1).reshape(h * w, window * window)
