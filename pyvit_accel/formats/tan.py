"""TanQ-style: softmax outputs on a tangent, after the description of DopQ-ViT. Its exact curve is not public.

    one-sided   code = rint(S tan(a x) / tan a)                        fine steps near 1
    two-sided   code = rint(S (1 + tan(a (2 x - 1)) / tan a) / 2)      fine steps near 0 and near 1,   S = 2^bits - 1

A stand-in with the properties told, not the published format; another curve is another pair of tables.
"""

from __future__ import annotations

import math

import torch

from .codebook import Codebook, boundaries, check_bits, half_steps


def tan(bits: int, a: float, two_sided: bool = False) -> Codebook:
    """a in 0..pi/2: how much finer the fine steps are. In no 8-bit type exact; float16 is off by up to 5e-4."""
    check_bits("tan", bits)
    if not 0 < a < math.pi / 2:
        raise ValueError(f"tan: a={a} is outside 0..pi/2")
    steps = 2**bits - 1

    def value(code: torch.Tensor) -> torch.Tensor:
        if two_sided:
            return (1 + torch.atan((2 * code / steps - 1) * math.tan(a)) / a) / 2
        return torch.atan(code * math.tan(a) / steps) / a

    ties, goes_up = half_steps(0, steps)
    levels = value(torch.arange(steps + 1).double())
    parameters = {"a": a, "two_sided": float(two_sided)}
    return Codebook("tan", bits, levels, boundaries(value(ties), goes_up), parameters=parameters)
