"""A plain vision transformer: ViT, DeiT (with distillation token) and DINOv2, with timm's parameter names.

images      (B, Cin, H, W)  uint8 pixels, normalised inside, or floats that are normalised already
returns     (B, num_classes) logits, dtype of the parameters

P patches, N = P + num_prefix_tokens tokens (class, then registers or the distillation token), C = dim.

Dosovitskiy et al., An Image Is Worth 16x16 Words, arXiv:2010.11929. Touvron et al., DeiT, arXiv:2012.12877.
Oquab et al., DINOv2, arXiv:2304.07193. Darcet et al., Vision Transformers Need Registers, arXiv:2309.16588.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GELU_APPROXIMATION = {"gelu": "none", "gelu_tanh": "tanh"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ViTConfig:
    """Everything that determines a VisionTransformer but its weights. mean and std are of pixels scaled to 0..1."""

    image_size: int = 224
    patch_size: int = 16
    in_channels: int = 3
    num_classes: int = 1000
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    layer_scale: bool = False
    num_registers: int = 0
    distilled: bool = False
    qk_norm: bool = False
    pool: str = "token"
    no_embed_class: bool = False
    norm_eps: float = 1e-6
    activation: str = "gelu"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        for name in ("image_size", "patch_size", "in_channels", "dim", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"ViTConfig: {name}={getattr(self, name)}; expected a positive integer")
        if self.image_size % self.patch_size:
            fitting = self.image_size - self.image_size % self.patch_size or self.patch_size
            raise ValueError(
                f"ViTConfig: image_size={self.image_size} is not a multiple of patch_size={self.patch_size}; "
                f"use image_size={fitting} or {fitting + self.patch_size}"
            )
        if self.dim % self.num_heads:
            raise ValueError(f"ViTConfig: dim={self.dim} is not a multiple of num_heads={self.num_heads}")
        if self.pool not in ("token", "avg"):
            raise ValueError(f"ViTConfig: pool={self.pool!r}; use 'token' or 'avg'")
        if self.activation not in GELU_APPROXIMATION:
            raise ValueError(f"ViTConfig: activation={self.activation!r}; use one of {list(GELU_APPROXIMATION)}")
        if self.distilled and (self.num_registers or self.pool != "token"):
            raise ValueError(
                f"ViTConfig: distilled=True came with num_registers={self.num_registers} and pool={self.pool!r}; "
                "a distilled model has no registers and pool='token'"
            )
        if not len(self.mean) == len(self.std) == self.in_channels:
            raise ValueError(
                f"ViTConfig: mean has {len(self.mean)} values and std {len(self.std)} but "
                f"in_channels={self.in_channels}; pass one mean and one std per channel"
            )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_prefix_tokens(self) -> int:
        return 1 + self.num_registers + int(self.distilled)

    @property
    def head_tokens(self) -> int | None:
        """How many tokens the head reads, the first ones; None: all."""
        return None if self.pool == "avg" else 1 + int(self.distilled)

    def to_dict(self) -> dict:
        """A dictionary that json can write."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict) -> ViTConfig:
        """The inverse of to_dict; a field that is not named keeps its default."""
        _check_fields("ViTConfig.from_dict", values)
        return cls(**values)


def _check_fields(caller: str, values: dict) -> None:
    known = [field.name for field in fields(ViTConfig)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        names = ", ".join(map(repr, unknown))
        raise ValueError(f"{caller}: unknown key {names}; the known keys are {', '.join(known)}")


class PatchEmbed(nn.Module):
    """images (B, Cin, H, W) -> patches (B, P, C). uint8 pixels become (x / 255 - mean) / std first."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch_size, self.mean, self.std = config.patch_size, config.mean, config.std
        self.proj = nn.Conv2d(config.in_channels, config.dim, config.patch_size, stride=config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = self.normalize(images)
        return self.proj(images).flatten(2).transpose(1, 2)

    def normalize(self, pixels: Tensor) -> Tensor:
        # Channel by channel with Python numbers: a tensor of means would be copied to the GPU on every call.
        each = zip(pixels.unbind(1), self.mean, self.std, strict=True)
        channels = [(x.float() / 255 - mean) / std for x, mean, std in each]
        return torch.stack(channels, dim=1).to(self.proj.weight.dtype)


class Attention(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.dim // config.num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.qkv_bias)
        self.q_norm = nn.LayerNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, scale=self.scale)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Mlp(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        hidden = int(config.dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.dim, hidden)
        self.act = nn.GELU(approximate=GELU_APPROXIMATION[config.activation])
        self.fc2 = nn.Linear(hidden, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, dim: int, init_value: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm: x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x)))."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.norm_eps)
        self.attn = Attention(config)
        self.ls1 = LayerScale(config.dim) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.dim, config.norm_eps)
        self.mlp = Mlp(config)
        self.ls2 = LayerScale(config.dim) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """patch_embed and every blocks.N can be replaced by a module with the same forward."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        C = config.dim
        self.config = config
        self.num_prefix_tokens = config.num_prefix_tokens
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, C))
        self.reg_token = nn.Parameter(torch.zeros(1, config.num_registers, C)) if config.num_registers else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, C)) if config.distilled else None
        embedded = config.num_patches + (0 if config.no_embed_class else config.num_prefix_tokens)
        self.pos_embed = nn.Parameter(torch.zeros(1, embedded, C))
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.depth)))
        pools = config.pool == "avg"  # the final norm then comes after pooling, as fc_norm
        self.norm = nn.Identity() if pools else nn.LayerNorm(C, config.norm_eps)
        self.fc_norm = nn.LayerNorm(C, config.norm_eps) if pools else nn.Identity()
        self.head = nn.Linear(C, config.num_classes) if config.num_classes else nn.Identity()
        if config.distilled:
            self.head_dist = nn.Linear(C, config.num_classes) if config.num_classes else nn.Identity()
        self._init_weights()

    def _init_weights(self) -> None:
        for parameter in (self.cls_token, self.reg_token, self.dist_token, self.pos_embed):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Of the last block only the tokens that the head reads, where the block can leave the others out."""
        *others, last = self.blocks
        if self.config.head_tokens is None or not getattr(last, "computes_first_tokens", False):
            return self.forward_head(self.forward_features(images))
        x = self._embed(images)
        for block in others:
            x = block(x)
        return self.forward_head(self.norm(last(x, tokens=self.config.head_tokens)))

    def forward_features(self, images: Tensor) -> Tensor:
        """All N tokens after the last block and `norm`: (B, N, C)."""
        x = self._embed(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _embed(self, images: Tensor) -> Tensor:
        self._check_images(images)
        return self._add_tokens(self.patch_embed(images))

    def forward_head(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) -> logits (B, num_classes). With a distillation token, the mean of the two heads."""
        if self.config.distilled:
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        pooled = x[:, self.num_prefix_tokens :].mean(dim=1) if self.config.pool == "avg" else x[:, 0]
        return self.head(self.fc_norm(pooled))

    def _add_tokens(self, x: Tensor) -> Tensor:
        prefix = [token for token in (self.cls_token, self.reg_token, self.dist_token) if token is not None]
        prefix = [token.expand(x.shape[0], -1, -1) for token in prefix]
        if self.config.no_embed_class:
            return torch.cat([*prefix, x + self.pos_embed], dim=1)
        return torch.cat([*prefix, x], dim=1) + self.pos_embed

    def _check_images(self, images: Tensor) -> None:
        config, shape = self.config, tuple(images.shape)
        expected = f"(B, {config.in_channels}, {config.image_size}, {config.image_size})"
        came = f"VisionTransformer: images have shape {shape}, expected {expected}"
        if images.ndim == 3:
            raise ValueError(f"{came}; add the batch dimension with images[None]")
        if images.ndim != 4:
            raise ValueError(f"{came}; pass a batch of images")
        if shape[1] != config.in_channels and shape[3] == config.in_channels:
            raise ValueError(f"{came}; the channels come last here, use images.permute(0, 3, 1, 2)")
        if shape[1] != config.in_channels:
            raise ValueError(
                f"{came}: {shape[1]} channels instead of {config.in_channels}; "
                f"convert the images, or build the model with in_channels={shape[1]}"
            )
        if shape[2:] != (config.image_size, config.image_size):
            raise ValueError(
                f"{came}; resize or crop the images to {config.image_size} x {config.image_size}, "
                "or build the model with another image_size"
            )
        if images.dtype not in (torch.uint8, self.cls_token.dtype):
            raise TypeError(
                f"VisionTransformer: images are {images.dtype}, expected torch.uint8 pixels or normalised "
                f"{self.cls_token.dtype}; use images.to({self.cls_token.dtype}) on normalised images"
            )


_TINY = ViTConfig(dim=192, num_heads=3)
_SMALL = ViTConfig(dim=384, num_heads=6)
_BASE = ViTConfig(dim=768, num_heads=12)
_LARGE = ViTConfig(dim=1024, depth=24, num_heads=16)
_HUGE = ViTConfig(patch_size=14, dim=1280, depth=32, num_heads=16)


def _deit(size: ViTConfig, distilled: bool = False) -> ViTConfig:
    return replace(size, distilled=distilled, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _dinov2(size: ViTConfig, num_registers: int = 0) -> ViTConfig:
    """The backbone alone, without a head. With registers, only patches have a position embedding (as in timm)."""
    registers = {"num_registers": num_registers, "no_embed_class": num_registers > 0}
    pixels = {"image_size": 518, "patch_size": 14, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return replace(size, layer_scale=True, num_classes=0, **registers, **pixels)


ARCHITECTURES: dict[str, ViTConfig] = {
    "vit_tiny_patch16_224": _TINY,
    "vit_small_patch16_224": _SMALL,
    "vit_base_patch16_224": _BASE,
    "vit_large_patch16_224": _LARGE,
    "vit_huge_patch14_224": _HUGE,
    "deit_tiny_patch16_224": _deit(_TINY),
    "deit_small_patch16_224": _deit(_SMALL),
    "deit_base_patch16_224": _deit(_BASE),
    "deit_tiny_distilled_patch16_224": _deit(_TINY, distilled=True),
    "deit_small_distilled_patch16_224": _deit(_SMALL, distilled=True),
    "deit_base_distilled_patch16_224": _deit(_BASE, distilled=True),
    "vit_small_patch14_dinov2": _dinov2(_SMALL),
    "vit_base_patch14_dinov2": _dinov2(_BASE),
    "vit_large_patch14_dinov2": _dinov2(_LARGE),
    "vit_small_patch14_reg4_dinov2": _dinov2(_SMALL, num_registers=4),
    "vit_base_patch14_reg4_dinov2": _dinov2(_BASE, num_registers=4),
    "vit_large_patch14_reg4_dinov2": _dinov2(_LARGE, num_registers=4),
}


def architecture(name: str) -> ViTConfig:
    """The ViTConfig of a named architecture."""
    if name not in ARCHITECTURES:
        close = difflib.get_close_matches(name, ARCHITECTURES, n=1)
        advice = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(ARCHITECTURES)}"
        raise ValueError(f"create_vit: unknown architecture {name!r}; {advice}")
    return ARCHITECTURES[name]


def create_vit(name: str, **overrides) -> VisionTransformer:
    """A randomly initialised model of a named architecture; overrides are fields of ViTConfig."""
    config = architecture(name)
    _check_fields("create_vit", overrides)
    return VisionTransformer(replace(config, **overrides))
