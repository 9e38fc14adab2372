"""Where few activation codes lie: the part of a token's range that they span, or levels unevenly spaced.

choose_clip   x_clip, for symmetric codes
choose_table  x_table, 2^bits of the 8-bit codes above a minimum, for outputs of GELU

Most outputs of GELU crowd just above its minimum and a few go far up: with 16 levels evenly spaced, fc2's input is by
far the largest error of a W4A4 block. Relative squared error of fc2's output on unseen images, geometric mean of the
blocks of DeiT-Ti and of ViT-Ti: even 0.045, 0.026; clipped 0.035, 0.020; logarithmic 0.010, 0.006; fitted, by
Lloyd's iteration, 0.007, 0.006.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyvit_accel.calibrate.plan import LinearPlan, quantized_input

OCTAVES = 5.6  # from the smallest level above zero to the largest, of the fixed logarithmic levels
CLIPS = tuple(1 - 0.05 * i for i in range(13))


def choose_table(plan: LinearPlan, x: Tensor, importance: Tensor) -> LinearPlan:
    """The plan with the x_table of the least error of its output; x (R, K) its input, importance (R,) of the rows.

    Even levels with a clip, logarithmic ones, and those that fit the histogram of x.
    """
    count = 2**plan.x_bits
    candidates = [torch.linspace(0, 255 * clip, count) for clip in CLIPS]
    candidates += [log_levels(count), _fitted(plan, x, importance, count)]
    return _least([replace(plan, x_table=table(levels).to(x.device)) for levels in candidates], x, importance)


def choose_clip(plan: LinearPlan, x: Tensor, importance: Tensor) -> LinearPlan:
    """The plan with the x_clip of the least error of its output."""
    return _least([replace(plan, x_clip=clip) for clip in CLIPS], x, importance)


def _least(plans: list[LinearPlan], x: Tensor, importance: Tensor) -> LinearPlan:
    """The plan with the least squared error of the output but for its mean, which the bias takes up."""
    importance = importance / importance.sum()
    errors = []
    for plan in plans:
        error = (quantized_input(plan, x) - x) @ plan.weight.T
        errors.append((importance @ (error - importance @ error).square()).sum())
    return plans[int(torch.stack(errors).argmin())]


def log_levels(count: int) -> Tensor:
    """0 and 255 2^-t, t evenly spaced over OCTAVES; (count,) ascending."""
    return torch.cat([torch.zeros(1), 255 * 2 ** -torch.linspace(OCTAVES, 0, count - 1)])


def table(levels: Tensor) -> Tensor:
    """(256,) int8: the nearest level of each of 0..255, less 128."""
    levels = levels.round().clamp(0, 255)
    nearest = (torch.arange(256.0)[:, None] - levels).abs().argmin(1)
    return (levels[nearest] - 128).to(torch.int8)


def fitted_levels(histogram: Tensor, count: int) -> Tensor:
    """levels (count,) ascending with the least sum of histogram (256,) times squared distance to the nearest level.

    Exact, by dynamic programming over where one level's codes end and the next one's begin.
    """
    code = torch.arange(256, dtype=torch.float64)
    h = histogram.double().cpu()
    h = h + h.sum() * 1e-12 + 1e-300  # an empty run has a mean
    sums = [torch.cat([torch.zeros(1, dtype=torch.float64), (h * code**p).cumsum(0)]) for p in range(3)]
    mass, first, second = (s[None, :] - s[:, None] for s in sums)  # [i, j]: of codes i .. j-1
    cost = torch.where(mass > 0, second - first.square() / mass, torch.inf)
    least, ends = cost[0], []
    for _ in range(count - 1):
        least, at = (least[:, None] + cost).min(0)
        ends.append(at)
    levels, stop = [], 256
    for at in [*reversed(ends), None]:
        start = 0 if at is None else int(at[stop])
        levels.append(first[start, stop] / mass[start, stop])
        stop = start
    return torch.stack(levels[::-1]).float()


def _fitted(plan: LinearPlan, x: Tensor, importance: Tensor, count: int) -> Tensor:
    """An error of input k of a row counts as much as the row, and as the weights that read it."""
    above = x - plan.x_minimum
    scale = above.amax(1, keepdim=True) * plan.x_clip / 255
    codes = (above / scale.clamp_min(1e-30)).round().clamp(0, 255).long()
    counts = importance[:, None] * scale.square() * plan.weight.square().sum(0)
    histogram = torch.bincount(codes.flatten(), weights=counts.flatten().double(), minlength=256)
    return fitted_levels(histogram, count)
