"""QuantBlock on packed rows: the selected tokens of all images one after the other, in place, and nothing else.

    codes = norm_quant(x, rows);  x[rows] += proj(attention(qkv(codes), cu_seqlens))
    codes = norm_quant(x, rows);  x[rows] += fc2(activation(fc1(codes)))

Shapes are those of the capacity, T = B N rows; how many of them are used is known on the device only, and ops skip -1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyvit_accel import ops
from pyvit_accel.modules import QuantBlock, QuantMlp


class Packed(NamedTuple):
    """Which tokens there are. All int32.

    rows        (T,)     b N + i of each, image after image, then -1
    places      (T,)     0, 1, 2, ... as many as there are, then -1: rows, once they are gathered
    cu_seqlens  (B + 1,) where each image starts among them
    max_seqlen           N, the most that an image can have
    """

    rows: Tensor
    places: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


def pack(mask: Tensor) -> Packed:
    """mask (B, N) bool."""
    _, _, cu_seqlens, rows = ops.split_tokens(mask)
    places = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
    return Packed(rows, torch.where(rows < 0, -1, places), cu_seqlens, mask.shape[1])


def packed_block(block: QuantBlock, x: Tensor, packed: Packed) -> None:
    """x (T, C) float32, in place: the rows of packed become the block's, the others stay."""
    attention, places = block.attention, packed.places
    heads = attention.heads(*attention.qkv.quantize_norm(block.norm1, x, packed.rows), index=places)
    ends = {"cu_seqlens": packed.cu_seqlens, "max_seqlen": packed.max_seqlen}
    out = heads.attention(None, softmax=attention.softmax, v_bits=attention.head_bits, **ends)
    codes = attention.proj.quantize(out[0], places)
    attention.proj.add_matmul(x, packed.rows, *codes, layer_scale=block.layer_scale1)
    packed_mlp(block.norm2, block.mlp, x, x, packed, block.layer_scale2)


def packed_mlp(
    norm: nn.LayerNorm, mlp: QuantMlp, x: Tensor, out: Tensor, packed: Packed, layer_scale: Tensor | None = None
) -> None:
    """out[rows] += layer_scale mlp(norm(x[rows])), in place; x and out (T, C) float32, the same tensor or two."""
    hidden = mlp.hidden(*mlp.fc1.quantize_norm(norm, x, packed.rows), packed.places)
    mlp.fc2.add_matmul(out, packed.rows, *hidden, layer_scale=layer_scale)
