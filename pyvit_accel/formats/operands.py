"""Which levels a tensor core's operand type holds exactly, found by a round trip through the type itself.

A level l becomes the operand l * 2^prescale; the epilogue undoes the power of two, so the choice is free. Of powers of
two e4m3 holds 18 in a row (2^-9 .. 2^8), e5m2 32 (2^-16 .. 2^15).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_PRESCALE = 40  # beyond, a float32 sum of products of two such operands could leave its range
OPERANDS = {
    "int8": torch.int8,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def limits(operand: str) -> tuple[float, float]:
    """Smallest positive and largest value of the type."""
    check_operand(operand)
    if operand == "int8":
        return 1.0, 127.0
    info = torch.finfo(OPERANDS[operand])
    return info.smallest_normal * info.eps, info.max


def check_operand(operand: str) -> None:
    if operand not in OPERANDS:
        raise ValueError(f"operand_dtype {operand!r} is not one of {', '.join(OPERANDS)}")


def round_to(operand: str, values: Tensor) -> Tensor:
    """values (float64) as the type holds them, float64; saturating, NaN kept."""
    _, top = limits(operand)
    if operand == "int8":
        return values.round().clamp(-128, 127)
    return values.float().clamp(-top, top).to(OPERANDS[operand]).double()


def exact_prescales(levels: Tensor, operand: str) -> list[int]:
    """Every prescale up to +-40 with which the type holds every level exactly, ascending; empty when there is none."""
    low, top = limits(operand)
    sizes = levels.double().abs()
    sizes = sizes[sizes > 0]
    if not sizes.numel():
        return [0]
    first = math.ceil(math.log2(low) - math.log2(sizes.min().item()))
    last = math.floor(math.log2(top) - math.log2(sizes.max().item()))
    reach = range(max(first, -MAX_PRESCALE), min(last, MAX_PRESCALE) + 1)
    scaled = ((p, levels.double() * 2.0**p) for p in reach)
    return [p for p, values in scaled if torch.equal(round_to(operand, values), values)]


def choose(levels: Tensor, *operands: str, prefer: int = 0) -> tuple[str, int]:
    """The first exact type and its prescale nearest to `prefer`; the last type, unscaled, when none is exact."""
    for operand in operands:
        fitting = exact_prescales(levels, operand)
        if fitting:
            return operand, min(fitting, key=lambda p: abs(p - prefer))
    return operands[-1], 0


def relative_error(levels: Tensor, operand: str, prescale_log2: int = 0) -> float:
    """Largest |operand / level - 1| over the levels that are not zero."""
    values = levels.double() * 2.0**prescale_log2
    values = values[values != 0]
    return (round_to(operand, values) / values - 1).abs().max().item() if values.numel() else 0.0
