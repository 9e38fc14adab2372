"""CodedAttention: attention on published number formats that the integer kernels do not take, their codes exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyvit_accel.formats import affine
from pyvit_accel.formats.codebook import Codebook

from .gradient import refuse_gradient
from .quant_linear import QuantLinear


class CodedAttention(nn.Module):
    """softmax(q k^T scale) v, projected; x (B, N, C) float in and out. Its two Linears are integer matmuls.

    head_scale, head_zero_point  (3, H, 1)  of the codes of q, k and v; head_bits (3,) theirs
    p_thresholds  (n-1,)  between the probabilities, less p_offset and over p_scale, that get the values p_values (n,)

    q k^T are exact integers, kept in float32, as are P v: log codes and zero points have no kernel yet. Its speed is
    that of float attention and a search of the thresholds.
    """

    def __init__(
        self,
        qkv: QuantLinear,
        proj: QuantLinear,
        num_heads: int,
        scale: float,
        head_bits: Sequence[int],
        levels: int,
        family: str,
    ) -> None:
        """levels: how many the probabilities have; family: what their format is called."""
        super().__init__()
        self.qkv, self.proj, self.num_heads, self.scale, self.family = qkv, proj, num_heads, scale, family
        self.head_bits = tuple(head_bits)
        self.register_buffer("head_scale", torch.ones(3, num_heads, 1))
        self.register_buffer("head_zero_point", torch.zeros(3, num_heads, 1))
        self.register_buffer("p_scale", torch.ones(1))
        self.register_buffer("p_offset", torch.zeros(1))
        self.register_buffer("p_thresholds", torch.arange(levels - 1.0))
        self.register_buffer("p_values", torch.zeros(levels))

    @classmethod
    def from_formats(
        cls,
        qkv: QuantLinear,
        proj: QuantLinear,
        num_heads: int,
        scale: float,
        heads: Sequence[tuple[Tensor, Tensor, int]],
        softmax: Codebook,
    ) -> CodedAttention:
        """heads: scale (1,) | (H,), zero point of signed codes and bits, of q, k and v. softmax: one for all heads."""
        bits = [b for _, _, b in heads]
        new = cls(qkv, proj, num_heads, scale, bits, softmax.levels.numel(), f"{softmax.family} {softmax.bits}")
        new.head_scale = torch.stack([s.float().expand(num_heads) for s, _, _ in heads])[..., None]
        new.head_zero_point = torch.stack([z.float().expand(num_heads) for _, z, _ in heads])[..., None]
        new.p_scale, new.p_offset, new.p_thresholds = softmax.scale, softmax.offset, softmax.thresholds
        new.p_values = softmax.dequantize(softmax.codes)
        return new.to(qkv.w_packed.device)

    def _codes(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, 3 C) to q, k, v (B, H, N, D), float32, code less zero point."""
        heads = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        formats = zip(heads, self.head_scale, self.head_zero_point, self.head_bits, strict=True)
        q, k, v = (affine.quantize(x, s, z, bits).float() - z for x, s, z, bits in formats)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def probabilities(self, p: Tensor) -> Tensor:
        """p as the product with v sees it."""
        u = (p - self.p_offset) * (1.0 / self.p_scale)
        ranks = torch.bucketize(u, self.p_thresholds, out_int32=True, right=True)
        return self.p_values.index_select(0, ranks.flatten()).view(p.shape)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """attn_mask as in F.scaled_dot_product_attention: bool, True is seen, or float, added; (B | 1, H | 1, N, N)."""
        q, k, v = self._codes(self.qkv.matmul(*self.qkv.quantize(x)))
        q_scale, k_scale, v_scale = self.head_scale[..., None]
        s = (q @ k.mT) * (q_scale * k_scale * self.scale)
        if attn_mask is not None:
            s = s.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else s + attn_mask
        out = (self.probabilities(s.softmax(dim=-1)) @ v) * v_scale
        out = self.proj.matmul(*self.proj.quantize(out.transpose(1, 2).flatten(2)))
        return refuse_gradient(out.to(x.dtype), x)

    def config(self) -> dict:
        return {
            "qkv": self.qkv.config(),
            "proj": self.proj.config(),
            "num_heads": self.num_heads,
            "scale": self.scale,
            "head_bits": list(self.head_bits),
            "levels": self.p_values.numel(),
            "family": self.family,
        }

    @classmethod
    def from_config(cls, config: dict) -> CodedAttention:
        return cls(**config | {name: QuantLinear(**config[name]) for name in ("qkv", "proj")})

    def extra_repr(self) -> str:
        bits = ", ".join(f"int{b}" for b in self.head_bits)
        return f"num_heads={self.num_heads}, q k v={bits}, softmax={self.family}"
