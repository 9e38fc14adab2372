"""Who is like whom, and who goes where; the matrix of similarities is never in memory.

match_tokens  a (B, Na, D), b (B, Nb, D) floats -> value (B, Na, topk) float32, index (B, Na, topk) int32
merge_pairs   value (B, Na) float32, index (B, Na) int32 -> (B, N) int32
mean_heads    x (B, H, N, D) int8 or floats, scale (B, H, N) float32 -> (B, N, D) float32

match_tokens: a program has a block of rows of a and goes over b in blocks. For one best it keeps a value and an index a
row; for more, keys: a score and the complement of its index in one integer, of which no two are equal, so that the topk
largest of those kept and those of a block are found one after the other. Products are float32, not TF32. Distances are
sums of squared differences, not |a|^2 + |b|^2 - 2 a b, which cancels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FLAGS, MATMUL_FLAGS
from .select_tokens import block_of_ranks, ordered_bits, ranks

LOWEST = tl.constexpr(-(2**63))  # a key below every other


@triton.jit
def _inverse_norms(squares):
    return tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(squares), 1e-12))


@triton.jit
def _match_kernel(
    a_ptr, b_ptr, exclude_ptr, value_ptr, index_ptr, Na, Nb, first,
    stride_ab, stride_an, stride_ad, stride_bb, stride_bn, stride_bd, stride_eb, stride_en,
    D: tl.constexpr, METRIC: tl.constexpr, TOPK: tl.constexpr, BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    offs_d = tl.arange(0, BLOCK_D)
    mask_a = offs_a < Na
    a_ptrs = a_ptr + image * stride_ab + offs_a[:, None] * stride_an + offs_d[None, :] * stride_ad
    exclude = tl.full((BLOCK_A,), -1, dtype=tl.int32)
    if exclude_ptr is not None:
        exclude = tl.load(exclude_ptr + image * stride_eb + offs_a * stride_en, mask=mask_a, other=-1)
    if METRIC == "cosine":
        squares_a = tl.zeros((BLOCK_A,), dtype=tl.float32)
        for d in range(0, D, BLOCK_D):
            x = tl.load(a_ptrs + d * stride_ad, mask=mask_a[:, None] & (d + offs_d < D)[None, :], other=0.0)
            squares_a += tl.sum(x.to(tl.float32) * x.to(tl.float32), axis=1)
        length = _inverse_norms(squares_a)

    if TOPK == 1:
        best = tl.full((BLOCK_A,), float("-inf"), dtype=tl.float32)
        which = tl.full((BLOCK_A,), -1, dtype=tl.int32)
    else:
        keys = tl.full((BLOCK_A, BLOCK_K), LOWEST, dtype=tl.int64)
        rank = tl.arange(0, BLOCK_K)[None, :]
    for step in range(STEPS):
        offs_b = step * BLOCK_B + tl.arange(0, BLOCK_B)
        b_ptrs = b_ptr + image * stride_bb + offs_b[:, None] * stride_bn + offs_d[None, :] * stride_bd
        score = tl.zeros((BLOCK_A, BLOCK_B), dtype=tl.float32)
        squares_b = tl.zeros((BLOCK_B,), dtype=tl.float32)
        for d in range(0, D, BLOCK_D):
            mask_d = (d + offs_d < D)[None, :]
            x = tl.load(a_ptrs + d * stride_ad, mask=mask_a[:, None] & mask_d, other=0.0).to(tl.float32)
            y = tl.load(b_ptrs + d * stride_bd, mask=(offs_b < Nb)[:, None] & mask_d, other=0.0).to(tl.float32)
            if METRIC == "l2":
                difference = x[:, None, :] - y[None, :, :]
                score -= tl.sum(difference * difference, axis=2)
            else:
                if METRIC == "cosine":
                    x *= length[:, None]
                    squares_b += tl.sum(y * y, axis=1)
                score = tl.dot(x, tl.trans(y), score, input_precision="ieee")
        if METRIC == "cosine":
            score *= _inverse_norms(squares_b)[None, :]

        allowed = ((offs_b >= first) & (offs_b < Nb))[None, :] & (offs_b[None, :] != exclude[:, None])
        if TOPK == 1:
            score = tl.where(allowed & (score == score), score, float("-inf"))
            top = tl.max(score, axis=1)
            at = tl.min(tl.where(allowed & (score == top[:, None]), offs_b[None, :], 0x7FFFFFFF), axis=1)
            better = (top > best) | ((which < 0) & (at < 0x7FFFFFFF))
            best, which = tl.where(better, top, best), tl.where(better, at, which)
        else:
            complement = 0xFFFFFFFF - offs_b.to(tl.int64)
            fresh = tl.where(allowed, (ordered_bits(score).to(tl.int64) << 32) | complement[None, :], LOWEST)
            found = tl.full((BLOCK_A, BLOCK_K), LOWEST, dtype=tl.int64)
            for t in range(TOPK):
                top = tl.maximum(tl.max(keys, axis=1), tl.max(fresh, axis=1))[:, None]
                found = tl.where(rank == t, top, found)
                keys, fresh = tl.where(keys == top, LOWEST, keys), tl.where(fresh == top, LOWEST, fresh)
            keys = found

    row = image * Na + offs_a
    if TOPK == 1:
        tl.store(value_ptr + row, -best if METRIC == "l2" else best, mask=mask_a)
        tl.store(index_ptr + row, which, mask=mask_a)
    else:
        bits = (keys >> 32).to(tl.int32)
        score = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        score = tl.where(keys == LOWEST, float("-inf"), score)
        index = tl.where(keys == LOWEST, -1, (0xFFFFFFFF - (keys & 0xFFFFFFFF)).to(tl.int32))
        mask = mask_a[:, None] & (rank < TOPK)
        tl.store(value_ptr + row[:, None] * TOPK + rank, -score if METRIC == "l2" else score, mask=mask)
        tl.store(index_ptr + row[:, None] * TOPK + rank, index, mask=mask)


@triton.jit
def _merge_kernel(
    value_ptr, index_ptr, rows_ptr, N, merges, prefix, stride_vb, stride_vn, stride_ib, stride_in,
    RANKED: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_N)
    even = (prefix + 1) // 2
    token = even + offs  # counted among the even ones
    rank = ranks(value_ptr + image * stride_vb, stride_vn, even, (N + 1) // 2, BLOCK_N, STEP, STEPS)
    merged = (token < (N + 1) // 2) & (rank < merges)
    stays = (token < (N + 1) // 2) & (rank >= merges)
    partner = tl.load(index_ptr + image * stride_ib + token * stride_in, mask=merged, other=0)
    rows_ptr += image * N
    to_odd = N - merges - N // 2

    tl.store(rows_ptr + 2 * offs, 2 * offs, mask=offs < even)
    odd_row = tl.where(offs < prefix // 2, 2 * offs + 1, to_odd + offs)
    tl.store(rows_ptr + 2 * offs + 1, odd_row, mask=offs < N // 2)
    row = tl.where(partner < prefix // 2, 2 * partner + 1, to_odd + partner)
    tl.store(rows_ptr + 2 * token, row, mask=merged)
    place = rank - merges if RANKED else tl.cumsum(stays.to(tl.int32), axis=0) - 1
    tl.store(rows_ptr + 2 * token, prefix + place, mask=stays)


@triton.jit
def _mean_heads_kernel(
    x_ptr, scale_ptr, out_ptr, N, D,
    stride_xb, stride_xh, stride_xn, stride_xd, stride_sb, stride_sh, stride_sn,
    H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(2).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    x_ptrs = x_ptr + image * stride_xb + offs_n[:, None] * stride_xn + offs_d[None, :] * stride_xd
    scale_ptrs = scale_ptr + image * stride_sb + offs_n * stride_sn
    total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for h in range(H):
        scale = tl.load(scale_ptrs + h * stride_sh, mask=mask_n, other=0.0)
        total += tl.load(x_ptrs + h * stride_xh, mask=mask, other=0).to(tl.float32) * scale[:, None]
    out_ptrs = out_ptr + (image * N + offs_n[:, None]) * D + offs_d[None, :]
    tl.store(out_ptrs, tl.div_rn(total, H * 1.0), mask=mask)


def match_tokens(
    a: Tensor, b: Tensor, metric: str, topk: int, first: int, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    (B, Na, D), Nb = a.shape, b.shape[1]
    value = a.new_empty(B, Na, topk, dtype=torch.float32)
    index = a.new_empty(B, Na, topk, dtype=torch.int32)
    if index.numel() == 0:
        return value, index
    BLOCK_A, BLOCK_B = 16, 64 if topk == 1 else 32
    # A block of squared differences has three dimensions, all in registers.
    BLOCK_D = 4096 // (BLOCK_A * BLOCK_B) if metric == "l2" else 32
    with torch.cuda.device_of(a):
        _match_kernel[(triton.cdiv(Na, BLOCK_A), B)](
            a, b, exclude, value, index, Na, Nb, first, *a.stride(), *b.stride(),
            *((0, 0) if exclude is None else exclude.stride()),
            D=D, METRIC=metric, TOPK=topk, BLOCK_K=triton.next_power_of_2(topk), STEPS=triton.cdiv(Nb, BLOCK_B),
            BLOCK_A=BLOCK_A, BLOCK_B=BLOCK_B, BLOCK_D=BLOCK_D, num_warps=4, **MATMUL_FLAGS,
        )  # fmt: skip
    return value, index


def merge_pairs(value: Tensor, index: Tensor, num_tokens: int, merges: int, num_prefix_tokens: int) -> Tensor:
    B, Na = value.shape
    rows = index.new_empty(B, num_tokens)
    if rows.numel():
        with torch.cuda.device_of(value):
            _merge_kernel[(B,)](
                value, index, rows, num_tokens, merges, num_prefix_tokens, *value.stride(), *index.stride(),
                RANKED=num_prefix_tokens == 0, **block_of_ranks(Na),
            )  # fmt: skip
    return rows


def mean_heads(x: Tensor, scale: Tensor) -> Tensor:
    B, H, N, D = x.shape
    out = x.new_empty(B, N, D, dtype=torch.float32)
    if out.numel() == 0:
        return out
    BLOCK_N, BLOCK_D = 16, min(128, triton.next_power_of_2(D))
    with torch.cuda.device_of(x):
        _mean_heads_kernel[(triton.cdiv(N, BLOCK_N), triton.cdiv(D, BLOCK_D), B)](
            x, scale, out, N, D, *x.stride(), *scale.expand(B, H, N).stride(),
            H=H, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, num_warps=4, **FLAGS,
        )  # fmt: skip
    return out
