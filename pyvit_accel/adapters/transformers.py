"""Hugging Face transformers: the pre-norm layers of its vision models, in the layouts of releases 4.4x to 5.x.

Release 5 keeps q_proj, k_proj, v_proj and o_proj side by side; release 4 nests attention.attention.query,
attention.output.dense, intermediate.dense and output.dense. CLIP and SigLIP have had one layout throughout.
"""

from __future__ import annotations

import inspect
from functools import cache

from torch import Tensor, nn

from pyvit_accel.adapters._common import (
    Adapter,
    check_forward,
    read_activation,
    read_attention,
    read_block,
    read_linear,
    read_norm,
    refuse,
)
from pyvit_accel.errors import Unsupported
from pyvit_accel.modules.parts import AttentionParts, BlockParts, MlpParts

# Folder under transformers.models, and what its class names begin with.
ENCODERS = {
    "vit": "ViT",
    "deit": "DeiT",
    "vit_mae": "ViTMAE",
    "vit_msn": "ViTMSN",
    "ijepa": "IJepa",
    "vivit": "Vivit",
    "dinov2": "Dinov2",
    "dinov2_with_registers": "Dinov2WithRegisters",
}
TOWERS = {"clip": "CLIP", "metaclip_2": "MetaClip2", "siglip": "Siglip", "siglip2": "Siglip2"}
CAUSAL_CONFIGS = ("CLIPTextConfig", "MetaClip2TextConfig")
CAPTURE_MODULE = "transformers.utils.output_capturing"


def _names(families: dict[str, str], suffix: str) -> tuple[str, ...]:
    return tuple(f"transformers.models.{folder}.modeling_{folder}.{name}{suffix}" for folder, name in families.items())


LAYER = _names(ENCODERS, "Layer") + _names(TOWERS, "EncoderLayer")
ATTENTION = _names(ENCODERS | TOWERS, "Attention")
MLP = _names(ENCODERS | TOWERS, "MLP")
INTERMEDIATE, OUTPUT = _names(ENCODERS, "Intermediate"), _names(ENCODERS, "Output")
SELF_ATTENTION, SELF_OUTPUT = _names(ENCODERS, "SelfAttention"), _names(ENCODERS, "SelfOutput")


def block_parts(layer: nn.Module) -> BlockParts:
    """A ViTLayer, Dinov2Layer, CLIPEncoderLayer or the like. The text tower of CLIP, which is causal, is refused."""
    check_forward(layer, LAYER)
    norm1 = _child(layer, "layernorm_before", "layer_norm1", "norm1")
    norm2 = _child(layer, "layernorm_after", "layer_norm2", "norm2")
    return read_block(
        norm1=read_norm(norm1, "norm before attention"),
        attention=attention_parts(_child(layer, "attention", "self_attn")),
        norm2=read_norm(norm2, "norm before mlp"),
        mlp=mlp_parts(layer.mlp) if hasattr(layer, "mlp") else _nested_mlp_parts(layer),
        layer_scale1=layer.layer_scale1.lambda1 if hasattr(layer, "layer_scale1") else None,
        layer_scale2=layer.layer_scale2.lambda1 if hasattr(layer, "layer_scale2") else None,
    )


def attention_parts(attention: nn.Module) -> AttentionParts:
    check_forward(attention, ATTENTION)
    if type(_config(attention)).__name__ in CAUSAL_CONFIGS:
        raise Unsupported("causal attention (text tower)")
    if hasattr(attention, "attention"):
        inner, out = attention.attention, attention.output
        check_forward(inner, SELF_ATTENTION)
        check_forward(out, SELF_OUTPUT)
        names, proj = ("query", "key", "value"), read_linear(out.dense, "output.dense")
    else:
        inner, names = attention, ("q_proj", "k_proj", "v_proj")
        proj = read_linear(_child(attention, "o_proj", "out_proj"), "out_proj")
    qkv = tuple(read_linear(getattr(inner, name), name) for name in names)
    num_heads = inner.num_heads if hasattr(inner, "num_heads") else inner.num_attention_heads
    scale = getattr(inner, "scaling", None) or getattr(inner, "scale", None) or (proj.in_features / num_heads) ** -0.5
    return read_attention(qkv, proj, num_heads, scale)


def mlp_parts(mlp: nn.Module) -> MlpParts:
    if "SwiGLU" in type(mlp).__name__:
        raise Unsupported(f"{type(mlp).__name__}: gated MLP")
    check_forward(mlp, MLP)
    activation = read_activation(_child(mlp, "activation_fn", "activation"))
    return MlpParts(read_linear(mlp.fc1, "fc1"), read_linear(mlp.fc2, "fc2"), activation)


def _nested_mlp_parts(layer: nn.Module) -> MlpParts:
    check_forward(layer.intermediate, INTERMEDIATE)
    check_forward(layer.output, OUTPUT)
    fc1, fc2 = layer.intermediate.dense, layer.output.dense
    activation = read_activation(layer.intermediate.intermediate_act_fn)
    return MlpParts(read_linear(fc1, "intermediate.dense"), read_linear(fc2, "output.dense"), activation)


def _child(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise Unsupported(f"{type(module).__name__} has no {' or '.join(names)}: a layout this release does not know")


def _config(attention: nn.Module) -> object | None:
    return getattr(attention, "config", None) or getattr(getattr(attention, "attention", None), "config", None)


class _Call(nn.Module):
    """The call of a transformers module, reduced to (hidden_states, attention_mask) for an accelerated one.

    Raises ValueError for what the accelerated module does not do: attention weights, head masks, causal attention.
    """

    def __init__(self, accelerated: nn.Module, original: nn.Module, config: object | None) -> None:
        nn.Module.__init__(self)
        names = tuple(inspect.signature(type(original).forward).parameters)[1:]
        self.accelerated, self.config, self._names = accelerated, config, names
        self.train(original.training)

    def _run(self, args: tuple, kwargs: dict) -> Tensor:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if given.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise ValueError("output_attentions=True: an accelerated layer forms no attention weights; ask without it")
        if given.get("is_causal") or given.get("causal_attention_mask") is not None:
            raise ValueError("causal attention reached a layer that was accelerated without it; keep it in the recipe")
        if given.get("head_mask") is not None:
            raise ValueError("head_mask reached an accelerated layer, which cannot mask heads; keep it in the recipe")
        x = given[self._names[0]]
        mask = self._mask(given.get("attention_mask"), x)
        rotary = given.get("position_embeddings")
        return self.accelerated(x, mask) if rotary is None else self.accelerated(x, mask, rotary)

    def _mask(self, mask: Tensor | None, x: Tensor) -> Tensor | None:
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 4):
            came = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"attention_mask came as {came}, expected 4-D; load with attn_implementation='sdpa'")
        return mask


class _LayerCall(_Call):
    """An accelerated block in the place of a layer; mixed into the layer's own class by _layer_class.

    transformers records hidden states with hooks on instances of the layer class, so it must stay an instance.
    """

    def __init__(self, accelerated: nn.Module, original: nn.Module) -> None:
        super().__init__(accelerated, original, _config(_child(original, "attention", "self_attn")))
        self._returns_tuple = "output_attentions" in self._names  # up to 4.5x; a plain tensor since
        # Hooks that recorded hidden states before the conversion are not installed a second time by transformers.
        for key, hook in original._forward_hooks.items():
            if getattr(hook, "__module__", None) == CAPTURE_MODULE:
                self._forward_hooks[key] = hook

    def forward(self, *args, **kwargs) -> Tensor | tuple[Tensor]:
        x = self._run(args, kwargs)
        return (x,) if self._returns_tuple else x

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _new_layer, (type(self).__bases__[1],), self.__dict__


@cache
def _layer_class(original: type[nn.Module]) -> type[nn.Module]:
    return type(f"Accelerated{original.__name__}", (_LayerCall, original), {"__module__": __name__})


def _new_layer(original: type[nn.Module]) -> nn.Module:
    cls = _layer_class(original)
    return cls.__new__(cls)


def wrap_layer(accelerated: nn.Module, original: nn.Module) -> nn.Module:
    return _layer_class(type(original))(accelerated, original)


class AttentionCall(_Call):
    """An accelerated attention in the place of a model's own: returns (output, None), or what 4.x returned."""

    def __init__(self, accelerated: nn.Module, original: nn.Module) -> None:
        super().__init__(accelerated, original, _config(original))
        nested = hasattr(original, "attention") or hasattr(original, "self")
        asks_weights = "output_attentions" in self._names
        self._num_outputs = 2 if not nested else 1 if asks_weights else 0  # 0: a tensor, not a tuple

    def forward(self, *args, **kwargs) -> Tensor | tuple:
        x = self._run(args, kwargs)
        return (x, None)[: self._num_outputs] if self._num_outputs else x


_MODELS = "transformers.models"
BLOCKS = {
    **dict.fromkeys(LAYER, Adapter(block_parts, wrap_layer)),
    f"{_MODELS}.beit.modeling_beit.BeitLayer": refuse("attention bias per relative position"),
    f"{_MODELS}.data2vec.modeling_data2vec_vision.Data2VecVisionLayer": refuse("attention bias per relative position"),
}
ATTENTIONS = dict.fromkeys(ATTENTION, Adapter(attention_parts, AttentionCall))
MLPS = dict.fromkeys(MLP, Adapter(mlp_parts))
