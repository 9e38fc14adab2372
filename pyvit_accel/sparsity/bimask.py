"""Bi-Mask: a forward mask, and beside it a backward mask that is 2:4 along the rows, in an order of rows to be found.

    y = x (w * forward)^T + bias        dx = dy (w * backward)        dw = dy^T x, dense

order (N,)        the rows, four by four, along which backward keeps two of four; the published search draws orders at
                  random and hardly gains: here they are found by swaps (permute.search)
backward (N, K)   a part of forward: what the backward pass of one step has lost is the gradient of the others

Zhang et al., Bi-directional Masks for Efficient N:M Sparse Training, arXiv:2302.06058.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyvit_accel.sparsity.masks import largest_two
from pyvit_accel.sparsity.permute import search


@dataclass(frozen=True)
class BiMask:
    """forward, backward (N, K) bool; order (N,); kept: the share of the forward magnitudes that backward keeps."""

    forward: Tensor
    backward: Tensor
    order: Tensor
    kept: float


@torch.no_grad()
def bimask(w: Tensor, order: Tensor | None = None, rounds: int = 100) -> BiMask:
    """Both masks of w (N, K). order: an earlier one, kept; the search is worth its time every hundred steps or so."""
    score = w.detach().abs()
    forward = largest_two(score)
    score = score * forward
    if order is None:
        order = search(score.T, rounds).order
    elif order.shape != (len(w),) or not torch.equal(order.sort().values, torch.arange(len(w), device=order.device)):
        raise ValueError(f"bimask: order {tuple(order.shape)} is no permutation of the {len(w)} rows")
    chosen = largest_two(score[order].T).T
    backward = torch.empty_like(forward)
    backward[order] = chosen
    backward &= forward
    total, kept = (float(part.sum(dtype=torch.float64)) for part in (score, score * backward))
    return BiMask(forward, backward, order, kept / total if total else 1.0)
