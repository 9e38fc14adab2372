"""torchvision: the encoder block, MLP and patch convolution of its ViT, and the window attention of its Swin."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyvit_accel.adapters import multihead, windows
from pyvit_accel.adapters._common import (
    Adapter,
    SharedLinear,
    check_forward,
    read_activation,
    read_attention,
    read_block,
    read_linear,
    read_norm,
    read_patch_embed,
    refuse,
)
from pyvit_accel.errors import Unsupported
from pyvit_accel.modules.parts import AttentionParts, BlockParts, MlpParts, PatchEmbedParts

BLOCK = ("torchvision.models.vision_transformer.EncoderBlock",)
MLP = ("torchvision.models.vision_transformer.MLPBlock", "torchvision.ops.misc.MLP")
SWIN = "torchvision.models.swin_transformer"
WINDOWS, WINDOWS_V2 = f"{SWIN}.ShiftedWindowAttention", f"{SWIN}.ShiftedWindowAttentionV2"


def block_parts(block: nn.Module) -> BlockParts:
    check_forward(block, BLOCK)
    return read_block(
        norm1=read_norm(block.ln_1, "ln_1"),
        attention=multihead.attention_parts(block.self_attention),
        norm2=read_norm(block.ln_2, "ln_2"),
        mlp=mlp_parts(block.mlp),
    )


def window_parts(attention: nn.Module) -> AttentionParts:
    """It multiplies with qkv.weight itself: calibration sees no input or output of that Linear."""
    check_forward(attention, (WINDOWS_V2, WINDOWS))
    qkv, proj = read_linear(attention.qkv, "qkv"), read_linear(attention.proj, "proj")
    C, index, position = qkv.in_features, attention.relative_position_index, {}
    bias = None if qkv.bias is None else qkv.bias.detach()
    if hasattr(attention, "logit_scale"):
        position = windows.cosine(attention.logit_scale)
        position["bias"] = windows.continuous_bias(attention.cpb_mlp, attention.relative_coords_table, index)
        bias = None if bias is None else bias.index_fill(0, torch.arange(C, 2 * C, device=bias.device), 0.0)
    else:
        position["scale"] = (C // attention.num_heads) ** -0.5
        position["bias"] = windows.relative_bias(attention.relative_position_bias_table, index)
    return read_attention((SharedLinear(qkv.weight, bias),), proj, attention.num_heads, **position)


def mlp_parts(mlp: nn.Module) -> MlpParts:
    """MLPBlock is a Sequential: Linear, GELU, Linear, with dropouts between, under names that changed over time."""
    check_forward(mlp, MLP)
    layers = [layer for layer in mlp if not isinstance(layer, nn.Dropout)]
    if len(layers) != 3:
        raise Unsupported(f"{type(mlp).__name__} has {len(layers)} layers, expected Linear, activation, Linear")
    fc1, activation, fc2 = layers
    return MlpParts(read_linear(fc1, "mlp.0"), read_linear(fc2, "mlp.3"), read_activation(activation))


def patch_embed_parts(
    model: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> PatchEmbedParts:
    """The convolution of model.conv_proj; torchvision keeps mean and std with the weights, so they must be given."""
    if isinstance(model.conv_proj, nn.Sequential):
        raise Unsupported("conv_proj is a convolutional stem")
    return read_patch_embed(model.conv_proj, mean, std, "conv_proj")


class ConvLayout(nn.Module):
    """A patch embedding (B, P, C) that returns what a convolution does: (B, C, H / patch, W / patch), as a view."""

    def __init__(self, accelerated: nn.Module, original: nn.Module) -> None:
        super().__init__()
        self.accelerated, self.patch_size = accelerated, original.kernel_size[0]

    def forward(self, images: Tensor) -> Tensor:
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        return self.accelerated(images).transpose(1, 2).unflatten(2, grid)


BLOCKS = {
    "torchvision.models.vision_transformer.EncoderBlock": Adapter(block_parts),
    f"{SWIN}.SwinTransformerBlock": refuse(windows.IN_WINDOWS),
}
ATTENTIONS = dict.fromkeys((WINDOWS, WINDOWS_V2), Adapter(window_parts, windows.ShiftedWindows))
MLPS = dict.fromkeys(MLP, Adapter(mlp_parts))
PATCH_EMBEDS = {
    "torchvision.models.vision_transformer.VisionTransformer": Adapter(patch_embed_parts, ConvLayout, path="conv_proj"),
}
