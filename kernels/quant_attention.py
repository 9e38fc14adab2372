"""softmax(q k^T scale + bias) v on integer codes, P in a format of formats/softmax.py or as bytes of the maximum.

Formulas, arguments and results are those of reference/quant_attention.py. The scores of a tile of queries and keys, its
codes and P stay in registers: nothing of size Nq Nk is in memory. Rows of one tile are scored once; longer ones first
for their maximum, then again for P (a running maximum would keep small values that the definition drops). With one
positive scale a head and no bias the first pass needs no floats: the largest product gives the largest score.

    P in bytes    fp8 dots with v of e4m3, int8 as two planes of e4m3; the row sum from the same bytes and a dot with
                  ones. No exponential. Ada's and Hopper's partial sums are added up in float32 every tile of keys
    other P       looked up, times 1/2 where integers, as float16; so are bytes on v of floats or with a scale a key,
                  and all of them before sm_89
    no format     diffused bytes, in two parts that an int8 holds: exact int32 sums, the reference's bits

Extra memory: v once more (_values.py); 4 B H Nk bytes for the class row, 8 B H Nk for column sums, which are added up
as integers of 2^-40 so that any order gives the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention import (
    COLUMN_UNITS,
    FAR,
    add_columns,
    add_tile,
    factor_of,
    first_row,
    keys_of,
    logits,
    row_max,
    share_sum,
)
from ._common import FLAGS, log2, to_codes, vector
from ._values import ALIGNED, prepare, start_of

LOG2_E = 1.44269504  # reference/scalar.py
SHARE = tl.constexpr(1.5318628356908448e-05)  # float32 of 1 / 65280
LN2 = tl.constexpr(0.693147180559945)


@triton.jit
def _load_q(q_ptr, offs_m, mask_m, stride_qm, first: tl.constexpr, PART: tl.constexpr, D: tl.constexpr):
    offs_d = first + tl.arange(0, PART)
    ptrs = q_ptr + offs_m[:, None].to(tl.int64) * stride_qm + offs_d[None, :]
    return tl.load(ptrs, mask=mask_m[:, None] & (offs_d < D)[None, :], other=0)


@triton.jit
def _store_first(cls_ptr, start, first, total, n_keys, form: tl.constexpr):
    keys = start + keys_of(first.shape[0], form[6])
    tl.store(cls_ptr + keys, tl.where(total > 0, first / total, 0.0), mask=keys < n_keys)


@triton.jit
def _store(
    acc, scale, factor, offs_m, mask_m, out_ptr, out_scale_ptr, h, stride_om,
    first: tl.constexpr, PART: tl.constexpr, D: tl.constexpr, OUT_SCALE_PER_COLUMN: tl.constexpr,
):  # fmt: skip
    offs_d = first + tl.arange(0, PART)
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    y = acc.to(tl.float32) * (scale * factor)[:, None]
    if out_scale_ptr is not None:
        if OUT_SCALE_PER_COLUMN:
            out_scale = tl.load(out_scale_ptr + h * D + offs_d, mask=offs_d < D, other=1.0)[None, :]
        else:
            out_scale = tl.load(out_scale_ptr)
        y = to_codes(y, tl.div_rn(1.0, out_scale), 0, 8)
    tl.store(out_ptr + offs_m[:, None].to(tl.int64) * stride_om + h * D + offs_d[None, :], y, mask=mask)


@triton.jit
def _quant_attention_kernel(
    q_ptr, k_ptr, v_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, bias_ptr, key_bias_ptr, grid_h_ptr, grid_w_ptr,
    out_scale_ptr, values_ptr, thresholds_ptr, key_scale_ptr, cu_q_ptr, cu_k_ptr, out_ptr, cls_ptr, lse_ptr,
    columns_ptr, H, Nq, blocks_m,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vp, stride_vd,
    stride_qsb, stride_qsh, stride_qsm, stride_ksb, stride_ksh, stride_ksn, stride_vsb, stride_vsh,
    stride_bb, stride_bh, stride_bm, stride_bn, stride_kbb, stride_kbn,
    stride_ghb, stride_ghh, stride_ghm, stride_ghk, stride_gwb, stride_gwh, stride_gwm, stride_gwk,
    score_unit, bias_unit, octave, inverse_octave, shift, p_unit, offset,
    N: tl.constexpr, D: tl.constexpr, PART: tl.constexpr, REST: tl.constexpr, KW: tl.constexpr,
    L: tl.constexpr, LSE: tl.constexpr, BYTE_STEP: tl.constexpr, E4M3: tl.constexpr, FP8: tl.constexpr,
    NORMALIZE: tl.constexpr, PLANES: tl.constexpr, K_SCALE_PER_KEY: tl.constexpr,
    OUT_SCALE_PER_COLUMN: tl.constexpr, PROMOTE: tl.constexpr, PERMUTED: tl.constexpr, PACKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block_m, bh = tl.program_id(0) % blocks_m, (tl.program_id(0) // blocks_m).to(tl.int64)
    b, h = bh // H, bh % H
    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n_queries, n_keys = Nq, N
    if cu_q_ptr is not None:  # b is the sequence
        first_q, first_k, first_v = tl.load(cu_q_ptr + b), tl.load(cu_k_ptr + b), start_of(cu_k_ptr, b)
        n_queries, n_keys = tl.load(cu_q_ptr + b + 1) - first_q, tl.load(cu_k_ptr + b + 1) - first_k
        if block_m * BLOCK_M >= n_queries:
            return
        q_ptr += first_q.to(tl.int64) * stride_qm
        q_scale_ptr += first_q * stride_qsm
        out_ptr += first_q.to(tl.int64) * H * D
        k_ptr += first_k.to(tl.int64) * stride_kn
        k_scale_ptr += first_k * stride_ksn
        v_ptr += tl.multiple_of(first_v, ALIGNED)
        if key_scale_ptr is not None:
            key_scale_ptr += first_k
        row, column = h * Nq + first_q, h * N + first_k
        if key_bias_ptr is not None:
            key_bias_ptr += first_k * stride_kbn
        b = b * 0
    else:
        out_ptr += b * Nq * H * D
        row, column = bh * Nq, bh * N
    mask_m, first_m = offs_m < n_queries, block_m.to(tl.int64) * BLOCK_M
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    k_scale_ptr += b * stride_ksb + h * stride_ksh
    if key_scale_ptr is not None:
        key_scale_ptr += (b * H + h) * N
    if bias_ptr is not None:
        bias_ptr += b * stride_bb + h * stride_bh + first_m * stride_bm
    if key_bias_ptr is not None:
        key_bias_ptr += b * stride_kbb
    if grid_h_ptr is not None:
        grid_h_ptr += b * stride_ghb + h * stride_ghh + first_m * stride_ghm
        grid_w_ptr += b * stride_gwb + h * stride_gwh + first_m * stride_gwm

    q = _load_q(q_ptr, offs_m, mask_m, stride_qm, 0, PART, D)
    q_rest = _load_q(q_ptr, offs_m, mask_m, stride_qm, PART, REST, D) if REST else q
    q_scale = tl.load(q_scale_ptr + b * stride_qsb + h * stride_qsh + offs_m * stride_qsm, mask=mask_m, other=0.0)
    PACKED: tl.constexpr = cu_q_ptr is not None
    query = (q, q_rest, q_scale * score_unit, tl.arange(0, BLOCK_M), mask_m)
    strides = (
        stride_kn, stride_ksn, stride_bm, stride_bn, stride_kbn, stride_ghm, stride_ghk, stride_gwm, stride_gwk,
    )  # fmt: skip
    scores = (
        query, (k_ptr, k_scale_ptr, bias_ptr, key_bias_ptr, grid_h_ptr, grid_w_ptr), strides, bias_unit,
    )  # fmt: skip
    k_again = k_ptr + (Nq >> 31)  # k_ptr, but the compiler does not know, and keeps no scores from one pass to another
    again = (
        query, (k_again, k_scale_ptr, bias_ptr, key_bias_ptr, grid_h_ptr, grid_w_ptr), strides, bias_unit,
    )  # fmt: skip
    values = (v_ptr, stride_vp, stride_vd)
    BIASED: tl.constexpr = bias_ptr is not None or grid_h_ptr is not None or key_bias_ptr is not None
    MONOTONE: tl.constexpr = not BIASED and not K_SCALE_PER_KEY
    form: tl.constexpr = (
        D, PART, REST, KW, K_SCALE_PER_KEY, BLOCK_N, PERMUTED, values_ptr is None, MONOTONE,
    )  # fmt: skip
    FAST: tl.constexpr = PACKS and not LSE and not BIASED
    factor = 1.0 if values_ptr is None else factor_of(values_ptr, L, BYTE_STEP, E4M3, FP8)
    code: tl.constexpr = (L, LSE, BYTE_STEP, E4M3, FP8, PLANES, PROMOTE, FAST)
    if key_scale_ptr is None:
        v_scale = tl.load(v_scale_ptr + b * stride_vsb + h * stride_vsh)
    else:
        v_scale = 0.0
        for start in range(0, n_keys, BLOCK_N):
            keys = start + tl.arange(0, BLOCK_N)
            v_scale = tl.maximum(v_scale, tl.max(tl.load(key_scale_ptr + keys, mask=keys < n_keys, other=0.0)))
    in_reach = False
    if FAST and not K_SCALE_PER_KEY:  # of two products, each up to 2^14 D times one scale
        in_reach = tl.max(query[2], axis=0) * tl.load(k_scale_ptr) * (2.0**15 * D) < FAR
    coding = (values_ptr, thresholds_ptr, factor, shift, offset, inverse_octave, key_scale_ptr, v_scale, in_reach)
    # Whole tiles, then one that is not: which of its columns are keys is known when it compiles, unless it is read.
    ONE: tl.constexpr = N <= BLOCK_N and not PACKED
    WHOLE: tl.constexpr = 0 if ONE else N // BLOCK_N * BLOCK_N
    REST_N: tl.constexpr = WHOLE < N and not ONE and not PACKED
    stop = n_keys if PACKED else WHOLE

    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    for start in range(0, stop, BLOCK_N):
        top = tl.maximum(top, row_max(start, n_keys, scores, form, PACKED))
    if ONE:
        t = logits(0, N, scores, form, N < BLOCK_N)
        top = row_max(0, N, scores, form, N < BLOCK_N)
    if REST_N:
        t = logits(WHOLE, N, scores, form, True)
        top = tl.maximum(top, row_max(WHOLE, N, scores, form, True))

    anchor = top
    if LSE:
        f = tl.zeros((BLOCK_M,), tl.int32)
        if ONE or REST_N:
            f = share_sum(t, top, inverse_octave)
        for start in range(0, stop, BLOCK_N):
            f += share_sum(logits(start, n_keys, scores, form, PACKED), top, inverse_octave)
        share = f.to(tl.uint32, bitcast=True).to(tl.float32) * SHARE  # up to 65280 * 65536, below 2^32
        anchor = top + log2(tl.maximum(share, 1.0)) * octave

    TYPE: tl.constexpr = tl.int32 if values_ptr is None else tl.float32
    total = tl.zeros((BLOCK_M, 16), TYPE) if BYTE_STEP else tl.zeros((BLOCK_M,), TYPE)
    acc = tl.zeros((BLOCK_M, PART), TYPE)
    acc_rest = tl.zeros((BLOCK_M, REST), TYPE) if REST else acc
    carry = tl.full((BLOCK_M, 16), 128, tl.int32) if values_ptr is None else acc
    sums = (total, acc, acc_rest, carry)
    # The last tile is at hand after the first pass; to keep it longer takes registers, so then it is made again.
    LAST: tl.constexpr = REST_N and (LSE or values_ptr is None)
    if (ONE or REST_N) and not LAST:
        sums = add_tile(t, anchor, sums, WHOLE, n_keys, coding, values, form, code, True)
    for start in range(0, stop, BLOCK_N):
        tile = logits(start, n_keys, scores, form, PACKED)
        sums = add_tile(tile, anchor, sums, start, n_keys, coding, values, form, code, PACKED)
    if LAST:
        t = logits(WHOLE, N, again, form, True)
        sums = add_tile(t, anchor, sums, WHOLE, n_keys, coding, values, form, code, True)
    total, acc, acc_rest, _ = sums
    if BYTE_STEP:
        # Every column of the dot with ones is the sum.
        total = tl.max(total, axis=1) * factor
    if values_ptr is None:
        total = total.to(tl.uint32, bitcast=True).to(tl.float32)
    if NORMALIZE:
        UNIT: tl.constexpr = 1 / 256 if values_ptr is None else 1.0  # of 16-bit codes in bytes
        weight = tl.where(total > 0, tl.div_rn(1.0, total), 0.0)
        scale = tl.where(total > 0, tl.div_rn(v_scale, total * UNIT), 0.0)
    else:
        weight = tl.full((BLOCK_M,), 1.0, tl.float32) * p_unit
        scale = weight * v_scale
    _store(
        acc, scale, factor, offs_m, mask_m, out_ptr, out_scale_ptr, h, H * D, 0, PART, D,
        OUT_SCALE_PER_COLUMN,
    )  # fmt: skip
    if REST:
        _store(
            acc_rest, scale, factor, offs_m, mask_m, out_ptr, out_scale_ptr, h, H * D, PART, REST,
            D, OUT_SCALE_PER_COLUMN,
        )  # fmt: skip
    if lse_ptr is not None:
        lse = anchor if values_ptr is None else anchor * inverse_octave * LN2
        if not LSE:
            lse += log2(tl.maximum(total * p_unit, 1e-37)) * LN2
        tl.store(lse_ptr + row + offs_m, lse, mask=mask_m)
    if columns_ptr is not None:
        weight = tl.where(mask_m, weight, 0.0)
        for start in range(0, stop, BLOCK_N):
            tile = logits(start, n_keys, scores, form, PACKED)
            add_columns(tile, anchor, weight, columns_ptr + column, start, n_keys, coding, form, code)
        if ONE or REST_N:
            if REST_N:
                t = logits(WHOLE, N, again, form, True)
            add_columns(t, anchor, weight, columns_ptr + column, WHOLE, n_keys, coding, form, code)
    if cls_ptr is not None:  # noqa: SIM102 - known when it compiles, the second is not
        if block_m == 0:
            cls_ptr += column
            sum_first = 0.0
            for start in range(0, stop, BLOCK_N):
                tile = logits(start, n_keys, scores, form, PACKED)
                sum_first += tl.sum(first_row(tile, top, offs_m, inverse_octave), axis=0)
            if ONE or REST_N:
                if REST_N:
                    t = logits(WHOLE, N, again, form, True)
                first = first_row(t, top, offs_m, inverse_octave)
                sum_first += tl.sum(first, axis=0)
                _store_first(cls_ptr, WHOLE, first, sum_first, n_keys, form)
            for start in range(0, stop, BLOCK_N):
                first = first_row(logits(start, n_keys, scores, form, PACKED), top, offs_m, inverse_octave)
                _store_first(cls_ptr, start, first, sum_first, n_keys, form)


def _blocks(
    Nk: int, D: int, packed: bool, light: bool, looked_up: bool, capability: tuple[int, int]
) -> dict[str, int]:
    """Queries and keys of a tile. A row that fits is one tile, and its scores stay in registers.

    light: a byte is the code, no bias before it, neither class row nor columns after it. Then 256 scores of a row fit,
    for Hopper's and later dots, and three programs of a head dimension up to 64 fit on an SM. All else spills with
    larger tiles (with smaller ones too, where sm_100 looks values up). A loop that looks values up is not pipelined:
    Triton would have to start the dots ahead that those loads wait for, and fails.
    """
    hopper = capability[0] == 9
    light &= capability >= (9, 0)
    heavy = not light and D > 64
    few = (looked_up or heavy) and not (looked_up and heavy and capability[0] == 10)
    BLOCK_N = 128 if light and (D <= 64 or hopper) else 32 if few else 64
    if not packed and Nk <= (256 if light and BLOCK_N == 128 else BLOCK_N):
        BLOCK_N = max(32, triton.next_power_of_2(Nk))
    return {
        "BLOCK_M": 32 if heavy and not hopper else 64, "BLOCK_N": BLOCK_N, "num_warps": 8 if heavy else 4,
        "num_stages": 1 if looked_up else 2, "maxnreg": 168 if light and D <= 64 and hopper else 255,
    }  # fmt: skip


def _parts(D: int) -> tuple[int, int]:
    """A head's inputs in one or two powers of two, at least the 32 of an 8-bit dot."""
    whole = max(32, triton.next_power_of_2(D))
    rest = 0 if whole <= 32 else max(32, triton.next_power_of_2(D - whole // 2))
    return (whole // 2, rest) if 0 < rest < whole // 2 else (whole, 0)


def _capability(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)


def _float32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).item()


def _strides(t: Tensor | None, n: int) -> tuple[int, ...]:
    return (0,) * n if t is None else t.stride()


def quant_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    softmax_scale: float,
    bias: Tensor | None,
    key_bias: Tensor | None,
    grid_bias_h: Tensor | None,
    grid_bias_w: Tensor | None,
    out_scale: Tensor | None,
    p_values: Tensor | None,
    p_thresholds: Tensor | None,
    p_steps: float,
    p_shift: float,
    p_unit: float,
    p_offset: float,
    p_operand: str,
    p_anchor: str,
    p_normalize: bool,
    v_bits: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen: int,
    emit_cls: bool,
    emit_lse: bool,
    emit_columns: bool,
    q_index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if q_index is not None:  # a copy of some codes, a byte each, before floats are written
        rows = q_index.long()[:, None].expand(-1, q.shape[1], -1)
        q, q_scale = q.gather(2, rows[..., None].expand(*rows.shape, q.shape[3])), q_scale.gather(2, rows)
    (B, H, Nq, D), Nk = q.shape, k.shape[2]
    packed = cu_seqlens_q is not None
    sequences, longest = (cu_seqlens_q.shape[0] - 1, max_seqlen) if packed else (B, Nq)

    def zeros(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape if wanted else (0,), dtype=dtype, device=q.device)

    make = torch.zeros if packed else torch.empty  # what lies beyond the last sequence belongs to no program
    out = make((B, Nq, H * D), dtype=torch.float32 if out_scale is None else torch.int8, device=q.device)
    cls, columns = zeros(emit_cls, B, H, Nk), zeros(emit_columns, B, H, Nk, dtype=torch.int64)
    lse = torch.full_like(zeros(emit_lse, B, H, Nq), -torch.inf)
    if out.numel() == 0 or Nk == 0:
        return out.zero_(), zeros(emit_cls, B, Nk), lse, zeros(emit_columns, B, H, Nk)
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    capability, bytes_ = _capability(q), p_values is None
    byte_step = {"e4m3": 8, "e5m2": 4}.get(p_operand, 0) // max(1, round(p_steps))
    one_scale = v_scale.shape[2] == 1 or v_scale.stride(2) == 0
    fp8 = byte_step > 0 and v.dtype.itemsize == 1 and one_scale and capability >= (8, 9)
    octave = 1 / LOG2_E if bytes_ else p_steps if p_thresholds is None else 1.0
    part, rest = _parts(D)
    light = fp8 and p_anchor == "max" and bias is None and grid_bias_h is None and key_bias is None
    light = light and not emit_cls and not emit_columns
    blocks = _blocks(Nk, D, packed, light, byte_step == 0 and not bytes_, capability)
    blocks_m = triton.cdiv(longest, blocks["BLOCK_M"])
    with torch.cuda.device_of(q):
        operand = torch.float8_e4m3fn if fp8 else torch.float16
        key_scale = v_scale.contiguous() if bytes_ and not one_scale else None
        planes, scale = prepare(v, v_scale, v_bits, torch.int8 if bytes_ else operand, cu_seqlens_k)
        _quant_attention_kernel[(blocks_m * H * sequences,)](
            q, k, planes, q_scale, k_scale, scale, bias, key_bias, grid_bias_h, grid_bias_w, vector(out_scale),
            vector(p_values), vector(p_thresholds), key_scale, vector(cu_seqlens_q), vector(cu_seqlens_k), out,
            cls if emit_cls else None, lse if emit_lse else None, columns if emit_columns else None,
            H, Nq, blocks_m, *q.stride()[:3], *k.stride()[:3], *planes.stride()[:4], *q_scale.stride(),
            *k_scale.stride(), *scale.stride(), *_strides(bias, 4), *_strides(key_bias, 2), *_strides(grid_bias_h, 4),
            *_strides(grid_bias_w, 4),
            _float32(softmax_scale if bytes_ else softmax_scale * LOG2_E * octave), _float32(LOG2_E * octave),
            float(octave), _float32(1 / octave), _float32(p_shift),
            _float32(1 / 65280 if bytes_ else p_unit), _float32(p_offset),
            N=Nk, D=D, PART=part, REST=rest, KW=1 if grid_bias_w is None else grid_bias_w.shape[3],
            L=0 if bytes_ else p_values.shape[0], LSE=p_anchor == "lse", BYTE_STEP=byte_step, E4M3=p_operand == "e4m3",
            FP8=fp8, NORMALIZE=p_normalize, PLANES=planes.shape[2],
            K_SCALE_PER_KEY=k_scale.stride(2) != 0,
            OUT_SCALE_PER_COLUMN=out_scale is not None and out_scale.shape[0] > 1, PROMOTE=fp8 and capability[0] != 10,
            PERMUTED=fp8 and capability[0] < 10, PACKS=fp8 and capability[0] == 9,
            **blocks, **FLAGS,
        )  # fmt: skip
    cls = cls.mean(dim=1) if emit_cls else cls
    return out, cls, lse, (columns.double() / COLUMN_UNITS.value).float() if emit_columns else zeros(False)
