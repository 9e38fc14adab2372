"""QuantPatchEmbed: the patch convolution of a ViT on raw uint8 pixels, as one integer matmul."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyvit_accel import ops
from pyvit_accel.formats import affine

from .parts import PatchEmbedParts
from .quant_linear import PackedWeight, check_weight


class QuantPatchEmbed(PackedWeight):
    """images (B, Cin, H, W) to patches (B, P, C) in the dtype of the convolution.

    uint8 images are raw pixels: they are multiplied as they are, by int8 weights that contain the normalisation. Floats
    are normalised already, who knows how, and go through the convolution itself, 1 % of a model's work.
    """

    def __init__(
        self, in_channels: int, out_features: int, patch_size: int, bias: bool = True, dtype: str = "float32"
    ) -> None:
        super().__init__(in_channels * patch_size**2, out_features)
        self.patch_size = patch_size
        self.conv = nn.Conv2d(
            in_channels, out_features, patch_size, stride=patch_size, bias=bias, dtype=getattr(torch, dtype)
        )
        self.requires_grad_(False)

    @classmethod
    def from_parts(cls, parts: PatchEmbedParts) -> QuantPatchEmbed:
        """Raises Unsupported for NaN or infinite weights."""
        conv = parts.conv
        check_weight(conv)
        dtype = str(conv.weight.dtype).removeprefix("torch.")
        new = cls(conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.bias is not None, dtype)
        new.conv.load_state_dict(conv.state_dict())
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (parts.mean, parts.std))
        weight = new.conv.weight.double()
        bias = 0 if conv.bias is None else new.conv.bias.double()
        codes, scale = affine.quantize_weight((weight / (255 * std)).flatten(1))
        new.pack(codes, scale, bias - (weight * (mean / std)).sum(dim=(1, 2, 3)))
        return new.to(conv.weight.device)

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] != self.conv.in_channels:
            raise ValueError(
                f"QuantPatchEmbed: images have shape {tuple(images.shape)}, expected (B, {self.conv.in_channels}, H, W)"
            )
        dtype = self.conv.weight.dtype
        if images.dtype != torch.uint8:
            return self.conv(images.to(dtype)).flatten(2).transpose(1, 2)
        return ops.quant_patch_embed(images, self.w_packed, self.w_scale, self.bias, self.patch_size).to(dtype)

    def formats(self) -> tuple[str, str]:
        return f"int{self.w_bits}", "uint8"

    def config(self) -> dict:
        return {
            "in_channels": self.conv.in_channels,
            "out_features": self.out_features,
            "patch_size": self.patch_size,
            "bias": self.conv.bias is not None,
            "dtype": str(self.conv.weight.dtype).removeprefix("torch."),
        }

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, weight=int8, pixels=uint8"
