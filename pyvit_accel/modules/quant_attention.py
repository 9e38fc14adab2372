"""QuantAttention: multi-head self-attention with integer matmuls throughout, softmax included."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyvit_accel import ops

from .gradient import refuse_gradient
from .quant_linear import QuantLinear


class QuantAttention(nn.Module):
    """softmax(q k^T scale + mask) v, projected; x (B, N, C) float in and out.

    head_scale  (3, H, 1)  static scales of q, k and v per head; None: one per token and head, found at run time
    qkv_scale   (3 C,)     the same, one per output feature of the qkv matmul, which writes the codes
    head_bits               2 to 8, of the codes of q, k and v

    The attention output is quantised per token: its range varies most between tokens, and it is small.
    """

    def __init__(
        self,
        qkv: QuantLinear,
        proj: QuantLinear,
        num_heads: int,
        scale: float,
        static: bool = False,
        head_bits: int = 8,
    ) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads, self.scale, self.head_bits = qkv, proj, num_heads, scale, head_bits
        self.head_dim = proj.in_features // num_heads
        self.p_steps, self.p_operand = 0.0, ""
        self.register_buffer("p_values", None)
        self.q_norm: nn.LayerNorm | None = None
        self.k_norm: nn.LayerNorm | None = None
        self.register_buffer("head_scale", torch.ones(3, num_heads, 1) if static else None)
        self.register_buffer("qkv_scale", torch.ones(qkv.out_features) if static else None)

    def set_head_scale(self, head_scale: Tensor) -> None:
        """head_scale (3, H, 1), float32."""
        self.head_scale = head_scale
        self.qkv_scale = head_scale.expand(-1, -1, self.head_dim).flatten()

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, 3 C) to q, k, v (B, H, N, D), views."""
        B, N, _ = qkv.shape
        return qkv.view(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)

    def _quantize_heads(self, x: Tensor, norm: nn.LayerNorm | None = None) -> tuple[Tensor, Tensor]:
        """Float (B, H, N, D) to codes and scale (B, H, N), through the norm if there is one."""
        x = x.transpose(1, 2)
        if norm is None:
            codes, scale = ops.quantize(x, bits=self.head_bits)
        else:
            codes, scale = ops.norm_quant(x, norm.weight, norm.bias, eps=norm.eps, bits=self.head_bits)
        return codes.transpose(1, 2), scale.view(x.shape[:-1]).transpose(1, 2)

    def attend(self, codes: Tensor, scale: Tensor, attn_mask: Tensor | None = None, **epilogue) -> Tensor:
        """Int8 codes (B, N, C) of normalised tokens to the projection's output; epilogue as in ops.lowbit_linear."""
        if self.head_scale is not None:
            qkv = self.qkv.matmul(codes, scale, out_scale=self.qkv_scale, out_bits=self.head_bits)
            q, k, v = self._split(qkv)
            q_scale, k_scale, v_scale = self.head_scale
        else:
            q, k, v = self._split(self.qkv.matmul(codes, scale))
            (q, q_scale), (k, k_scale) = self._quantize_heads(q, self.q_norm), self._quantize_heads(k, self.k_norm)
            v, v_scale = self._quantize_heads(v)
        boolean = attn_mask is not None and attn_mask.dtype == torch.bool
        out = ops.quant_attention(
            q,
            k,
            v,
            q_scale,
            k_scale,
            v_scale,
            self.scale,
            mask=attn_mask if boolean else None,
            bias=None if boolean else attn_mask,
        )
        return self.proj.matmul(*self.proj.quantize(out), **epilogue)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """attn_mask as in F.scaled_dot_product_attention: bool, True is seen, or float, added; (B | 1, H | 1, N, N)."""
        return refuse_gradient(self.attend(*self.qkv.quantize(x), attn_mask).to(x.dtype), x)

    def config(self) -> dict:
        return {
            "qkv": self.qkv.config(),
            "proj": self.proj.config(),
            "num_heads": self.num_heads,
            "scale": self.scale,
            "static": self.head_scale is not None,
            "head_bits": self.head_bits,
            "q_norm": None if self.q_norm is None else self.q_norm.eps,
            "k_norm": None if self.k_norm is None else self.k_norm.eps,
        }

    @classmethod
    def from_config(cls, config: dict) -> QuantAttention:
        qkv, proj = QuantLinear(**config["qkv"]), QuantLinear(**config["proj"])
        new = cls(qkv, proj, config["num_heads"], config["scale"], config["static"], config["head_bits"])
        for name in ("q_norm", "k_norm"):
            if config[name] is not None:
                setattr(new, name, nn.LayerNorm(new.head_dim, config[name]))
        return new

    def extra_repr(self) -> str:
        kind = "per token and head" if self.head_scale is None else "static per head"
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, q k v=int{self.head_bits} {kind}"
