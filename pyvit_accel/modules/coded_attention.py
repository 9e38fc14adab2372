"""CodedAttention: attention on published number formats, their codes as they are, in the integer kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyvit_accel import ops
from pyvit_accel.errors import Unsupported
from pyvit_accel.formats import affine
from pyvit_accel.formats.codebook import Codebook
from pyvit_accel.formats.softmax import SoftmaxFormat, from_description, of_codebook

from .gradient import refuse_gradient
from .quant_linear import QuantLinear
from .softmax_holder import SoftmaxHolder


class CodedAttention(SoftmaxHolder):
    """softmax(q k^T scale) v, projected; x (B, N, C) float in and out.

    head_scale, head_zero_point  (3, H, 1)  of the codes of q, k and v; head_bits (3,) theirs
    softmax                                 the format of the probabilities, anchored at the log-sum-exp
    factors  (3,)  multiplied is (code - zero_point) factor, an int8; 0: code - zero_point is none, at 8 bits

    Those of q and k are the largest powers of two, which their scales undo exactly. Where one is 0, the zero point of k
    adds the same to all scores of a query, which a softmax does not see; that of q adds -zero_point sum_d k to the
    scores of a key, as a bias; v is float16, which holds the difference.
    """

    def __init__(
        self,
        qkv: QuantLinear,
        proj: QuantLinear,
        num_heads: int,
        scale: float,
        head_bits: Sequence[int],
        softmax: SoftmaxFormat,
        factors: Sequence[int] = (1, 1, 1),
    ) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads, self.scale, self.softmax = qkv, proj, num_heads, scale, softmax
        self.head_bits, self.factors = tuple(head_bits), tuple(factors)
        self.register_buffer("head_scale", torch.ones(3, num_heads, 1))
        self.register_buffer("head_zero_point", torch.zeros(3, num_heads, 1))

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
        """heads: scale (1,) | (H,), zero point of signed codes and bits, of q, k and v. softmax: one for all heads.

        Raises Unsupported for a softmax format that the kernel does not take.
        """
        try:
            form = of_codebook(softmax, "lse")
        except ValueError as reason:
            raise Unsupported(f"softmax outputs: {reason}") from None
        bits = [b for _, _, b in heads]
        *factors, factor = (_factor(zero_point, b) for _, zero_point, b in heads)
        new = cls(qkv, proj, num_heads, scale, bits, form, (*factors, min(factor, 1)))
        new.head_scale = torch.stack([s.float().expand(num_heads) for s, _, _ in heads])[..., None]
        new.head_zero_point = torch.stack([z.float().expand(num_heads) for _, z, _ in heads])[..., None]
        return new.to(qkv.w_packed.device)

    def _codes(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, 3 C) to what is multiplied of q, k, v, (B, H, N, D)."""
        heads = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        found = []
        formats = zip(heads, self.head_scale, self.head_zero_point, self.head_bits, self.factors, strict=True)
        for x, scale, zero_point, bits, factor in formats:
            codes = affine.quantize(x, scale, zero_point, bits)
            if factor:
                codes = ((codes - zero_point) * factor).to(torch.int8)
            elif len(found) == 2:
                codes = (codes - zero_point).half()
            found.append(codes.transpose(1, 2))
        return tuple(found)

    def _bias(self, k: Tensor) -> Tensor | None:
        """(B, H, 1, N): what the zero point of q adds to the scores of a key."""
        if self.factors[0]:
            return None
        q_scale, k_scale, _ = self._scales()
        per_unit = q_scale * k_scale * self.scale * self.head_zero_point[0]
        return -(per_unit * k.sum(dim=-1, dtype=torch.int32))[:, :, None]

    def _scales(self) -> tuple[Tensor, ...]:
        """(H, 1) of what is multiplied."""
        return tuple(scale / max(factor, 1) for scale, factor in zip(self.head_scale, self.factors, strict=True))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """attn_mask as in F.scaled_dot_product_attention: bool, True is seen, or float, added; (B | 1, H | 1, N, N)."""
        q, k, v = self._codes(self.qkv.matmul(*self.qkv.quantize(x)))
        mask, bias = None, self._bias(k)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            mask = attn_mask
        elif attn_mask is not None:
            bias = attn_mask if bias is None else bias + attn_mask
        out = ops.quant_attention(
            q, k, v, *self._scales(), self.scale, softmax=self.softmax, mask=mask, bias=bias, v_bits=self._v_bits
        )
        return refuse_gradient(self.proj.matmul(*self.proj.quantize(out)).to(x.dtype), x)

    @property
    def _v_bits(self) -> int:
        """Of codes less a zero point: one more."""
        return min(8, self.head_bits[2] + 1)

    def config(self) -> dict:
        return {
            "qkv": self.qkv.config(),
            "proj": self.proj.config(),
            "num_heads": self.num_heads,
            "scale": self.scale,
            "head_bits": list(self.head_bits),
            "softmax": self.softmax.describe(),
            "factors": list(self.factors),
        }

    @classmethod
    def from_config(cls, config: dict) -> CodedAttention:
        linears = {name: QuantLinear(**config[name]) for name in ("qkv", "proj")}
        return cls(**config | linears | {"softmax": from_description(config["softmax"])})

    def extra_repr(self) -> str:
        bits = ", ".join(f"int{b}" for b in self.head_bits)
        return f"num_heads={self.num_heads}, q k v={bits}, softmax={self.softmax.label}"


def _factor(zero_point: Tensor, bits: int) -> int:
    """The largest power of two that leaves codes of so many bits, less any of the zero points, an int8; 0: none."""
    lo, hi = affine.q_range(bits)
    largest = max(int(zero_point.max()) - lo - 1, hi - int(zero_point.min()))  # there is a -128
    return 0 if largest > 127 else 2 ** int(math.log2(127 // max(largest, 1)))
