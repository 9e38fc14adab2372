"""Which tokens stay: small integer plans, one program per image; no count leaves the device.

select_tokens  scores (B, N) floats -> index (B, p + keep), dropped (B, N - p - keep), inverse (B, N)
split_tokens   mask (B, N) bool     -> index (B, N), count (B,), cu_seqlens (B + 1,), rows (B N,)
group_tokens   assign (B, N), weight (B, N) float32 or None
                                    -> ptr (B, groups + 1), col (B, N), weight (B, N) float32, total (B, groups) float32

A token's rank is the number of tokens that come before it: counted, N^2 comparisons of a row that stays in L1, which
for the N of a transformer cost less than a second launch. Every element is written by one thread; nothing is summed
by atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FLAGS


@triton.jit
def ordered_bits(scores):
    """int32, ordered as the scores are; -0.0 as 0.0, NaN as -inf."""
    scores = tl.where(scores == scores, scores, float("-inf"))
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def ranks(scores_ptr, stride, first, N, BLOCK_N: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr):
    """How many of the tokens first .. N - 1 have a larger score than first + i, or an equal one and come before it."""
    token = first + tl.arange(0, BLOCK_N)
    own = ordered_bits(tl.load(scores_ptr + token * stride, mask=token < N, other=0.0).to(tl.float32))
    rank = tl.zeros((BLOCK_N,), dtype=tl.int32)
    for step in range(STEPS):
        # Those from N on have the lowest score and come last: before none of the others.
        other = first + step * STEP + tl.arange(0, STEP)
        score = tl.load(scores_ptr + other * stride, mask=other < N, other=float("-inf")).to(tl.float32)
        bits = ordered_bits(score)[None, :]
        ahead = (bits > own[:, None]) | ((bits == own[:, None]) & (other[None, :] < token[:, None]))
        rank += tl.sum(ahead.to(tl.int32), axis=1)
    return rank


@triton.jit
def _select_kernel(
    scores_ptr, index_ptr, dropped_ptr, inverse_ptr, N, prefix, keep, stride_sb, stride_sn,
    BY_INDEX: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_N)
    token = prefix + offs
    rank = ranks(scores_ptr + image * stride_sb, stride_sn, prefix, N, BLOCK_N, STEP, STEPS)
    kept = (token < N) & (rank < keep)
    dropped = (token < N) & (rank >= keep)
    index_ptr += image * (prefix + keep)
    inverse_ptr += image * N

    tl.store(index_ptr + offs, offs, mask=offs < prefix)
    tl.store(inverse_ptr + offs, offs, mask=offs < prefix)
    before = tl.cumsum(kept.to(tl.int32), axis=0)
    place = prefix + (before - 1 if BY_INDEX else rank)
    tl.store(index_ptr + place, token, mask=kept)
    tl.store(inverse_ptr + token, tl.where(kept, place, -1), mask=token < N)
    tl.store(dropped_ptr + image * (N - prefix - keep) + offs - before, token, mask=dropped)


@triton.jit
def _split_kernel(mask_ptr, index_ptr, count_ptr, N, prefix, stride_mb, stride_mn, BLOCK_N: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_N)
    inside = offs < N
    wanted = tl.load(mask_ptr + image * stride_mb + offs * stride_mn, mask=inside, other=0)
    stays = inside & ((wanted != 0) | (offs < prefix))
    before = tl.cumsum(stays.to(tl.int32), axis=0)
    count = tl.sum(stays.to(tl.int32), axis=0)
    tl.store(index_ptr + image * N + tl.where(stays, before - 1, count + offs - before), offs, mask=inside)
    tl.store(count_ptr + image, count)


@triton.jit
def _split_rows_kernel(index_ptr, cu_ptr, rows_ptr, B, N, BLOCK_N: tl.constexpr):
    image = tl.program_id(0)
    offs = tl.arange(0, BLOCK_N)
    start, total = tl.load(cu_ptr + image), tl.load(cu_ptr + B)
    count = tl.load(cu_ptr + image + 1) - start
    stays = offs < count
    row = image * N + tl.load(index_ptr + image.to(tl.int64) * N + offs, mask=stays, other=0)
    place = tl.where(stays, start + offs, total + image * N - start + offs - count)  # others: as many -1, at the end
    tl.store(rows_ptr + place, tl.where(stays, row, -1), mask=offs < N)


@triton.jit
def _group_kernel(
    assign_ptr, weight_ptr, ptr_ptr, col_ptr, entry_ptr, total_ptr, N, groups,
    stride_ab, stride_an, stride_wb, stride_wn,
    STEPS: tl.constexpr, STEP: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    image, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = block * BLOCK_G + tl.arange(0, BLOCK_G)
    assign_ptr += image * stride_ab
    first = tl.zeros((BLOCK_G,), dtype=tl.int32)
    inside = 0
    for step in range(STEPS):
        token = step * STEP + tl.arange(0, STEP)
        g = tl.load(assign_ptr + token * stride_an, mask=token < N, other=-1)
        member = (g >= 0) & (g < groups)
        first += tl.sum((member[None, :] & (g[None, :] < group[:, None])).to(tl.int32), axis=1)
        inside += tl.sum(member.to(tl.int32), axis=0)
    tl.store(ptr_ptr + image * (groups + 1) + group, first, mask=group <= groups)
    for step in range(STEPS):
        place = step * STEP + tl.arange(0, STEP)
        beyond = (place >= inside) & (place < N) & (block == 0)
        tl.store(col_ptr + image * N + place, -1, mask=beyond)
        tl.store(entry_ptr + image * N + place, 0.0, mask=beyond)

    # A thread has a group and sees the tokens in order, so its sum is the reference's.
    total = tl.zeros((BLOCK_G,), dtype=tl.float32)
    for token in range(STEPS * STEP):
        g = tl.load(assign_ptr + token * stride_an, mask=token < N, other=-1)
        weight = 1.0
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + image * stride_wb + token * stride_wn, mask=token < N, other=0.0)
        mine = (group == g) & (group < groups)
        tl.store(col_ptr + image * N + first, token, mask=mine)
        tl.store(entry_ptr + image * N + first, weight, mask=mine)
        total = tl.where(mine, total + weight, total)
        first += mine.to(tl.int32)
    tl.store(total_ptr + image * groups + group, total, mask=group < groups)


def _ints(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.int32)


def block_of_tokens(N: int) -> dict[str, int]:
    BLOCK_N = max(16, triton.next_power_of_2(N))
    return {"BLOCK_N": BLOCK_N, "num_warps": max(1, min(16, BLOCK_N // 64)), **FLAGS}


def block_of_ranks(N: int) -> dict[str, int]:
    """And what ranks takes: 32 comparisons a thread at a time."""
    block = block_of_tokens(N)
    STEP = max(4, 1024 * block["num_warps"] // block["BLOCK_N"])
    return block | {"STEP": STEP, "STEPS": triton.cdiv(N, STEP)}


def select_tokens(scores: Tensor, keep: int, num_prefix_tokens: int, order: str) -> tuple[Tensor, Tensor, Tensor]:
    (B, N), p = scores.shape, num_prefix_tokens
    index, dropped, inverse = _ints(scores, B, p + keep), _ints(scores, B, N - p - keep), _ints(scores, B, N)
    if B:
        with torch.cuda.device_of(scores):
            _select_kernel[(B,)](
                scores, index, dropped, inverse, N, p, keep, *scores.stride(),
                BY_INDEX=order == "index", **block_of_ranks(N),
            )  # fmt: skip
    return index, dropped, inverse


def split_tokens(mask: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, N = mask.shape
    index, count, rows = _ints(mask, B, N), _ints(mask, B), _ints(mask, B * N)
    cu_seqlens = mask.new_zeros(B + 1, dtype=torch.int32)
    if B:
        with torch.cuda.device_of(mask):
            block = block_of_tokens(N)
            _split_kernel[(B,)](mask.view(torch.uint8), index, count, N, num_prefix_tokens, *mask.stride(), **block)
            torch.cumsum(count, 0, dtype=torch.int32, out=cu_seqlens[1:])
            _split_rows_kernel[(B,)](index, cu_seqlens, rows, B, N, **block)
    return index, count, cu_seqlens, rows


def group_tokens(assign: Tensor, groups: int, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, N = assign.shape
    ptr, col = _ints(assign, B, groups + 1), _ints(assign, B, N)
    entry, total = (assign.new_empty(shape, dtype=torch.float32) for shape in ((B, N), (B, groups)))
    STEP, BLOCK_G = 16, max(32, min(256, triton.next_power_of_2(groups + 1)))
    if B:
        with torch.cuda.device_of(assign):
            _group_kernel[(B, triton.cdiv(groups + 1, BLOCK_G))](
                assign, weight, ptr, col, entry, total, N, groups,
                *assign.stride(), *((0, 0) if weight is None else weight.stride()),
                STEPS=triton.cdiv(N, STEP), STEP=STEP, BLOCK_G=BLOCK_G, num_warps=BLOCK_G // 32, **FLAGS,
            )  # fmt: skip
    return ptr, col, entry, total
