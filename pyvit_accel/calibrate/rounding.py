"""Rounding of weights one input after the other, each error made good by the inputs not rounded yet.

    What = argmin  tr((W - What) G (W - What)^T),   G (K, K) = sum of x x^T over the rows x

Column k of W is rounded; what is left of it, in the direction that G says the other columns can answer for, is added to
those. Large entries of diag G go first. In blocks of columns, so that most of the work is matrix products.
Frantar et al., GPTQ, arXiv:2210.17323.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyvit_accel.formats import affine

DAMPING = 0.05  # of the mean of diag G, added to it: keeps the factor well conditioned and the answers small
BLOCK = 64


def compensated_codes(w: Tensor, scale: Tensor, gram: Tensor, bits: int) -> Tensor:
    """codes (N, K) int8 of w (N, K), float32; scale (N,); What = codes * scale; as compensated."""
    lo, hi = affine.weight_range(bits)
    return compensated(w, gram, lambda column: (column / scale).round().clamp(lo, hi), scale).to(torch.int8)


def compensated(w: Tensor, gram: Tensor, nearest: Callable[[Tensor], Tensor], scale: Tensor | float = 1.0) -> Tensor:
    """What / scale (N, K) of w (N, K), float32. nearest: a column (N,) to the one of What / scale for it alone.

    gram  (K, K)  symmetric, not negative; inputs that are always zero leave their column at the nearest

    Raises ValueError for a gram that does not fit or is not finite.
    """
    K = w.shape[1]
    if gram.shape != (K, K) or not bool(gram.isfinite().all()):
        raise ValueError(f"compensated: gram {tuple(gram.shape)} must be ({K}, {K}) and finite")
    order = gram.diagonal().argsort(descending=True, stable=True)
    w, factor = w.detach().float()[:, order], _factor(gram[order][:, order])
    found = torch.empty_like(w)
    for start in range(0, K, BLOCK):
        stop = min(start + BLOCK, K)
        errors = torch.empty_like(w[:, start:stop])
        for k in range(start, stop):
            found[:, k] = nearest(w[:, k])
            errors[:, k - start] = (w[:, k] - found[:, k] * scale) / factor[k, k]
            w[:, k + 1 : stop] -= errors[:, k - start, None] * factor[k, k + 1 : stop]
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return found[:, order.argsort()]


def _factor(gram: Tensor) -> Tensor:
    """Upper triangular U (K, K), float32, with U^T U the inverse of the damped gram."""
    gram = gram.double()
    mean = gram.diagonal().mean()
    added = DAMPING * mean if mean > 0 else torch.ones_like(mean)  # no input is ever other than zero
    gram = gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * added
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return torch.linalg.cholesky(inverse, upper=True).float()
