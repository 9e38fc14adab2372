"""MultiQuant: 2-bit weights without a zero, -3, -1, 1, 3 times a step, and the activations of its branches.

    weight       u = clip((w - l) / (u - l), 0, 1),   code = rint(3 u)          published value: level / 3
    activation   code = rint((2^bits - 1) clip((x - l) / (u - l), 0, 1))        published value: code / (2^bits - 1)

The published values are in units of the range; batch norm takes the rest. Here dequantize gives w and x themselves. l
and u are one number, or one per branch (G,): the k-th of them belongs to the k-th active branch.
Zhong et al., MultiQuant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codebook import Codebook, boundaries, check_bits, half_steps


def weight(lower: Tensor | float, upper: Tensor | float, axis: int = 0) -> Codebook:
    """Levels -3, -1, 1, 3, exact in every operand type."""
    scale, offset = _range("multiquant weight", lower, upper, 6), (_float(upper) + _float(lower)) / 2
    ties, goes_up = half_steps(0, 3)
    return Codebook(
        "multiquant weight", 2, torch.tensor([-3.0, -1.0, 1.0, 3.0]), boundaries(2 * ties - 3, goes_up), scale, offset,
        axis=axis, operand_dtype="int8",
    )  # fmt: skip


def activation(bits: int, lower: Tensor | float, upper: Tensor | float, axis: int = 1) -> Codebook:
    """Codes 0..2^bits - 1 from lower to upper; lower is the offset."""
    check_bits("multiquant activation", bits)
    last = 2**bits - 1
    return Codebook(
        "multiquant activation", bits, torch.arange(last + 1), boundaries(*half_steps(0, last)),
        _range("multiquant activation", lower, upper, last), _float(lower), axis=axis,
        operand_dtype="int8" if bits < 8 else "fp16",
    )  # fmt: skip


def _float(t: Tensor | float) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float32).reshape(-1)


def _range(family: str, lower: Tensor | float, upper: Tensor | float, steps: int) -> Tensor:
    lower, upper = _float(lower), _float(upper)
    if not bool((lower < upper).all()):
        raise ValueError(f"{family}: lower {lower.tolist()} must be below upper {upper.tolist()}")
    return (upper - lower) / steps
