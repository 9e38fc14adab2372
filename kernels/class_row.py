"""What the class token attends to: q, k (B, H, N, D) int8 -> (B, N) float32, the mean over the heads.

A program per image and head goes over the keys in blocks, twice: for the maximum and the sum, and for the
probabilities, with the scores made anew. A second kernel adds up the heads in order. Arguments: reference/class_row.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FLAGS, exp2

BLOCK = 64  # keys at a time, and components
LOG2_E = tl.constexpr(1.44269504)


@triton.jit
def _scores(
    q_ptr, k_ptr, k_scale_ptr, bias_ptr, keys, scale, stride_kn, stride_sn, stride_bn,
    N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(keys,) float32, -inf where a key is not one."""
    mask = keys < N
    acc = tl.zeros((keys.shape[0],), tl.int32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        q = tl.load(q_ptr + offs_d, mask=offs_d < D, other=0).to(tl.int32)
        k_ptrs = k_ptr + keys[:, None].to(tl.int64) * stride_kn + offs_d[None, :]
        k = tl.load(k_ptrs, mask=mask[:, None] & (offs_d < D)[None, :], other=0).to(tl.int32)
        acc += tl.sum(q[None, :] * k, axis=1)
    k_scale = tl.load(k_scale_ptr + keys.to(tl.int64) * stride_sn, mask=mask, other=0.0)
    scores = acc.to(tl.float32) * (scale * k_scale)
    if bias_ptr is not None:
        scores += tl.load(bias_ptr + keys.to(tl.int64) * stride_bn, mask=mask, other=0.0)
    return tl.where(mask, scores, -float("inf"))


@triton.jit
def _exponentials(scores, anchor):
    """e^(scores - anchor), 0 for a key that is not seen."""
    t = tl.maximum((scores - anchor) * LOG2_E, -100.0)
    return tl.where(scores > -float("inf"), exp2(t), 0.0)


@triton.jit
def _class_row_kernel(
    q_ptr, k_ptr, q_scale_ptr, k_scale_ptr, bias_ptr, p_ptr, H, softmax_scale,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_kn, stride_tb, stride_th, stride_sb, stride_sh, stride_sn,
    stride_bb, stride_bn, N: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    k_scale_ptr += b * stride_sb + h * stride_sh
    scale = tl.load(q_scale_ptr + b * stride_tb + h * stride_th) * softmax_scale
    if bias_ptr is not None:
        bias_ptr += b * stride_bb
    top = -float("inf")
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        scores = _scores(
            q_ptr, k_ptr, k_scale_ptr, bias_ptr, keys, scale, stride_kn, stride_sn, stride_bn, N, D, BLOCK_D
        )
        higher = tl.maximum(top, tl.max(scores, axis=0))
        anchor = tl.where(higher > -float("inf"), higher, 0.0)
        total = total * exp2(tl.maximum((top - anchor) * LOG2_E, -100.0)) + _exponentials(scores, anchor)
        top = higher
    total = tl.sum(total, axis=0)
    anchor = tl.where(top > -float("inf"), top, 0.0)
    factor = tl.where(total > 0, tl.div_rn(1.0, total), 0.0)
    for start in range(0, N, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        scores = _scores(
            q_ptr, k_ptr, k_scale_ptr, bias_ptr, keys, scale, stride_kn, stride_sn, stride_bn, N, D, BLOCK_D
        )
        tl.store(p_ptr + head * N + keys, _exponentials(scores, anchor) * factor, mask=keys < N)


@triton.jit
def _mean_kernel(p_ptr, out_ptr, blocks, H: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr):
    image = (tl.program_id(0) // blocks).to(tl.int64)
    keys = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for h in range(H):
        total += tl.load(p_ptr + (image * H + h) * N + keys, mask=keys < N, other=0.0)
    tl.store(out_ptr + image * N + keys, tl.div_rn(total, H * 1.0), mask=keys < N)


def class_row(
    q: Tensor, k: Tensor, q_scale: Tensor, k_scale: Tensor, softmax_scale: float, key_bias: Tensor | None
) -> Tensor:
    B, H, N, D = k.shape
    out = torch.empty(B, N, dtype=torch.float32, device=k.device)
    if out.numel() == 0:
        return out
    q, k = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k))
    rows = torch.empty(B, H, N, dtype=torch.float32, device=k.device)
    strides = (*q.stride()[:2], *k.stride()[:3], *q_scale.stride()[:2], *k_scale.stride())
    strides += (0, 0) if key_bias is None else key_bias.stride()
    BLOCK_D = min(BLOCK, max(16, triton.next_power_of_2(D)))
    blocks = triton.cdiv(N, 4 * BLOCK)
    with torch.cuda.device_of(k):
        _class_row_kernel[(B * H,)](
            q, k, q_scale, k_scale, key_bias, rows, H, float(softmax_scale), *strides, N=N, D=D, BLOCK_N=BLOCK,
            BLOCK_D=BLOCK_D, num_warps=4, **FLAGS,
        )  # fmt: skip
        _mean_kernel[(B * blocks,)](rows, out, blocks, H=H, N=N, BLOCK_N=4 * BLOCK, num_warps=4, **FLAGS)
    return out
