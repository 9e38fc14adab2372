"""quant_patch_embed: raw uint8 pixels to patch embeddings, the normalisation folded into the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel import reference

from ._library import define
from .lowbit_linear import check_weight


def _fake(images, w_packed, w_scale, bias, patch_size):
    B, _, H, W = images.shape
    return images.new_empty(B, (H // patch_size) * (W // patch_size), w_scale.shape[0], dtype=torch.float32)


_op = define(
    "quant_patch_embed",
    "(Tensor images, Tensor w_packed, Tensor w_scale, Tensor bias, int patch_size) -> Tensor",
    reference.quant_patch_embed,
    _fake,
)


def quant_patch_embed(images: Tensor, w_packed: Tensor, w_scale: Tensor, bias: Tensor, patch_size: int) -> Tensor:
    """A convolution of stride patch_size over pixels, as one integer matmul.

    images      (B, C, H, W)    uint8, any memory format; H and W multiples of patch_size
    w_packed    packed          uint8; holds (N, C patch_size^2), inputs in channel, row, column order
    w_scale     (N,)            float32
    bias        (N,) | (P, N)   float32; per patch when it carries the position embedding
    returns     (B, P, N)       float32, P = (H / patch_size) (W / patch_size)

    Raises TypeError when images are not uint8, ValueError for shapes that disagree. No gradient.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"quant_patch_embed: images must be uint8 pixels, got {images.dtype}")
    if patch_size < 1:
        raise ValueError(f"quant_patch_embed: patch_size={patch_size}; use a positive integer")
    if images.dim() != 4 or images.shape[2] % patch_size or images.shape[3] % patch_size:
        raise ValueError(
            f"quant_patch_embed: images must be (B, C, H, W) with sides that are multiples of {patch_size}, "
            f"got {tuple(images.shape)}"
        )
    patches = (images.shape[2] // patch_size) * (images.shape[3] // patch_size)
    N = check_weight("quant_patch_embed", w_packed, w_scale, None, images.shape[1] * patch_size**2)
    if bias.shape not in ((N,), (patches, N)):
        raise ValueError(f"quant_patch_embed: bias is {tuple(bias.shape)}; use ({N},) or ({patches}, {N})")
    return _op(images, w_packed, w_scale, bias, patch_size)
