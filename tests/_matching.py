"""What a matching of tokens must be: within a bound of float64, and exact for whole numbers."""

from __future__ import annotations

import torch
from _problems import U32
from torch.nn.functional import pad

METRICS = ("cosine", "dot", "l2")


def scores_and_error(a, b, metric):
    """(B, Na, Nb) in float64, larger is nearer, and what float32 may add, in any order of summation.

    A sum of D terms: D U of the sum of their sizes. A row of length one: its norm D / 2 + 1, its inverse and the
    product with it 1 each, so that the product of two such rows has 2 D + 6 of the sum of the sizes of its terms. A
    squared difference: 3, and all are positive.
    """
    a, b, D = a.double(), b.double(), a.shape[-1]
    if metric == "l2":
        distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
        return -distance, 1.01 * U32 * (D + 3) * distance
    if metric == "cosine":
        a, b = (x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12) for x in (a, b))
    return a @ b.mT, 1.01 * U32 * (D if metric == "dot" else 2 * D + 6) * (a.abs() @ b.abs().mT)


def assert_nearest(value, index, score, error, metric, first=0, exclude=None):
    """Every value is that of its index; the order is right, and that of the scores wherever it is not in doubt."""
    topk, place = value.shape[-1], torch.arange(score.shape[-1])
    out = (place < first).expand(score.shape)
    if exclude is not None:
        out = out | (place == exclude[..., None])
    score, error = score.masked_fill(out, -torch.inf), error.masked_fill(out, 0)
    ranked, order = score.sort(dim=-1, descending=True, stable=True)
    assert value.dtype == torch.float32 and index.dtype == torch.int32
    there = index >= 0
    assert torch.equal(there, ~ranked[..., :topk].isinf())
    assert (value[~there] == (torch.inf if metric == "l2" else -torch.inf)).all()
    at = index.clamp(min=0).long()
    value, found = (-value if metric == "l2" else value).double(), score.gather(-1, at)
    assert ((value - found).abs() <= error.gather(-1, at))[there].all()
    assert (value[..., 1:] <= value[..., :-1]).all()

    lowest, highest = ranked - error.gather(-1, order), ranked + error.gather(-1, order)
    before = pad(lowest.cummin(-1).values[..., :-1], (1, 0), value=torch.inf)
    after = pad(highest.flip(-1).cummax(-1).values.flip(-1)[..., 1:], (0, 1), value=-torch.inf)
    sure = there & ((before > highest) & (lowest > after))[..., :topk]
    assert torch.equal(index[sure], order[..., :topk][sure].int())
    assert sure.sum() >= 0.9 * there.sum()


def even_and_odd(x):
    return x[:, ::2], x[:, 1::2]


def whole_numbers(B, N, D):
    """float32 computes their products, squares and, four entries of -1 or 1, lengths exactly; many are equal."""
    x = torch.zeros(B, N, D)
    return x.scatter_(-1, torch.rand(B, N, D).argsort(-1)[..., :4], torch.randint(0, 2, (B, N, 4)) * 2.0 - 1)
