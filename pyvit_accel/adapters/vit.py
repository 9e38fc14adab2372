"""models/vit.py: the same blocks as timm's, without masks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pyvit_accel.adapters._common import Adapter, check_forward, read_patch_embed
from pyvit_accel.adapters.timm import attention_parts, block_parts, mlp_parts
from pyvit_accel.modules.parts import PatchEmbedParts


def patch_embed_parts(
    model: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> PatchEmbedParts:
    """The convolution of model.patch_embed; mean and std are the ones it normalises uint8 pixels with, unless given."""
    embed = model.patch_embed
    check_forward(embed, ("pyvit_accel.models.vit.PatchEmbed",))
    return read_patch_embed(embed.proj, mean or embed.mean, std or embed.std, "patch_embed.proj")


BLOCKS = {"pyvit_accel.models.vit.Block": Adapter(block_parts)}
ATTENTIONS = {"pyvit_accel.models.vit.Attention": Adapter(attention_parts)}
MLPS = {"pyvit_accel.models.vit.Mlp": Adapter(mlp_parts)}
PATCH_EMBEDS = {"pyvit_accel.models.vit.VisionTransformer": Adapter(patch_embed_parts, path="patch_embed")}
