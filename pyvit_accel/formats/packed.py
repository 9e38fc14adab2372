"""Packed int8 weights, layout "W8 v1": what the matmul kernels read, the same bytes on every device.

w (N, K) int8 becomes w_packed (ceil(N / 16), 64 + 16 K4) uint8, K4 = K rounded up to 4. One row is a tile of 16 output
features, zero padded:

    bytes 0..63      16 int32, little endian: the sum over k of each feature's codes
    bytes 64..       K4 / 4 groups of 64 bytes; byte 4 n + i of group g is the code of feature n, input 4 g + i

A group is one 64-byte register of int8 dot products (four inputs for sixteen features), and a tile streams through a
cache line by line. The sums turn unsigned or shifted activations into signed ones: sum (q - z) w = sum q w - z sum w.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 16  # output features


def packed_shape(N: int, K: int) -> tuple[int, int]:
    return -(-N // TILE), 64 + TILE * (-(-K // 4) * 4)


def pack_w8(q: Tensor) -> Tensor:
    """Codes (N, K) int8 to the packed tensor."""
    if q.dtype != torch.int8 or q.dim() != 2:
        raise TypeError(f"pack_w8: expected int8 codes (N, K), got {q.dtype} {tuple(q.shape)}")
    N, K = q.shape
    tiles, width = packed_shape(N, K)
    padded = q.new_zeros(tiles * TILE, (width - 64) // TILE)
    padded[:N, :K] = q
    sums = padded.sum(dim=1, dtype=torch.int32).view(tiles, TILE).view(torch.uint8)
    codes = padded.view(tiles, TILE, -1, 4).transpose(1, 2).reshape(tiles, -1).view(torch.uint8)
    return torch.cat([sums, codes], dim=1).contiguous()


def unpack_w8(w_packed: Tensor, N: int, K: int) -> Tensor:
    """The packed tensor back to codes (N, K) int8."""
    tiles, width = packed_shape(N, K)
    if w_packed.dtype != torch.uint8 or tuple(w_packed.shape) != (tiles, width):
        raise ValueError(
            f"unpack_w8: W8 v1 of N={N}, K={K} is uint8 {(tiles, width)}, got {w_packed.dtype} {tuple(w_packed.shape)}"
        )
    codes = w_packed[:, 64:].contiguous().view(torch.int8).view(tiles, -1, TILE, 4)
    return codes.transpose(1, 2).reshape(tiles * TILE, -1)[:N, :K].contiguous()
