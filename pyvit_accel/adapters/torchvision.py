"""torchvision: the encoder block, MLP and patch convolution of torchvision.models.vision_transformer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pyvit_accel.adapters import multihead
from pyvit_accel.adapters._common import (
    Adapter,
    check_forward,
    read_activation,
    read_block,
    read_linear,
    read_norm,
    read_patch_embed,
    refuse,
)
from pyvit_accel.errors import Unsupported
from pyvit_accel.modules.parts import BlockParts, MlpParts, PatchEmbedParts

BLOCK = ("torchvision.models.vision_transformer.EncoderBlock",)
MLP = ("torchvision.models.vision_transformer.MLPBlock",)


def block_parts(block: nn.Module) -> BlockParts:
    check_forward(block, BLOCK)
    return read_block(
        norm1=read_norm(block.ln_1, "ln_1"),
        attention=multihead.attention_parts(block.self_attention),
        norm2=read_norm(block.ln_2, "ln_2"),
        mlp=mlp_parts(block.mlp),
    )


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
    "torchvision.models.swin_transformer.SwinTransformerBlock": refuse(
        "window attention with a bias per relative position"
    ),
}
MLPS = {"torchvision.models.vision_transformer.MLPBlock": Adapter(mlp_parts)}
PATCH_EMBEDS = {
    "torchvision.models.vision_transformer.VisionTransformer": Adapter(patch_embed_parts, ConvLayout, path="conv_proj"),
}
