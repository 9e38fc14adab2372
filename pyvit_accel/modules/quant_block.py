"""QuantBlock: a pre-norm transformer block whose codes stay int8 from each norm to the residual.

    norm -> int8 -> qkv matmul -> int8 -> attention -> int8 -> projection + residual -> float32
    norm -> int8 -> fc1 matmul + GELU -> int8 -> fc2 matmul + residual -> float32
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyvit_accel import ops

from .quant_attention import QuantAttention
from .quant_mlp import QuantMlp


class QuantBlock(nn.Module):
    """x (B, N, C) float in and out; attn_mask as in F.scaled_dot_product_attention."""

    def __init__(
        self,
        norm1: nn.LayerNorm,
        attention: QuantAttention,
        norm2: nn.LayerNorm,
        mlp: QuantMlp,
        layer_scale1: Tensor | None = None,
        layer_scale2: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = norm1, attention, norm2, mlp
        self.register_buffer("layer_scale1", layer_scale1)
        self.register_buffer("layer_scale2", layer_scale2)
        self.requires_grad_(False)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        dtype, x = x.dtype, x.float()
        norm, attention, mlp = self.norm1, self.attention, self.mlp
        codes, scale = ops.norm_quant(x, norm.weight, norm.bias, attention.qkv.x_scale, norm.eps)
        x = attention.attend(codes, scale, attn_mask, layer_scale=self.layer_scale1, residual=x)
        norm = self.norm2
        codes, scale = ops.norm_quant(x, norm.weight, norm.bias, mlp.fc1.x_scale, norm.eps)
        return mlp.apply_codes(codes, scale, layer_scale=self.layer_scale2, residual=x).to(dtype)

    def config(self) -> dict:
        return {
            "dim": self.norm1.weight.shape[0],
            "norm1": self.norm1.eps,
            "norm2": self.norm2.eps,
            "attention": self.attention.config(),
            "mlp": self.mlp.config(),
            "layer_scale1": self.layer_scale1 is not None,
            "layer_scale2": self.layer_scale2 is not None,
        }

    @classmethod
    def from_config(cls, config: dict) -> QuantBlock:
        C = config["dim"]
        attention, mlp = QuantAttention.from_config(config["attention"]), QuantMlp.from_config(config["mlp"])
        scales = [torch.ones(C) if config[name] else None for name in ("layer_scale1", "layer_scale2")]
        return cls(nn.LayerNorm(C, config["norm1"]), attention, nn.LayerNorm(C, config["norm2"]), mlp, *scales)
