"""SparseGPT: 2:4 masks chosen column by column, each weight that goes made good by the inputs not decided yet.

    What = argmin  tr((W - What) G (W - What)^T),   G (K, K): mean of x x^T over the inputs x

With U upper triangular, U^T U the inverse of the damped G: at the first column of a chunk the two of its columns with
the largest (w / U_kk)^2 are kept, w as compensated so far; then for every column k that goes, w_k / U_kk U_k,k+1.. is
taken off the columns behind it. In blocks of columns, so that most of the work is matrix products.
Frantar and Alistarh, SparseGPT, arXiv:2301.00774. There a column answers only for those before it; refit lets all that
are kept answer for all that went, by conjugate gradients as in Meng et al., ALPS, arXiv:2406.07831.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel.sparsity.masks import CHUNK, largest_two

DAMPING = 0.01  # of the mean of diag G, added to it
STEPS = 32  # of refit
BLOCK = 128  # columns, a multiple of CHUNK


def sparsegpt(w: Tensor, gram: Tensor, mask: Tensor | None = None, damping: float = DAMPING) -> Tensor:
    """What (N, K) float32 of w (N, K): at most two of every four not zero, their values changed.

    gram (K, K)  symmetric, not negative; inputs that are always zero lose their weights
    mask (N, K)  keep these, and choose values only

    Raises ValueError for a gram or mask that does not fit or a gram or weight that is not finite.
    """
    N, K = w.shape
    if gram.shape != (K, K) or not bool(gram.isfinite().all()):
        raise ValueError(f"sparsegpt: gram {tuple(gram.shape)} must be ({K}, {K}) and finite")
    if mask is not None and mask.shape != w.shape:
        raise ValueError(f"sparsegpt: mask {tuple(mask.shape)} for a weight ({N}, {K})")
    if not bool(w.isfinite().all()):
        row, k = (~w.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"sparsegpt: row {row}, chunk {k // CHUNK} holds {w[row, k].item()}; weights must be finite")
    w = w.detach().float().clone()
    factor = _factor(gram, damping)
    w[:, gram.diagonal() <= 0] = 0
    kept = torch.zeros_like(w, dtype=torch.bool) if mask is None else mask.bool()
    found = torch.empty_like(w)
    for start in range(0, K, BLOCK):
        stop = min(start + BLOCK, K)
        errors = torch.empty_like(w[:, start:stop])
        for k in range(start, stop):
            if mask is None and k % CHUNK == 0:
                group = slice(k, min(k + CHUNK, K))
                kept[:, group] = largest_two((w[:, group] / factor.diagonal()[group]).square())
            found[:, k] = w[:, k] * kept[:, k]
            errors[:, k - start] = (w[:, k] - found[:, k]) / factor[k, k]
            w[:, k + 1 : stop] -= errors[:, k - start, None] * factor[k, k + 1 : stop]
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return found


def refit(
    w: Tensor, mask: Tensor, gram: Tensor, start: Tensor | None = None, steps: int = STEPS, damping: float = DAMPING
) -> Tensor:
    """What (N, K) float32, zero outside of mask, with the least tr((W - What) G (W - What)^T) of the damped G: so many
    steps of preconditioned conjugate gradients from `start` (w when None) * mask, for all rows at once. No step errs
    more than the one before. Raises ValueError for shapes that differ."""
    K = w.shape[1]
    if not (gram.shape == (K, K) and mask.shape == w.shape == (w if start is None else start).shape):
        raise ValueError(f"refit: w {tuple(w.shape)}, mask {tuple(mask.shape)}, gram {tuple(gram.shape)} do not fit")
    w, gram = w.detach().float(), gram.float()
    diagonal = gram.diagonal()
    added = damping * diagonal.mean() if bool(diagonal.any()) else 1.0
    gram = gram + added * torch.eye(K, device=gram.device)
    tiny = torch.finfo(torch.float32).tiny
    scale = 1 / gram.diagonal().clamp(min=tiny)
    found = (w if start is None else start.detach().float()) * mask
    left = ((w - found) @ gram) * mask
    step = left * scale
    size = (left * step).sum(1, keepdim=True)
    for _ in range(steps):
        change = (step @ gram) * mask
        curvature = (step * change).sum(1, keepdim=True)
        length = torch.where(curvature > tiny, size / curvature, 0.0)
        found = found + length * step
        left = left - length * change
        ahead = left * scale
        size, before = (left * ahead).sum(1, keepdim=True), size
        step = ahead + size / before.clamp(min=tiny) * step
    return found


def _factor(gram: Tensor, damping: float) -> Tensor:
    """Upper triangular U (K, K) float32 with U^T U the inverse of the damped gram; damped more where rounding has left
    it with negative eigenvalues."""
    gram = gram.double().clone()
    dead = gram.diagonal() <= 0
    gram[dead], gram[:, dead] = 0, 0
    mean = gram.diagonal().mean()
    gram.diagonal()[dead] = 1.0  # else the inverse of what is never seen would be unbounded
    gram.diagonal().add_(damping * mean)
    lower, failed = torch.linalg.cholesky_ex(gram)
    while bool(failed):
        damping = max(10 * damping, 1e-6)
        gram.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(gram)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()
