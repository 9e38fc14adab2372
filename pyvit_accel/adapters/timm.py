"""timm: the blocks of timm.models.vision_transformer, and the attention and MLP inside them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import Tensor, nn

from pyvit_accel.adapters import timm_positions, windows
from pyvit_accel.adapters._common import (
    Adapter,
    check_forward,
    dotted_name,
    read_activation,
    read_attention,
    read_block,
    read_head_norm,
    read_linear,
    read_norm,
    read_patch_embed,
    refuse,
)
from pyvit_accel.errors import Unsupported
from pyvit_accel.modules.parts import AttentionParts, BlockParts, MlpParts, PatchEmbedParts

BLOCK = ("timm.models.vision_transformer.Block", "pyvit_accel.models.vit.Block")
ATTENTION = (
    "timm.layers.attention.Attention",
    "timm.models.vision_transformer.Attention",
    "pyvit_accel.models.vit.Attention",
)
MLP = ("timm.layers.mlp.Mlp", "pyvit_accel.models.vit.Mlp")
LAYER_SCALE = (
    "timm.layers.layer_scale.LayerScale",
    "timm.models.vision_transformer.LayerScale",
    "pyvit_accel.models.vit.LayerScale",
)
RELATIVE = "attention bias per relative position; attention and MLP are replaced one by one"
ROTARY = "rotary position embedding; attention and MLP are replaced one by one"
PATCH_EMBED = ("timm.layers.patch_embed.PatchEmbed",)


def block_parts(block: nn.Module) -> BlockParts:
    """A pre-norm Block with optional LayerScale. Stochastic depth and dropout, identities in eval, are left out."""
    check_forward(block, BLOCK)
    return read_block(
        norm1=read_norm(block.norm1, "norm1"),
        attention=attention_parts(block.attn),
        norm2=read_norm(block.norm2, "norm2"),
        mlp=mlp_parts(block.mlp),
        layer_scale1=_layer_scale(block.ls1),
        layer_scale2=_layer_scale(block.ls2),
    )


def attention_parts(attention: nn.Module) -> AttentionParts:
    check_forward(attention, ATTENTION)
    if not isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity):
        raise Unsupported("norm between attention and proj (scale_attn_norm)")
    return read_attention(
        qkv=(read_linear(attention.qkv, "qkv"),),
        proj=read_linear(attention.proj, "proj"),
        num_heads=attention.num_heads,
        scale=attention.scale,
        q_norm=read_head_norm(getattr(attention, "q_norm", nn.Identity()), "q_norm"),
        k_norm=read_head_norm(getattr(attention, "k_norm", nn.Identity()), "k_norm"),
    )


def mlp_parts(mlp: nn.Module) -> MlpParts:
    if any(word in type(mlp).__name__ for word in ("Glu", "GLU", "Gated")):
        raise Unsupported(f"{type(mlp).__name__}: gated MLP")
    check_forward(mlp, MLP)
    if not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity):
        raise Unsupported("norm between fc1 and fc2 (scale_mlp_norm)")
    return MlpParts(read_linear(mlp.fc1, "fc1"), read_linear(mlp.fc2, "fc2"), read_activation(mlp.act))


def patch_embed_parts(
    model: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> PatchEmbedParts:
    """The convolution of model.patch_embed; mean and std come from the model's pretrained_cfg unless given."""
    embed, cfg = model.patch_embed, getattr(model, "pretrained_cfg", None) or {}
    check_forward(embed, PATCH_EMBED)
    if not embed.flatten or getattr(embed, "dynamic_img_pad", False):
        raise Unsupported("patch_embed serves a dynamic image size")
    if not isinstance(embed.norm, nn.Identity):
        raise Unsupported("patch_embed ends in a norm")
    mean, std = mean or cfg.get("mean"), std or cfg.get("std")
    return read_patch_embed(embed.proj, mean, std, "patch_embed.proj")


def _layer_scale(module: nn.Module) -> Tensor | None:
    if isinstance(module, nn.Identity):
        return None
    if dotted_name(type(module)) not in LAYER_SCALE:
        raise Unsupported(f"{type(module).__name__} in the place of LayerScale")
    return module.gamma


class NotCausal(nn.Module):
    """forward(x, attn_mask, is_causal) of newer timm, for a module that is never causal."""

    def __init__(self, accelerated: nn.Module) -> None:
        super().__init__()
        self.accelerated = accelerated

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if is_causal:
            raise ValueError(
                "is_causal=True: this block was accelerated without causal attention; keep it in the recipe"
            )
        return self.accelerated(x, attn_mask)


def wrap(accelerated: nn.Module, original: nn.Module) -> nn.Module:
    takes_causal = "is_causal" in inspect.signature(type(original).forward).parameters
    return NotCausal(accelerated) if takes_causal else accelerated


class PatchEmbed(nn.Module):
    """An accelerated patch embedding with what timm's models ask theirs: patch_size, grid_size, feat_ratio()."""

    def __init__(self, accelerated: nn.Module, original: nn.Module) -> None:
        super().__init__()
        self.accelerated = accelerated
        self.patch_size, self.img_size = original.patch_size, original.img_size
        self.grid_size, self.num_patches = original.grid_size, original.num_patches

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def forward(self, images: Tensor) -> Tensor:
        return self.accelerated(images)


BLOCKS = {
    "timm.models.vision_transformer.Block": Adapter(block_parts, wrap),
    "timm.models.vision_transformer.ResPostBlock": refuse("the norms come after attention and MLP (post-norm)"),
    "timm.models.vision_transformer.ParallelScalingBlock": refuse("attention and MLP run in parallel"),
    "timm.models.vision_transformer.ParallelThingsBlock": refuse("attention and MLP run in parallel"),
    "timm.models.vision_transformer.DiffParallelScalingBlock": refuse("attention and MLP run in parallel"),
    "timm.models.beit.Block": refuse(RELATIVE),
    "timm.models.vision_transformer_relpos.RelPosBlock": refuse(RELATIVE),
    "timm.models.vision_transformer_relpos.ResPostRelPosBlock": refuse(RELATIVE),
    "timm.models.eva.EvaBlock": refuse(ROTARY),
    "timm.models.eva.EvaBlockPostNorm": refuse("the norms come after attention and MLP (post-norm)"),
    "timm.models.cait.LayerScaleBlock": refuse("talking-heads attention"),
    "timm.models.cait.LayerScaleBlockClassAttn": refuse("class attention"),
    "timm.models.swin_transformer.SwinTransformerBlock": refuse(windows.IN_WINDOWS),
    "timm.models.vision_transformer_sam.Block": refuse(windows.IN_WINDOWS),
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": refuse(windows.IN_WINDOWS),
}
ATTENTIONS = {
    "timm.layers.attention.Attention": Adapter(attention_parts, wrap),
    "timm.models.vision_transformer.Attention": Adapter(attention_parts, wrap),
    **timm_positions.ATTENTIONS,
}
MLPS = {
    "timm.layers.mlp.Mlp": Adapter(mlp_parts),
    "timm.layers.mlp.GluMlp": refuse("gated MLP"),
    "timm.layers.mlp.SwiGLU": refuse("gated MLP"),
    "timm.layers.mlp.GatedMlp": refuse("gated MLP"),
}
PATCH_EMBEDS = {
    "timm.models.vision_transformer.VisionTransformer": Adapter(patch_embed_parts, PatchEmbed, path="patch_embed"),
}
