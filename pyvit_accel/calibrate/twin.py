"""Twin uniform quantizers of PTQ4ViT: one step for large values, one for small, chosen on the error of the product.

GELU       x > 0: steps of `scale`, 2^(b-1) - 1 of them; x < 0: 2^(b-1) steps down to the minimum of GELU
softmax    p > split: steps of 1 / (2^(b-1) - 1); else steps of split / (2^(b-1) - 1)

The softmax form is the clean one, where a value is in one range; the released code adds both ranges, so every p above
the split gets the split on top (quantization.md 7.2). Yuan et al., PTQ4ViT, arXiv:2111.12293.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel.calibrate.observers import Activation

GELU_MINIMUM = -0.16997124254703522
PARTS = tuple(0.01 + 1.19 * i / 100 for i in range(101))  # scales tried, as parts of the one that reaches the maximum
SPLITS = tuple(2.0**-i for i in range(20))


def twin_gelu(x: Activation | Tensor, weight: Tensor, bits: int) -> float:
    """The scale of positive GELU outputs x in front of weight (N, K); that of the negative ones is fixed."""
    x = x.sample if isinstance(x, Activation) else x.reshape(-1, x.shape[-1]).float()
    w = weight.detach().float()
    small = -GELU_MINIMUM / 2 ** (bits - 1)
    full = float(x.max()) / (2 ** (bits - 1) - 0.5)
    if full <= 0:
        raise ValueError("twin_gelu: no value of x is positive; are these outputs of GELU?")
    return min((full * part for part in PARTS), key=lambda scale: output_error(fake_twin(x, scale, small, bits) - x, w))


def twin_softmax(p: Tensor, v: Tensor, bits: int) -> float:
    """The split of softmax outputs p (B, H, N, N) in front of v (B, H, N, D): a power of two from 1 down to 2^-19."""
    return min(SPLITS, key=lambda split: float(((fake_twin_softmax(p, split, bits) - p) @ v).square().sum()))


def fake_twin(x: Tensor, scale: float, small: float, bits: int) -> Tensor:
    """x quantized and dequantized: steps of `scale` above zero, of `small` below."""
    q_max = 2 ** (bits - 1)
    return torch.where(
        x > 0, (x / scale).round().clamp_max(q_max - 1) * scale, (x / small).round().clamp_min(-q_max) * small
    )


def fake_twin_softmax(p: Tensor, split: float, bits: int) -> Tensor:
    """p in 0..1 quantized and dequantized in the clean form."""
    top = 2 ** (bits - 1) - 1
    return torch.where(p > split, (p * top).round() / top, (p * (top / split)).round() * (split / top))


def output_error(error: Tensor, w: Tensor) -> float:
    """Squared error that an error (R, K) of the input makes in the output of w (N, K)."""
    return float((error @ w.T).square().sum())
