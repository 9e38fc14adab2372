"""Layers of a source as records: integers exactly as the published quantizers make them.

    code = clip(rint(w / scale) + zero_point, 0, 2^bits - 1)

It is a division: a product with 1 / scale breaks other ties. Stored is code - zero_point, in as many bits as it needs:
an asymmetric weight then multiplies without a correction.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pyvit_accel.formats.codebook import Codebook
from pyvit_accel.formats.packed import PLANES

from .records import ImportedLinear, Uniform
from .source import Source


def linear(
    source: Source, name: str, scale: Tensor, zero_point: Tensor, bits: int, x: Uniform | Codebook | None
) -> ImportedLinear:
    """scale (N,), integer-valued zero_point (N,) of unsigned codes: 2^(bits-1) for a symmetric weight."""
    weight = source.tensor(f"{name}.weight").flatten(1)
    unsigned = (torch.round(weight / scale[:, None]) + zero_point[:, None]).clamp(0, 2**bits - 1)
    codes = unsigned - zero_point[:, None]
    lo, hi = (int(end) for end in codes.aminmax())
    w_bits = next((b for b in PLANES if b >= bits and -(2 ** (b - 1)) <= lo and hi < 2 ** (b - 1)), None)
    if w_bits is None:
        reason = f"gives {bits}-bit codes {lo} to {hi} once its zero point is taken off; packed weights have 8 bits"
        raise source.refused(f"{name}.weight", reason)
    bias = source.optional(f"{name}.bias")
    return ImportedLinear(name, weight, bias, codes.to(torch.int8), scale, w_bits, bits, x)


def uniform(scale: Tensor, zero_point: Tensor, bits: int) -> Uniform:
    """From the zero point of unsigned codes."""
    return Uniform(scale, zero_point.long() - 2 ** (bits - 1), bits)


def symmetric(scale: Tensor, bits: int) -> Uniform:
    return Uniform(scale, torch.zeros_like(scale, dtype=torch.int64), bits)


def norm(source: Source, name: str) -> tuple[Tensor, Tensor]:
    return source.tensor(f"{name}.weight"), source.tensor(f"{name}.bias")


def matmuls(linears: Iterable[str]) -> list[str]:
    """Names of the two matmuls of every attention that has a qkv."""
    attentions = [name.removesuffix("qkv") for name in linears if name.endswith("attn.qkv")]
    return [f"{attention}matmul{i}" for attention in attentions for i in (1, 2)]


def norms(source: Source, linears: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """norm1 and norm2 of every block that has a qkv, and the last norm where there is one."""
    blocks = [name.removesuffix("attn.qkv") for name in linears if name.endswith("attn.qkv")]
    names = [f"{block}{norm}" for block in blocks for norm in ("norm1", "norm2")]
    return {name: norm(source, name) for name in [*names, *(["norm"] if source.has("norm.weight") else [])]}


def storage_notes(linears: Iterable[ImportedLinear]) -> list[str]:
    return [
        f"{linear.name}: its {linear.published_bits}-bit weights and zero points are stored in {linear.w_bits} bits"
        for linear in linears
        if linear.w_bits != linear.published_bits
    ]


def not_quantized(linears: Iterable[ImportedLinear]) -> list[str]:
    return [f"{linear.name}: the source does not quantize its input" for linear in linears if linear.x is None]
