"""What every adapter does: match a class by its dotted name, and check the parts it found.

Nothing here imports a foreign library: a class is known by the dotted names in its MRO.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from pyvit_accel.errors import Unsupported
from pyvit_accel.modules.parts import AttentionParts, BlockParts, MlpParts, PatchEmbedParts

LAYER_NORMS = (
    "torch.nn.modules.normalization.LayerNorm",
    "timm.layers.norm.LayerNorm",
    "timm.layers.norm.LayerNormFp32",
)
RMS_NORMS = (
    "torch.nn.modules.normalization.RMSNorm",
    "timm.layers.norm.RmsNorm",
    "timm.layers.norm.RmsNormFp32",
)
ACTIVATIONS = {
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "timm.layers.activations.QuickGELU": "quick_gelu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.PytorchGELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.FastGELUActivation": "gelu_tanh",
    "transformers.activations.AccurateGELUActivation": "gelu_tanh",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
}


def take_accelerated(accelerated: nn.Module, original: nn.Module) -> nn.Module:
    """The wrap of a module that is called as forward(x) or forward(x, attn_mask) and returns a tensor."""
    return accelerated


@dataclass(frozen=True)
class Adapter:
    """How one foreign class is read and replaced.

    parts(module) reads it into BlockParts, AttentionParts, MlpParts or PatchEmbedParts, or raises Unsupported.
    wrap(accelerated, original) gives what takes the place of `original`: same arguments, same return type.
    `accelerated` is called as forward(x, attn_mask=None), a patch embedding or an MLP as forward(x). attn_mask is what
    scaled_dot_product_attention takes, True where a query may look or an additive float; it broadcasts to (B, H, N, N).
    path is the dotted name, below the matched module, of what is replaced; empty for the module itself.
    """

    parts: Callable[..., BlockParts | AttentionParts | MlpParts | PatchEmbedParts]
    wrap: Callable[[nn.Module, nn.Module], nn.Module] = take_accelerated
    path: str = ""


def refuse(reason: str) -> Adapter:
    """The Adapter of a class that is known not to fit."""

    def parts(module: nn.Module) -> NoReturn:
        raise Unsupported(f"{type(module).__name__}: {reason}")

    return Adapter(parts)


def dotted_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def find(table: Mapping[str, Adapter], module: nn.Module) -> Adapter | None:
    """The adapter of the nearest class in the MRO of `module`, or None."""
    names = (dotted_name(cls) for cls in type(module).__mro__)
    return next((table[name] for name in names if name in table), None)


def check_forward(module: nn.Module, names: tuple[str, ...]) -> None:
    """Raises Unsupported unless `module` computes what the first class of its MRO named in `names` computes."""
    known = next((cls for cls in type(module).__mro__ if dotted_name(cls) in names), None)
    if known is None:
        expected = " or ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
        raise Unsupported(f"{dotted_name(type(module))} is not a {expected}")
    # Decorated forwards (gradient checkpointing, documentation) are compared by what they wrap.
    if inspect.unwrap(type(module).forward) is not inspect.unwrap(known.forward):
        raise Unsupported(f"{type(module).__name__} overrides the forward of {known.__name__}")
    # transformers 4 leaves its own bound forward on instances whose hidden states it once recorded.
    if getattr(vars(module).get("forward", module.forward), "__func__", None) is not type(module).forward:
        raise Unsupported(f"the forward of this {known.__name__} was replaced on the instance")


def read_linear(module: nn.Module, name: str) -> nn.Linear:
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise Unsupported(f"{name} is {type(module).__name__}, not nn.Linear")
    return module


def read_norm(module: nn.Module, name: str) -> nn.LayerNorm:
    """The LayerNorm itself, or, where it lacks weight or bias, its equal with weight 1 or bias 0."""
    if dotted_name(type(module)) not in LAYER_NORMS:
        raise Unsupported(f"{name} is {type(module).__name__}, not LayerNorm")
    if module.weight is not None and module.bias is not None:
        return module
    like = {} if module.weight is None else {"device": module.weight.device, "dtype": module.weight.dtype}
    norm = nn.LayerNorm(module.normalized_shape, module.eps, **like)
    if module.weight is not None:
        norm.weight = module.weight
    return norm.train(module.training)


def read_head_norm(module: nn.Module, name: str) -> nn.LayerNorm | nn.RMSNorm | None:
    """A norm over head_dim; None for nn.Identity."""
    if isinstance(module, nn.Identity):
        return None
    if dotted_name(type(module)) not in RMS_NORMS:
        if dotted_name(type(module)) not in LAYER_NORMS:
            raise Unsupported(f"{name} is {type(module).__name__}, neither LayerNorm nor RMSNorm")
        return read_norm(module, name)
    like = {} if module.weight is None else {"device": module.weight.device, "dtype": module.weight.dtype}
    eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
    norm = nn.RMSNorm(module.normalized_shape, eps, **like)
    if module.weight is not None:
        norm.weight = module.weight
    return norm.train(module.training)


class SharedLinear(nn.Linear):
    """A Linear of parameters that another module multiplies with by itself; calibration never sees it called.

    A class of its own: rules for nn.Linear must not take it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(*reversed(weight.shape), bias=bias is not None, device="meta")
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)


def read_qkv_biases(module: nn.Module) -> nn.Linear:
    """qkv of a module that keeps its bias apart, as q_bias, k_bias and v_bias, and may add it to the product itself."""
    weight = read_linear(module.qkv, "qkv").weight
    if module.q_bias is None:
        return module.qkv
    return SharedLinear(weight, torch.cat([module.q_bias, module.k_bias, module.v_bias]))


def read_activation(module: nn.Module) -> str:
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    name = ACTIVATIONS.get(dotted_name(type(module)))
    if name is None:
        raise Unsupported(f"activation {type(module).__name__} is not GELU, tanh GELU or quick GELU")
    return name


def read_attention(
    qkv: tuple[nn.Linear, ...],
    proj: nn.Linear,
    num_heads: int,
    scale: float,
    q_norm: nn.LayerNorm | nn.RMSNorm | None = None,
    k_norm: nn.LayerNorm | nn.RMSNorm | None = None,
    **position,
) -> AttentionParts:
    """AttentionParts, with the widths checked. position: the fields of AttentionParts after k_norm."""
    C = qkv[0].in_features
    widths = {linear.out_features for linear in qkv}
    if widths != {3 * C if len(qkv) == 1 else C} or (proj.in_features, proj.out_features) != (C, C):
        raise Unsupported(
            f"attention is {sum(linear.out_features for linear in qkv)} wide inside and {proj.out_features} outside, "
            f"expected {3 * C} and {C}"
        )
    if C % num_heads:
        raise Unsupported(f"num_heads={num_heads} does not divide C={C}")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None and tuple(norm.normalized_shape) != (C // num_heads,):
            raise Unsupported(f"{name} is over {tuple(norm.normalized_shape)}, not over head_dim={C // num_heads}")
    return AttentionParts(qkv, proj, num_heads, float(scale), q_norm, k_norm, **position)


def read_block(
    norm1: nn.LayerNorm,
    attention: AttentionParts,
    norm2: nn.LayerNorm,
    mlp: MlpParts,
    layer_scale1: Tensor | None = None,
    layer_scale2: Tensor | None = None,
) -> BlockParts:
    """BlockParts, with the widths checked."""
    C = attention.proj.out_features
    for name, norm in (("norm1", norm1), ("norm2", norm2)):
        if tuple(norm.normalized_shape) != (C,):
            raise Unsupported(f"{name} is over {tuple(norm.normalized_shape)}, expected ({C},)")
    if (mlp.fc1.in_features, mlp.fc2.in_features, mlp.fc2.out_features) != (C, mlp.fc1.out_features, C):
        raise Unsupported(
            f"mlp maps {mlp.fc1.in_features} -> {mlp.fc1.out_features}, {mlp.fc2.in_features} -> "
            f"{mlp.fc2.out_features}, expected {C} outside"
        )
    return BlockParts(norm1, attention, layer_scale1, norm2, mlp, layer_scale2)


def read_patch_embed(conv: nn.Module, mean: object, std: object, name: str) -> PatchEmbedParts:
    """PatchEmbedParts, with the convolution and the pixel statistics checked."""
    if type(conv) is not nn.Conv2d:
        raise Unsupported(f"{name} is {type(conv).__name__}, not nn.Conv2d")
    if conv.stride != conv.kernel_size or conv.kernel_size[0] != conv.kernel_size[1]:
        raise Unsupported(
            f"{name} has kernel {conv.kernel_size} and stride {conv.stride}; patches must be square and tile"
        )
    if conv.padding not in ((0, 0), "valid") or conv.dilation != (1, 1) or conv.groups != 1:
        raise Unsupported(f"{name} is padded, dilated or grouped")
    if mean is None or std is None:
        raise Unsupported("the model does not record the mean and std of its pixels; pass mean= and std=")
    mean, std = tuple(map(float, mean)), tuple(map(float, std))
    if not len(mean) == len(std) == conv.in_channels:
        raise Unsupported(f"mean has {len(mean)} values and std {len(std)}, {name} has {conv.in_channels} channels")
    return PatchEmbedParts(conv, mean, std)
