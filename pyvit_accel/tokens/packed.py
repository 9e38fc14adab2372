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
from pyvit_accel.modules import QuantAttention, QuantBlock, QuantLinear, QuantMlp


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
    attention = block.attention
    codes, scale = _norm(block.norm1, attention.qkv, x, packed)
    (q, q_scale), (k, k_scale), (v, v_scale) = _heads(attention, codes, scale, packed.places)
    out = ops.quant_attention(
        *(q, k, v, q_scale, k_scale, v_scale, attention.scale),
        softmax=attention.softmax,
        v_bits=attention.head_bits,
        cu_seqlens=packed.cu_seqlens,
        max_seqlen=packed.max_seqlen,
    )
    _add(attention.proj, out[0], x, packed, block.layer_scale1)
    packed_mlp(block.norm2, block.mlp, x, x, packed, block.layer_scale2)


def packed_mlp(
    norm: nn.LayerNorm, mlp: QuantMlp, x: Tensor, out: Tensor, packed: Packed, layer_scale: Tensor | None = None
) -> None:
    """out[rows] += layer_scale mlp(norm(x[rows])), in place; x and out (T, C) float32, the same tensor or two."""
    fc1, fc2 = mlp.fc1, mlp.fc2
    epilogue = {"activation": mlp.activation, "index": packed.places}
    codes, scale = _norm(norm, fc1, x, packed)
    if fc2.x_scale is None:
        _add(fc2, fc1.matmul(codes, scale, **epilogue), out, packed, layer_scale)
        return
    requantised = {"out_scale": fc2.x_scale, "out_zero_point": fc2.x_zero_point, "out_bits": fc2.x_bits}
    _scatter(fc2, fc1.matmul(codes, scale, **epilogue, **requantised), None, out, packed, layer_scale)


def _norm(norm: nn.LayerNorm, linear: QuantLinear, x: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    clip = linear.x_clip if linear.x_scale is None else 1.0
    return ops.norm_quant(x, norm.weight, norm.bias, linear.x_scale, norm.eps, linear.x_bits, clip, index=packed.rows)


def _add(linear: QuantLinear, y: Tensor, out: Tensor, packed: Packed, layer_scale: Tensor | None) -> None:
    """out[rows] += layer_scale linear(y); y (T, K) float32."""
    if linear.x_scale is None:
        codes, scale = ops.quantize(
            y, minimum=linear.x_minimum, bits=linear.code_bits, clip=linear.x_clip, table=linear.x_table,
            index=packed.places,
        )  # fmt: skip
    else:
        codes, scale = ops.quantize(y, linear.x_scale, linear.x_zero_point, bits=linear.x_bits, index=packed.places)
    _scatter(linear, codes, scale, out, packed, layer_scale)


def _scatter(
    linear: QuantLinear, codes: Tensor, scale: Tensor | None, out: Tensor, packed: Packed, layer_scale: Tensor | None
) -> None:
    if linear.x_scale is not None:
        scale = linear.x_scale if linear.x_scale.shape[0] == 1 else linear.unit_scale
    ops.lowbit_linear_scatter(
        *(out, packed.rows, codes, scale, linear.w_packed, linear.w_scale, linear.bias),
        x_zero_point=linear.x_zero_point,
        layer_scale=layer_scale,
    )


def _heads(
    attention: QuantAttention, codes: Tensor, scale: Tensor, places: Tensor
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Codes (1, H, T, D) and scale of q, k and v, from those (T, C) of normalised tokens."""
    H, D = attention.num_heads, attention.head_dim
    shape = (1, codes.shape[0], 3, H, D)
    if attention.head_scale is not None:
        static = {"out_scale": attention.qkv_scale, "out_bits": attention.head_bits}
        qkv = attention.qkv.matmul(codes, scale, index=places, **static).view(shape)
        return tuple(zip(qkv.permute(2, 0, 3, 1, 4).unbind(0), attention.head_scale, strict=True))
    qkv = attention.qkv.matmul(codes, scale, index=places).view(shape)
    head = torch.arange(H, dtype=torch.int32, device=places.device)
    heads = torch.where(places[:, None] < 0, -1, H * places[:, None] + head).flatten()
    norms = (attention.q_norm, attention.k_norm, None)
    return tuple(_head_codes(x, norm, heads, attention.head_bits) for x, norm in zip(qkv.unbind(2), norms, strict=True))


def _head_codes(x: Tensor, norm: nn.Module | None, heads: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x (1, T, H, D) float32 to codes (1, H, T, D) and scale (1, H, T), through the norm if there is one."""
    if isinstance(norm, nn.LayerNorm):
        codes, scale = ops.norm_quant(x, norm.weight, norm.bias, eps=norm.eps, bits=bits, index=heads)
    else:
        codes, scale = ops.quantize(x if norm is None else norm(x), bits=bits, index=heads)
    return codes.view(x.shape).transpose(1, 2), scale.view(x.shape[:3]).transpose(1, 2)
