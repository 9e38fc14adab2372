"""Uniform codes as a codebook, and PTQ4ViT's twin uniform: two steps in one code, its highest bit tells which.

    gelu      clip(rint(x/A), 0, Q-1) A + clip(rint(x/n), -Q, 0) n       Q = 2^(bits-1); code = the integer + Q
    softmax   small: k d, d = split / (Q-1), code k;  large: j / (Q-1), code Q + j

The released softmax adds the two ranges, so that everything above the split is `split` too large; a model calibrated
with it needs it so. released=False is the form meant, for new calibrations: the nearest level of both ranges.
Yuan et al., PTQ4ViT, arXiv:2111.12293.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import operands
from .codebook import Codebook, boundaries, check_bits, half_steps

GELU_MINIMUM = 0.16997124254703522  # how far GELU reaches below zero


def uniform(bits: int, scale: Tensor | float, zero_point: int = 0, offset: Tensor | float = 0.0) -> Codebook:
    """code = clip(rint(x / scale) + zero_point, 0, 2^bits - 1), x ~ (code - zero_point) scale."""
    check_bits("uniform", bits)
    last = 2**bits - 1 - zero_point
    levels = torch.arange(-zero_point, last + 1).double()
    operand, prescale = operands.choose(levels, "int8", "fp16")
    return Codebook(
        "uniform", bits, levels, boundaries(*half_steps(-zero_point, last)), scale, offset,
        operand_dtype=operand, prescale_log2=prescale, parameters={"zero_point": zero_point},
    )  # fmt: skip


def gelu(bits: int, scale: float, negative_scale: float | None = None) -> Codebook:
    """scale: A, of positive values; negative_scale: n, 0.16997124254703522 / 2^(bits-1) unless given."""
    check_bits("twin gelu", bits)
    Q = 2 ** (bits - 1)
    n = GELU_MINIMUM / Q if negative_scale is None else negative_scale
    if not (n > 0 and scale > 0 and math.isfinite(n / scale)):
        raise ValueError(f"twin gelu: scale={scale}, negative_scale={n}; both must be positive and finite")
    ratio = n / scale
    step = torch.where(torch.arange(-Q, Q) < 0, ratio, 1.0).double()
    ties, goes_up = half_steps(-Q, Q - 1)
    levels = torch.arange(-Q, Q) * step
    operand, prescale = operands.choose(levels, "fp16")
    return Codebook(
        "twin gelu", bits, levels, boundaries(ties * step[:-1], goes_up), scale,
        operand_dtype=operand, prescale_log2=prescale, parameters={"scale": scale, "negative_scale": n},
    )  # fmt: skip


def softmax(bits: int, split: float, released: bool = True) -> Codebook:
    """split: a power of two, 1 or less. Levels are integers times d; float16 holds the clean ones whatever it is.

    Of the released ones at 8 bits it holds all when split is 2^-3 or more.
    """
    check_bits("twin softmax", bits)
    if not 0 < split <= 1 or math.frexp(split)[0] != 0.5:
        raise ValueError(f"twin softmax: split={split} is not a power of two of at most 1")
    Q, large = 2 ** (bits - 1), round(1 / split)
    first = round(split * (Q - 1)) if released else (Q - 1) // large  # the last j that is no level of the large range
    small, j = torch.arange(Q), torch.arange(first + 1, Q)
    ties, goes_up = half_steps(0, Q - 1)
    large_ties, large_up = half_steps(first, Q - 1)
    cuts, up = [ties, large_ties * large], [goes_up, large_up]
    if released:
        levels = torch.cat([small + first * large, j * large + Q - 1])
    else:
        levels = torch.cat([small, j * large])
        cuts[1][:1] = (Q - 1 + (first + 1) * large) / 2
    operand, prescale = operands.choose(levels, "fp16")
    return Codebook(
        "twin softmax", bits, levels, boundaries(torch.cat(cuts), torch.cat(up)), split / (Q - 1),
        codes=torch.cat([small, Q + j]), operand_dtype=operand, prescale_log2=prescale,
        parameters={"split": split, "released": float(released)},
    )  # fmt: skip
