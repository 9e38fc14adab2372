"""What any pre-norm transformer block is made of, whoever wrote it.

Adapters read a foreign block into these records; modules build accelerated ones from them. Nothing here computes.

    x = x + layer_scale1 * proj(attention(norm1(x)))
    x = x + layer_scale2 * fc2(activation(fc1(norm2(x))))
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionParts:
    """qkv is one fused Linear (3 C, C), rows ordered q, k, v and head-major inside each, or three Linears (C, C).

    bias to rotary: what position adds, as in modules/position.py.
    """

    qkv: tuple[nn.Linear, ...]
    proj: nn.Linear
    num_heads: int
    scale: float  # multiplies q k^T before the softmax
    q_norm: nn.LayerNorm | nn.RMSNorm | None = None  # over head_dim, after the split into heads
    k_norm: nn.LayerNorm | nn.RMSNorm | None = None
    bias: Tensor | None = None  # (H, N, N)
    tables: tuple[Tensor, Tensor] | None = None  # (2 h - 1, D), (2 w - 1, D)
    gain: Tensor | None = None  # (H,); scale is 1
    rotary: str = ""  # "half" | "interleaved"

    @property
    def has_position(self) -> bool:
        return bool(self.rotary) or any(part is not None for part in (self.bias, self.tables, self.gain))


@dataclass(frozen=True)
class MlpParts:
    fc1: nn.Linear
    fc2: nn.Linear
    activation: str  # "gelu" | "gelu_tanh" | "quick_gelu"


@dataclass(frozen=True)
class BlockParts:
    norm1: nn.LayerNorm
    attention: AttentionParts
    layer_scale1: Tensor | None
    norm2: nn.LayerNorm
    mlp: MlpParts
    layer_scale2: Tensor | None


@dataclass(frozen=True)
class PatchEmbedParts:
    """conv has stride = kernel size and no padding. mean and std, one per channel, are of pixels scaled to 0..1."""

    conv: nn.Conv2d
    mean: tuple[float, ...]
    std: tuple[float, ...]
