"""Step sizes of int8 activations from what `observe` saw.

symmetric: x ~ code * scale,                  code in -127..127
affine:    x ~ (code - zero_point) * scale,   code in -128..127; zero is always a code

Methods: "minmax" covers all that was seen; "percentile" gives up the outermost part of the sample; "mse" takes the
clipping with the smallest squared error on the sample. minmax is the default: on 8 bits the rare large values of a
transformer matter more than a finer step. (ViT-Ti: 4 tokens of block 7 carry 200 in one channel of the GELU output,
where all others stay below 9; any percentile up to 99.99 cuts them off.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel.calibrate.observers import Activation

# Clipping positions "mse" tries, as parts of the minmax range.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3)


def symmetric_scale(
    x: Activation | Tensor, method: str = "minmax", groups: int = 1, percentile: float = 99.999
) -> Tensor:
    """scale (groups,): the C channels of x cut into `groups` equal runs (1 per tensor, heads, or C per channel)."""
    x = x if isinstance(x, Activation) else Activation.of(x)
    channels = x.amax.shape[0]
    if groups < 1 or channels % groups:
        raise ValueError(f"symmetric_scale: {channels} channels do not divide into groups={groups}")
    amax = x.amax.reshape(groups, -1).amax(1)
    if method != "minmax":
        grouped = x.sample.reshape(-1, groups, channels // groups).transpose(0, 1).reshape(groups, -1)
        if method == "percentile":
            amax = torch.minimum(amax, _quantile(grouped.abs(), percentile))
        elif method == "mse":
            amax = amax * torch.stack([_best_clip(run, top) for run, top in zip(grouped, amax, strict=True)])
        else:
            raise ValueError(_unknown("symmetric_scale", method))
    return _nonzero(amax / 127)


def affine_scale(x: Activation | Tensor, method: str = "minmax", percentile: float = 99.999) -> tuple[Tensor, int]:
    """(scale (1,), zero_point) over all of x. The range is widened to hold zero, which the zero point makes exact."""
    x = x if isinstance(x, Activation) else Activation.of(x)
    lo, hi = x.min.min().clamp_max(0), x.max.max().clamp_min(0)
    if method == "percentile":
        flat = x.sample.reshape(1, -1)
        lo = torch.maximum(lo, -_quantile(-flat, percentile)[0]).clamp_max(0)
        hi = torch.minimum(hi, _quantile(flat, percentile)[0]).clamp_min(0)
    elif method == "mse":
        # Only what lies beyond the clip is cut: post-GELU that is the top, never the crowded end at -0.17.
        ends = [torch.maximum(hi, -lo) * clip for clip in CLIPS]
        errors = [_affine_error(x.sample, torch.maximum(lo, -end), torch.minimum(hi, end)) for end in ends]
        end = ends[int(torch.stack(errors).argmin())]
        lo, hi = torch.maximum(lo, -end), torch.minimum(hi, end)
    elif method != "minmax":
        raise ValueError(_unknown("affine_scale", method))
    return _affine(lo, hi)


def _affine(lo: Tensor, hi: Tensor) -> tuple[Tensor, int]:
    scale = _nonzero((hi - lo) / 255)
    return scale.reshape(1), int((-128 - lo / scale).round().clamp(-128, 127))


def _affine_error(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    scale, zero_point = _affine(lo, hi)
    codes = ((x / scale).round() + zero_point).clamp(-128, 127)
    return ((codes - zero_point) * scale - x).square().mean()


def _best_clip(x: Tensor, amax: Tensor) -> Tensor:
    steps = [_nonzero(amax * clip / 127) for clip in CLIPS]
    errors = torch.stack([((x / s).round().clamp(-127, 127) * s - x).square().mean() for s in steps])
    return torch.tensor(CLIPS, device=x.device)[errors.argmin()]


def _quantile(x: Tensor, percentile: float) -> Tensor:
    """The percentile of each row of x (G, R): the smallest entry with at most the remaining part above it.
    (torch.quantile refuses more than 16 million entries.)"""
    if not 50 <= percentile <= 100:
        raise ValueError(f"percentile={percentile} is outside 50..100; 99.999 drops one value in a hundred thousand")
    above = int(x.shape[1] * (1 - percentile / 100) + 1e-9)
    return x.topk(above + 1, dim=1).values[:, -1]


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)


def _unknown(function: str, method: str) -> str:
    return f"{function}: unknown method {method!r}; use 'minmax', 'percentile' or 'mse'"
