"""Attention in float32 but for what is studied: the format of its probabilities, and the rounding of q, k and v.

    s = q k^T scale log2(e)          scores in octaves, float32
    P = format of s - anchor         as ops.quant_attention does it: code for code but where float32 meets a tie
    out = P v

q, k, v (B, H, N, D); s, P (B, H, N, N).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit_accel.calibrate import symmetric_scale
from pyvit_accel.formats import affine
from pyvit_accel.formats.softmax import SoftmaxFormat
from pyvit_accel.models.vit import Attention, Block, VisionTransformer
from pyvit_accel.reference.quant_attention import FULL, diffuse
from pyvit_accel.reference.scalar import LOG2_E

SEARCHED = 4  # images of the sample on which formats search for their numbers
E4M3_MAX = 448.0


@dataclass
class Sample:
    """What one block's attention saw in calibration: q, k, v (B, H, N, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    @cached_property
    def scores(self) -> Tensor:
        """In octaves, (SEARCHED, H, N, N)."""
        return scores(self.q[:SEARCHED], self.k[:SEARCHED], self.scale)

    @property
    def p(self) -> Tensor:
        return softmax(self.scores)

    def best(self, candidates: Iterable[SoftmaxFormat]) -> SoftmaxFormat:
        """The format with the least squared error of P v."""
        s, v = self.scores, self.v[:SEARCHED]
        exact = softmax(s) @ v
        return min(candidates, key=lambda f: float((probabilities(s, f) @ v - exact).square().sum()))


@dataclass(frozen=True)
class Variant:
    """One row of the study.

    format  of P from a block's sample; gives None for the diffused bytes that quant_attention has without a format
    top     "exact": the distance of a score to the maximum is rounded, as the op does it; "step": both are, and then
            subtracted; "octave": the maximum up to a whole octave
    qk      int8 scales of q and k, "tensor" | "head" | "token", or "": float32
    centre  subtract from k its mean over the tokens, which no softmax notices
    v       "int8" | "e4m3" | "int4", a scale per head, or "": float32
    """

    name: str
    group: str
    family: str
    anchor: str
    format: Callable[[Sample], SoftmaxFormat | None]
    top: str = "exact"
    qk: str = ""
    centre: bool = False
    v: str = ""


def scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return (q * (scale * LOG2_E)) @ k.mT


def softmax(s: Tensor) -> Tensor:
    p = torch.exp2(s - s.amax(-1, keepdim=True))
    return p / p.sum(-1, keepdim=True)


def probabilities(s: Tensor, form: SoftmaxFormat | None, top: str = "exact") -> Tensor:
    """P of scores s in octaves; rows of a form that normalizes are divided by the sum of their values."""
    m = s.amax(-1, keepdim=True)
    if form is None:
        f = torch.round(torch.exp2(s - m) * FULL)
        return (diffuse(f.double()) / (f.sum(-1, keepdim=True).double() / 256)).float()
    if form.anchor == "lse":
        m = m + torch.exp2(s - m).sum(-1, keepdim=True).log2()
    table = F.pad((form.values.double() + form.offset).float(), (0, 1))
    values = table.index_select(0, codes(s, m, form, top).flatten()).view_as(s)
    if not form.normalize:
        return values.mul_(form.unit)
    total = values.sum(-1, keepdim=True)
    return values.mul_(torch.where(total > 0, 1 / total, 0.0))


def codes(s: Tensor, m: Tensor, form: SoftmaxFormat, top: str) -> Tensor:
    """int32 codes of scores s with the anchor m."""
    if form.thresholds is not None:
        return torch.bucketize(m - s, -form.thresholds, out_int32=True)
    if form.anchor == "lse":
        k = (m - s).mul_(form.steps).add_(form.shift).round_()
    elif top == "exact":
        k = (m - s).mul_(form.steps).round_()
    else:
        m = torch.ceil(m) * form.steps if top == "octave" else torch.round(m * form.steps)
        k = m - (s * form.steps).round_()
    return k.clamp_(0, form.values.numel()).int()


class StudiedAttention(nn.Module):
    """x (B, N, C) -> (B, N, C), or of the first `tokens` rows alone."""

    def __init__(self, attention: Attention, variant: Variant, sample: Sample) -> None:
        super().__init__()
        self.attention, self.variant, self.form = attention, variant, variant.format(sample)
        k = sample.k - sample.k.mean(2, keepdim=True) if variant.centre else sample.k
        if variant.qk in ("tensor", "head"):
            self.q_scale, self.k_scale = static_scale(sample.q, variant.qk), static_scale(k, variant.qk)
        if variant.v == "e4m3":
            self.v_scale = sample.v.abs().amax((0, 2, 3))[:, None, None] / E4M3_MAX
        elif variant.v:
            self.v_scale = static_scale(sample.v, "head", int(variant.v.removeprefix("int")))

    def forward(self, x: Tensor, tokens: int | None = None) -> Tensor:
        q, k, v = heads(self.attention, x)
        q, k, v = self.rounded(q[:, :, :tokens], k, v)
        p = probabilities(scores(q, k, self.attention.scale), self.form, self.variant.top)
        return self.attention.proj((p @ v).transpose(1, 2).flatten(2))

    def rounded(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        variant = self.variant
        if variant.centre:
            k = k - k.mean(2, keepdim=True)
        if variant.qk == "token":
            q, k = (integers(x, affine.scale_of(x.abs().amax(-1, keepdim=True))) for x in (q, k))
        elif variant.qk:
            q, k = integers(q, self.q_scale), integers(k, self.k_scale)
        if variant.v == "e4m3":
            coded = (v / self.v_scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
            v = coded.float() * self.v_scale
        elif variant.v:
            v = integers(v, self.v_scale, int(variant.v.removeprefix("int")))
        return q, k, v


def heads(attention: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, N, D)."""
    qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, attention.head_dim))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
    return attention.q_norm(q), attention.k_norm(k), v


def static_scale(x: Tensor, of: str, bits: int = 8) -> Tensor:
    """(1 or H, 1, 1) for x (B, H, N, D): of the largest value for 8 bits, of the least squared error for fewer."""
    groups = 1 if of == "tensor" else x.shape[1]
    method = "minmax" if bits == 8 else "mse"
    return symmetric_scale(x.transpose(1, 2).flatten(2).flatten(0, 1), method, groups, bits=bits)[:, None, None]


def integers(x: Tensor, scale: Tensor, bits: int = 8) -> Tensor:
    """x rounded to `bits`-bit multiples of scale, float32."""
    return affine.dequantize(affine.quantize(x, scale, bits=bits), scale)


class StudiedBlock(nn.Module):
    computes_first_tokens = True

    def __init__(self, block: Block, variant: Variant, sample: Sample) -> None:
        super().__init__()
        self.block, self.attn = block, StudiedAttention(block.attn, variant, sample)

    def forward(self, x: Tensor, tokens: int | None = None) -> Tensor:
        block = self.block
        x = x[:, :tokens] + block.ls1(self.attn(block.norm1(x), tokens))
        return x + block.ls2(block.mlp(block.norm2(x)))


def studied(model: VisionTransformer, variant: Variant, samples: list[Sample]) -> VisionTransformer:
    """The model with the attention of every block replaced; weights are shared."""
    other = deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    pairs = zip(model.blocks, samples, strict=True)
    other.blocks = nn.Sequential(*(StudiedBlock(block, variant, sample) for block, sample in pairs))
    return other


@torch.inference_mode()
def sample_blocks(model: VisionTransformer, images: Tensor) -> list[Sample]:
    """The sample of every block, on images (B, Cin, H, W)."""
    seen: list[Sample] = []
    hooks = [
        block.attn.register_forward_pre_hook(
            lambda attention, args: seen.append(Sample(*heads(attention, args[0]), attention.scale))
        )
        for block in model.blocks
    ]
    try:
        model.forward_features(images)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
