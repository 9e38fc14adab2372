"""Patch embedding of raw pixels: a convolution of stride patch_size with the normalisation folded into weight and bias.

    (pixel / 255 - mean) / std = pixel * s + t with s, t per channel, so w' = w s and b' = b + sum w t: pixels exact.

images      (B, C, H, W)    uint8
w_packed    packed          uint8; holds (N, C patch_size^2) codes, inputs in channel, row, column order
w_scale     (N,)            float32
bias        (N,) | (P, N)   float32; per patch when it carries the position embedding
returns     (B, P, N)       float32, P = (H / patch_size) (W / patch_size)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .lowbit_linear import accumulate


def quant_patch_embed(images: Tensor, w_packed: Tensor, w_scale: Tensor, bias: Tensor, patch_size: int) -> Tensor:
    B, C, H, W = images.shape
    p = patch_size
    patches = images.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(-1, C * p * p)
    codes = (patches.to(torch.int16) - 128).to(torch.int8)
    y = accumulate(codes, w_packed, w_scale.shape[0], -128).float() * w_scale
    return y.reshape(B, (H // p) * (W // p), w_scale.shape[0]) + bias
