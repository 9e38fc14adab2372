"""DFSQ: for every channel 2^bits points out of one universal set, sums of four powers of two.

    (p1 + p2 + p3 + p4) / 4,   p_i in {1, 2^-i, 2^-(i+4), 0},   and negatives: n / 1024, 377 integers n in -1024..1024

A channel is normalised at run time and takes the nearest of its points, the lower of two as near. Points may repeat;
then the first has the codes. Codebook and scale belong to a channel of the input, so nothing factors out of a dot
product. Zhong et al., DFSQ, arXiv:2305.05888.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from . import operands
from .codebook import Codebook, boundaries, check_bits

DENOMINATOR = 1024


def universal_set(signed: bool = True) -> Tensor:
    """Ascending numerators n, int64: 377, of which 189 are not negative."""
    terms = [(256, 256 >> i, 256 >> (i + 4), 0) for i in range(1, 5)]
    positive = sorted({sum(chosen) for chosen in product(*terms)})
    return torch.tensor([-n for n in reversed(positive) if n and signed] + positive)


def snap(centres: Tensor) -> Tensor:
    """The numerators nearest to centres, in the shape of centres."""
    members = universal_set()
    cuts = (members[1:] + members[:-1]).double() / 2
    return members[torch.bucketize(centres.double() * DENOMINATOR, cuts)]


def subset(points: Tensor, scale: Tensor | float = 1.0, axis: int = -1) -> Codebook:
    """points  (2^bits,) or one row per channel (G, 2^bits): numerators, members of the universal set, in any order.

    Codes count the points upwards.
    """
    if not bool(torch.isin(points, universal_set()).all()):
        wrong = points[~torch.isin(points, universal_set())]
        raise ValueError(
            f"subset: {wrong[0].item()} / {DENOMINATOR} is not in the universal set; snap gives the nearest"
        )
    levels = points.sort(dim=-1).values.double() / DENOMINATOR
    cuts = boundaries((levels[..., 1:] + levels[..., :-1]) / 2, False)
    # Between two equal points lies no threshold of its own: the first keeps all up to the next that differs.
    same = levels[..., 1:] == levels[..., :-1]
    ends = torch.where(same, torch.inf, cuts)
    cuts = ends.flip(-1).cummin(dim=-1).values.flip(-1)
    bits = (points.shape[-1] - 1).bit_length()
    operand, prescale = operands.choose(levels, "fp16")
    return Codebook("subset", bits, levels, cuts, scale, axis=axis, operand_dtype=operand, prescale_log2=prescale)


def select(x: Tensor, bits: int, restarts: int = 5, iterations: int = 30, seed: int = 0) -> Tensor:
    """Points (G, 2^bits) for normalised values x (G, samples): k-means with one centre held at 0, snapped to the set.

    Of `restarts` the one whose points lose least on x, summed squares, is kept for each channel.
    """
    check_bits("subset", bits)
    if x.dim() != 2 or not x.numel():
        raise ValueError(f"subset: x has shape {tuple(x.shape)}; use (channels, samples)")
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([_select_row(row.double(), 2**bits, restarts, iterations, generator) for row in x])


def _select_row(x: Tensor, count: int, restarts: int, iterations: int, generator: torch.Generator) -> Tensor:
    best, least = None, torch.inf
    for _ in range(restarts):
        chosen = torch.randint(len(x), (count - 1,), generator=generator)
        centres = torch.cat([x[chosen], x.new_zeros(1)]).sort().values
        for _ in range(iterations):
            nearest = torch.bucketize(x, (centres[1:] + centres[:-1]) / 2)
            total = x.new_zeros(count).index_add(0, nearest, x)
            size = torch.bincount(nearest, minlength=count)
            moved = torch.where((size > 0) & (centres != 0), total / size.clamp_min(1), centres)
            if torch.equal(moved, centres):
                break
            centres = moved.sort().values
        points = snap(centres)
        book = subset(points)
        error = (book.dequantize(book.quantize(x)).double() - x).square().sum().item()
        if error < least:
            best, least = points, error
    return best


def normalize(x: Tensor, after_relu: bool, eps: float = 1e-8) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, C, ...) per image and channel into -1..1: the result, the mean taken off, what it was divided by.

    After a ReLU nothing is taken off.
    """
    axes = tuple(range(2, x.dim()))
    mean = torch.zeros_like(x.amax(axes, keepdim=True)) if after_relu else x.mean(axes, keepdim=True)
    centred = x - mean
    size = centred.abs().amax(axes, keepdim=True).clamp_min(eps)
    return centred / size, mean, size
