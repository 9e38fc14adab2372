"""QuantPatchEmbed: the patch convolution of a ViT on raw uint8 pixels, as one integer matmul."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel import ops

from .parts import PatchEmbedParts
from .quant_linear import PackedWeight, check_weight


class QuantPatchEmbed(PackedWeight):
    """images (B, Cin, H, W) to patches (B, P, C) in the dtype of the convolution; int8 weights, pixels exact.

    uint8 images are used as they are. Normalised float images are mapped back to the nearest pixel value, 1/255 apart,
    which is exact when they came from uint8 pixels normalised with the same mean and std.
    """

    def __init__(self, in_channels: int, out_features: int, patch_size: int, dtype: str = "float32") -> None:
        super().__init__(in_channels * patch_size**2, out_features)
        self.in_channels, self.patch_size, self.dtype = in_channels, patch_size, getattr(torch, dtype)
        self.register_buffer("mean", torch.zeros(in_channels, 1, 1))
        self.register_buffer("std", torch.ones(in_channels, 1, 1))

    @classmethod
    def from_parts(cls, parts: PatchEmbedParts) -> QuantPatchEmbed:
        """Raises Unsupported for NaN or infinite weights."""
        conv = parts.conv
        check_weight(conv)
        dtype = str(conv.weight.dtype).removeprefix("torch.")
        new = cls(conv.in_channels, conv.out_channels, conv.kernel_size[0], dtype).to(conv.weight.device)
        new.mean.copy_(torch.tensor(parts.mean)[:, None, None])
        new.std.copy_(torch.tensor(parts.std)[:, None, None])
        weight = conv.weight.detach().double()
        mean, std = new.mean.double(), new.std.double()
        bias = 0 if conv.bias is None else conv.bias.detach().double()
        new.pack((weight / (255 * std)).flatten(1), bias - (weight * (mean / std)).sum(dim=(1, 2, 3)))
        return new

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"QuantPatchEmbed: images have shape {tuple(images.shape)}, expected (B, {self.in_channels}, H, W)"
            )
        if images.dtype != torch.uint8:
            pixels = (images.float() * self.std + self.mean) * 255
            images = torch.round(pixels).clamp(0, 255).to(torch.uint8)
        return ops.quant_patch_embed(images, self.w_packed, self.w_scale, self.bias, self.patch_size).to(self.dtype)

    def config(self) -> dict:
        return {
            "in_channels": self.in_channels,
            "out_features": self.out_features,
            "patch_size": self.patch_size,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, out_features={self.out_features}, patch_size={self.patch_size}, int8"
