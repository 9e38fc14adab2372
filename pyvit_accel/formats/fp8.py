"""fp8 e4m3 and e5m2 as a codebook: the code of a value is its byte, rounded half to even, saturating.

NaN and infinity are bytes that no level has. -0.0 encodes as +0.0, what rounds to zero from below as the byte of -0.
Micikevicius et al., FP8 formats for deep learning, arXiv:2209.05433.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codebook import Codebook, boundaries
from .operands import OPERANDS


def fp8(operand: str = "e4m3", scale: Tensor | float = 1.0, axis: int = -1) -> Codebook:
    if operand not in ("e4m3", "e5m2"):
        raise ValueError(f"fp8: {operand!r} is not one of e4m3, e5m2")
    values = torch.arange(256, dtype=torch.uint8).view(OPERANDS[operand]).double()
    positive = torch.arange(128)[values[:128].isfinite()]
    levels = values[positive]
    # Half to even: of bytes c and c + 1 the even one has the even mantissa.
    ties, up = (levels[1:] + levels[:-1]) / 2, positive[:-1] % 2 == 1
    cuts = torch.cat([boundaries(-ties, ~up).flip(0), torch.zeros(1), boundaries(ties, up)])
    codes = torch.cat([positive.flip(0) + 128, positive])
    return Codebook(
        operand, 8, torch.cat([-levels.flip(0), levels]), cuts, scale, codes=codes, axis=axis, operand_dtype=operand
    )
