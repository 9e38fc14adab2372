"""Hugging Face transformers: attentions that know where tokens stand: Swin, Swin V2, SAM, ViTDet, DINOv3."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from pyvit_accel.adapters import windows
from pyvit_accel.adapters._common import (
    Adapter,
    check_forward,
    dotted_name,
    read_activation,
    read_attention,
    read_linear,
    refuse,
)
from pyvit_accel.adapters.transformers import AttentionCall
from pyvit_accel.modules.parts import AttentionParts, MlpParts

MODELS = "transformers.models"
# What the class names begin with. Up to release 4 Swin nests self and output, as the others still do.
WINDOWED = {
    "Swin": f"{MODELS}.swin.modeling_swin",
    "Swinv2": f"{MODELS}.swinv2.modeling_swinv2",
    "DonutSwin": f"{MODELS}.donut.modeling_donut_swin",
    "MaskFormerSwin": f"{MODELS}.maskformer.modeling_maskformer_swin",
}
GRIDS = {"Sam": f"{MODELS}.sam.modeling_sam", "SamHQ": f"{MODELS}.sam_hq.modeling_sam_hq"}
VITDET = f"{MODELS}.vitdet.modeling_vitdet"
DINOV3 = f"{MODELS}.dinov3_vit.modeling_dinov3_vit"


def _names(folders: dict[str, str], *suffixes: str) -> tuple[str, ...]:
    return tuple(f"{folder}.{name}{suffix}" for name, folder in folders.items() for suffix in suffixes)


WINDOW = _names(WINDOWED, "Attention")
SELF_ATTENTION, SELF_OUTPUT = _names(WINDOWED, "SelfAttention"), _names(WINDOWED, "SelfOutput")
GRID = (*_names(GRIDS, "VisionSdpaAttention", "VisionAttention"), f"{VITDET}.VitDetAttention")
ROTARY = (f"{DINOV3}.DINOv3ViTAttention",)
MLP_NAMES = {
    f"{MODELS}.swin.modeling_swin.SwinMLP": ("fc1", "activation_fn", "fc2"),
    f"{DINOV3}.DINOv3ViTMLP": ("up_proj", "act_fn", "down_proj"),
    f"{VITDET}.VitDetMlp": ("fc1", "act", "fc2"),
    **dict.fromkeys(_names(GRIDS, "MLPBlock"), ("lin1", "act", "lin2")),
}


def window_parts(attention: nn.Module) -> AttentionParts:
    check_forward(attention, WINDOW)
    if hasattr(attention, "self"):
        inner, names, proj = attention.self, ("query", "key", "value"), read_linear(attention.output.dense, "dense")
        check_forward(inner, SELF_ATTENTION)
        check_forward(attention.output, SELF_OUTPUT)
        table = inner
    else:
        inner, names, proj = attention, ("q_proj", "k_proj", "v_proj"), read_linear(attention.o_proj, "o_proj")
        table = attention.relative_position_bias
    index = table.relative_position_index
    if hasattr(inner, "logit_scale"):
        position = windows.cosine(inner.logit_scale)
        position["bias"] = windows.continuous_bias(
            inner.continuous_position_bias_mlp, inner.relative_coords_table, index
        )
    else:
        bias = windows.relative_bias(table.relative_position_bias_table, index)
        position = {"scale": (proj.in_features // inner.num_attention_heads) ** -0.5, "bias": bias}
    qkv = tuple(read_linear(getattr(inner, name), name) for name in names)
    return read_attention(qkv, proj, inner.num_attention_heads, **position)


def grid_parts(attention: nn.Module) -> AttentionParts:
    """SAM and ViTDet: tokens come as a grid, (B, h, w, C)."""
    check_forward(attention, GRID)
    heads = attention.num_heads if hasattr(attention, "num_heads") else attention.num_attention_heads
    tables = (attention.rel_pos_h, attention.rel_pos_w) if hasattr(attention, "rel_pos_h") else None
    qkv, proj = read_linear(attention.qkv, "qkv"), read_linear(attention.proj, "proj")
    return read_attention((qkv,), proj, heads, attention.scale, tables=tables)


def rotary_parts(attention: nn.Module) -> AttentionParts:
    check_forward(attention, ROTARY)
    qkv = tuple(read_linear(getattr(attention, name), name) for name in ("q_proj", "k_proj", "v_proj"))
    proj = read_linear(attention.o_proj, "o_proj")
    return read_attention(qkv, proj, attention.num_heads, attention.scaling, rotary="half")


def mlp_parts(mlp: nn.Module) -> MlpParts:
    check_forward(mlp, tuple(MLP_NAMES))
    names = (dotted_name(cls) for cls in type(mlp).__mro__)
    fc1, activation, fc2 = next(MLP_NAMES[name] for name in names if name in MLP_NAMES)
    linears = (read_linear(getattr(mlp, name), name) for name in (fc1, fc2))
    return MlpParts(*linears, read_activation(getattr(mlp, activation)))


class WindowCall(AttentionCall):
    """attention_mask is one for every window of an image, (nW, N, N), added to the scores `times` times."""

    def __init__(self, accelerated: nn.Module, original: nn.Module, times: int = 1) -> None:
        super().__init__(accelerated, original)
        self.times = times

    def _mask(self, mask: Tensor | None, x: Tensor) -> Tensor | None:
        return None if mask is None else windows.tile_mask(self.times * mask, x.shape[0])


class SingleCall(AttentionCall):
    """Returns (output,), as ViTDet does."""

    def forward(self, *args, **kwargs) -> tuple[Tensor]:
        return super().forward(*args, **kwargs)[:1]


BLOCKS = {
    f"{DINOV3}.DINOv3ViTLayer": refuse("rotary position embedding; attention and MLP are replaced one by one"),
    **dict.fromkeys(_names(WINDOWED, "Layer"), refuse(windows.IN_WINDOWS)),
    **dict.fromkeys((*_names(GRIDS, "VisionLayer"), f"{VITDET}.VitDetLayer"), refuse(windows.IN_WINDOWS)),
}
ATTENTIONS = {
    **dict.fromkeys(WINDOW, Adapter(window_parts, WindowCall)),
    # Its forward adds the mask in two statements, one after the other.
    f"{WINDOWED['Swinv2']}.Swinv2Attention": Adapter(window_parts, partial(WindowCall, times=2)),
    **dict.fromkeys(GRID, Adapter(grid_parts, AttentionCall)),
    f"{VITDET}.VitDetAttention": Adapter(grid_parts, SingleCall),
    **dict.fromkeys(ROTARY, Adapter(rotary_parts, AttentionCall)),
}
MLPS = dict.fromkeys(MLP_NAMES, Adapter(mlp_parts))
