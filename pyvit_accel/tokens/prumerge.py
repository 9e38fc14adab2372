"""PruMerge: of features outside a block keep those that the class token attends to unusually much, and add the others.

    kept       above Q3 + 1.5 (Q3 - Q1) of the attention, by rank; or a fixed count
    PruMerge+  and every stride-th of the rest, ascending: stride = (N // count) // 3
    row        x_i + sum of a_j x_j over the 32 tokens j nearest to i by the cosine of their keys, kept ones among them
    last row   sum of a_j x_j over all that are not kept

How many are kept differs between images and stays on the device: rows beyond are padding, or packed. The sums are not
normalised, as in the published code; normalize=True divides each by its weights, as in the paper's text.

Shang et al., LLaVA-PruMerge, arXiv:2403.15388.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyvit_accel import ops
from pyvit_accel.reference.select_tokens import comparable

SCOPES = ("image", "batch")


@dataclass(frozen=True)
class Merged:
    """tokens (B, M, C), of which the first count[b] are real, (B,) int32, and the others zero; kept (B, M) int32: which
    feature a row is of, -1 for the last real one, which is of all that are not kept, and for padding."""

    tokens: Tensor
    count: Tensor
    kept: Tensor

    @property
    def mask(self) -> Tensor:
        """(B, M) bool: the real rows."""
        return torch.arange(self.tokens.shape[1], device=self.count.device) < self.count[:, None]

    def packed(self) -> tuple[Tensor, Tensor]:
        """tokens (B M, C), the real ones of all images after each other, then zeros; cu_seqlens (B + 1,) int32."""
        *_, cu_seqlens, rows = ops.split_tokens(self.mask)
        return ops.mix_tokens(self.tokens.flatten(0, 1)[None], rows[None])[0], cu_seqlens


def class_attention(q: Tensor, k: Tensor, scale: float | None = None, num_prefix_tokens: int = 1) -> Tensor:
    """(B, N - p) float32: what the class token attends to as one head, those of the prefix left out.

    q (B, D) of the class token, k (B, N, D) of all, of all channels at once; scale: 1 / sqrt(D) unless given.
    """
    if q.ndim != 2 or k.ndim != 3 or q.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"class_attention: q {tuple(q.shape)} must be (B, D) of k (B, N, D) = {tuple(k.shape)}")
    scale = k.shape[2] ** -0.5 if scale is None else scale
    scores = (k.float() @ q.float()[:, :, None])[..., 0] * scale
    return scores.softmax(1)[:, num_prefix_tokens:]


def most_outliers(N: int) -> int:
    """How many of N numbers can be above their third quartile."""
    return N - 1 - 3 * (N - 1) // 4


def count_outliers(attention: Tensor, scope: str = "image") -> Tensor:
    """(B,) int32 of attention (B, N): how many are above Q3 + 1.5 (Q3 - Q1), quartiles interpolated linearly.

    scope: "image"; "batch", as published: quartiles of all images at once, and for each their mean count, rounded down.
    """
    if scope not in SCOPES:
        raise ValueError(f"count_outliers: scope={scope!r} is not one of {', '.join(SCOPES)}")
    a = comparable(attention)
    if scope == "batch":
        a = a.reshape(1, -1)
    ordered = a.sort(1).values
    q1, q3 = _quantile(ordered, 1), _quantile(ordered, 3)
    count = (a > q3 + 1.5 * (q3 - q1)).sum(1)
    B = attention.shape[0]
    return (count // B).expand(B).int() if scope == "batch" else count.int()


def _quantile(ordered: Tensor, fourths: int) -> Tensor:
    """(B, 1): the quartile of every ascending row."""
    place = fourths * (ordered.shape[1] - 1)
    low, part = place // 4, place % 4 / 4
    below, above = ordered[:, low, None], ordered[:, min(low + 1, ordered.shape[1] - 1), None]
    return below + part * (above - below)


def prumerge(
    features: Tensor,
    keys: Tensor,
    attention: Tensor,
    *,
    keep: int | None = None,
    plus: bool = False,
    scope: str = "image",
    capacity: int | None = None,
    neighbours: int = 32,
    normalize: bool = False,
) -> Merged:
    """features (B, N, C), keys (B, N, D) of the same tokens, attention (B, N) of the class token to them.

    keep      how many are kept of each image; None: as many as are outliers
    plus      PruMerge+
    scope     of the outliers' quartiles: "image" | "batch"
    capacity  the most rows that are made of kept tokens, the first ones; None: as many as there can be

    Raises ValueError for shapes and counts that do not fit. No count leaves the device.
    """
    B, N, _ = features.shape
    if keys.ndim != 3 or not features.shape[:2] == keys.shape[:2] == attention.shape:
        shapes = f"features {tuple(features.shape)}, keys {tuple(keys.shape)}, attention {tuple(attention.shape)}"
        raise ValueError(f"prumerge: {shapes}; expected (B, N, C), (B, N, D) and (B, N)")
    most = N // 3 if plus else N
    if keep is not None and not 1 <= keep <= most:
        raise ValueError(f"prumerge: keep={keep} of N={N} tokens; use 1..{most}" + (" with plus" if plus else ""))
    if capacity is not None and capacity < 1:
        raise ValueError(f"prumerge: capacity={capacity}; use 1 or more")
    if neighbours < 1:
        raise ValueError(f"prumerge: neighbours={neighbours}; use 1 or more")
    if keep is None:
        count, most = count_outliers(attention, scope), _most(B, N, scope)
    else:
        count, most = torch.full((B,), keep, dtype=torch.int32, device=features.device), keep
    score = attention.float()
    if plus:
        score, count = _with_grid(score, count)
        most = N if keep is None else min(N, keep + len(range(0, N - 1, N // keep // 3)))
    most = most if capacity is None else min(most, capacity)
    index, _, inverse = ops.select_tokens(score, most)
    return _merge(features, keys, attention, index, inverse, count.clamp(max=most), neighbours, normalize)


def _most(B: int, N: int, scope: str) -> int:
    return most_outliers(N) if scope == "image" else most_outliers(B * N) // B


def _with_grid(attention: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (B, N) whose order is the count best, then the grid's, ascending, then the others; new count (B,)."""
    N = attention.shape[1]
    *_, rank = ops.select_tokens(attention, N)
    i, count = torch.arange(N, device=attention.device), count[:, None]
    stride = (N // count.clamp(min=1) // 3).clamp(min=1)
    grid = (i % stride == 0) & (i < N - 1) & (count > 0)
    best = rank < count
    place = torch.where(best, rank, torch.where(grid, N + i, 2 * N + i))
    return -place.float(), (best | grid).sum(1).int()


def _merge(
    x: Tensor, keys: Tensor, a: Tensor, index: Tensor, inverse: Tensor, count: Tensor, neighbours: int, normalize: bool
) -> Merged:
    """index (B, K): tokens in the order in which they are kept, inverse (B, N) their places; the first count are."""
    (B, N), K = inverse.shape, index.shape[1]
    a, device = a.float(), x.device
    row = torch.arange(K + 1, device=device)
    real = row[:K] < count[:, None]
    nearest = ops.match_tokens(ops.mix_tokens(keys, index), keys, topk=min(neighbours, N), exclude=index)[1]
    col = torch.cat([index[..., None], nearest], 2)
    weight = a.gather(1, nearest.clamp(min=0).long().flatten(1)).view_as(nearest)
    weight = torch.cat([torch.ones_like(weight[..., :1]), weight], 2)
    col = torch.where(real[..., None], col, -1)
    dropped = (inverse < 0) | (inverse >= count[:, None])
    everything = torch.arange(N, device=device).expand(B, N)
    col = torch.cat([col.flatten(1), torch.where(dropped, everything, -1)], 1).int()
    width = nearest.shape[2] + 1
    ptr = torch.where(row == K, K * width, row * width)
    ptr = torch.cat([ptr, ptr.new_full((1,), col.shape[1])]).int().expand(B, -1).contiguous()
    reduce = "mean" if normalize else "sum"
    y = ops.mix_tokens(x, col, ptr, torch.cat([weight.flatten(1), a], 1), reduce=reduce)
    # The row of the dropped tokens comes last: behind the real ones, in front of the padding.
    last = row == count[:, None]
    place = torch.where(last, K, torch.where(row < count[:, None], row, -1)).int()
    kept = torch.where(real, index, -1)
    return Merged(ops.mix_tokens(y, place), (count + 1).int(), torch.cat([kept, kept.new_full((B, 1), -1)], 1))
