"""Logarithmic formats of softmax and GELU outputs: log2, log-sqrt2, AdaLog, SULQ.

    log2       k = rint(-log2(x / s))                x ~ s 2^-k                        FQ-ViT, arXiv:2111.13824
    log-sqrt2  k = rint(-2 log2(x / s))              x ~ s 2^(-k / 2)                  RepQ-ViT, arXiv:2212.08254
    adalog     k = rint(-log2((x + g) / s) r / q)    x ~ s m_k / D 2^-t_k - g          AdaLog, arXiv:2407.12951
    sulq       c = rint((log2(x + eta) - low) / d)   x ~ 2^rint(c d + low) - eta       I&S-ViT, arXiv:2311.10126

Of the first three, code k counts down from the largest level, clipped to 0..2^bits - 1; what lies below the last is
zero, code 2^bits. With zero="last" the last code is the zero, with zero="none" it is the last level, which a sum over a
softmax row does not survive.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import operands
from .codebook import ZERO_POLICIES, Codebook, boundaries, check_bits

ROUNDINGS = ("nearest", "lis")


def log2(bits: int, scale: Tensor | float = 1.0, zero: str = "extra", rounding: str = "nearest") -> Codebook:
    """rounding "lis": the integer softmax of FQ-ViT, which rounds 1 / x at 1.5 * 2^k and not at sqrt(2) * 2^k."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"log2: rounding {rounding!r} is not one of {', '.join(ROUNDINGS)}")
    k = _steps("log2", bits, zero)
    if rounding == "lis":
        # The float32 next to 2/3 2^-k is 1 / (1.5 2^k) as float32 divides, a tie, and belongs below.
        cuts = torch.nextafter((2 / 3 * torch.exp2(-k)).float(), torch.tensor(torch.inf))
    else:
        cuts = boundaries(torch.exp2(-(k + 0.5)))
    levels = torch.exp2(-k)
    return _downwards("log2", bits, levels, cuts, zero, ("e5m2", "bf16"), prefer=8, scale=scale, rounding=rounding)


def log_sqrt2(bits: int, scale: Tensor | float = 1.0, zero: str = "extra") -> Codebook:
    """Levels at odd codes are irrational: as float16 operands they are off by 1.1e-4."""
    k = _steps("log_sqrt2", bits, zero)
    cuts = boundaries(torch.exp2(-(k + 0.5) / 2))
    return _downwards("log_sqrt2", bits, torch.exp2(-k / 2), cuts, zero, ("fp16",), scale=scale)


def adalog_table(bits: int, q: int, r: int = 37) -> tuple[Tensor, Tensor, int]:
    """Shifts t (2^bits,), mantissas m (2^bits,), both int64, and D: level k is m_k 2^-t_k / D."""
    check_bits("adalog", bits)
    if q < 1 or r < 1:
        raise ValueError(f"adalog: the base is 2^(q/r) with q, r >= 1, got q={q}, r={r}")
    D = 2 ** (bits + 1) - 2
    steps = torch.arange(2**bits) * q
    return steps // r, torch.round(torch.exp2(-(steps % r) / r) * D).long(), D


def adalog(
    bits: int, q: int, scale: Tensor | float = 1.0, shift: float = 0.0, r: int = 37, zero: str = "extra"
) -> Codebook:
    """shift: 0.16997124254703522 for outputs of GELU, until fold_offset takes it into the bias.

    The publication clips x / s to 1e-15, so with q > 118 at 4 bits nothing reaches the zero.
    """
    k = _steps("adalog", bits, zero)
    t, m, D = adalog_table(bits, q, r)
    common = math.gcd(*m.tolist())
    values = torch.exp2(-(k + 0.5) * q / r)
    cuts = boundaries(values, k % 2 == 0)
    cuts[values <= 1e-15] = -torch.inf
    levels = (m // common * torch.exp2(-t.double()))[: len(k)]
    return _downwards(
        "adalog", bits, levels, cuts, zero, ("e4m3", "fp16", "bf16") if bits == 3 else ("fp16", "bf16"),
        scale=scale, offset=-shift, unit=common / D, q=q, r=r, shift=shift,
    )  # fmt: skip


def sulq(bits: int, eta: float, low: float, high: float, steps: int | None = None) -> Codebook:
    """low, high: the range of log2(x + eta) in calibration. Codes 0..2^bits ascend.

    steps  of the range; 2^bits, but the published search for eta counts 2^bits - 1
    """
    check_bits("sulq", bits)
    steps = 2**bits if steps is None else steps
    if not low < high:
        raise ValueError(f"sulq: log2(x + eta) reaches from low={low} to high={high}; low must be below")
    d = (high - low) / steps
    c = torch.arange(steps + 1, dtype=torch.float64)
    levels = torch.exp2(torch.round(c * d + low))
    cuts = boundaries(torch.exp2(low + (c[:-1] + 0.5) * d), c[:-1] % 2 == 1)
    operand, prescale = operands.choose(levels, "e5m2", "bf16")
    return Codebook(
        "sulq", bits, levels, cuts, offset=-eta, operand_dtype=operand, prescale_log2=prescale,
        parameters={"eta": eta, "low": low, "high": high, "steps": steps},
    )  # fmt: skip


def _steps(family: str, bits: int, zero: str) -> Tensor:
    """The codes that are not the zero, float64."""
    check_bits(family, bits)
    if zero not in ZERO_POLICIES:
        raise ValueError(f"{family}: zero {zero!r} is not one of {', '.join(ZERO_POLICIES)}")
    return torch.arange(2**bits - (zero == "last"), dtype=torch.float64)


def _downwards(
    family: str,
    bits: int,
    levels: Tensor,
    cuts: Tensor,
    zero: str,
    types: tuple[str, ...],
    prefer: int = 0,
    scale: Tensor | float = 1.0,
    offset: float = 0.0,
    unit: float = 1.0,
    **parameters: float | str,
) -> Codebook:
    """levels of codes 0, 1, .. descend; cuts[k] lies below level k."""
    if zero == "none":
        cuts = cuts[:-1]
    else:
        levels = torch.cat([levels, levels.new_zeros(1)])
    codes = torch.arange(len(levels) - 1, -1, -1)
    operand, prescale = operands.choose(levels, *types, prefer=prefer)
    return Codebook(
        family, bits, levels.flip(0), cuts.flip(0), scale, offset, codes, zero,
        operand_dtype=operand, prescale_log2=prescale, unit=unit, parameters=parameters,
    )  # fmt: skip
