"""q = clip(rint(x / scale) + zero_point) to codes of `bits` bits, int8: -2^(bits-1) .. 2^(bits-1)-1.

x       (R, K)       float32
scale   (1,) | (K,)  float32, static; quantize_dynamic finds one per row and returns it (M,):
                     scale = max |x| clip / (2^(bits-1)-1), zero_point 0
minimum float        a known lower bound of x: the codes then start there,
                     q = rint((x - minimum) / scale) - 2^(bits-1), scale = (max x - minimum) clip / (2^bits-1)
table   (256,) int8  what takes the place of the codes -128 .. 127, of 8 bits then, or None
index   (M,) int32   row m is of row index[m] of x, code 0 and scale 1 where that is below 0; None: of row m, M = R
returns (M, K)       int8, the reference's bits

Static: one program per BLOCK_M x BLOCK_K tile, so a per-column scale is inverted once for BLOCK_M rows. Dynamic: one
program per row, read twice when it is longer than BLOCK_K; the second time it comes from cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FLAGS, MIN_SCALE, rows, scale_of, shape_by, to_codes, vector


@triton.jit(do_not_specialize=["zero_point"])
def _quantize_kernel(
    x_ptr, scale_ptr, index_ptr, q_ptr, M, K, stride_xm, zero_point,
    PER_COLUMN: tl.constexpr, BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    mask = (offs_m < M)[:, None] & mask_k[None, :]
    q_ptrs = q_ptr + offs_m[:, None] * K + offs_k[None, :]
    rows, live = offs_m, mask
    if index_ptr is not None:
        rows = tl.load(index_ptr + offs_m, mask=offs_m < M, other=-1).to(tl.int64)
        if tl.max(rows, axis=0) < 0:
            tl.store(q_ptrs, tl.zeros((BLOCK_M, BLOCK_K), tl.int8), mask=mask)
            return
        live &= (rows >= 0)[:, None]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + offs_k[None, :], mask=live, other=0.0)
    if PER_COLUMN:
        inv_scale = tl.div_rn(1.0, tl.load(scale_ptr + offs_k, mask=mask_k, other=1.0))[None, :]
    else:
        inv_scale = tl.div_rn(1.0, tl.load(scale_ptr))
    q = to_codes(x, inv_scale, zero_point, BITS)
    if index_ptr is not None:
        q = tl.where(live, q, 0)
    tl.store(q_ptrs, q, mask=mask)


@triton.jit
def _quantize_dynamic_kernel(
    x_ptr, table_ptr, index_ptr, q_ptr, scale_ptr, minimum, clip, stride_xm,
    K: tl.constexpr, SPAN: tl.constexpr, BITS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    if index_ptr is not None:
        source = tl.load(index_ptr + row).to(tl.int64)
        if source < 0:
            tl.store(scale_ptr + row, 1.0)
            for k in range(0, K, BLOCK_K):
                tl.store(q_ptr + row * K + k + offs_k, tl.zeros((BLOCK_K,), tl.int8), mask=offs_k < K - k)
            return
        x_ptr += source * stride_xm
    else:
        x_ptr += row * stride_xm
    amax = tl.zeros((BLOCK_K,), tl.float32)
    for k in range(0, K, BLOCK_K):
        # The tail becomes 0 in either form, which is never above the maximum.
        x = tl.load(x_ptr + k + offs_k, mask=offs_k < K - k, other=minimum if SPAN else 0.0)
        amax = tl.maximum(amax, x - minimum if SPAN else tl.abs(x))
    scale = scale_of(tl.max(amax, axis=0) * clip, 2**BITS - 1 if SPAN else 2 ** (BITS - 1) - 1)
    tl.store(scale_ptr + row, scale)
    inv_scale = tl.div_rn(1.0, scale)
    for k in range(0, K, BLOCK_K):
        mask = offs_k < K - k
        x = tl.load(x_ptr + k + offs_k, mask=mask, other=0.0)
        q = to_codes(x - minimum if SPAN else x, inv_scale, -(2 ** (BITS - 1)) if SPAN else 0, BITS)
        if table_ptr is not None:
            q = tl.load(table_ptr + q.to(tl.int32) + 128)
        tl.store(q_ptr + row * K + k + offs_k, q, mask=mask)


def quantize(x: Tensor, scale: Tensor, zero_point: int, bits: int, index: Tensor | None = None) -> Tensor:
    x, M, K = rows(x), *shape_by(x, index)
    q = torch.empty((M, K), dtype=torch.int8, device=x.device)
    if q.numel() == 0:
        return q
    BLOCK_K = min(256, triton.next_power_of_2(K))
    BLOCK_M = 4096 // BLOCK_K
    grid = (triton.cdiv(M, BLOCK_M), triton.cdiv(K, BLOCK_K))
    with torch.cuda.device_of(x):
        _quantize_kernel[grid](
            x, scale.contiguous(), vector(index), q, M, K, x.stride(0), zero_point,
            PER_COLUMN=scale.shape[0] > 1, BITS=bits, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, num_warps=4, **FLAGS,
        )  # fmt: skip
    return q


def quantize_dynamic(
    x: Tensor, minimum: float | None, bits: int, clip: float, table: Tensor | None, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    x, M, K = rows(x), *shape_by(x, index)
    q = torch.empty((M, K), dtype=torch.int8, device=x.device)
    if q.numel() == 0:
        return q, x.new_full((M,), MIN_SCALE.value)
    scale = x.new_empty(M)
    BLOCK_K = min(4096, triton.next_power_of_2(K))
    with torch.cuda.device_of(x):
        _quantize_dynamic_kernel[(M,)](
            x, vector(table), vector(index), q, scale, 0.0 if minimum is None else float(minimum), float(clip),
            x.stride(0),
            K=K, SPAN=minimum is not None, BITS=bits, BLOCK_K=BLOCK_K, num_warps=max(1, min(8, BLOCK_K // 512)),
            **FLAGS,
        )  # fmt: skip
    return q, scale
