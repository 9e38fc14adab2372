"""v of attention, made ready for the tensor core: transposed, in the type it is multiplied in.

An 8-bit wgmma reads its right operand with the contracted dimension, keys, contiguous. So v (B, H, N, D) of any type
goes once through memory, to planes (B, H, planes, D, N'), N' = N rounded up to 16 and zeros beyond N:

    e4m3           as it is, or float16                            one plane
    int8           e4m3 holds every integer to 16, and 16 times such: v = 16 floor(v / 16) + rest, two planes; up to 5
                   bits, and float16 of any, one
    floats         float16 of v v_scale / max v_scale, less a power of two that brings the largest |v| of a head to 1

Packed sequences start at multiples of 16 of their own, sequence s at cu[s] rounded up, plus 16 s. What lies beyond the
last is no value of a head: its scales may be any.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MIN_SCALE = 1e-30
ALIGNED = tl.constexpr(16)


@triton.jit
def start_of(cu_ptr, s):
    """Where sequence s starts in the planes."""
    return (tl.load(cu_ptr + s) + ALIGNED - 1) // ALIGNED * ALIGNED + ALIGNED * s


@triton.jit
def _prepare_kernel(
    v_ptr, ratio_ptr, cu_ptr, planes_ptr, H, N, padded, sequences, stride_vb, stride_vh, stride_vn, stride_vd,
    stride_rh, stride_rn,
    E4M3: tl.constexpr, D: tl.constexpr, PLANES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of keys of one head, of one sequence when they are packed."""
    bh, s = tl.program_id(0).to(tl.int64) // sequences, tl.program_id(0) % sequences
    v_ptr += bh // H * stride_vb + bh % H * stride_vh
    if cu_ptr is None:
        first, n, at = 0, N, 0
    else:
        first = tl.load(cu_ptr + s)
        n, at = tl.load(cu_ptr + s + 1) - first, start_of(cu_ptr, s)
    keys = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (keys < n)[:, None] & (offs_d < D)[None, :]
    v_ptrs = v_ptr + (first + keys)[:, None].to(tl.int64) * stride_vn + offs_d[None, :].to(tl.int64) * stride_vd
    v = tl.load(v_ptrs, mask=mask, other=0)
    if E4M3:
        # A byte's exponent and mantissa are those of a float16 2^8 times smaller, on every GPU.
        byte = v.to(tl.int32)
        half = (((byte & 0x7F) << 7) | ((byte & 0x80) << 8)).to(tl.int16).to(tl.float16, bitcast=True)
        y = tl.where((byte & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    else:
        y = v.to(tl.float32)
    if ratio_ptr is not None:
        y *= tl.load(ratio_ptr + bh * stride_rh + (first + keys) * stride_rn, mask=keys < n, other=0.0)[:, None]
    planes_ptrs = planes_ptr + bh * PLANES * D * padded + at + offs_d[None, :].to(tl.int64) * padded + keys[:, None]
    mask = (keys < (n + ALIGNED - 1) // ALIGNED * ALIGNED)[:, None] & (offs_d < D)[None, :]
    if PLANES == 2:
        high = (v.to(tl.int32) & -16).to(tl.float32)
        tl.store(planes_ptrs + D * padded, (y - high).to(planes_ptr.dtype.element_ty), mask=mask)
        y = high
    tl.store(planes_ptrs, y.to(planes_ptr.dtype.element_ty), mask=mask)


def is_ready(v: Tensor) -> bool:
    """v (B, H, N, D) of 8 bits lies as a plane: transposed, in rows of 16 bytes."""
    strides_fit = v.stride(-2) == 1 and all(s % 16 == 0 for s in (v.shape[2], v.stride(0), v.stride(1), v.stride(3)))
    return v.dtype.itemsize == 1 and strides_fit and v.data_ptr() % 16 == 0


def _largest(t: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """max t (B, H, N) over N, which ends where the last sequence does; t is not negative."""
    if cu_seqlens is not None:
        t = t.masked_fill(torch.arange(t.shape[2], device=t.device) >= cu_seqlens[-1], 0)
    return t.amax(dim=2)


def prepare(
    v: Tensor, v_scale: Tensor, v_bits: int, operand: torch.dtype, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Planes (B, H, planes, D, N'), and the scale (B, H) of their values."""
    B, H, N, D = v.shape
    scale, ratio = v_scale[..., 0], None
    if v.dtype == operand and cu_seqlens is None and is_ready(v):
        return v.mT[:, :, None], scale
    if operand == torch.float16 and v_scale.shape[2] > 1:
        scale = _largest(v_scale, cu_seqlens)
        ratio = v_scale / scale.clamp_min(MIN_SCALE)[..., None]
    if v.dtype.itemsize > 1:
        _, exponent = torch.frexp(_largest(v.abs().amax(dim=3).float(), cu_seqlens))
        scale = torch.ldexp(scale, exponent)
        ratio = torch.ldexp(torch.ones_like(v_scale) if ratio is None else ratio, -exponent[..., None])
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    padded = triton.cdiv(N, 16) * 16 + (0 if cu_seqlens is None else 16 * sequences)
    planes = 2 if operand == torch.float8_e4m3fn and v.dtype == torch.int8 and v_bits > 5 else 1
    out = torch.empty((B, H, planes, D, padded), dtype=operand, device=v.device)
    e4m3 = v.dtype == torch.float8_e4m3fn
    BLOCK_N = 128
    ratio = None if ratio is None else ratio.contiguous()
    _prepare_kernel[(B * H * sequences, triton.cdiv(N, BLOCK_N))](
        v.view(torch.int8) if e4m3 else v, ratio, cu_seqlens, out, H, N, padded, sequences, *v.stride(),
        0 if ratio is None else ratio.shape[2], 0 if ratio is None or ratio.shape[2] == 1 else 1,
        E4M3=e4m3, D=D, PLANES=planes, BLOCK_D=triton.next_power_of_2(D), BLOCK_N=BLOCK_N, num_warps=4,
    )  # fmt: skip
    return out, scale
