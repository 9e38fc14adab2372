"""y = x_lut[x] @ w_lut[w].T on codes of non-uniform levels, and everything that follows a matmul in a transformer.

    acc = sum_k x_lut[x[m, k]] w_lut[q[n, k] + 2^(bits-1)]           float32
    y   = acc * (x_scale * w_scale), then as lowbit_linear

x            (M, K)       uint8
x_scale      (1,) | (M,)  float32: one, or one per row
x_lut        (L,)         float32, L <= 256
w_packed     packed       uint8, layout version 2; (N, K) codes of 2, 3, 4, 5, 6 or 8 bits, read off its shape
w_scale      (N,)         float32
w_lut        (2^bits,)    float32
operand      "fp16" | "bf16" | "e4m3" | "e5m2": holds every level of both tables exactly, and is what is multiplied
bias, activation, layer_scale, residual, out_scale, out_zero_point, out_bits    as lowbit_linear
returns      (M, N)       float32, or int8 when out_scale is given

A table of 256 levels of an fp8 operand is that of its bytes: the codes then are the operands, and it is not read.
Other x is looked up once, in a pass of its own, as every column of blocks would repeat it; other w where it is
multiplied, in shared memory. GPUs before sm_89 have no fp8 unit and multiply fp8 values as float16, which holds them
all. The fp8 sums of Ada and Hopper keep 13 bits; there they start anew every BLOCK_K inputs and add to a float32 sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import GROUP_M, MATMUL_FLAGS, aligned_rows, bits_of, block_of, epilogue, rows, vector
from ._packed import first_plane, load_plane, plane_ptrs, unpack

_DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}


@triton.jit
def _decode_kernel(x_ptr, lut_ptr, y_ptr, M, K, stride_xm, stride_ym, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_m, mask = offs_m < M, (offs_m < M)[:, None] & (offs_k < K)[None, :]
    code = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :], mask=mask, other=0)
    y = tl.load(lut_ptr + code.to(tl.int32), mask=mask, other=0.0).to(y_ptr.dtype.element_ty)
    mask = mask_m[:, None] & (offs_k < stride_ym)[None, :]
    tl.store(y_ptr + offs_m[:, None] * stride_ym + offs_k[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["out_zero_point"])
def _codebook_linear_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_lut_ptr, w_scale_ptr, bias_ptr, layer_scale_ptr, residual_ptr, out_scale_ptr, y_ptr,
    M, N, stride_xm, stride_wt, stride_rm, out_zero_point,
    K: tl.constexpr, BITS: tl.constexpr, ACTIVATION: tl.constexpr, X_SCALE_PER_ROW: tl.constexpr,
    OUT_SCALE_PER_COLUMN: tl.constexpr, OUT_BITS: tl.constexpr, PROMOTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    block_m, block_n = block_of(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    start_m = block_m.to(tl.int64) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]

    P: tl.constexpr = first_plane(BITS)
    TILES: tl.constexpr = BLOCK_N // 16
    CHUNKS: tl.constexpr = BLOCK_K // 32
    tile = block_n * TILES + tl.arange(0, TILES)
    mask_tile = tile < tl.cdiv(N, 16)
    w_ptrs = plane_ptrs(w_ptr, tile, stride_wt, 0, P, BITS, CHUNKS)
    if P < BITS:
        second_ptrs = plane_ptrs(w_ptr, tile, stride_wt, 64 * P, BITS - P, BITS, CHUNKS)

    if w_lut_ptr is not None:
        w_lut = tl.load(w_lut_ptr + tl.arange(0, 2**BITS))
        # Codes of no level have NaN, and what lies beyond the last chunk may be such a code.
        w_lut = tl.where(w_lut == w_lut, w_lut, 0.0).to(x_ptr.dtype.element_ty)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.trans(tl.load(x_ptrs, mask=mask_m[:, None] & (offs_k < K - k)[None, :], other=0.0))
        # Beyond K, x is zero and w the level of some code, finite; w is masked to stay inside the tensor.
        chunks = tl.cdiv(K - k, 32)
        w = load_plane(w_ptrs, mask_tile, chunks, P, CHUNKS)
        second = None
        if P < BITS:
            second = load_plane(second_ptrs, mask_tile, chunks, BITS - P, CHUNKS)
            second_ptrs += 64 * BITS * CHUNKS
        w = unpack(w, second, BITS, TILES, CHUNKS).to(tl.uint8, bitcast=True) ^ 128
        if w_lut_ptr is None:
            w = w.to(x.dtype, bitcast=True)
        else:
            code = tl.reshape((w >> (8 - BITS)).to(tl.int32), (BLOCK_N * BLOCK_K,))
            w = tl.reshape(tl.gather(w_lut, code, axis=0), (BLOCK_N, BLOCK_K))
        if PROMOTE:
            acc += tl.dot(w, x, max_num_imprecise_acc=BLOCK_K)  # else Triton puts acc into the dot
        else:
            acc = tl.dot(w, x, acc)
        x_ptrs += BLOCK_K
        w_ptrs += 64 * BITS * CHUNKS

    epilogue(
        acc, start_m, offs_n, M, N, x_scale_ptr, w_scale_ptr, bias_ptr, layer_scale_ptr, residual_ptr, out_scale_ptr,
        y_ptr, stride_rm, out_zero_point, ACTIVATION, X_SCALE_PER_ROW, OUT_SCALE_PER_COLUMN, OUT_BITS,
    )  # fmt: skip


def _blocks(M: int, itemsize: int) -> dict[str, int]:
    BLOCK_K = 128 // itemsize
    if M <= 32:
        return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": BLOCK_K, "num_warps": 4, "num_stages": 4}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": BLOCK_K, "num_warps": 4, "num_stages": 3}


def _capability(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)


def _decode(x: Tensor, lut: Tensor, dtype: torch.dtype) -> Tensor:
    """lut[x], as aligned_rows."""
    x, (M, K) = rows(x), x.shape
    y = torch.empty((M, triton.cdiv(K, 16) * 16), dtype=dtype, device=x.device)
    BLOCK_K = min(256, triton.next_power_of_2(y.shape[1]))
    BLOCK_M = 4096 // BLOCK_K
    grid = (triton.cdiv(M, BLOCK_M), triton.cdiv(y.shape[1], BLOCK_K))
    _decode_kernel[grid](x, lut.contiguous(), y, M, K, x.stride(0), y.stride(0), BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K)
    return y


def codebook_linear(
    x: Tensor,
    x_scale: Tensor,
    x_lut: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    w_lut: Tensor,
    bias: Tensor | None,
    operand: str,
    activation: str,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out_zero_point: int,
    out_bits: int,
) -> Tensor:
    (M, K), N, w_packed = x.shape, w_scale.shape[0], w_packed.contiguous()
    residual = None if residual is None else aligned_rows(residual)
    y = torch.empty((M, N), dtype=torch.float32 if out_scale is None else torch.int8, device=x.device)
    if y.numel() == 0:
        return y
    dtype, capability = _DTYPES[operand], _capability(x)
    dtype = torch.float16 if dtype.itemsize == 1 and capability < (8, 9) else dtype
    promote = dtype.itemsize == 1 and capability[0] != 10
    bits, blocks = bits_of(w_packed, K), _blocks(M, dtype.itemsize)
    grid = (triton.cdiv(M, blocks["BLOCK_M"]) * triton.cdiv(N, blocks["BLOCK_N"]),)
    with torch.cuda.device_of(x):
        bytes_are_values = dtype.itemsize == 1 and x_lut.shape[0] == 256
        x = aligned_rows(x).view(dtype) if bytes_are_values else _decode(x, x_lut, dtype)
        _codebook_linear_kernel[grid](
            x, vector(x_scale),
            w_packed.view(torch.int8), None if dtype.itemsize == 1 and bits == 8 else vector(w_lut), vector(w_scale),
            vector(bias), vector(layer_scale), residual, vector(out_scale), y,
            M, N, x.stride(0), w_packed.stride(0), 0 if residual is None else residual.stride(0), out_zero_point,
            K=x.shape[1], BITS=bits, ACTIVATION=activation, X_SCALE_PER_ROW=x_scale.shape[0] > 1,
            OUT_SCALE_PER_COLUMN=out_scale is not None and out_scale.shape[0] > 1, OUT_BITS=out_bits,
            PROMOTE=promote, GROUP_M=GROUP_M, **blocks, **MATMUL_FLAGS,
        )  # fmt: skip
    return y
