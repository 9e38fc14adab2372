"""The scalar functions of the epilogues, as float32 operations in a stated order.

Every kernel computes these operations in this order without contraction, so codes agree bit for bit on every backend;
how far they are from the true functions is measured in tests/test_scalar.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG2_E = 1.44269504
# 2^f for |f| <= 1/2: 9e-8, 2e-7 rounded
_EXP2 = (0.00132647261, 0.00967151299, 0.0555073358, 0.240222424, 0.693147004, 1.0)
# log2(1 + y) / y for 1 + y between sqrt(1/2) and sqrt(2): 1.5e-7 of the logarithm
_LOG2 = (-0.14620353, 0.23420985, -0.24882181, 0.2870756, -0.36024198, 0.48092404, -0.72135276, 1.4426949)
_PHI_P = (2.27495214e-08, 6.35206834e-06, 0.000168822022, 0.00467723841, 0.0338523164, 0.398942232)
_PHI_Q = (1.19750473e-06, 7.36461952e-05, 0.00188442448, 0.0286456775, 0.251521081, 1.0)


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    y = x * coefficients[0] + coefficients[1]
    for c in coefficients[2:]:
        y = y * x + c
    return y


def exp2(t: Tensor) -> Tensor:
    """2^t for float32 |t| <= 100."""
    n = torch.round(t)
    p = _horner(t - n, _EXP2)
    return (p.view(torch.int32) + (n.to(torch.int32) << 23)).view(torch.float32)


def log2(x: Tensor) -> Tensor:
    """log2 of positive, normal float32 x."""
    bits = x.view(torch.int32)
    n = (bits - 0x3F3504F3) >> 23  # 0x3F3504F3: sqrt(1/2)
    y = (bits - (n << 23)).view(torch.float32) - 1.0
    return n.float() + y * _horner(y, _LOG2)


def _sigmoid2(t: Tensor) -> Tensor:
    return 1.0 / (1.0 + exp2((-t).clamp(-100, 100)))


def gelu(x: Tensor) -> Tensor:
    """x Phi(x); Phi - 1/2 is t P(t^2) / Q(t^2), t = x clipped to +-5.5 where Phi is 1 - 2e-8."""
    t = x.clamp(-5.5, 5.5)
    z = t * t
    return x * (0.5 + t * (_horner(z, _PHI_P) / _horner(z, _PHI_Q)))


def gelu_tanh(x: Tensor) -> Tensor:
    """x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), which is the tanh form of GELU."""
    return x * _sigmoid2((x + x * x * x * 0.044715) * 2.30220819)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the GELU of CLIP."""
    return x * _sigmoid2(x * 2.45546696)


ACTIVATIONS = {"none": lambda x: x, "gelu": gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu}
