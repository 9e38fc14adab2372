"""What the kernels share: rounding, codes, and the scalar functions of the epilogues.

Every float operation here rounds as written: the launchers pass FLAGS, which keeps the compiler from contracting a
multiply and an add, divisions are div_rn, and the constants are those of the reference. So codes are the reference's,
bit for bit, where the contract of the library would let them differ by one beside a rounding tie. One compiler does not
obey: ptxas 12.9, of Triton 3.6 on sm_100, contracts packed pairs all the same, and there that leave is used.

Lengths that a kernel loops over are constexpr: they are dimensions of the model, few, and Triton 3.6's interpreter
cannot loop to a run-time bound under NumPy 2.4.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

FLAGS = {"enable_fp_fusion": False}
MATMUL_FLAGS = FLAGS | {"maxnreg": 255}  # told no limit, ptxas spills a register or two where it stops at 168
GROUP_M = 8  # row blocks that share a column of weight tiles in L2
MIN_SCALE = tl.constexpr(1e-30)  # formats/affine.py
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: the sum with |x| <= 2^22 holds rint(x), half to even, in its low bits
_MAGIC_BITS = tl.constexpr(0x4B400000)


def rows(x: Tensor) -> Tensor:
    """x (M, K) with contiguous rows, at any distance from each other."""
    return x if x.stride(1) == 1 else x.contiguous()


def shape_by(x: Tensor, index: Tensor | None) -> tuple[int, int]:
    """(M, K) of the rows of x (R, K), or of those that index (M,) names."""
    return (x if index is None else index).shape[0], x.shape[1]


def aligned_rows(x: Tensor) -> Tensor:
    """x (M, K), or a copy padded with zeros: as many columns as the next multiple of 16, and such a stride and address.

    Then x loads 16 bytes at a time, under a mask too. Else Triton loads single elements, and the loop is not pipelined.
    """
    M, K = x.shape
    if K % 16 == 0 and x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_zeros(M, triton.cdiv(K, 16) * 16)
    padded[:, :K] = x
    return padded


def vector(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.contiguous()


def bits_of(w_packed: Tensor, K: int) -> int:
    """The number of bits of the codes, from the length of a row of packed weights with K inputs."""
    return (w_packed.shape[1] - 64) // (64 * triton.cdiv(K, 32)) if K else 8


@triton.jit
def to_codes(y, inv_scale, zero_point, BITS: tl.constexpr):
    """clip(rint(y * inv_scale) + zero_point) to BITS bits, as int8. Clipping to integers first commutes with rint."""
    lo: tl.constexpr = -(2 ** (BITS - 1))
    hi: tl.constexpr = 2 ** (BITS - 1) - 1
    t = tl.minimum(tl.maximum(y * inv_scale, lo * 1.0 - zero_point), hi * 1.0 - zero_point)
    return ((t + _MAGIC).to(tl.int32, bitcast=True) - _MAGIC_BITS + zero_point).to(tl.int8)


@triton.jit
def scale_of(amax, Q_MAX: tl.constexpr):
    """The scale that maps amax to Q_MAX; never zero."""
    return tl.maximum(tl.div_rn(amax, Q_MAX * 1.0), MIN_SCALE)


@triton.jit
def exp2(t):
    """2^t for |t| <= 100, as reference/scalar.py."""
    shifted = t + _MAGIC
    f = t - (shifted - _MAGIC)
    p = f * 0.00132647261 + 0.00967151299
    p = p * f + 0.0555073358
    p = p * f + 0.240222424
    p = p * f + 0.693147004
    p = p * f + 1.0
    n = shifted.to(tl.int32, bitcast=True) - _MAGIC_BITS
    return (p.to(tl.int32, bitcast=True) + (n << 23)).to(tl.float32, bitcast=True)


@triton.jit
def log2(x):
    """log2 of positive, normal x, as reference/scalar.py."""
    bits = x.to(tl.int32, bitcast=True)
    n = (bits - 0x3F3504F3) >> 23
    y = (bits - (n << 23)).to(tl.float32, bitcast=True) - 1.0
    p = y * -0.14620353 + 0.23420985
    p = p * y + -0.24882181
    p = p * y + 0.2870756
    p = p * y + -0.36024198
    p = p * y + 0.48092404
    p = p * y + -0.72135276
    p = p * y + 1.4426949
    return n.to(tl.float32) + y * p


@triton.jit
def rint(t):
    """|t| <= 2^22 to the nearest int32, half to even; what is not finite becomes far from zero."""
    return (t + _MAGIC).to(tl.int32, bitcast=True) - _MAGIC_BITS


@triton.jit
def sigmoid2(t):
    """1 / (1 + 2^-t)."""
    return tl.div_rn(1.0, 1.0 + exp2(tl.minimum(tl.maximum(-t, -100.0), 100.0)))


@triton.jit
def gelu(x):
    """x Phi(x), Phi - 1/2 as an odd rational function of x clipped to +-5.5."""
    t = tl.minimum(tl.maximum(x, -5.5), 5.5)
    z = t * t
    p = z * 2.27495214e-08 + 6.35206834e-06
    p = p * z + 0.000168822022
    p = p * z + 0.00467723841
    p = p * z + 0.0338523164
    p = p * z + 0.398942232
    q = z * 1.19750473e-06 + 7.36461952e-05
    q = q * z + 0.00188442448
    q = q * z + 0.0286456775
    q = q * z + 0.251521081
    q = q * z + 1.0
    return x * (0.5 + t * tl.div_rn(p, q))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        x = gelu(x)
    elif ACTIVATION == "gelu_tanh":
        x = x * sigmoid2((x + x * x * x * 0.044715) * 2.30220819)
    elif ACTIVATION == "quick_gelu":
        x = x * sigmoid2(x * 2.45546696)
    return x


@triton.jit
def block_of(blocks_m, blocks_n, GROUP_M: tl.constexpr):
    """The block of y this program computes: GROUP_M row blocks in turn share a column of weight tiles in L2."""
    group = tl.program_id(0) // (GROUP_M * blocks_n)
    group_m = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * blocks_n)
    return group * GROUP_M + within % group_m, within // group_m


@triton.jit
def sources(offs_m, mask_m, index_ptr, out_index_ptr):
    """The rows of x that rows of the result are computed from, and which are: those with an index of 0 or more."""
    rows, live = offs_m, mask_m
    if index_ptr is not None:
        rows = tl.load(index_ptr + offs_m, mask=mask_m, other=-1).to(tl.int64)
        live = rows >= 0
    if out_index_ptr is not None:
        live &= tl.load(out_index_ptr + offs_m, mask=live, other=-1) >= 0
    return rows, live


@triton.jit
def _finish(
    acc, offs_m, offs_n, M, N, x_scale_ptr, w_scale_ptr, bias_ptr, layer_scale_ptr, residual_ptr, out_scale_ptr, y_ptr,
    stride_rm, out_zero_point,
    ACTIVATION: tl.constexpr, X_SCALE_PER_ROW: tl.constexpr, OUT_SCALE_PER_COLUMN: tl.constexpr, OUT_BITS: tl.constexpr,
    index_ptr, out_index_ptr,
):  # fmt: skip
    mask_m, mask_n = offs_m < M, offs_n < N
    rows, live = sources(offs_m, mask_m, index_ptr, out_index_ptr)
    w_scale = tl.load(w_scale_ptr + offs_n, mask=mask_n, other=0.0)
    x_scale = tl.load(x_scale_ptr + rows, mask=live, other=0.0)[None, :] if X_SCALE_PER_ROW else tl.load(x_scale_ptr)
    y = acc * (x_scale * w_scale[:, None])
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
    y = activate(y, ACTIVATION)
    if layer_scale_ptr is not None:
        y *= tl.load(layer_scale_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
    if out_index_ptr is not None:
        offs_m, mask_m = tl.load(out_index_ptr + offs_m, mask=live, other=0).to(tl.int64), live
    mask = mask_n[:, None] & mask_m[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offs_m[None, :] * stride_rm + offs_n[:, None], mask=mask, other=0.0)
    if out_scale_ptr is not None:
        if OUT_SCALE_PER_COLUMN:
            out_scale = tl.load(out_scale_ptr + offs_n, mask=mask_n, other=1.0)[:, None]
        else:
            out_scale = tl.load(out_scale_ptr)
        y = to_codes(y, tl.div_rn(1.0, out_scale), out_zero_point, OUT_BITS)
    if index_ptr is not None:
        y = tl.where(live[None, :], y, 0)
    tl.store(y_ptr + offs_m[None, :] * N + offs_n[:, None], y, mask=mask)


@triton.jit
def epilogue(
    acc, start_m, offs_n, M, N, x_scale_ptr, w_scale_ptr, bias_ptr, layer_scale_ptr, residual_ptr, out_scale_ptr, y_ptr,
    stride_rm, out_zero_point,
    ACTIVATION: tl.constexpr, X_SCALE_PER_ROW: tl.constexpr, OUT_SCALE_PER_COLUMN: tl.constexpr, OUT_BITS: tl.constexpr,
    index_ptr=None, out_index_ptr=None,
):  # fmt: skip
    """What follows a matmul, from acc (features, rows) float32 to the stored y (rows, features).

    128 rows are done in halves: at once, GELU spills 20 to 40 registers when y is float32.
    """
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    if BLOCK_M == 128:
        first, second = tl.split(tl.permute(tl.reshape(acc, (BLOCK_N, 2, 64)), (0, 2, 1)))
        offs_m = start_m + tl.arange(0, 64)
        _finish(
            first, offs_m, offs_n, M, N, x_scale_ptr, w_scale_ptr, bias_ptr, layer_scale_ptr, residual_ptr,
            out_scale_ptr, y_ptr, stride_rm, out_zero_point, ACTIVATION, X_SCALE_PER_ROW,
            OUT_SCALE_PER_COLUMN, OUT_BITS, index_ptr, out_index_ptr,
        )  # fmt: skip
        _finish(
            second, offs_m + 64, offs_n, M, N, x_scale_ptr, w_scale_ptr, bias_ptr, layer_scale_ptr, residual_ptr,
            out_scale_ptr, y_ptr, stride_rm, out_zero_point, ACTIVATION, X_SCALE_PER_ROW,
            OUT_SCALE_PER_COLUMN, OUT_BITS, index_ptr, out_index_ptr,
        )  # fmt: skip
    else:
        _finish(
            acc, start_m + tl.arange(0, BLOCK_M), offs_n, M, N, x_scale_ptr, w_scale_ptr, bias_ptr, layer_scale_ptr,
            residual_ptr, out_scale_ptr, y_ptr, stride_rm, out_zero_point, ACTIVATION, X_SCALE_PER_ROW,
            OUT_SCALE_PER_COLUMN, OUT_BITS, index_ptr, out_index_ptr,
        )  # fmt: skip
