"""What an importer returns: the source's integers and formats, whether or not a kernel of this release runs them.

    Uniform   x ~ (code - zero_point) * scale     signed: published codes and zero points less 2^(bits-1)
    Codebook  formats/codebook.py                 softmax and GELU outputs

Nothing is replaced on the way: `plan` gives the record that modules pack, or raises Unsupported with what it lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pyvit_accel.calibrate.plan import BlockPlan, LinearPlan
from pyvit_accel.errors import Unsupported
from pyvit_accel.formats import affine
from pyvit_accel.formats.codebook import Codebook


@dataclass(frozen=True)
class Uniform:
    """scale (G,) float32, zero_point (G,) int64: one for all, or one per head."""

    scale: Tensor
    zero_point: Tensor
    bits: int

    @property
    def symmetric(self) -> bool:
        return not bool(self.zero_point.any())

    def quantize(self, x: Tensor) -> Tensor:
        """int8 codes of x; with more than one scale x is (..., G, N, D)."""
        scale, zero_point = (t.reshape(-1, *[1] * (2 * (t.numel() > 1))) for t in (self.scale, self.zero_point))
        return affine.quantize(x, scale, zero_point, self.bits)


@dataclass(frozen=True)
class ImportedLinear:
    """y = xhat @ (codes * w_scale).T + bias.

    weight  (N, K) float32 that the codes were taken from; bias (N,) float32 | None, all folds of the source included
    codes   (N, K) int8, the published code less its zero point; w_bits, in which they fit: published_bits or more
    w_scale (N,)   float32
    x       what the input is quantized to; a Codebook's offset has its share of y in the bias already; None: not at all
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    codes: Tensor
    w_scale: Tensor
    w_bits: int
    published_bits: int
    x: Uniform | Codebook | None

    def plan(self) -> LinearPlan:
        if not isinstance(self.x, Uniform):
            reason = (
                "its input is not quantized: ops.weight_only_linear runs it"
                if self.x is None
                else "its input has codes of a codebook: ops.codebook_linear runs it"
            )
            raise Unsupported(f"{self.name}: {reason}, and a LinearPlan cannot say so")
        return LinearPlan(
            self.weight, self.bias, self.w_bits, self.x.bits, x_scale=self.x.scale,
            x_zero_point=int(self.x.zero_point), w_scale=self.w_scale, codes=self.codes,
        )  # fmt: skip


@dataclass(frozen=True)
class ImportedMatmul:
    """The operands of q k^T (a: q, b: k) or of P v (a: P, b: v)."""

    name: str
    a: Uniform | Codebook
    b: Uniform


@dataclass(frozen=True)
class ImportedBlock:
    """A pre-norm block with timm's names. norms: weight (C,), bias (C,), eps; q, k, v, softmax: their formats."""

    norm1: tuple[Tensor, Tensor, float]
    qkv: ImportedLinear
    num_heads: int
    softmax_scale: float
    q: Uniform
    k: Uniform
    v: Uniform
    softmax: Uniform | Codebook
    proj: ImportedLinear
    norm2: tuple[Tensor, Tensor, float]
    fc1: ImportedLinear
    activation: str
    fc2: ImportedLinear

    def limits(self) -> tuple[str, ...]:
        """What of the published attention ops.quant_attention does not run."""
        operands = {"q": self.q, "k": self.k, "v": self.v}
        found = [f"{name} has zero points {t.zero_point.tolist()}" for name, t in operands.items() if not t.symmetric]
        if len({t.bits for t in operands.values()}) > 1:
            found.append(f"q, k and v have {self.q.bits}, {self.k.bits} and {self.v.bits} bits")
        kind = "uniform" if isinstance(self.softmax, Uniform) else self.softmax.family
        return (*found, f"softmax outputs have {kind} codes of {self.softmax.bits} bits")

    def plan(self, replace_attention: bool = False) -> BlockPlan:
        """The block as a plan; the linears are the paper's, code for code.

        replace_attention: take q, k and v in 8 bits with a scale per token, and 8-bit probabilities. That is finer than
        any published format but not the paper's; without it Unsupported is raised, with every limit.
        """
        if not replace_attention:
            name = self.qkv.name.removesuffix(".qkv")
            raise Unsupported(f"{name}: {'; '.join(self.limits())}; replace_attention=True takes 8 bits instead")
        return BlockPlan(
            self.norm1, self.qkv.plan(), self.num_heads, self.softmax_scale, 8, None, self.proj.plan(), None,
            self.norm2, self.fc1.plan(), self.activation, self.fc2.plan(), None,
        )  # fmt: skip


@dataclass(frozen=True)
class ImportedModel:
    """Everything quantized, by the source's names.

    norms  weight and bias (C,) of the norms, with whatever was folded into them
    notes  what differs from the source in storage or in value, a line each
    """

    linears: Mapping[str, ImportedLinear]
    matmuls: Mapping[str, ImportedMatmul]
    norms: Mapping[str, tuple[Tensor, Tensor]]
    notes: tuple[str, ...]

    def blocks(self) -> list[str]:
        """Names of the blocks, "blocks.0"."""
        return [name.removesuffix(".attn.qkv") for name in self.linears if name.endswith(".attn.qkv")]

    def block(self, name: str, num_heads: int | None = None, eps: float = 1e-6) -> ImportedBlock:
        """num_heads: for a source with one scale for all heads. eps: of the norms, which no source keeps with them."""
        parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for part in (*parts, "attn.matmul1", "attn.matmul2", "norm1", "norm2"):
            if not any(f"{name}.{part}" in found for found in (self.linears, self.matmuls, self.norms)):
                raise Unsupported(f"{name}.{part} is missing: no plain block of a ViT")
        qkv, proj, fc1, fc2 = (self.linears[f"{name}.{part}"] for part in parts)
        qk, pv = self.matmuls[f"{name}.attn.matmul1"], self.matmuls[f"{name}.attn.matmul2"]
        formats = (qk.a, qk.b, pv.b)
        counts = {t.scale.numel() for t in formats} - {1}
        if num_heads is None and len(counts) != 1:
            raise ValueError(f"block: {name} has no scale per head; give num_heads")
        heads = counts.pop() if num_heads is None else num_heads
        if counts - {heads}:
            raise ValueError(f"block: {name} has scales for {sorted(counts)} heads, not num_heads={heads}")
        dim = qkv.codes.shape[0] // 3 // heads
        return ImportedBlock(
            (*self.norms[f"{name}.norm1"], eps), qkv, heads, dim**-0.5, *formats, pv.a,
            proj, (*self.norms[f"{name}.norm2"], eps), fc1, "gelu", fc2,
        )  # fmt: skip

