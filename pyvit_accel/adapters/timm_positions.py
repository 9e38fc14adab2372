"""timm: attentions that know where tokens stand: Swin, BEiT, relative position, rotary (EVA), SAM."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyvit_accel.adapters import windows
from pyvit_accel.adapters._common import (
    Adapter,
    check_forward,
    read_attention,
    read_head_norm,
    read_linear,
    read_qkv_biases,
)
from pyvit_accel.errors import Unsupported
from pyvit_accel.modules.parts import AttentionParts

SWIN, SWIN_V2 = "timm.models.swin_transformer.WindowAttention", "timm.models.swin_transformer_v2.WindowAttention"
BEIT, RELATIVE = "timm.models.beit.Attention", "timm.models.vision_transformer_relpos.RelPosAttention"
ROTARY = ("timm.layers.attention.AttentionRope", "timm.models.eva.EvaAttention")
SAM = "timm.models.vision_transformer_sam.Attention"


def _read(attention: nn.Module, qkv: nn.Linear | tuple[nn.Linear, ...], **position) -> AttentionParts:
    if not isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity):
        raise Unsupported("norm between attention and proj")
    return read_attention(
        qkv=qkv if isinstance(qkv, tuple) else (qkv,),
        proj=read_linear(attention.proj, "proj"),
        num_heads=attention.num_heads,
        **{name: read_head_norm(getattr(attention, name, nn.Identity()), name) for name in ("q_norm", "k_norm")},
        **({"scale": getattr(attention, "scale", 1.0)} | position),
    )


def window_parts(attention: nn.Module) -> AttentionParts:
    check_forward(attention, (SWIN,))
    bias = windows.relative_bias(attention.relative_position_bias_table, attention.relative_position_index)
    return _read(attention, read_linear(attention.qkv, "qkv"), bias=bias)


def window_v2_parts(attention: nn.Module) -> AttentionParts:
    check_forward(attention, (SWIN_V2,))
    index = attention.relative_position_index
    bias = windows.continuous_bias(attention.cpb_mlp, attention.relative_coords_table, index)
    return _read(attention, read_qkv_biases(attention), bias=bias, **windows.cosine(attention.logit_scale))


def beit_parts(attention: nn.Module) -> AttentionParts:
    check_forward(attention, (BEIT,))
    table, bias = attention.relative_position_bias_table, None
    if table is not None:
        bias = windows.relative_bias(table, attention.relative_position_index)
    return _read(attention, read_qkv_biases(attention), bias=bias)


def relative_parts(attention: nn.Module) -> AttentionParts:
    check_forward(attention, (RELATIVE,))
    with torch.no_grad():
        bias = None if attention.rel_pos is None else attention.rel_pos.get_bias()[0]
    return _read(attention, read_linear(attention.qkv, "qkv"), bias=bias)


def rotary_parts(attention: nn.Module) -> AttentionParts:
    check_forward(attention, ROTARY)
    if attention.qkv is None:
        qkv = tuple(read_linear(getattr(attention, name), name) for name in ("q_proj", "k_proj", "v_proj"))
    else:
        qkv = read_qkv_biases(attention) if hasattr(attention, "q_bias") else read_linear(attention.qkv, "qkv")
    return _read(attention, qkv, rotary=_rotary(attention))


def grid_parts(attention: nn.Module) -> AttentionParts:
    """SAM: tokens come as a grid, (B, h, w, C)."""
    check_forward(attention, (SAM,))
    position = {"tables": (attention.rel_pos_h, attention.rel_pos_w)} if attention.use_rel_pos else {}
    if attention.rope is not None:
        position["rotary"] = "interleaved"
    return _read(attention, read_linear(attention.qkv, "qkv"), **position)


def _rotary(attention: nn.Module) -> str:
    return "half" if getattr(attention, "rotate_half", False) else "interleaved"


def cos_sin(rope: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """timm keeps sin and cos side by side, (..., N, 2 D)."""
    return None if rope is None else rope.chunk(2, dim=-1)[::-1]


class SharedBias(nn.Module):
    """forward(x, shared bias) of BEiT, and of relative position, which ignores it where it has a bias of its own."""

    def __init__(self, accelerated: nn.Module, original: nn.Module) -> None:
        super().__init__()
        self.accelerated = accelerated
        self.ignores = getattr(original, "rel_pos", None) is not None

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        return self.accelerated(x, None if self.ignores else shared_rel_pos)


class BeitBias(SharedBias):
    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        return self.accelerated(x, shared_rel_pos_bias)


class Rotary(nn.Module):
    """forward(x, rope, attn_mask)."""

    def __init__(self, accelerated: nn.Module, original: nn.Module) -> None:
        super().__init__()
        self.accelerated = accelerated

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        return self.accelerated(x, attn_mask, cos_sin(rope))


class Grid(nn.Module):
    """forward(x) with x (B, h, w, C); rope is the module of the original, which all blocks share."""

    def __init__(self, accelerated: nn.Module, original: nn.Module) -> None:
        super().__init__()
        self.accelerated, self.rope = accelerated, original.rope

    def forward(self, x: Tensor) -> Tensor:
        return self.accelerated(x, None, None if self.rope is None else cos_sin(self.rope.get_embed()))


ATTENTIONS = {
    SWIN: Adapter(window_parts, windows.Windows),
    SWIN_V2: Adapter(window_v2_parts, windows.Windows),
    BEIT: Adapter(beit_parts, BeitBias),
    RELATIVE: Adapter(relative_parts, SharedBias),
    **dict.fromkeys(ROTARY, Adapter(rotary_parts, Rotary)),
    SAM: Adapter(grid_parts, Grid),
}
