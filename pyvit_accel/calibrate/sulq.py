"""SULQ of I&S-ViT: the shift eta of a log quantizer for softmax outputs.

    u = log2(p + eta)      code = clip(rint((u - minv) / d), 0, 2^b)      d = (maxv - minv) / 2^b
    p ~ 2^rint(code d + minv) - eta

minv and maxv are the smallest and the largest u of the calibration data. The published search scores a slightly
different quantizer, with steps of (maxv - minv) / (2^b - 1) and codes to 2^b - 1. It is kept: its eta is the published.
Zhong et al., I&S-ViT, arXiv:2311.10126.
"""

from __future__ import annotations

import torch
from torch import Tensor

ETAS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)


def sulq_search(p: Tensor, bits: int) -> tuple[float, float, float]:
    """(eta, minv, maxv) for softmax outputs p of any shape: of eleven shifts the one with the least squared error."""
    if p.numel() == 0 or bool((p < 0).any()):
        raise ValueError(f"sulq_search: p {tuple(p.shape)} must hold probabilities, none negative and at least one")
    p = p.detach().float()
    best, least = (0.0, 0.0, 0.0), torch.inf
    for eta in ETAS:
        u = torch.log2(p + eta)
        minv, maxv = (float(end) for end in u.aminmax())
        error = float((_fake(u, eta, minv, maxv, 2**bits - 1) - p).square().mean())
        if error < least:
            best, least = (eta, minv, maxv), error
    return best


def fake_sulq(p: Tensor, eta: float, minv: float, maxv: float, bits: int) -> Tensor:
    """p quantized and dequantized as the published network does it."""
    return _fake(torch.log2(p + eta), eta, minv, maxv, 2**bits)


def _fake(u: Tensor, eta: float, minv: float, maxv: float, top: int) -> Tensor:
    step = (maxv - minv) / top or 1.0
    code = torch.round((u - minv) / step).clamp(0, top)
    return torch.exp2(torch.round(code * step + minv)) - eta
