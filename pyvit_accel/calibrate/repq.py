"""RepQ-ViT: one scale per channel while calibrating, one scale per tensor at run time; log-sqrt2 softmax outputs.

The fold makes every channel's codes the codes of one scale s~ and zero point z~. Any s~ gives the same codes of
activations and weights (quantization.md 1.3), and z~ matters only through the error of the weights, which bias
correction removes. So the default is s~ = 1 and z~ = 0 in signed codes: no zero point in the matmul. The published
convention, the means of both, is there for comparison with published models, whose z~ is not an integer: `refold`
turns those into ours.

Zero points here are the published ones less 2^(b-1), for codes are signed.
Li et al., RepQ-ViT, arXiv:2212.08254.
clipped_scales is our re-implementation of the idea of LRP-QViT (Ranjan and Savakis, arXiv:2401.11243), which has no
public code; it does not claim that paper's numbers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyvit_accel.calibrate.fold import SMALLEST_RANGE, Fold, bias_correction, fold_linear, fold_norm
from pyvit_accel.calibrate.observers import Activation
from pyvit_accel.calibrate.plan import LinearPlan, linear_output, quantized_input
from pyvit_accel.calibrate.scales import REPQ_PERCENTILES, interpolated_percentile, percentile_search
from pyvit_accel.formats import affine

CLIP_PERCENTILES = (100.0, 99.0, 98.0, 97.0, 95.0, 90.0)


def channel_scales(y: Activation, bits: int) -> tuple[Tensor, Tensor]:
    """(scale (C,), zero_point (C,)): one percentile search per channel. A dead channel's scale stays in proportion."""
    return percentile_search(y, bits, groups=y.amax.shape[0], smallest=SMALLEST_RANGE)


def repq_fold(scale: Tensor, zero_point: Tensor, convention: str = "signed") -> tuple[Fold, float, float]:
    """(fold, s~, z~) for per-channel scale and zero_point (C,).

    convention  "signed": s~ = 1, z~ = 0; "published": the means of both, z~ not rounded; "rounded": the same with z~
                rounded, as AdaLog does it
    """
    if convention == "signed":
        target, offset = 1.0, 0.0
    elif convention in ("published", "rounded"):
        target, offset = float(scale.mean()), float(zero_point.mean())
        offset = round(offset) if convention == "rounded" else offset
    else:
        raise ValueError(f"repq_fold: unknown convention {convention!r}; use 'signed', 'published' or 'rounded'")
    return Fold.from_affine(scale, zero_point, target, offset), target, float(offset)


def refold(scale: float, zero_point: float, channels: int) -> tuple[Fold, int]:
    """(fold, integer zero point) for a model whose z~ is not an integer: the same codes, and 2^b levels, not 2^b + 1.

    The fold shifts all channels alike and keeps the scale; apply it with fold_norm and fold_linear.
    """
    rounded = round(zero_point)
    shift = torch.full((channels,), (rounded - zero_point) * scale)
    return Fold(torch.ones(channels), shift), rounded


def repq_plan(
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    y: Activation,
    w_bits: int = 4,
    x_bits: int = 4,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, LinearPlan]:
    """(norm weight, norm bias, plan of the linear), folded to the signed convention; codes and corrected bias decided.

    scales: per-channel (scale, zero_point) to use instead of channel_scales(y). Weights are symmetric per output
    feature where the published ones are asymmetric: a zero point of theirs would need a sum over each token's codes.
    """
    scale, zero_point = channel_scales(y, x_bits) if scales is None else scales
    fold, target, _ = repq_fold(scale, zero_point)
    folded_weight, folded_bias = fold_linear(weight, bias, fold)
    seen = fold.activation(y)
    x_scale = folded_weight.new_full((1,), target)
    plan = LinearPlan(folded_weight, folded_bias, w_bits, x_bits, x_scale=x_scale, seen=seen).quantized()
    mean = quantized_input(plan, seen.sample).mean(0)
    plan = replace(plan, bias=folded_bias + bias_correction(folded_weight, plan.weight_hat(), mean))
    return *fold_norm(norm_weight, norm_bias, fold), plan


def log_sqrt2_scale(p: Tensor, bits: int, percentiles: tuple[float, ...] = REPQ_PERCENTILES) -> float:
    """delta of the log-sqrt2 quantizer of softmax outputs p (any shape): the percentile of least squared error."""
    flat = p.detach().float().reshape(1, -1).sort(1).values
    deltas = [float(interpolated_percentile(flat, percentile)) for percentile in percentiles]
    return min(deltas, key=lambda delta: float((fake_log_sqrt2(flat, delta, bits) - flat).square().mean()))


def fake_log_sqrt2(p: Tensor, delta: float, bits: int) -> Tensor:
    """p quantized to delta 2^(-code / 2) and back, zero below the last of 2^b codes."""
    code = torch.round(-2 * (p / delta).clamp(1e-15).log2()).clamp_min(0)
    return torch.where(code < 2**bits, delta * torch.exp2(-code / 2), 0.0)


def clipped_scales(
    y: Activation,
    weight: Tensor,
    w_bits: int = 4,
    x_bits: int = 4,
    percentiles: tuple[float, ...] = CLIP_PERCENTILES,
) -> tuple[Tensor, Tensor]:
    """Per-channel (scale, zero_point) with the largest scales cut down to a percentile of all, for `repq_plan`.

    A channel cut down saturates outside of a part of its range, around its mean where that fits; in exchange the
    weight columns, which the fold multiplies with the scales, stay more even. Of the percentiles the one with the least
    squared error of the output of weight (N, C), both sides quantized, over the sample.
    """
    scale, zero_point = channel_scales(y, x_bits)
    q_lo, q_hi = affine.q_range(x_bits)
    lo, hi = (q_lo - zero_point) * scale, (q_hi - zero_point) * scale
    truth = y.sample @ weight.float().T
    best, least = (scale, zero_point), torch.inf
    for percentile in percentiles:
        cut = scale.clamp_max(float(torch.quantile(scale, percentile / 100)))
        width = (q_hi - q_lo) * cut
        start = torch.minimum(torch.maximum(y.mean - width / 2, lo), hi - width)
        moved = torch.where(cut < scale, torch.round(q_lo - start / cut), zero_point)
        _, _, plan = repq_plan(None, None, weight, None, y, w_bits, x_bits, (cut, moved))
        error = float((linear_output(plan, plan.seen.sample) - truth).square().mean())
        if error < least:
            best, least = (cut, moved), error
    return best
