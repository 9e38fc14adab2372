"""Two branches of the same support, trained side by side, added up to one sparse weight.

    y = bn1(x (w * mask)^T) + bn2(x (r * mask)^T)  =  x weight^T + bias

weight = (scale1 w + scale2 r) * mask is as sparse as the mask: the sum of 2:4 branches of one mask is 2:4. That is
what SpRe's merge comes to for a linear layer, whose one spatial position leaves nothing of its choice of positions: its
gains for convolutions are not to be expected here. Zhang et al., SpRe, TPAMI 2025.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def merge_branches(
    w: Tensor, r: Tensor, mask: Tensor, bn1: nn.Module | None = None, bn2: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """(weight, bias) of the sum; w, r, mask (N, ...). bn1, bn2: batch norms of the N outputs in eval mode, or None.

    Sums are taken in float64 and rounded once to w's dtype. Raises ValueError for shapes that differ and for a sum that
    is not finite.
    """
    if not w.shape == r.shape == mask.shape:
        raise ValueError(f"merge_branches: w {tuple(w.shape)}, r {tuple(r.shape)}, mask {tuple(mask.shape)} differ")
    (scale1, shift1), (scale2, shift2) = (_affine(bn, w) for bn in (bn1, bn2))
    column = (-1, *[1] * (w.dim() - 1))
    weight = (w.double() * scale1.view(column) + r.double() * scale2.view(column)) * mask
    if not bool(weight.isfinite().all()):
        row = int((~weight.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"merge_branches: row {row} of the sum is not finite; clean the weights first")
    return weight.to(w.dtype), (shift1 + shift2).to(w.dtype)


def _affine(bn: nn.Module | None, w: Tensor) -> tuple[Tensor, Tensor]:
    """scale and shift (N,) float64 of a batch norm at inference."""
    ones = torch.ones(len(w), dtype=torch.float64, device=w.device)
    if bn is None:
        return ones, 0 * ones
    if bn.running_mean is None or bn.running_mean.shape != ones.shape:
        raise ValueError(f"merge_branches: {bn} has no statistics of the {len(w)} outputs")
    scale = (bn.running_var.double() + bn.eps).rsqrt() * (ones if bn.weight is None else bn.weight.double())
    return scale, (0 * ones if bn.bias is None else bn.bias.double()) - bn.running_mean.double() * scale
