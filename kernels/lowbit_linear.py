"""y = x @ w.T on integer codes, and everything that follows a matmul in a transformer block.

    acc = sum_k (x[m, k] - x_zero_point) w[n, k]                              exact
    y   = acc * (x_scale * w_scale) + bias, activation, * layer_scale, + residual       float32, in this order
    q   = clip(rint(y * (1 / out_scale)) + out_zero_point, -128, 127)         when out_scale is given

x            (M, K)       int8
x_scale      (1,) | (M,)  float32: one, or one per row
w_packed     W8 v1        uint8: rows of 16 features, 16 int32 code sums, then K / 4 groups of 16 features x 4 inputs
w_scale      (N,)         float32
bias, layer_scale  (N,)   float32 or None
residual     (M, N)       float32 or None
activation   "none" | "gelu" | "gelu_tanh" | "quick_gelu"
out_scale    (1,) | (N,)  float32 or None
returns      (M, N)       float32, or int8 when out_scale is given; the reference's bits

BLOCK_K inputs of 16 features are one contiguous run of w_packed, so a tile of weights is loaded in memory order, 16
bytes a thread, and becomes (BLOCK_N, BLOCK_K) in registers. The tensor core's int32 sums saturate, from K = 132104 on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FLAGS, activate, rows, to_codes

_GROUP_M = 8  # row blocks that share a column of weight tiles in L2


@triton.jit(do_not_specialize=["x_zero_point", "out_zero_point"])
def _lowbit_linear_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_sum_ptr, w_scale_ptr, bias_ptr, layer_scale_ptr, residual_ptr, out_scale_ptr, y_ptr,
    M, N, stride_xm, stride_wt, stride_rm, x_zero_point, out_zero_point,
    K: tl.constexpr, ACTIVATION: tl.constexpr, X_SCALE_PER_ROW: tl.constexpr, OUT_SCALE_PER_COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * blocks_n)
    group_m = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * blocks_n)
    block_m, block_n = group * GROUP_M + within % group_m, within // group_m

    offs_m = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < N
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]
    tile = block_n * (BLOCK_N // 16) + tl.arange(0, BLOCK_N // 16)
    mask_tile = tile < tl.cdiv(N, 16)
    offs_w = tl.arange(0, 16 * BLOCK_K)
    w_ptrs = w_ptr + tile.to(tl.int64)[:, None] * stride_wt + 64 + offs_w[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k in range(0, K, BLOCK_K):
        # For the sum a tail of zeros in x or in w would do; both are masked to stay inside the tensors.
        x = tl.load(x_ptrs, mask=mask_m[:, None] & (offs_k < K - k)[None, :], other=0)
        # A row of w_packed ends with the last, zero-padded group; its length needs no K rounded up.
        w = tl.load(w_ptrs, mask=mask_tile[:, None] & (offs_w < stride_wt - 64 - 16 * k)[None, :], other=0)
        w = tl.permute(tl.reshape(w, (BLOCK_N // 16, BLOCK_K // 4, 16, 4)), (0, 2, 1, 3))
        acc = tl.dot(x, tl.trans(tl.reshape(w, (BLOCK_N, BLOCK_K))), acc, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        w_ptrs += 16 * BLOCK_K

    w_sum = tl.load(w_sum_ptr + (offs_n // 16) * (stride_wt // 4) + offs_n % 16, mask=mask_n, other=0)
    acc -= (x_zero_point * w_sum)[None, :]

    w_scale = tl.load(w_scale_ptr + offs_n, mask=mask_n, other=0.0)
    if X_SCALE_PER_ROW:
        x_scale = tl.load(x_scale_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
    else:
        x_scale = tl.load(x_scale_ptr)
    y = acc.to(tl.float32) * (x_scale * w_scale[None, :])
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    y = activate(y, ACTIVATION)
    if layer_scale_ptr is not None:
        y *= tl.load(layer_scale_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offs_m[:, None] * stride_rm + offs_n[None, :], mask=mask, other=0.0)
    if out_scale_ptr is not None:
        if OUT_SCALE_PER_COLUMN:
            out_scale = tl.load(out_scale_ptr + offs_n, mask=mask_n, other=1.0)[None, :]
        else:
            out_scale = tl.load(out_scale_ptr)
        y = to_codes(y, tl.div_rn(1.0, out_scale), out_zero_point)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y, mask=mask)


def _blocks(M: int, N: int) -> dict[str, int]:
    """Tile and pipeline: small tiles until there are enough large ones to give every SM of a large GPU one.

    A tile of 128 x 128 spills on sm_90: each thread of a wgmma holds a quarter of its columns, and with them that much
    of every vector of the epilogue.
    """
    if M <= 32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
    if triton.cdiv(M, 128) * triton.cdiv(N, 64) < 128:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}


def _vector(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.contiguous()


def lowbit_linear(
    x: Tensor,
    x_scale: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_zero_point: int,
    activation: str,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out_zero_point: int,
) -> Tensor:
    x, w_packed, residual = rows(x), w_packed.contiguous(), None if residual is None else rows(residual)
    (M, K), N = x.shape, w_scale.shape[0]
    y = torch.empty((M, N), dtype=torch.float32 if out_scale is None else torch.int8, device=x.device)
    if y.numel() == 0:
        return y
    blocks = _blocks(M, N)
    grid = (triton.cdiv(M, blocks["BLOCK_M"]) * triton.cdiv(N, blocks["BLOCK_N"]),)
    with torch.cuda.device_of(x):
        _lowbit_linear_kernel[grid](
            x, _vector(x_scale), w_packed.view(torch.int8), w_packed.view(torch.int32), _vector(w_scale), _vector(bias),
            _vector(layer_scale), residual, _vector(out_scale), y,
            M, N, x.stride(0), w_packed.stride(0), 0 if residual is None else residual.stride(0),
            x_zero_point, out_zero_point,
            K=K, ACTIVATION=activation, X_SCALE_PER_ROW=x_scale.shape[0] > 1,
            OUT_SCALE_PER_COLUMN=out_scale is not None and out_scale.shape[0] > 1, GROUP_M=_GROUP_M, **blocks, **FLAGS,
        )  # fmt: skip
    return y
