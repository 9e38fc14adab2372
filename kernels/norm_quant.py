"""LayerNorm, then quantise: y = (x - mean) * rstd * weight + bias, q = clip(rint(y / scale)) to codes of `bits` bits.

x       (R, C)       float32
weight  (C,)         float32
bias    (C,)         float32
scale   (1,) | (C,)  float32, static; norm_quant_dynamic finds one per row and returns it (M,):
                     max |y| clip / (2^(bits-1)-1)
index   (M,) int32   row m is of row index[m] of x, code 0 and scale 1 where that is below 0; None: of row m, M = R
returns (M, C)       int8

One program per row, the row in registers: x is read once. Mean and variance are summed in float64 and rounded once, as
in the reference. Two orders of summation in float64 round to the same float32 unless it lies within a few float64
roundings of a tie, so the codes are the reference's, where a float32 sum would move some. The price is five float64
instructions an element: little where float64 has half the rate of float32 (sm_80, sm_90), much where it has 1/64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FLAGS, MIN_SCALE, rows, scale_of, shape_by, to_codes, vector


@triton.jit
def _norm_quant_kernel(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, index_ptr, q_ptr, C, stride_xm, clip,
    EPS: tl.constexpr, DYNAMIC: tl.constexpr, PER_COLUMN: tl.constexpr, BITS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    mask = offs_c < C
    source = row
    if index_ptr is not None:
        source = tl.load(index_ptr + row).to(tl.int64)
        if source < 0:
            tl.store(q_ptr + row * C + offs_c, tl.zeros((BLOCK_C,), tl.int8), mask=mask)
            if DYNAMIC:
                tl.store(scale_ptr + row, 1.0)
            return
    x = tl.load(x_ptr + source * stride_xm + offs_c, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + offs_c, mask=mask, other=0.0)
    bias = tl.load(bias_ptr + offs_c, mask=mask, other=0.0)

    wide = x.to(tl.float64)
    mean = tl.sum(wide, axis=0) / C
    centred = tl.where(mask, wide - mean, 0.0)
    # EPS is a constexpr because a float argument would arrive rounded to float32.
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / C + EPS)
    y = (x - mean.to(tl.float32)) * rstd.to(tl.float32) * weight + bias  # zero in the tail, as weight and bias are

    if DYNAMIC:
        scale = scale_of(tl.max(tl.abs(y), axis=0) * clip, 2 ** (BITS - 1) - 1)
        tl.store(scale_ptr + row, scale)
    elif PER_COLUMN:
        scale = tl.load(scale_ptr + offs_c, mask=mask, other=1.0)
    else:
        scale = tl.load(scale_ptr)
    tl.store(q_ptr + row * C + offs_c, to_codes(y, tl.div_rn(1.0, scale), 0, BITS), mask=mask)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, eps: float, bits: int, clip: float, index: Tensor | None,
    dynamic: bool,
) -> Tensor:  # fmt: skip
    x, M, C = rows(x), *shape_by(x, index)
    q = torch.empty((M, C), dtype=torch.int8, device=x.device)
    if q.numel() == 0:
        return q
    BLOCK_C = triton.next_power_of_2(C)
    with torch.cuda.device_of(x):
        _norm_quant_kernel[(M,)](
            x, weight.contiguous(), bias.contiguous(), scale, vector(index), q, C, x.stride(0), float(clip),
            EPS=eps, DYNAMIC=dynamic, PER_COLUMN=scale.shape[0] > 1, BITS=bits, BLOCK_C=BLOCK_C,
            num_warps=max(1, min(16, BLOCK_C // 512)), **FLAGS,
        )  # fmt: skip
    return q


def norm_quant(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, eps: float, bits: int, index: Tensor | None = None
) -> Tensor:
    return _launch(x, weight, bias, scale.contiguous(), eps, bits, 1.0, index, dynamic=False)


def norm_quant_dynamic(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, bits: int, clip: float, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    M, C = shape_by(x, index)
    scale = x.new_full((M,), MIN_SCALE.value) if C == 0 else x.new_empty(M)
    return _launch(x, weight, bias, scale, eps, bits, clip, index, dynamic=True), scale
