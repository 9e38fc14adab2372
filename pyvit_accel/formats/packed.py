"""Packed integer weights of 2, 3, 4, 5, 6 or 8 bits, layout version 2: the same bytes on every device.

Signed codes q (N, K), -2^(bits-1) .. 2^(bits-1)-1, become w_packed (ceil(N / 16), 64 + 64 bits ceil(K / 32)) uint8. A
row is a tile of 16 output features, zero padded:

    bytes 0..63      16 int32, little endian: the sum over k of each feature's codes
    bytes 64..       chunks of 32 inputs, 64 bits bytes each

A chunk is 8 groups, a group the 64 codes of 16 features x 4 inputs: element 4 n + i is feature n, input 4 g + i. As
bytes a group is one 64-byte register of int8 dot products, and 8-bit chunks are just that: 8 groups of q. With fewer
bits u = q + 2^(bits-1) is cut, highest bits first, into planes of 4, 2 or 1 bits: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2. A
plane of p bits is p registers; field f (bits f p .. f p + p - 1) of byte e of register j is element e of group f p + j:

    plane of 4:   register j: groups j, 4 + j          low nibbles are inputs 0..15 of a chunk, high ones 16..31
    plane of 2:   register j: groups j, 2 + j, 4 + j, 6 + j
    plane of 1:   groups 0, 1, .. 7

So one shift and one mask unpack 64 codes, and a tile streams through a cache line by line. The number of bits follows
from the shape (bits_of). The sums serve shifted activations: sum (x - z) q = sum x q - z sum q.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 16  # output features
CHUNK = 32  # inputs
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}  # of each number of bits, highest first


def check_bits(what: str, bits: int, choices: tuple[int, ...] = tuple(PLANES)) -> None:
    if bits not in choices:
        raise ValueError(f"{what}: bits={bits}; use one of {', '.join(map(str, choices))}")


def packed_shape(N: int, K: int, bits: int = 8) -> tuple[int, int]:
    check_bits("packed_shape", bits)
    return -(-N // TILE), 64 + 64 * bits * -(-K // CHUNK)


def bits_of(w_packed: Tensor, N: int, K: int) -> int:
    """How many bits the codes (N, K) of a packed tensor have. Raises ValueError when it holds no such codes."""
    for bits in PLANES:
        if tuple(w_packed.shape) == packed_shape(N, K, bits):
            return bits
    shapes = ", ".join(f"{packed_shape(N, K, bits)} for {bits} bits" for bits in (2, 4, 8))
    raise ValueError(f"w_packed of N={N}, K={K} has shape {shapes} ...; got {tuple(w_packed.shape)}")


def pack(q: Tensor, bits: int = 8) -> Tensor:
    """Codes (N, K) int8 to the packed tensor."""
    check_bits("pack", bits)
    if q.dtype != torch.int8 or q.dim() != 2:
        raise TypeError(f"pack: expected int8 codes (N, K), got {q.dtype} {tuple(q.shape)}")
    if q.numel():
        lo, hi = (int(end) for end in q.aminmax())
        if lo < -(2 ** (bits - 1)) or hi >= 2 ** (bits - 1):
            held = f"{-(2 ** (bits - 1))} to {2 ** (bits - 1) - 1}"
            raise ValueError(f"pack: codes reach from {lo} to {hi}, but {bits} bits hold {held}")
    N, K = q.shape
    tiles, chunks = -(-N // TILE), -(-K // CHUNK)
    padded = q.new_zeros(tiles * TILE, chunks * CHUNK)
    padded[:N, :K] = q
    sums = padded.sum(dim=1, dtype=torch.int32).view(tiles, TILE).view(torch.uint8)
    groups = padded.view(tiles, TILE, chunks, 8, 4).permute(0, 2, 3, 1, 4).reshape(tiles, chunks, 8, 64)
    if bits == 8:
        registers = groups.view(torch.uint8)
    else:
        u, left, planes = groups.int() + 2 ** (bits - 1), bits, []
        for p in PLANES[bits]:
            left -= p
            fields = ((u >> left) & (2**p - 1)).view(tiles, chunks, 8 // p, p, 64)
            shifts = p * torch.arange(8 // p, device=q.device)[:, None, None]
            planes.append((fields << shifts).sum(dim=2).to(torch.uint8))
        registers = torch.cat(planes, dim=2)
    return torch.cat([sums, registers.reshape(tiles, -1)], dim=1).contiguous()


def unpack(w_packed: Tensor, N: int, K: int) -> Tensor:
    """The packed tensor back to codes (N, K) int8."""
    if w_packed.dtype != torch.uint8:
        raise TypeError(f"unpack: packed weights are uint8, got {w_packed.dtype}")
    bits = bits_of(w_packed, N, K)
    tiles, chunks = w_packed.shape[0], -(-K // CHUNK)
    registers = w_packed[:, 64:].reshape(tiles, chunks, bits, 64)
    if bits == 8:
        groups = registers.contiguous().view(torch.int8)
    else:
        u, at = torch.zeros(tiles, chunks, 8, 64, dtype=torch.uint8, device=w_packed.device), 0
        for p in PLANES[bits]:
            shifts = p * torch.arange(8 // p, dtype=torch.uint8, device=w_packed.device)[:, None, None]
            fields = (registers[:, :, None, at : at + p] >> shifts) & (2**p - 1)
            u = (u << p) | fields.reshape(tiles, chunks, 8, 64)
            at += p
        groups = (u - 2 ** (bits - 1)).view(torch.int8)  # wraps
    codes = groups.view(tiles, chunks, 8, TILE, 4).permute(0, 3, 1, 2, 4).reshape(tiles * TILE, chunks * CHUNK)
    return codes[:N, :K].contiguous()
