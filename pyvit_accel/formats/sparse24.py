"""P24 v1: 2:4 sparse weights as the sparse tensor cores of every architecture read them, 16-bit and 8-bit.

w (N, K) float16 | bfloat16 | int8. A chunk is 4 consecutive inputs of one row, of which at most 2 are not zero; 2 are
kept: those that are not zero, then the first of the others. Its nibble is i0 | i1 << 2, i0 < i1 the places of the kept:

    kept     0,1   0,2   0,3   1,2   1,3   2,3
    nibble   0x4   0x8   0xC   0x9   0xD   0xE        no other one is ever written

A tile is 16 rows x 32 inputs (16-bit) or 64 (8-bit): the A operand of one mma.sp.m16n8k32 or .m16n8k64, or of one warp
of a wgmma.mma_async.sp. Rows are padded with zeros (nibble 0x4) to a multiple of 128, inputs to one of 4 tiles.

    values  (N / 16, K / KS, 32, 4 E)    dtype of w: per tile, lane l and register r (of E = 2 or 4 elements) the A
                                         fragment; g = l / 4, t = l % 4, kept elements of the row counted 0, 1, ..:
                                         row g + 8 (r & 1), kept E t + e + 4 E (r >> 1)
    meta    16-bit  (N / 32, K / 128, 32, 4)  int32; word j is of k-step 4 i + j of the tiles 2 p (lanes t < 2) and
                                         2 p + 1 (t >= 2); with s = t & 1, nibble c: row g, chunk 4 s + c; nibble 4 + c:
                                         row g + 8, the same chunk
            8-bit   (N / 16, K / 256, 32, 4)  int32; word j is of k-step 4 i + j; nibble c: row g + 8 (t & 1), chunk
                                         8 (t >> 1) + c

KS is 32 or 64; words are little endian. The words are those of torch's SparseSemiStructuredTensor (the CUTLASS layout),
in another order: to_torch and from_torch only move them. Layouts: PTX ISA, "mma.sp"; CUTLASS, host_reorder.h.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

VERSION = 1
CHUNK = 4  # inputs
TILE = 16  # rows
ROWS = 128  # padded to
STEPS = 4  # k-steps of a group of metadata words
NIBBLES = (0x4, 0x8, 0xC, 0x9, 0xD, 0xE)
ELEMENTS = {torch.float16: 2, torch.bfloat16: 2, torch.int8: 4}  # of a 32-bit register


def tile_inputs(dtype: torch.dtype) -> int:
    """KS: inputs of a tile, 32 or 64."""
    if dtype not in ELEMENTS:
        raise TypeError(f"sparse24: a weight of {dtype}; expected float16, bfloat16 or int8")
    return 16 * ELEMENTS[dtype]


def packed_shapes(N: int, K: int, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of values and of meta for a weight (N, K)."""
    KS = tile_inputs(dtype)
    tiles, steps = -(-N // ROWS) * (ROWS // TILE), -(-K // (STEPS * KS)) * STEPS
    rows = tiles if dtype == torch.int8 else tiles // 2
    return (tiles, steps, 32, 4 * ELEMENTS[dtype]), (rows, steps // STEPS, 32, 4)


def check(w: Tensor) -> None:
    """Raise ValueError, naming row and chunk, for a weight that is not finite or not 2:4."""
    if w.dim() != 2:
        raise ValueError(f"sparse24: a weight of shape {tuple(w.shape)}; expected (out_features, in_features)")
    if w.is_floating_point() and not bool((finite := w.isfinite()).all()):
        row, k = _first(~finite)
        raise ValueError(f"sparse24: row {row}, chunk {k // CHUNK} holds {w[row, k].item()}; weights must be finite")
    crowded = (chunks := _chunks(w)).count_nonzero(dim=-1) > 2
    if bool(crowded.any()):
        row, chunk = _first(crowded)
        raise ValueError(
            f"sparse24: row {row}, chunk {chunk} (inputs from {CHUNK * chunk} on) holds {chunks[row, chunk].tolist()}, "
            "more than two non-zeros; choose a 2:4 mask first (pyvit_accel.sparsity)"
        )


def is_sparse(w: Tensor) -> bool:
    """Whether at most two of the four inputs of every chunk of w (N, K) are not zero."""
    return bool((_chunks(w).count_nonzero(dim=-1) <= 2).all())


def pack(w: Tensor) -> tuple[Tensor, Tensor]:
    """w (N, K), 2:4 already, to (values, meta). Raises TypeError for a dtype without sparse products, else as check.

    -0.0 is a zero: where it is not kept it comes back as 0.0.
    """
    check(w)
    (tiles, steps, _, _), _ = packed_shapes(*w.shape, w.dtype)
    padded = w.new_zeros(tiles * TILE, steps * tile_inputs(w.dtype))
    padded[: w.shape[0], : w.shape[1]] = w
    chunks = _chunks(padded)
    places = torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=w.device)
    nibbles = _NIBBLE_OF.to(w.device)[((chunks != 0) * places).sum(-1, dtype=torch.int32)]
    kept = chunks.gather(-1, torch.stack([nibbles & 3, nibbles >> 2], dim=-1).long())
    return fragments_of(kept.flatten(1)), _words_of(nibbles, w.dtype)


def unpack(values: Tensor, meta: Tensor, N: int, K: int) -> Tensor:
    """(values, meta) back to w (N, K). Raises ValueError for shapes that are not of (N, K), and, naming row and chunk,
    for an illegal nibble."""
    _check_packed(values, meta, N, K)
    nibbles = _nibbles_of(meta, values.dtype)
    _check_nibbles(nibbles)
    return _scatter(rows_of(values), nibbles)[:N, :K].contiguous()


class Sparse24Operand(NamedTuple):
    """A 2:4 weight (N, K) of int8 codes as one operand: values, meta, and the sums of the codes over K, (N,) int32.

    ops.lowbit_linear, lowbit_linear_scatter, quant_project, quant_mlp and quant_block take it for a packed weight.
    """

    values: Tensor
    meta: Tensor
    sums: Tensor

    @classmethod
    def of(cls, codes: Tensor) -> Sparse24Operand:
        """codes (N, K) int8. Raises as pack."""
        return cls(*pack(codes), codes.sum(dim=1, dtype=torch.int32))

    def check(self, N: int, K: int) -> None:
        """Raise ValueError unless it is of (N, K)."""
        _check_packed(self.values, self.meta, N, K)
        if self.values.dtype != torch.int8 or self.sums.shape != (N,) or self.sums.dtype != torch.int32:
            raise ValueError(
                f"sparse24: values of {self.values.dtype} with sums {tuple(self.sums.shape)} of {self.sums.dtype}; a "
                f"weight ({N}, {K}) of codes has int8 values and sums ({N},) of int32"
            )


def check_meta(meta: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError, naming row and chunk, for an illegal nibble in the metadata of a weight of this dtype."""
    _check_nibbles(_nibbles_of(meta, dtype))


def to_torch(values: Tensor, meta: Tensor, N: int, K: int) -> tuple[Tensor, Tensor]:
    """(packed (N, K / 2), meta (N, K / 16) int16 | (N, K / 32) int32) of torch's SparseSemiStructuredTensorCUTLASS.

    Raises ValueError for sizes that torch does not take: multiples of (32, 64), of (16, 128) for int8.
    """
    _check_packed(values, meta, N, K)
    rows, inputs = _torch_multiples(values.dtype)
    if N % rows or K % inputs:
        raise ValueError(
            f"to_torch: a weight ({N}, {K}) of {values.dtype}; torch's layout takes multiples of ({rows}, {inputs}), "
            f"pad it to ({-(-N // rows) * rows}, {-(-K // inputs) * inputs}) with zeros first"
        )
    words = meta.permute(1, 3, 0, 2).flatten(0, 1)  # (k-steps, rows of tiles, 32)
    words = words[: K // tile_inputs(values.dtype), : N // rows].contiguous()
    narrow = torch.int32 if values.dtype == torch.int8 else torch.int16
    return rows_of(values)[:N, : K // 2].contiguous(), words.view(narrow).reshape(N, -1)


def from_torch(packed: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """`packed` and `meta` of a SparseSemiStructuredTensorCUTLASS to (values, meta) of P24; the kept stay the kept.

    Raises ValueError, naming row and chunk, for nibbles that torch's tile kernel and CUTLASS's compressor may write and
    hardware does not define, and for values that are not finite.
    """
    KS, (rows, inputs) = tile_inputs(packed.dtype), _torch_multiples(packed.dtype)
    narrow, per_word = (torch.int32, 32) if packed.dtype == torch.int8 else (torch.int16, 16)
    N, K = (packed.shape[0], 2 * packed.shape[1]) if packed.dim() == 2 else (1, 1)
    if N % rows or K % inputs or tuple(meta.shape) != (N, K // per_word) or meta.dtype != narrow:
        raise ValueError(
            f"from_torch: packed {tuple(packed.shape)} of {packed.dtype} and meta {tuple(meta.shape)} of {meta.dtype}; "
            f"expected packed in multiples of ({rows}, {inputs // 2}) and, for (N, K / 2), meta (N, K / {per_word}) of "
            f"{narrow}"
        )
    (tiles, steps, _, _), shape = packed_shapes(N, K, packed.dtype)
    words = torch.full((steps, shape[0], 32), 0x44444444, dtype=torch.int32, device=meta.device)
    words[: K // KS, : N // rows] = meta.contiguous().view(torch.int32).view(K // KS, N // rows, 32)
    words = words.view(steps // STEPS, STEPS, shape[0], 32).permute(2, 0, 3, 1).contiguous()
    kept = packed.new_zeros(tiles * TILE, steps * KS // 2)
    kept[:N, : K // 2] = packed
    nibbles = _nibbles_of(words, packed.dtype)
    _check_nibbles(nibbles)
    check(_scatter(kept, nibbles))
    return fragments_of(kept), words


def rows_of(values: Tensor) -> Tensor:
    """The kept elements row by row, (N, K / 2) of the padded weight: the A operand of wgmma from shared memory."""
    tiles, steps = values.shape[:2]
    E = ELEMENTS[values.dtype]
    return values.view(tiles, steps, 8, 4, 2, 2, E).permute(0, 5, 2, 1, 4, 3, 6).reshape(tiles * TILE, steps * 8 * E)


def fragments_of(rows: Tensor) -> Tensor:
    """The inverse of rows_of."""
    E = ELEMENTS[rows.dtype]
    tiles, steps = rows.shape[0] // TILE, rows.shape[1] // (8 * E)
    split = rows.view(tiles, 2, 8, steps, 2, 4, E)  # r & 1, g, k-step, r >> 1, t, element
    return split.permute(0, 3, 2, 5, 4, 1, 6).reshape(tiles, steps, 32, 4 * E).contiguous()


def _words_of(nibbles: Tensor, dtype: torch.dtype) -> Tensor:
    """Nibbles (N, K / 4) uint8 of the padded weight to meta."""
    if dtype == torch.int8:  # (tile, h, g, k-step, s, c): lane 4 g + 2 s + h
        ordered = nibbles.view(len(nibbles) // 16, 2, 8, -1, 2, 8).permute(0, 3, 2, 4, 1, 5)
    else:  # (pair of tiles, which, r & 1, g, k-step, s, c): lane 4 g + 2 which + s
        ordered = nibbles.view(len(nibbles) // 32, 2, 2, 8, -1, 2, 4).permute(0, 4, 3, 1, 5, 2, 6)
    ordered = ordered.reshape(ordered.shape[0], ordered.shape[1] // STEPS, STEPS, 32, 8).transpose(2, 3)
    return (ordered[..., 0::2] | ordered[..., 1::2] << 4).contiguous().view(torch.int32).squeeze(-1)


def _nibbles_of(meta: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of _words_of."""
    split = meta.contiguous().unsqueeze(-1).view(torch.uint8)
    ordered = torch.stack([split & 15, split >> 4], dim=-1).flatten(-2).transpose(2, 3).flatten(1, 2)
    tiles, steps = ordered.shape[:2]
    if dtype == torch.int8:
        return ordered.view(tiles, steps, 8, 2, 2, 8).permute(0, 4, 2, 1, 3, 5).reshape(16 * tiles, 16 * steps)
    return ordered.view(tiles, steps, 8, 2, 2, 2, 4).permute(0, 3, 5, 2, 1, 4, 6).reshape(32 * tiles, 8 * steps)


def _scatter(kept: Tensor, nibbles: Tensor) -> Tensor:
    """Kept elements (N, K / 2) and nibbles (N, K / 4) to the dense weight."""
    places = torch.stack([nibbles & 3, nibbles >> 2], dim=-1).long()
    return kept.new_zeros(*nibbles.shape, CHUNK).scatter_(-1, places, kept.view(*nibbles.shape, 2)).flatten(1)


def _chunks(w: Tensor) -> Tensor:
    """(N, chunks, 4), the last one padded with zeros."""
    return torch.nn.functional.pad(w, (0, -w.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK))


def _nibble_of(nonzero: int) -> int:
    """The nibble of a chunk whose bits of `nonzero` say which elements are not zero, two of them at most."""
    places = sorted(range(CHUNK), key=lambda i: (not nonzero >> i & 1, i))[:2]
    return min(places) | max(places) << 2


_NIBBLE_OF = torch.tensor([_nibble_of(nonzero) for nonzero in range(16)], dtype=torch.uint8)
_LEGAL = torch.tensor([nibble in NIBBLES for nibble in range(16)])


def _torch_multiples(dtype: torch.dtype) -> tuple[int, int]:
    return (16, 128) if dtype == torch.int8 else (32, 64)


def _check_packed(values: Tensor, meta: Tensor, N: int, K: int) -> None:
    shapes = packed_shapes(N, K, values.dtype)
    if (tuple(values.shape), tuple(meta.shape)) != shapes or meta.dtype != torch.int32:
        raise ValueError(
            f"sparse24: values {tuple(values.shape)}, meta {tuple(meta.shape)} of {meta.dtype}; a weight ({N}, {K}) of "
            f"{values.dtype} has values {shapes[0]}, meta {shapes[1]} of int32"
        )


def _check_nibbles(nibbles: Tensor) -> None:
    legal = _LEGAL.to(nibbles.device)[nibbles.int()]
    if not bool(legal.all()):
        row, chunk = _first(~legal)
        known = ", ".join(f"{nibble:X}" for nibble in NIBBLES)
        raise ValueError(
            f"sparse24: row {row}, chunk {chunk} has metadata {nibbles[row, chunk].item():X}; legal are {known}. Pack "
            "the weight again"
        )


def _first(where: Tensor) -> tuple[int, int]:
    row, column = where.nonzero()[0].tolist()
    return row, column
