"""Weights that are powers of two, after ShiftAddViT (arXiv:2306.06446): a multiplication is a shift, or costs nothing.

    q    |w| clipped to 2^-15..1,  w ~ sgn(w) 2^rint(log2 |w|)                   33 levels, 6 bits
    ps   w = sgn(rint(sign)) 2^rint(clip(shift, -14, 0)), trained so             31 levels, 5 bits

Codes ascend with the value. Published without a scale, so weights beyond 1 saturate; one per output feature is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import operands
from .codebook import Codebook, boundaries, check_bits


def q_weight(scale: Tensor | float = 1.0) -> Codebook:
    """Zero is zero alone: the smallest weight that is not has 2^-15."""
    return _signed("pow2 q", 6, 15, 2.0**-149, scale)


def ps_weight(scale: Tensor | float = 1.0, bits: int = 5) -> Codebook:
    """2^bits - 1 levels, sgn 2^0 .. 2^(2 - 2^(bits-1)) and zero; published with 5 bits. With 4 they are int8 integers.

    For a weight that was not trained so, zero begins where the smallest level would round to the next below.
    """
    check_bits("pow2 ps", bits)
    deepest = 2 ** (bits - 1) - 2
    return _signed("pow2 ps", bits, deepest, 2.0 ** -(deepest + 0.5), scale)


def ps_codes(shift: Tensor, sign: Tensor) -> Tensor:
    """Codes of ps_weight() for the trained parameters of a LinearShift, float tensors of one shape."""
    signs = torch.sign(torch.round(sign))
    exponents = torch.round(shift.clamp(-14, 0))
    return (15 + signs * (exponents + 15)).to(torch.uint8)


def _signed(family: str, bits: int, deepest: int, zero_until: float, scale: Tensor | float) -> Codebook:
    k = torch.arange(deepest, -1, -1).double()
    sizes = torch.exp2(-k)
    above = torch.cat([boundaries(torch.tensor([zero_until]).double()), boundaries(torch.exp2(-(k[1:] + 0.5)))])
    # On the negative side a threshold is the smallest float of the smaller magnitude: one ulp nearer to zero.
    below = torch.nextafter(-above, torch.zeros(1)).flip(0)
    levels = torch.cat([-sizes.flip(0), sizes.new_zeros(1), sizes])
    operand, prescale = operands.choose(levels, "e5m2", prefer=8)
    return Codebook(
        family, bits, levels, torch.cat([below, above]), scale, axis=0,
        operand_dtype=operand, prescale_log2=prescale, parameters={"deepest": -deepest},
    )  # fmt: skip
