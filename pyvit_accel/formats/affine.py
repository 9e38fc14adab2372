"""Affine integers: x ~ (q - zero_point) * scale.

    q = clip(rint(x * inv_scale) + zero_point, q_min, q_max),   inv_scale = 1 / scale in float32, rint half to even

Codes of b bits are signed, -2^(b-1) .. 2^(b-1)-1, in int8 whatever b is. The granularity is the shape of scale: (1,)
per tensor, (N, 1) per output channel, (H, 1) per head, (M, 1) per token; quantize_groups cuts K. Weights are
symmetric, one scale per output feature: max |w| / 127 and codes -127..127 for 8 bits, else what weight_scale finds.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_SCALE = 1e-30  # of an all-zero row: its codes are zero, and 1 / scale stays finite
# Clipping positions the searches try, as parts of the range that holds everything.
CLIPS = tuple(1 - 0.025 * i for i in range(29))


def q_range(bits: int) -> tuple[int, int]:
    """Smallest and largest signed code."""
    if not 2 <= bits <= 8:
        raise ValueError(f"affine: bits={bits} is outside 2..8")
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def check_scale(scale: Tensor) -> None:
    """Raise ValueError unless every scale is positive and finite."""
    good = (scale > 0) & scale.isfinite()
    if not bool(good.all()):
        at = tuple((~good).nonzero()[0].tolist())
        raise ValueError(f"affine: scale{list(at)} is {scale[at].item()}; every scale must be positive and finite")


def scale_of(amax: Tensor, q_max: int = 127) -> Tensor:
    """The symmetric scale that maps amax to q_max; float32, never zero."""
    return (amax.float() / q_max).clamp_min(MIN_SCALE)


def quantize(x: Tensor, scale: Tensor, zero_point: int | Tensor = 0, bits: int = 8, q_min: int | None = None) -> Tensor:
    """int8 codes of float32 x; scale and zero_point broadcast against x. q_min: a narrower range's lower end."""
    lo, hi = q_range(bits)
    return (torch.round(x * (1.0 / scale)) + zero_point).clamp(lo if q_min is None else q_min, hi).to(torch.int8)


def dequantize(q: Tensor, scale: Tensor, zero_point: int | Tensor = 0) -> Tensor:
    return (q.to(scale.dtype) - zero_point) * scale


def error_bound(
    x: Tensor, scale: Tensor, zero_point: int | Tensor = 0, bits: int = 8, q_min: int | None = None
) -> Tensor:
    """Largest |x - dequantize(quantize(x))|: half a step inside the range, the distance to its end outside.

    The last term is the rounding of x * inv_scale and of the product with scale, four float32 roundings of x.
    """
    q_lo, q_hi = q_range(bits)
    lo, hi = ((q_lo if q_min is None else q_min) - zero_point) * scale, (q_hi - zero_point) * scale
    clipped = torch.maximum(x - hi, lo - x).clamp_min(0)
    return clipped + scale / 2 + 4 * 2.0**-24 * (x.abs() + scale)


def weight_range(bits: int) -> tuple[int, int]:
    """Codes of symmetric weights: the full range, but -127..127 for 8 bits."""
    return (-127, 127) if bits == 8 else q_range(bits)


def weight_scale(w: Tensor, bits: int = 8, weight: Tensor | None = None) -> Tensor:
    """scale (N,) for w (N, K): of CLIPS the one with the least squared error; at 8 bits simply max |w| / 127.

    weight  (K,)  what an error in column k counts, for example the mean square of input k
    """
    w = w.detach().float()
    lo, hi = weight_range(bits)
    full = scale_of(w.abs().amax(dim=1), hi)
    if bits == 8:
        return full
    full = scale_of(w.abs().amax(dim=1) * 2, hi - lo)  # max |w| lies between the last two codes of the longer side
    best, least = full, torch.full_like(full, torch.inf)
    for clip in ((hi - lo) / (2 * hi), *CLIPS):  # the first: max |w| is the last code of the shorter side
        scale = full * clip
        error = (dequantize(quantize(w, scale[:, None], bits=bits), scale[:, None]) - w).square()
        error = (error if weight is None else error * weight).sum(dim=1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def quantize_weight(w: Tensor, bits: int = 8, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """w (N, K) float to codes (N, K) int8 and scale (N,) float32, symmetric per output feature."""
    w = w.detach().float()
    scale = weight_scale(w, bits) if scale is None else scale
    return quantize(w, scale[:, None], bits=bits, q_min=weight_range(bits)[0]), scale


def quantize_groups(w: Tensor, bits: int, group_size: int, symmetric: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """w (N, K) to codes (N, K) int8, scale (N, G) and integer-valued zero_point (N, G) float32, G = K / group_size.

    Asymmetric groups reach from their smallest value to their largest; zero need not be a code.
    """
    N, K = w.shape
    if group_size < 1 or K % group_size:
        fitting = [size for size in (32, 64, 128) if K % size == 0] or [K]
        raise ValueError(
            f"quantize_groups: K={K} is not a multiple of group_size={group_size}; use {' or '.join(map(str, fitting))}"
        )
    lo, hi = q_range(bits)
    runs = w.detach().float().view(N, -1, group_size)
    if symmetric:
        scale = weight_scale(runs.reshape(-1, group_size), bits).view(N, -1)
        zero_point = torch.zeros_like(scale)
    else:
        low, high = runs.aminmax(dim=2)
        scale = scale_of(high - low, hi - lo)
        zero_point = lo - torch.round(low / scale)
        # A group of equal values, or one far from zero: the codes of float32 would not reach it.
        far = zero_point.abs() > 2**20
        scale = torch.where(far, scale_of(torch.maximum(high.abs(), low.abs()), hi), scale)
        zero_point = torch.where(far, 0, zero_point)
    codes = quantize(runs, scale[..., None], zero_point[..., None], bits)
    return codes.reshape(N, K), scale, zero_point
