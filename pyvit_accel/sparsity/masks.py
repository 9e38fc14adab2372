"""Masks of 2:4 weights: which two of every four inputs are kept.

w, score  (N, K)   a chunk is 4 consecutive inputs of one row; the last one may be shorter
mask      (N, K)   bool, two of every chunk: the largest scores, of equal ones those of lower index

Han et al., arXiv:1506.02626 (magnitude). Sun et al., Wanda, arXiv:2306.11695. Hubara et al., arXiv:2102.08124
(transposable masks; here the best of the 90 patterns instead of a flow).
"""

from __future__ import annotations

from itertools import combinations, product

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK, KEPT = 4, 2


def largest_two(score: Tensor) -> Tensor:
    """The mask of the two largest scores of every chunk. Raises ValueError for NaN, naming row and chunk."""
    _check("largest_two", score)
    if bool(score.isnan().any()):
        row, k = score.isnan().nonzero()[0].tolist()
        raise ValueError(f"largest_two: row {row}, chunk {k // CHUNK} has a score of nan; clean the weight first")
    chunks = F.pad(score, (0, -score.shape[1] % CHUNK), value=-torch.inf).unflatten(1, (-1, CHUNK))
    mine, others = chunks[..., :, None], chunks[..., None, :]
    earlier = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=score.device).tril(-1)
    ahead = (others > mine) | ((others == mine) & earlier)
    return (ahead.sum(-1) < KEPT).flatten(1)[:, : score.shape[1]].contiguous()


def magnitude(w: Tensor) -> Tensor:
    """The mask of the largest magnitudes."""
    return largest_two(w.detach().abs())


def wanda(w: Tensor, norm: Tensor) -> Tensor:
    """The mask of the largest |w[n, k]| norm[k]; norm (K,): root of the mean square of each input (Moments.norm)."""
    _check("wanda", w)
    if norm.shape != w.shape[1:]:
        raise ValueError(f"wanda: norm {tuple(norm.shape)} for a weight of {w.shape[1]} inputs; expected one for each")
    return largest_two(w.detach().abs().double() * norm.double())


def transposable(score: Tensor) -> Tensor:
    """The mask, two of four along both inputs and rows, that keeps the most score: of 4 x 4 tiles the best of the 90
    patterns with two in every row and column, the first of equals; the last rows and inputs as if zeros followed.
    Raises ValueError for scores that are not finite."""
    _check("transposable", score)
    if not bool(score.isfinite().all()):
        row, k = (~score.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"transposable: row {row}, chunk {k // CHUNK} has a score of {score[row, k].item()}")
    N, K = score.shape
    padded = F.pad(score.double(), (0, -K % CHUNK, 0, -N % CHUNK))
    tiles = padded.unflatten(1, (-1, CHUNK)).unflatten(0, (-1, CHUNK)).transpose(1, 2)  # (rows, columns, 4, 4) of tiles
    patterns = PATTERNS.to(score.device)
    best = (tiles.flatten(2) @ patterns.flatten(1).double().T).argmax(-1)
    return patterns[best].transpose(1, 2).reshape(padded.shape)[:N, :K].contiguous()


def kept_energy(w: Tensor, mask: Tensor) -> float:
    """The share of the sum of squares that the mask keeps; 1 for a weight of zeros."""
    energy = w.detach().double().square()
    total = energy.sum()
    return float((energy * mask).sum() / total) if total > 0 else 1.0


def _patterns() -> Tensor:
    """(90, 4, 4) bool: two in every row and column."""
    rows = [[i in kept for i in range(CHUNK)] for kept in combinations(range(CHUNK), KEPT)]
    tiles = torch.tensor(list(product(rows, repeat=CHUNK)))
    return tiles[(tiles.sum(1) == KEPT).all(-1)]


PATTERNS = _patterns()


def _check(what: str, score: Tensor) -> None:
    if score.dim() != 2 or not score.is_floating_point():
        raise ValueError(f"{what}: expected floats (out_features, in_features), got {score.dtype} {tuple(score.shape)}")
