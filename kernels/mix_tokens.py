"""y[b, m] = base[b, m] + reduce over list m of weight[b, t] x[b, col[b, t]].

Arguments and results are those of reference/mix_tokens.py. One program per list and 1024 channels, which stay in
registers: rows of x are read as they are listed, STREAMS of them in flight, and added in their order, so sums and means
are the reference's bits. mlerp needs the length of rows and takes all channels at once. No index is checked here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import MATMUL_FLAGS, vector

STREAMS = 4


@triton.jit
def _mix_tokens_kernel(
    x_ptr, col_ptr, ptr_ptr, weight_ptr, base_ptr, y_ptr, C, L, M, width, stride_xb, stride_xn, stride_bb, stride_bm,
    MEAN: tl.constexpr, MLERP: tl.constexpr, STREAMS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    b, m = (item // M).to(tl.int64), item % M
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs_c < C
    if ptr_ptr is not None:
        t, end = tl.load(ptr_ptr + b * (M + 1) + m), tl.load(ptr_ptr + b * (M + 1) + m + 1)
    else:
        t, end = m * width, m * width + width
    x_ptr += b * stride_xb + offs_c
    y = tl.zeros((BLOCK_C,), tl.float32)
    only = y
    total, longest, count = 0.0, 0.0, 0
    while t < end:
        for i in tl.static_range(STREAMS):
            row = tl.load(col_ptr + b * L + t + i, mask=t + i < end, other=-1)
            there = row >= 0
            w = tl.where(there, 1.0, 0.0)
            if weight_ptr is not None:
                w = tl.load(weight_ptr + b * L + t + i, mask=there, other=0.0)
            x = tl.load(x_ptr + row.to(tl.int64) * stride_xn, mask=mask & there, other=0.0).to(tl.float32)
            y += w * x
            total += w
            count += there.to(tl.int32)
            if MEAN:
                only = tl.where(there, x, only)
            if MLERP:
                longest = tl.maximum(longest, tl.sqrt_rn(tl.sum(x * x, axis=0)))
        t += STREAMS
    if MEAN:
        divisor = tl.where(total == 0, 1.0, total)
        y = tl.where(total == 0, 0.0, tl.div_rn(y, tl.zeros_like(y) + divisor))
    if MLERP:
        norm = tl.sqrt_rn(tl.sum(y * y, axis=0))
        y *= tl.div_rn(longest, tl.where(norm < 1e-12, 1e-12, norm))
    if MEAN:
        y = tl.where(count == 1, only, y)  # the mean of one row is that row
    if base_ptr is not None:
        y = tl.load(base_ptr + b * stride_bb + m * stride_bm + offs_c, mask=mask, other=0.0).to(tl.float32) + y
    tl.store(y_ptr + item.to(tl.int64) * C + offs_c, y, mask=mask)


def mix_tokens(
    x: Tensor, col: Tensor, ptr: Tensor | None, weight: Tensor | None, base: Tensor | None, width: int, reduce: str
) -> Tensor:
    (B, L), C = col.shape, x.shape[2]
    M = L // width if ptr is None else ptr.shape[1] - 1
    y = x.new_empty(B, M, C)
    if y.numel() == 0:
        return y
    x = _rows(x)
    base = None if base is None else _rows(base)
    BLOCK_C = triton.next_power_of_2(C)
    if reduce != "mlerp":
        BLOCK_C = min(BLOCK_C, 1024)
    with torch.cuda.device_of(x):
        _mix_tokens_kernel[(B * M, triton.cdiv(C, BLOCK_C))](
            x, col.contiguous(), vector(ptr), vector(weight), base, y, C, L, M, width, x.stride(0), x.stride(1),
            0 if base is None else base.stride(0), 0 if base is None else base.stride(1),
            MEAN=reduce != "sum", MLERP=reduce == "mlerp", STREAMS=STREAMS, BLOCK_C=BLOCK_C,
            num_warps=max(1, min(8, BLOCK_C // 256)), **MATMUL_FLAGS,
        )  # fmt: skip
    return y


def _rows(x: Tensor) -> Tensor:
    """x (B, N, C) with contiguous rows, at any distance from each other."""
    return x if x.stride(2) == 1 else x.contiguous()
