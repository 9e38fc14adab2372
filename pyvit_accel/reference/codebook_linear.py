"""y = x_lut[x] @ w_lut[w].T on codes of non-uniform levels, and everything that follows a matmul in a transformer.

    acc = sum_k x_lut[x[m, k]] w_lut[q[n, k] + 2^(bits-1)]           in the dtype of the tables: float32 as called
    y   = acc * (x_scale * w_scale), then as lowbit_linear

x            (M, K)       uint8, codes below L
x_scale      (1,) | (M,)  float32: one, or one per row
x_lut        (L,)         float32, L <= 256; NaN where no code is
w_packed     packed       uint8, formats/packed.py; holds (N, K) codes of 2, 3, 4, 5, 6 or 8 bits
w_scale      (N,)         float32
w_lut        (2^bits,)    float32
operand      "fp16" | "bf16" | "e4m3" | "e5m2": what a kernel may multiply in; it holds both tables, so nothing changes
bias, activation, layer_scale, residual, out_scale, out_zero_point, out_bits    as lowbit_linear
returns      (M, N)       float32, or int8 when out_scale is given
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel.formats import packed

from .lowbit_linear import finish

BLOCK = 2**20  # weights decoded at a time: as float32 they fit a cache, and take no second copy of the whole


def take(table: Tensor, index: Tensor) -> Tensor:
    """table[index]; for one dimension index_select is four times as fast."""
    return table.index_select(0, index.reshape(-1).int()).view(index.shape)


def decode_weight(w_packed: Tensor, N: int, K: int, w_lut: Tensor) -> Tensor:
    """w_lut[code] (N, K)."""
    offset = 2 ** (packed.bits_of(w_packed, N, K) - 1)
    return take(w_lut, packed.unpack(w_packed, N, K).int() + offset)


def codebook_linear(
    x: Tensor,
    x_scale: Tensor,
    x_lut: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    w_lut: Tensor,
    bias: Tensor | None,
    operand: str,
    activation: str,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out_zero_point: int,
    out_bits: int,
) -> Tensor:
    K, N = x.shape[1], w_scale.shape[0]
    values = take(x_lut, x)
    tiles = max(1, BLOCK // (K * packed.TILE))
    acc = []
    for block in w_packed.split(tiles):
        features = min(block.shape[0] * packed.TILE, N - packed.TILE * tiles * len(acc))
        acc.append(values @ decode_weight(block, features, K, w_lut).T)
    y = torch.cat(acc, dim=1) * (x_scale[:, None] * w_scale)
    return finish(y, bias, activation, layer_scale, residual, out_scale, out_zero_point, out_bits)
