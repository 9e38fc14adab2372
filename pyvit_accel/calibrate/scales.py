"""Step sizes of activation codes of b bits from what `observe` saw.

symmetric: x ~ code * scale,                  code in -2^(b-1) .. 2^(b-1)-1, but -127..127 for 8 bits
affine:    x ~ (code - zero_point) * scale,   code in -2^(b-1) .. 2^(b-1)-1; zero is always a code

Methods: "minmax" covers all that was seen; "percentile" gives up the outermost part of the sample; "mse" takes the
clipping with the smallest squared error on the sample. minmax is the default: on 8 bits the rare large values of a
transformer matter more than a finer step. (ViT-Ti: 4 tokens of block 7 carry 200 in one channel of the GELU output,
where all others stay below 9; any percentile up to 99.99 cuts them off.)

percentile_search is the observer of RepQ-ViT (Li et al., arXiv:2212.08254): of three percentiles the one with the least
squared error, for any number of groups, zero not always a code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel.calibrate.observers import Activation
from pyvit_accel.formats import affine

# Clipping positions "mse" tries, as parts of the minmax range; fewer bits want to clip more.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3)
LOW_BIT_CLIPS = tuple(i / 40 for i in range(40, 1, -1))
REPQ_PERCENTILES = (99.9, 99.99, 99.999)


def symmetric_scale(
    x: Activation | Tensor, method: str = "minmax", groups: int = 1, percentile: float = 99.999, bits: int = 8
) -> Tensor:
    """scale (groups,): the C channels of x cut into `groups` equal runs (1 per tensor, heads, or C per channel)."""
    x = x if isinstance(x, Activation) else Activation.of(x)
    q_max = affine.q_range(bits)[1]
    sample = _runs("symmetric_scale", x.sample, groups)
    amax = x.amax.reshape(groups, -1).amax(1)
    if method == "percentile":
        amax = torch.minimum(amax, _quantile(sample.abs(), percentile))
    elif method == "mse":
        amax = amax * torch.stack([_best_clip(run, top, bits) for run, top in zip(sample, amax, strict=True)])
    elif method != "minmax":
        raise ValueError(_unknown("symmetric_scale", method))
    return _nonzero(amax / q_max)


def affine_scale(
    x: Activation | Tensor, method: str = "minmax", percentile: float = 99.999, bits: int = 8
) -> tuple[Tensor, int]:
    """(scale (1,), zero_point) over all of x. The range is widened to hold zero, which the zero point makes exact."""
    x = x if isinstance(x, Activation) else Activation.of(x)
    lo, hi = x.min.min().clamp_max(0), x.max.max().clamp_min(0)
    if method == "percentile":
        flat = x.sample.reshape(1, -1)
        lo = torch.maximum(lo, -_quantile(-flat, percentile)[0]).clamp_max(0)
        hi = torch.minimum(hi, _quantile(flat, percentile)[0]).clamp_min(0)
    elif method == "mse":
        # Only what lies beyond the clip is cut: post-GELU that is the top, never the crowded end at -0.17.
        ends = [torch.maximum(hi, -lo) * clip for clip in _clips(bits)]
        errors = [_affine_error(x.sample, torch.maximum(lo, -end), torch.minimum(hi, end), bits) for end in ends]
        end = ends[int(torch.stack(errors).argmin())]
        lo, hi = torch.maximum(lo, -end), torch.minimum(hi, end)
    elif method != "minmax":
        raise ValueError(_unknown("affine_scale", method))
    return _affine(lo, hi, bits)


def percentile_search(
    x: Activation | Tensor,
    bits: int = 8,
    groups: int = 1,
    percentiles: tuple[float, ...] = REPQ_PERCENTILES,
    smallest: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(scale (groups,), integer-valued zero_point (groups,)) of RepQ-ViT, each group by itself.

    Range: the interpolated percentile on both sides. zero_point is the published one less 2^(b-1), for codes are signed
    here; a range that does not hold zero has it outside of the codes.
    groups: as in symmetric_scale; the rows of a weight w (N, K) are percentile_search(w.T, bits, groups=N).
    smallest: a range counts as at least this part of the widest one, for scales that will be folded into weights.
    """
    q_lo, q_hi = affine.q_range(bits)
    runs = _runs("percentile_search", x.sample if isinstance(x, Activation) else Activation.of(x).sample, groups)
    ordered = runs.sort(dim=1).values
    least = torch.full_like(ordered[:, 0], torch.inf)
    scale, zero_point = torch.ones_like(least), torch.zeros_like(least)
    for percentile in percentiles:
        lo, hi = interpolated_percentile(ordered, 100 - percentile), interpolated_percentile(ordered, percentile)
        width = torch.maximum(hi - lo, (hi - lo).max() * smallest)
        step = _nonzero(torch.where(width > 0, width / (q_hi - q_lo), lo.abs()))  # a constant is one step from zero
        offset = q_lo - (lo / step).round()
        error = (fake_affine(runs, step[:, None], offset[:, None], bits) - runs).square().sum(1)
        better = error < least
        scale, zero_point = torch.where(better, step, scale), torch.where(better, offset, zero_point)
        least = torch.minimum(error, least)
    return scale, zero_point


def fake_affine(x: Tensor, scale: Tensor, zero_point: Tensor | float, bits: int) -> Tensor:
    """x quantized and dequantized, in its own dtype. The zero point need not be an integer: published models differ."""
    lo, hi = affine.q_range(bits)
    return (x / scale).round().clamp(lo - zero_point, hi - zero_point) * scale


def _runs(function: str, sample: Tensor, groups: int) -> Tensor:
    """sample (R, C) to (groups, R C / groups)."""
    channels = sample.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"{function}: {channels} channels do not divide into groups={groups}")
    return sample.reshape(-1, groups, channels // groups).transpose(0, 1).reshape(groups, -1)


def _clips(bits: int) -> tuple[float, ...]:
    return CLIPS if bits == 8 else LOW_BIT_CLIPS


def _affine(lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, int]:
    q_lo, q_hi = affine.q_range(bits)
    scale = _nonzero((hi - lo) / (q_hi - q_lo))
    return scale.reshape(1), int((q_lo - lo / scale).round().clamp(q_lo, q_hi))


def _affine_error(x: Tensor, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
    return (fake_affine(x, *_affine(lo, hi, bits), bits) - x).square().mean()


def _best_clip(x: Tensor, amax: Tensor, bits: int) -> Tensor:
    lo, hi = affine.weight_range(bits)
    clips = _clips(bits)
    steps = [_nonzero(amax * clip / hi) for clip in clips]
    errors = torch.stack([((x / s).round().clamp(lo, hi) * s - x).square().mean() for s in steps])
    return torch.tensor(clips, device=x.device)[errors.argmin()]


def _quantile(x: Tensor, percentile: float) -> Tensor:
    """The percentile of each row of x (G, R): the smallest entry with at most the remaining part above it.
    (torch.quantile refuses more than 16 million entries.)"""
    if not 50 <= percentile <= 100:
        raise ValueError(f"percentile={percentile} is outside 50..100; 99.999 drops one value in a hundred thousand")
    above = int(x.shape[1] * (1 - percentile / 100) + 1e-9)
    return x.topk(above + 1, dim=1).values[:, -1]


def interpolated_percentile(ordered: Tensor, percentile: float) -> Tensor:
    """The percentile of each ascending row (G, R), linear between entries, as torch.quantile."""
    at = percentile / 100 * (ordered.shape[1] - 1)
    below = min(int(at), ordered.shape[1] - 2) if ordered.shape[1] > 1 else 0
    above = min(below + 1, ordered.shape[1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], at - below)


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)


def _unknown(function: str, method: str) -> str:
    return f"{function}: unknown method {method!r}; use 'minmax', 'percentile' or 'mse'"
