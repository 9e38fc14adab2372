"""y = x @ w.T on integer codes, and everything that follows a matmul in a transformer block.

    acc = sum_k (x[m, k] - x_zero_point) w[n, k]                              exact
    y   = acc * (x_scale * w_scale) + bias, activation, * layer_scale, + residual       float32, in this order
    q   = clip(rint(y * (1 / out_scale)) + out_zero_point) to out_bits bits   when out_scale is given

x            (R, K)       int8
x_scale      (1,) | (R,)  float32: one, or one per row
w_packed     packed       uint8, layout version 2; (N, K) codes of 2, 3, 4, 5, 6 or 8 bits, read off its shape
w_scale      (N,)         float32
bias, layer_scale  (N,)   float32 or None
residual     (M, N)       float32 or None
activation   "none" | "gelu" | "gelu_tanh" | "quick_gelu"
out_scale    (1,) | (N,)  float32 or None
index        (M,)         int32: row m is of row index[m] of x, zeros where that is below 0; None: of row m, M = R
returns      (M, N)       float32, or int8 when out_scale is given; the reference's bits

lowbit_linear_scatter adds y to row out_index[m] of out, nothing where out_index[m] or index[m] is below 0; the others
differ, so that no two programs add to one row. A block of rows that are not computed ends before the first product.

Weights are unpacked in registers, _packed.py. Their codes arrive times 2^(8-bits), and so does the int32 sum: it is
moved down. It stays exact up to K = 131071, where the tensor core's sums may saturate.

FP8 is for targets whose int8 tensor core is second class. Integers up to 16 are exact in e4m3: weights of up to 5 bits,
and x as 16 x_high + x_low, each of four bits. Two dots and an int32 sum of both take codes x of any size. The float32
sums stay below 240 K, exact up to K = 2^16. Hopper's fp8 unit keeps some 13 bits of a sum; 32 products, below 2^13 in
all, are what it is given before the sum goes to float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import GROUP_M, MATMUL_FLAGS, aligned_rows, bits_of, block_of, epilogue, shape_by, sources, vector
from ._packed import first_plane, high_to_e4m3, load_plane, low_to_e4m3, plane_ptrs, unpack

_FP8_CAPABILITY = 10  # sm_100 has tcgen05 for fp8, and Triton only mma.sync for int8


@triton.jit(do_not_specialize=["x_zero_point", "out_zero_point"])
def _lowbit_linear_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_sum_ptr, w_scale_ptr, bias_ptr, layer_scale_ptr, residual_ptr, out_scale_ptr, y_ptr,
    index_ptr, out_index_ptr, M, N, stride_xm, stride_wt, stride_rm, x_zero_point, out_zero_point,
    K: tl.constexpr, BITS: tl.constexpr, FP8: tl.constexpr, ACTIVATION: tl.constexpr, X_SCALE_PER_ROW: tl.constexpr,
    OUT_SCALE_PER_COLUMN: tl.constexpr, OUT_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    block_m, block_n = block_of(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    start_m = block_m.to(tl.int64) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    rows, live = sources(offs_m, offs_m < M, index_ptr, out_index_ptr)
    if index_ptr is not None or out_index_ptr is not None:  # noqa: SIM102 - known when it compiles, the second is not
        if tl.max(live.to(tl.int32), axis=0) == 0:
            if out_index_ptr is None:
                mask = (offs_n < N)[:, None] & (offs_m < M)[None, :]
                zeros = tl.zeros((BLOCK_N, BLOCK_M), y_ptr.dtype.element_ty)
                tl.store(y_ptr + offs_m[None, :] * N + offs_n[:, None], zeros, mask=mask)
            return
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]

    P: tl.constexpr = first_plane(BITS)
    TILES: tl.constexpr = BLOCK_N // 16
    CHUNKS: tl.constexpr = BLOCK_K // 32
    tile = block_n * TILES + tl.arange(0, TILES)
    mask_tile = tile < tl.cdiv(N, 16)
    w_ptrs = plane_ptrs(w_ptr, tile, stride_wt, 0, P, BITS, CHUNKS)
    if P < BITS:
        second_ptrs = plane_ptrs(w_ptr, tile, stride_wt, 64 * P, BITS - P, BITS, CHUNKS)

    if FP8:
        acc_high = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        acc_low = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for k in range(0, K, BLOCK_K):
        x = tl.trans(tl.load(x_ptrs, mask=live[:, None] & (offs_k < K - k)[None, :], other=0))
        # Beyond K, x is zero and w anything; w is masked to stay inside the tensor.
        chunks = tl.cdiv(K - k, 32)
        w = load_plane(w_ptrs, mask_tile, chunks, P, CHUNKS)
        second = None
        if P < BITS:
            second = load_plane(second_ptrs, mask_tile, chunks, BITS - P, CHUNKS)
            second_ptrs += 64 * BITS * CHUNKS
        w = unpack(w, second, BITS, TILES, CHUNKS)
        if FP8:
            w = high_to_e4m3(w, BITS)
            acc_high = tl.dot(w, high_to_e4m3(x, 4), acc_high, max_num_imprecise_acc=32)
            acc_low = tl.dot(w, low_to_e4m3(x), acc_low, max_num_imprecise_acc=32)
        else:
            acc = tl.dot(w, x, acc, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        w_ptrs += 64 * BITS * CHUNKS

    if FP8:
        acc = (acc_high * 262144.0).to(tl.int32) * 16 + (acc_low * 262144.0).to(tl.int32)  # 2^18: both were times 2^-9
    else:
        acc >>= 8 - BITS
    w_sum = tl.load(w_sum_ptr + (offs_n // 16) * (stride_wt // 4) + offs_n % 16, mask=offs_n < N, other=0)
    acc -= (x_zero_point * w_sum)[:, None]
    epilogue(
        acc.to(tl.float32), start_m, offs_n, M, N, x_scale_ptr, w_scale_ptr, bias_ptr, layer_scale_ptr, residual_ptr,
        out_scale_ptr, y_ptr, stride_rm, out_zero_point, ACTIVATION, X_SCALE_PER_ROW, OUT_SCALE_PER_COLUMN, OUT_BITS,
        index_ptr, out_index_ptr,
    )  # fmt: skip


def _blocks(M: int, N: int, fp8: bool) -> dict[str, int]:
    """Tile and pipeline: small tiles until there are enough large ones to give every SM of a large GPU one.

    BLOCK_N is a multiple of 64, the rows of a wgmma. The two float32 sums of fp8 would spill with more rows or inputs.
    """
    BLOCK_K = 64 if fp8 and M > 32 else 128
    if M <= 32:
        return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": BLOCK_K, "num_warps": 4, "num_stages": 4}
    if triton.cdiv(M, 128) * triton.cdiv(N, 128) < 128:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": BLOCK_K, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 64 if fp8 else 128, "BLOCK_N": 128, "BLOCK_K": BLOCK_K, "num_warps": 8, "num_stages": 3}


def _use_fp8(x: Tensor, bits: int) -> bool:
    major = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0
    return major == _FP8_CAPABILITY and bits <= 5 and x.shape[1] <= 2**16


def _launch(
    y: Tensor, x: Tensor, x_scale: Tensor, w_packed: Tensor, w_scale: Tensor, bias: Tensor | None, x_zero_point: int,
    activation: str, layer_scale: Tensor | None, residual: Tensor | None, out_scale: Tensor | None,
    out_zero_point: int, out_bits: int, index: Tensor | None, out_index: Tensor | None,
) -> None:  # fmt: skip
    """y: the result, or what it is added to, contiguous."""
    x, w_packed = aligned_rows(x), w_packed.contiguous()
    (M, K), N = shape_by(x, index), w_scale.shape[0]
    bits = bits_of(w_packed, K)
    fp8 = _use_fp8(x, bits)
    blocks = _blocks(M, N, fp8)
    grid = (triton.cdiv(M, blocks["BLOCK_M"]) * triton.cdiv(N, blocks["BLOCK_N"]),)
    with torch.cuda.device_of(x):
        _lowbit_linear_kernel[grid](
            x, vector(x_scale), w_packed.view(torch.int8), w_packed.view(torch.int32), vector(w_scale), vector(bias),
            vector(layer_scale), residual, vector(out_scale), y, vector(index), vector(out_index),
            M, N, x.stride(0), w_packed.stride(0), 0 if residual is None else residual.stride(0),
            x_zero_point, out_zero_point,
            K=K, BITS=bits, FP8=fp8, ACTIVATION=activation, X_SCALE_PER_ROW=x_scale.shape[0] > 1,
            OUT_SCALE_PER_COLUMN=out_scale is not None and out_scale.shape[0] > 1, OUT_BITS=out_bits,
            GROUP_M=GROUP_M, **blocks, **MATMUL_FLAGS,
        )  # fmt: skip


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
    out_bits: int,
    index: Tensor | None = None,
) -> Tensor:
    residual = None if residual is None else aligned_rows(residual)
    shape = shape_by(x, index)[0], w_scale.shape[0]
    y = torch.empty(shape, dtype=torch.float32 if out_scale is None else torch.int8, device=x.device)
    if y.numel():
        _launch(
            y, x, x_scale, w_packed, w_scale, bias, x_zero_point, activation, layer_scale, residual, out_scale,
            out_zero_point, out_bits, index, None,
        )  # fmt: skip
    return y


def lowbit_linear_scatter(
    out: Tensor,
    out_index: Tensor,
    x: Tensor,
    x_scale: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_zero_point: int,
    activation: str,
    layer_scale: Tensor | None,
    index: Tensor | None = None,
) -> None:
    y = out.contiguous()
    if out_index.numel() and y.numel():
        _launch(
            y, x, x_scale, w_packed, w_scale, bias, x_zero_point, activation, layer_scale, y, None, 0, 8, index,
            out_index,
        )  # fmt: skip
    if y is not out:
        out.copy_(y)
