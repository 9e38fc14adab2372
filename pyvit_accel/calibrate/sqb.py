"""SQ-b: SmoothQuant with a bias, after MPTQ-ViT. The fold with the ratio of SmoothQuant and the mean for a shift.

    ratio_c = amax |y_c| ** strength / amax |W_:c| ** (1 - strength)          shift_c = mean y_c

Activations then take symmetric codes: their means are zero, and the unevenness of the channels is shared with the
weights. MPTQ-ViT (Tai et al., arXiv:2401.14895) has no public code: this is our re-implementation, its ratio that of
SmoothQuant (Xiao et al., arXiv:2211.10438), and does not claim the paper's numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel.calibrate.fold import SMALLEST_RANGE, Fold
from pyvit_accel.calibrate.observers import Activation


def sqb_fold(y: Activation, weight: Tensor, strength: float = 0.5, shift: bool = True) -> Fold:
    """The fold of y (..., C) before weight (N, C). strength: the part of the unevenness that moves into the weights.

    shift=False is plain SmoothQuant, for an input whose maker cannot be shifted. The range of y is measured after the
    shift; a channel counts as at least a thousandth of the widest.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"sqb_fold: strength={strength} is outside 0..1; 0 leaves the weights even, 1 the activations")
    if weight.dim() != 2 or weight.shape[1] != y.mean.shape[0]:
        raise ValueError(f"sqb_fold: weight {tuple(weight.shape)} does not take the {y.mean.shape[0]} channels of y")
    centre = y.mean if shift else torch.zeros_like(y.mean)
    reach = _not_negligible(torch.maximum(y.max - centre, centre - y.min))
    column = _not_negligible(weight.detach().float().abs().amax(0))
    return Fold(reach**strength / column ** (1 - strength), centre)


def _not_negligible(reach: Tensor) -> Tensor:
    widest = reach.max()
    return torch.ones_like(reach) if widest == 0 else reach.clamp_min(widest * SMALLEST_RANGE)
