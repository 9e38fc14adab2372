"""QuantAttention: multi-head self-attention with integer matmuls throughout, softmax included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyvit_accel import ops
from pyvit_accel.formats.softmax import SoftmaxFormat, from_description

from .gradient import refuse_gradient
from .position import Position
from .quant_linear import QuantLinear
from .softmax_holder import SoftmaxHolder
from .sparse24_quant_linear import from_config

NORMS = ("q_norm", "k_norm")


class QuantHeads:
    """Codes and scales of q, k and v of one block; what a TokenStep reads of them (token_step.py: Heads)."""

    def __init__(
        self,
        q: tuple[Tensor, Tensor],
        k: tuple[Tensor, Tensor],
        v: tuple[Tensor, Tensor],
        scale: float,
        grid_bias: tuple[Tensor, Tensor] | None = None,
        key_bias: Tensor | None = None,
    ) -> None:
        self.q, self.k, self.v, self.scale, self.grid_bias, self.key_bias = q, k, v, scale, grid_bias, key_bias

    def attention(self, index: Tensor | None, **formats) -> Tensor | tuple[Tensor, ...]:
        """ops.quant_attention of all queries, or those of index (B, K) int32."""
        (q, q_scale), (k, k_scale), (v, v_scale) = self.q, self.k, self.v
        rest = {"key_bias": self.key_bias, "grid_bias": self.grid_bias, "q_index": index}
        return ops.quant_attention(q, k, v, q_scale, k_scale, v_scale, self.scale, **rest, **formats)

    def class_row(self) -> Tensor:
        (q, q_scale), (k, k_scale) = self.q, self.k
        return ops.class_row(q, k, q_scale, k_scale, self.scale, self.key_bias)

    def mean_key(self) -> Tensor:
        return ops.mean_heads(*self.k)

    def floats(self) -> tuple[Tensor, Tensor]:
        return tuple(codes.float() * scale.expand(codes.shape[:3])[..., None] for codes, scale in (self.q, self.k))


class QuantAttention(SoftmaxHolder):
    """softmax(q k^T scale + mask) v, projected; x (B, N, C) or, a grid of tokens, (B, h, w, C), float in and out.

    head_scale  (3, H, 1)  static scales of q, k and v per head; None: one per token and head, found at run time
    qkv_scale   (3 C,)     the same, one per output feature of the qkv matmul, which writes the codes
    head_bits               2 to 8, of the codes of q, k and v
    softmax                 the format of the probabilities; None: bytes, of an exponential
    q_norm, k_norm          over head_dim, or None; position: None, or what rotates q and k and is added to the scores

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
        softmax: SoftmaxFormat | None = None,
    ) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads, self.scale, self.head_bits = qkv, proj, num_heads, scale, head_bits
        self.head_dim = proj.in_features // num_heads
        self.softmax = softmax
        self.q_norm: nn.LayerNorm | nn.RMSNorm | None = None
        self.k_norm: nn.LayerNorm | nn.RMSNorm | None = None
        self.position: Position | None = None
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

    def _quantize_heads(
        self, x: Tensor, norm: nn.Module | None = None, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Float (B, H, N, D) to codes and scale (B, H, N), through the norm if there is one; index as ops.quantize."""
        x = x.transpose(1, 2)
        if isinstance(norm, nn.LayerNorm):
            codes, scale = ops.norm_quant(x, norm.weight, norm.bias, eps=norm.eps, bits=self.head_bits, index=index)
        else:
            codes, scale = ops.quantize(x if norm is None else norm(x), bits=self.head_bits, index=index)
        return codes.view(x.shape).transpose(1, 2), scale.view(x.shape[:-1]).transpose(1, 2)

    def _heads(
        self, codes: Tensor, scale: Tensor, rotary: tuple[Tensor, Tensor] | None, grid: Sequence[int],
        index: Tensor | None = None,
    ) -> tuple[tuple[tuple[Tensor, Tensor], ...], tuple[Tensor, Tensor] | None]:  # fmt: skip
        """(codes, scale) of q, k and v, and what their place on the grid adds to the scores."""
        static = {} if self.head_scale is None else {"out_scale": self.qkv_scale, "out_bits": self.head_bits}
        qkv = self.qkv.matmul(codes, scale, index=index, **static)
        q, k, v = self._split(qkv if index is None else qkv[None])
        if self.head_scale is not None:
            return tuple(zip((q, k, v), self.head_scale, strict=True)), None
        norms, grid_bias = (self.q_norm, self.k_norm), None
        if self.position is not None and self.position.reads_heads:
            q, k = (x if norm is None else norm(x) for x, norm in zip((q, k), norms, strict=True))
            norms, grid_bias = (None, None), self.position.grid_bias(q, grid)
            q, k = self.position.heads(q, k, rotary)
        heads = zip((q, k, v), (*norms, None), strict=True)
        rows = None if index is None else self._head_rows(index)
        return tuple(self._quantize_heads(x, norm, rows) for x, norm in heads), grid_bias

    def _head_rows(self, index: Tensor) -> Tensor:
        """index (M,) of tokens as one (M H,) of their heads."""
        head = torch.arange(self.num_heads, dtype=torch.int32, device=index.device)
        return torch.where(index[:, None] < 0, -1, self.num_heads * index[:, None] + head).flatten()

    def heads(
        self,
        codes: Tensor,
        scale: Tensor,
        key_bias: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        grid: Sequence[int] = (),
        index: Tensor | None = None,
    ) -> QuantHeads:
        """Of int8 codes (B, N, C) of normalised tokens; of codes (T, C) with index (T,), packed: 0, 1, ..., then -1.

        key_bias (B, N) is added to the scores of every key. rotary and grid are for a position: its cos and sin, and
        the rows and columns of N tokens.
        """
        qkv, grid_bias = self._heads(codes, scale, rotary, grid, index)
        return QuantHeads(*qkv, self.scale, grid_bias, key_bias)

    def weigh(self, heads: QuantHeads, attn_mask: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """The means of v by softmax(q k^T), (B, N, H D) float, or of the queries in index (B, K) int32."""
        boolean = attn_mask is not None and attn_mask.dtype == torch.bool
        bias = None if boolean else attn_mask
        return heads.attention(
            index,
            softmax=self.softmax,
            v_bits=self.head_bits,
            mask=attn_mask if boolean else None,
            bias=bias if self.position is None else self.position.add_bias(bias),
        )

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, rotary: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """attn_mask as in F.scaled_dot_product_attention: bool, True is seen, or float, added; (B | 1, H | 1, N, N).

        rotary: cos and sin, as in Position.heads.
        """
        heads = self.heads(*self.qkv.quantize(x.flatten(1, -2)), None, rotary, x.shape[1:-1])
        out = self.proj.matmul(*self.proj.quantize(self.weigh(heads, attn_mask)))
        return refuse_gradient(out.to(x.dtype).view(x.shape), x)

    def config(self) -> dict:
        return {
            "qkv": self.qkv.config(),
            "proj": self.proj.config(),
            "num_heads": self.num_heads,
            "scale": self.scale,
            "static": self.head_scale is not None,
            "head_bits": self.head_bits,
            "softmax": None if self.softmax is None else self.softmax.describe(),
            "q_norm": None if self.q_norm is None else self.q_norm.eps,
            "k_norm": None if self.k_norm is None else self.k_norm.eps,
            "rms_norms": [name for name in NORMS if isinstance(getattr(self, name), nn.RMSNorm)],
            "position": None if self.position is None else self.position.config(),
        }

    @classmethod
    def from_config(cls, config: dict) -> QuantAttention:
        qkv, proj = from_config(config["qkv"]), from_config(config["proj"])
        softmax = None if config.get("softmax") is None else from_description(config["softmax"])
        new = cls(qkv, proj, config["num_heads"], config["scale"], config["static"], config["head_bits"], softmax)
        for name in NORMS:
            if config[name] is not None:
                norm = nn.RMSNorm if name in config.get("rms_norms", ()) else nn.LayerNorm
                setattr(new, name, norm(new.head_dim, config[name]))
        if config.get("position") is not None:
            new.position = Position.from_config(config["position"])
        return new

    def extra_repr(self) -> str:
        kind = "per token and head" if self.head_scale is None else "static per head"
        softmax = "bytes" if self.softmax is None else self.softmax.label
        heads = f"num_heads={self.num_heads}, head_dim={self.head_dim}, q k v=int{self.head_bits} {kind}"
        return f"{heads}, softmax={softmax}"
