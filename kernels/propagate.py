"""s <- A^T s, `iterations` times, A = softmax(q k^T softmax_scale + key_bias).

Arguments and results are those of reference/propagate.py. A is never in memory.

    up to 128 tokens, 64 of float32  one program per head, A in its registers from one iteration to the next
    more                             one pass for every row's maximum and sum, then a launch an iteration, in which a
                                     program makes a block of columns of A anew: 256 x 256 spills, as float16 too

float32 q and k are multiplied as three tf32 products, which leave out the product of the two remainders.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import MATMUL_FLAGS, exp2, vector

WHOLE = 128  # tokens whose A one program holds: 64 registers of each of 256 threads; beside three tf32 products, half
LOG2_E = tl.constexpr(1.44269504)


@triton.jit
def _scores(
    q_ptr, k_ptr, bias_ptr, rows, keys, stride_qn, stride_kn, scale,
    N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(rows, keys) float32, -inf where a key is not one; of rows that are none, whatever."""
    acc = tl.zeros((rows.shape[0], keys.shape[0]), tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        q_ptrs = q_ptr + rows[:, None].to(tl.int64) * stride_qn + offs_d[None, :]
        k_ptrs = k_ptr + keys[None, :].to(tl.int64) * stride_kn + offs_d[:, None]
        q = tl.load(q_ptrs, mask=(rows < N)[:, None] & (offs_d < D)[None, :], other=0.0)
        k = tl.load(k_ptrs, mask=(keys < N)[None, :] & (offs_d < D)[:, None], other=0.0)
        acc = tl.dot(q, k, acc, input_precision="tf32x3")
    acc *= scale
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + keys, mask=keys < N, other=0.0)[None, :]
    return tl.where((keys < N)[None, :], acc, -float("inf"))


@triton.jit
def _exponentials(scores, top):
    """e^(scores - top), 0 below 2^-100; NaN where there is one, or nothing that is finite."""
    t = (scores - top[:, None]) * LOG2_E
    return tl.where(t >= -100, exp2(tl.maximum(t, -100.0)), tl.where(t < -100, 0.0, t))


@triton.jit
def _whole_kernel(
    q_ptr, k_ptr, start_ptr, bias_ptr, out_ptr, H, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    scale, ITERATIONS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    if bias_ptr is not None:
        bias_ptr += b * N
    tokens = tl.arange(0, BLOCK)
    scores = _scores(q_ptr, k_ptr, bias_ptr, tokens, tokens, stride_qn, stride_kn, scale, N, D, BLOCK_D)
    e = _exponentials(scores, tl.max(scores, axis=1))
    factor = tl.div_rn(1.0, tl.sum(e, axis=1))
    s = tl.load(start_ptr + head * N + tokens, mask=tokens < N, other=0.0)
    for _ in range(ITERATIONS):
        s = tl.sum(e * (s * factor)[:, None], axis=0)
    tl.store(out_ptr + head * N + tokens, s, mask=tokens < N)


@triton.jit
def _rows_kernel(
    q_ptr, k_ptr, bias_ptr, top_ptr, factor_ptr, H, blocks,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, scale,
    N: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    b, h = head // H, head % H
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    if bias_ptr is not None:
        bias_ptr += b * N
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    for start in range(0, N, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        scores = _scores(q_ptr, k_ptr, bias_ptr, rows, keys, stride_qn, stride_kn, scale, N, D, BLOCK_D)
        top = tl.maximum(top, tl.max(scores, axis=1))
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, N, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        scores = _scores(q_ptr, k_ptr, bias_ptr, rows, keys, stride_qn, stride_kn, scale, N, D, BLOCK_D)
        total += _exponentials(scores, top)
    tl.store(top_ptr + head * N + rows, top, mask=rows < N)
    tl.store(factor_ptr + head * N + rows, tl.div_rn(1.0, tl.sum(total, axis=1)), mask=rows < N)


@triton.jit
def _step_kernel(
    q_ptr, k_ptr, bias_ptr, top_ptr, factor_ptr, s_ptr, out_ptr, H, blocks,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, scale,
    N: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    b, h = head // H, head % H
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    if bias_ptr is not None:
        bias_ptr += b * N
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, N, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        scores = _scores(q_ptr, k_ptr, bias_ptr, rows, keys, stride_qn, stride_kn, scale, N, D, BLOCK_D)
        top = tl.load(top_ptr + head * N + rows, mask=rows < N, other=float("inf"))
        share = tl.load(s_ptr + head * N + rows, mask=rows < N, other=0.0)
        share *= tl.load(factor_ptr + head * N + rows, mask=rows < N, other=0.0)
        acc += _exponentials(scores, top) * share[:, None]
    tl.store(out_ptr + head * N + keys, tl.sum(acc, axis=0), mask=keys < N)


def propagate(
    q: Tensor, k: Tensor, start: Tensor, softmax_scale: float, iterations: int, key_bias: Tensor | None
) -> Tensor:
    B, H, N, D = q.shape
    s = start.contiguous()
    out = torch.empty_like(s)
    if s.numel() == 0:
        return out
    q, k = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k))
    key_bias, scale = vector(key_bias), float(softmax_scale)
    strides = (*q.stride()[:3], *k.stride()[:3])
    wide = q.dtype == torch.float32
    BLOCK_D = max(16, min(triton.next_power_of_2(D), 16 if wide else 64))
    with torch.cuda.device_of(q):
        if (WHOLE // 2 if wide else WHOLE) >= N:
            BLOCK = max(16, triton.next_power_of_2(N))
            _whole_kernel[(B * H,)](
                q, k, s, key_bias, out, H, *strides, scale, ITERATIONS=iterations, N=N, D=D, BLOCK=BLOCK,
                BLOCK_D=BLOCK_D, num_warps=8 if BLOCK == WHOLE else 4, **MATMUL_FLAGS,
            )  # fmt: skip
            return out
        BLOCK, num_warps = 64, 8 if wide else 4
        form = {"N": N, "D": D, "BLOCK_M": BLOCK, "BLOCK_N": BLOCK, "BLOCK_D": BLOCK_D, "num_warps": num_warps}
        form |= MATMUL_FLAGS
        blocks = triton.cdiv(N, BLOCK)
        top, factor, spare = torch.empty((3, *s.shape), dtype=s.dtype, device=s.device)
        _rows_kernel[(B * H * blocks,)](q, k, key_bias, top, factor, H, blocks, *strides, scale, **form)
        for i in range(iterations):  # the last one writes to out
            to = out if (iterations - i) % 2 else spare
            _step_kernel[(B * H * blocks,)](q, k, key_bias, top, factor, s, to, H, blocks, *strides, scale, **form)
            s = to
    return out
