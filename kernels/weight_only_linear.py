"""y = x @ w.T + bias, x float, w codes with a scale per output feature, or scale and zero point per group of inputs.

    w_scale (N,):    y = (x @ q.T) * w_scale + bias
    w_scale (N, G):  y = x @ w.T + bias,  w[n, k] = (q[n, k] - w_zero_point[n, g]) * w_scale[n, g],  g = k // (K / G)

x             (M, K)         float16 | bfloat16 | float32
w_packed      packed         uint8, layout version 2; (N, K) codes of 2, 3, 4, 5, 6 or 8 bits, read off its shape
w_scale       (N,) | (N, G)  float32
w_zero_point  (N, G) | None  float32, integer-valued
bias          (N,) | None    float32
returns       (M, N)         dtype of x, accumulated in float32

Codes are exact in every dtype of x; a grouped weight is the reference's float32, rounded once to the dtype of x.
float32 is multiplied as three tf32 products, which leave out the product of the two remainders: 2^-22 of each product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import GROUP_M, MATMUL_FLAGS, aligned_rows, bits_of, block_of, vector
from ._packed import first_plane, load_plane, plane_ptrs, to_float, unpack


@triton.jit
def _weight_only_linear_kernel(
    x_ptr, w_ptr, w_scale_ptr, w_zero_point_ptr, bias_ptr, y_ptr, M, N, stride_xm, stride_wt,
    K: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    block_m, block_n = block_of(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < N
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]

    P: tl.constexpr = first_plane(BITS)
    TILES: tl.constexpr = BLOCK_N // 16
    CHUNKS: tl.constexpr = BLOCK_K // 32
    UNIT: tl.constexpr = 2.0 ** (BITS - 8)  # codes arrive times 2^(8-bits)
    tile = block_n * TILES + tl.arange(0, TILES)
    mask_tile = tile < tl.cdiv(N, 16)
    w_ptrs = plane_ptrs(w_ptr, tile, stride_wt, 0, P, BITS, CHUNKS)
    if P < BITS:
        second_ptrs = plane_ptrs(w_ptr, tile, stride_wt, 64 * P, BITS - P, BITS, CHUNKS)

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.trans(tl.load(x_ptrs, mask=mask_m[:, None] & (offs_k < K - k)[None, :], other=0.0))
        # Beyond K, x is zero and w finite; w is masked to stay inside the tensor.
        chunks = tl.cdiv(K - k, 32)
        w = load_plane(w_ptrs, mask_tile, chunks, P, CHUNKS)
        second = None
        if P < BITS:
            second = load_plane(second_ptrs, mask_tile, chunks, BITS - P, CHUNKS)
            second_ptrs += 64 * BITS * CHUNKS
        w = to_float(unpack(w, second, BITS, TILES, CHUNKS))
        if GROUPS > 0:
            if GROUP_SIZE % BLOCK_K == 0:
                g = offs_n[:, None] * GROUPS + k // GROUP_SIZE
            else:
                g = offs_n[:, None] * GROUPS + tl.minimum((k + offs_k) // GROUP_SIZE, GROUPS - 1)[None, :]
            if w_zero_point_ptr is not None:
                w -= tl.load(w_zero_point_ptr + g, mask=mask_n[:, None], other=0.0) * (1 / UNIT)
            w *= tl.load(w_scale_ptr + g, mask=mask_n[:, None], other=0.0) * UNIT
        acc = tl.dot(w.to(x.dtype), x, acc, input_precision="tf32x3")
        x_ptrs += BLOCK_K
        w_ptrs += 64 * BITS * CHUNKS

    if GROUPS == 0:
        acc *= (tl.load(w_scale_ptr + offs_n, mask=mask_n, other=0.0) * UNIT)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
    y_ptrs = y_ptr + offs_m[None, :] * N + offs_n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_m[None, :])


def _blocks(M: int, group_size: int, itemsize: int, bits: int) -> dict[str, int]:
    """Tile and pipeline. A block of inputs lies within one group where the group's size allows it.

    Four bytes of a plane for each thread at least, or Triton hands _packed.py's assembly words of two different inputs:
    of a plane of one bit, 32 inputs of 128 features.
    """
    BLOCK_K = 64 if group_size % 64 == 0 and itemsize == 2 else 32
    BLOCK_N = 128 if BLOCK_K == 32 and bits in (3, 5) else 64
    if M <= 32:
        return {"BLOCK_M": 32, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "num_warps": 4, "num_stages": 4}
    return {"BLOCK_M": 64, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "num_warps": 4, "num_stages": 3}


def weight_only_linear(
    x: Tensor, w_packed: Tensor, w_scale: Tensor, w_zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    groups = 0 if w_scale.dim() == 1 else w_scale.shape[1]
    group_size = x.shape[1] // groups if groups else 64
    x, w_packed = aligned_rows(x), w_packed.contiguous()
    (M, K), N = x.shape, w_scale.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    bits = bits_of(w_packed, K)
    blocks = _blocks(M, group_size, x.itemsize, bits)
    grid = (triton.cdiv(M, blocks["BLOCK_M"]) * triton.cdiv(N, blocks["BLOCK_N"]),)
    with torch.cuda.device_of(x):
        _weight_only_linear_kernel[grid](
            x, w_packed.view(torch.int8), vector(w_scale), vector(w_zero_point), vector(bias), y,
            M, N, x.stride(0), w_packed.stride(0),
            K=K, BITS=bits, GROUPS=groups, GROUP_SIZE=group_size, GROUP_M=GROUP_M,
            **blocks, **MATMUL_FLAGS,
        )  # fmt: skip
    return y
