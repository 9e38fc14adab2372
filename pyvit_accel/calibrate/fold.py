"""Folds: divide an activation by a ratio per channel, shift it, and undo both in the weights around it.

y' = (y - shift) / ratio                               y (..., C); ratio > 0 and shift are (C,) float32
norm that makes y:   gamma' = gamma / ratio            beta' = (beta - shift) / ratio
linear that takes y: W' = W * ratio                    bias' = bias + W shift

Exact in real arithmetic: the float network computes what it did. What changes is that one scale now serves all
channels of y', and that a symmetric range is centred, so codes need no zero point.

strength 1 gives every channel the same range (RepQ-ViT, Li et al., arXiv:2212.08254). But then every channel clips as
soon as an unseen image goes further, and the weights take over all the unevenness. The square root halves it on a log
scale; relative squared error of the next layer's output on images that were not calibrated on, DeiT-Ti, 8 bits, x 1e5,
geometric mean of 12 blocks: qkv 28 (strength 0), 14 (0.5), 16 (1); fc1 53, 19, 21; proj 49, 27, 57.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyvit_accel.calibrate.observers import Activation

# A channel's range counts as at least this part of the widest one: a dead channel has range zero (DeiT-Ti has some).
SMALLEST_RANGE = 1e-3


@dataclass(frozen=True)
class Fold:
    """y' = (y - shift) / ratio."""

    ratio: Tensor
    shift: Tensor

    def __post_init__(self):
        if self.ratio.shape != self.shift.shape or self.ratio.dim() != 1:
            shapes = f"ratio {tuple(self.ratio.shape)} and shift {tuple(self.shift.shape)}"
            raise ValueError(f"Fold: got {shapes}; both must be (C,)")
        if not bool((self.ratio > 0).all() & self.ratio.isfinite().all() & self.shift.isfinite().all()):
            raise ValueError("Fold: every ratio must be positive and every entry finite")

    @classmethod
    def from_affine(cls, scale: Tensor, zero_point: Tensor, target_scale: float, target_zero_point: float) -> Fold:
        """The fold that turns per-channel affine codes into the same codes under one scale and zero point."""
        return cls(scale / target_scale, scale * (target_zero_point - zero_point))

    def activation(self, y: Activation) -> Activation:
        """What `observe` would have seen of y'."""
        move = self._move
        return Activation(move(y.min), move(y.max), move(y.mean), move(y.sample), y.count)

    def _move(self, y: Tensor) -> Tensor:
        return (y - self.shift) / self.ratio


def range_fold(y: Activation, strength: float = 0.5, centre: bool = True) -> Fold:
    """ratio = range ** strength, the range being half the width of a channel; shift = its middle.

    centre=False keeps shift 0 (what sits between y and the weights may be linear but not affine, as P V in attention)
    and takes the largest magnitude for the range.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"range_fold: strength={strength} is outside 0..1; 0 leaves the channels, 1 makes them equal")
    width = (y.max - y.min) / 2 if centre else y.amax
    shift = (y.max + y.min) / 2 if centre else torch.zeros_like(width)
    return Fold(_positive(width) ** strength, shift)


def outlier_fold(y: Activation, strength: float = 0.5) -> Fold:
    """ratio = (amax / median amax) ** strength where a channel exceeds the median, else 1; no shift.

    For outputs whose range matters only above: post-GELU, where small channels share the lower bound -0.17.
    """
    if not 0 <= strength <= 1:
        raise ValueError(
            f"outlier_fold: strength={strength} is outside 0..1; 0 leaves the channels, 1 caps at the median"
        )
    amax = _positive(y.amax)
    ratio = (amax / amax.median()).clamp_min(1) ** strength
    return Fold(ratio, torch.zeros_like(ratio))


def fold_norm(weight: Tensor | None, bias: Tensor | None, fold: Fold) -> tuple[Tensor, Tensor]:
    """Weight and bias of the norm that makes y', from those of the norm that makes y (None: 1 and 0)."""
    weight = torch.ones_like(fold.ratio) if weight is None else weight.detach().float()
    bias = torch.zeros_like(fold.ratio) if bias is None else bias.detach().float()
    _check("fold_norm", "the norm has", weight.shape[0], fold)
    return weight / fold.ratio, (bias - fold.shift) / fold.ratio


def fold_linear(weight: Tensor, bias: Tensor | None, fold: Fold) -> tuple[Tensor, Tensor]:
    """Weight (N, C) and bias of the linear that takes y', from those of the linear that takes y."""
    _check("fold_linear", "the linear takes", weight.shape[1], fold)
    weight = weight.detach().float()
    shifted = weight @ fold.shift
    return weight * fold.ratio, shifted if bias is None else bias.detach().float() + shifted


def bias_correction(weight: Tensor, weight_hat: Tensor, mean: Tensor) -> Tensor:
    """What to add to the bias so that quantizing the weight leaves the mean output where it was: (W - W_hat) mean.

    mean (C,) is the mean of the input the product sees: folded and quantized, when it is.
    """
    if weight.shape != weight_hat.shape or weight.shape[1:] != mean.shape:
        shapes = f"weight {tuple(weight.shape)}, weight_hat {tuple(weight_hat.shape)}, mean {tuple(mean.shape)}"
        raise ValueError(f"bias_correction: got {shapes}; expected (N, C), (N, C), (C,)")
    return (weight.detach().float() - weight_hat.float()) @ mean.float()


def _positive(width: Tensor) -> Tensor:
    widest = width.max()
    return torch.ones_like(width) if widest == 0 else width.clamp_min(widest * SMALLEST_RANGE)


def _check(function: str, what: str, channels: int, fold: Fold) -> None:
    if channels != fold.ratio.shape[0]:
        raise ValueError(f"{function}: {what} {channels} channels but the fold has {fold.ratio.shape[0]}")
