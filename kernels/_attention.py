"""Scores, codes and operands of quant_attention, on one tile of queries and keys.

A tensor core's sum leaves a thread two neighbouring keys of every eight, and an 8-bit left operand wants four of every
sixteen. So column 16 i + 8 h + 2 t + b of a tile of scores is key 16 i + 4 t + 2 h + b: k is read in that order, and
`in_order` only renames what a thread holds. Probabilities never leave the registers they were made in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import MIN_SCALE, exp2, rint
from ._packed import ASM
from ._values import ALIGNED

LIMIT = tl.constexpr(16320.0)  # reference/quant_attention.py
FAR = tl.constexpr(30000.0)  # steps; further than there are codes, and no more than 16 bits hold
FULL = tl.constexpr(65280.0)
COLUMN_UNITS = tl.constexpr(2.0**40)  # of column sums: integers, whose order of addition does not matter


@triton.jit
def keys_of(BLOCK_N: tl.constexpr, PERMUTED: tl.constexpr):
    """The key of each column of a tile."""
    column = tl.arange(0, BLOCK_N)
    if PERMUTED:
        column = (column & -16) | ((column & 6) << 1) | ((column & 8) >> 2) | (column & 1)
    return column


@triton.jit
def in_order(p, PERMUTED: tl.constexpr):
    """The columns of p (BLOCK_M, BLOCK_N) in the order of keys."""
    if PERMUTED:
        M: tl.constexpr = p.shape[0]
        N: tl.constexpr = p.shape[1]
        p = tl.reshape(tl.permute(tl.reshape(p, (M, N // 16, 2, 4, 2)), (0, 1, 3, 2, 4)), (M, N))
    return p


@triton.jit
def _score_part(s, q, k_ptr, keys, seen, stride_kn, first: tl.constexpr, PART: tl.constexpr, D: tl.constexpr):
    offs_d = first + tl.arange(0, PART)
    k_ptrs = k_ptr + keys[None, :] * stride_kn + offs_d[:, None]
    k = tl.load(k_ptrs, mask=(offs_d < D)[:, None] & seen[None, :], other=0)
    return tl.dot(q, k, s, out_dtype=tl.int32)


@triton.jit
def _products(start, n_keys, scores, form: tl.constexpr, TAIL: tl.constexpr):
    """q k^T of a tile, int32; its columns, less start; which of them are keys. Offsets within a tile fit 32 bits."""
    query, sources, strides, _ = scores
    column = keys_of(form[5], form[6])
    seen = column < n_keys - start if TAIL else tl.full((form[5],), True, tl.int1)
    k_ptr = sources[0] + tl.cast(start, tl.int64) * strides[0]
    s = tl.zeros((query[0].shape[0], form[5]), tl.int32)
    s = _score_part(s, query[0], k_ptr, column, seen, strides[0], 0, form[1], form[0])
    if form[2]:
        s = _score_part(s, query[1], k_ptr, column, seen, strides[0], form[1], form[2], form[0])
    return s, column, seen


@triton.jit
def row_max(start, n_keys, scores, form: tl.constexpr, TAIL: tl.constexpr):
    """The largest of logits. That of the largest product where all have one positive scale: rounding is monotone."""
    query, sources, _, _ = scores
    if form[8]:
        s, _, seen = _products(start, n_keys, scores, form, TAIL)
        if TAIL:
            s = tl.where(seen[None, :], s, -(2**30))
        top = tl.max(s, axis=1).to(tl.float32) * (query[2] * tl.load(sources[1]))
    else:
        top = tl.max(logits(start, n_keys, scores, form, TAIL), axis=1)
    return top


@triton.jit
def logits(start, n_keys, scores, form: tl.constexpr, TAIL: tl.constexpr):
    """t (BLOCK_M, BLOCK_N) of the reference, -inf where a key is not seen; TAIL: some are not keys at all."""
    query, sources, strides, bias_unit = scores
    _, _, q_scale, rows, mask_m = query
    _, k_scale_ptr, bias_ptr, key_bias_ptr, grid_h_ptr, grid_w_ptr = sources
    _, stride_ksn, stride_bm, stride_bn, stride_kbn, stride_ghm, stride_ghk, stride_gwm, stride_gwk = strides
    KW: tl.constexpr = form[3]
    K_SCALE_PER_KEY: tl.constexpr = form[4]
    EXACT: tl.constexpr = form[7]
    s, column, seen = _products(start, n_keys, scores, form, TAIL)
    first = tl.cast(start, tl.int64)
    if K_SCALE_PER_KEY:
        k_scale = tl.load(k_scale_ptr + first * stride_ksn + column * stride_ksn, mask=seen, other=0.0)
        t = s.to(tl.float32) * (q_scale[:, None] * k_scale[None, :])
    else:
        t = s.to(tl.float32) * (q_scale * tl.load(k_scale_ptr))[:, None]
    mask = mask_m[:, None] & seen[None, :]
    b = t if EXACT else 0.0  # bytes add one bias after the other to the scores, codes their sum
    if bias_ptr is not None:
        ptrs = bias_ptr + first * stride_bn + rows[:, None] * stride_bm + column[None, :] * stride_bn
        b += tl.load(ptrs, mask=mask, other=0.0)
    if grid_h_ptr is not None:
        keys = start + column
        h_ptrs = grid_h_ptr + rows[:, None] * stride_ghm + (keys // KW)[None, :] * stride_ghk
        w_ptrs = grid_w_ptr + rows[:, None] * stride_gwm + (keys % KW)[None, :] * stride_gwk
        b += tl.load(h_ptrs, mask=mask, other=0.0) + tl.load(w_ptrs, mask=mask, other=0.0)
    if key_bias_ptr is not None:
        b += tl.load(key_bias_ptr + first * stride_kbn + column * stride_kbn, mask=seen, other=0.0)[None, :]
    if EXACT:
        t = b
    elif bias_ptr is not None or grid_h_ptr is not None or key_bias_ptr is not None:
        octaves = tl.minimum(tl.maximum(b * bias_unit, -LIMIT), LIMIT)
        t = tl.where(b == -float("inf"), -float("inf"), t + octaves)
    if TAIL:
        t = tl.where(seen[None, :], t, -float("inf"))
    return t


@triton.jit
def _count_above(x, thresholds_ptr, L: tl.constexpr):
    """How many of the descending thresholds are above x."""
    n = tl.zeros(x.shape, tl.int32)
    for i in tl.static_range(8):
        if (128 >> i) <= L:
            probe = n + (127 >> i)
            above = tl.load(thresholds_ptr + probe, mask=probe < L, other=-float("inf")) > x
            n += tl.where(above, 128 >> i, 0)
    return n


@triton.jit
def codes(t, anchor, thresholds_ptr, shift, L: tl.constexpr):
    """k = 0 .. L of t (BLOCK_M, BLOCK_N), int32; what is far beyond L is a key that is not seen."""
    if thresholds_ptr is not None:
        anchor = tl.where(anchor == -float("inf"), 0.0, anchor)
        k = _count_above(t - anchor[:, None], thresholds_ptr, L)
        return tl.where(t == -float("inf"), L, k)
    anchor = tl.where(anchor == -float("inf"), 0.0, anchor)
    return rint(tl.minimum(tl.maximum(anchor[:, None] - t + shift, 0.0), FAR))


@triton.jit
def _positive(x):
    """max(x, 0) of the lower 16 bits."""
    return tl.maximum((x << 16) >> 16, 0)


@triton.jit
def packed_bytes(t, top, in_reach, n_keys, L: tl.constexpr, BYTE_STEP: tl.constexpr, TAIL: tl.constexpr):
    """BYTE_STEP max(L - rint(top - t), 0) of permuted t as uint8 in the order of keys, two and four at a time.

    16 bits hold every difference, if they are within reach or made to be. Where TAIL, bytes from n_keys on are zero.
    """
    M: tl.constexpr = t.shape[0]
    N: tl.constexpr = t.shape[1]
    distance = t - top[:, None]
    if not in_reach:
        distance = tl.maximum(distance, -FAR)
    low_bits = (distance + 12582912.0).to(tl.int32, bitcast=True)
    low_bits = tl.permute(tl.reshape(low_bits, (M, N // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
    even, odd = tl.split(low_bits)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    c = tl.full((M, N // 16, 4), L, tl.int32)
    if ASM:
        # ptxas makes a zero that it knows anew for every pair.
        zero = (rint(tl.minimum(tl.maximum(top, -FAR), FAR)) + 65536) >> 18
        zero = tl.broadcast_to(zero[:, None, None], (M, N // 16, 4))
        word = tl.inline_asm_elementwise(
            """{ .reg .b32 a, b;
            prmt.b32 a, $1, $2, 0x5410;
            prmt.b32 b, $3, $4, 0x5410;
            add.s16x2 a, a, $5;
            add.s16x2 b, b, $5;
            max.s16x2 a, a, $6;
            max.s16x2 b, b, $6;
            prmt.b32 $0, a, b, 0x6420; }""",
            "=r,r,r,r,r,r,r", [x0, x1, x2, x3, (c & 0xFFFF) * 0x10001, zero], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        word = _positive(x0 + c) | _positive(x1 + c) << 8 | _positive(x2 + c) << 16 | _positive(x3 + c) << 24
    if BYTE_STEP > 1:
        word *= BYTE_STEP
    if TAIL:
        left = n_keys - tl.reshape(tl.arange(0, N // 4) * 4, (1, N // 16, 4))
        word = tl.where(left >= 4, word, tl.where(left > 0, word & ((1 << (left & 3) * 8) - 1), 0))
    y0, y1, y2, y3 = word.to(tl.uint8), (word >> 8).to(tl.uint8), (word >> 16).to(tl.uint8), (word >> 24).to(tl.uint8)
    return tl.reshape(tl.join(tl.join(y0, y2), tl.join(y1, y3)), (M, N))


@triton.jit
def probabilities(t, anchor, coding, code: tl.constexpr):
    """The left operand, fp8 or float16, and the values P in float32."""
    L: tl.constexpr = code[0]
    BYTE_STEP: tl.constexpr = code[2]
    E4M3: tl.constexpr = code[3]
    FP8: tl.constexpr = code[4]
    values_ptr, thresholds_ptr, factor, shift, offset, _, _, _, _ = coding
    k = codes(t, anchor, thresholds_ptr, shift, L)
    if BYTE_STEP:
        byte = (tl.maximum(L - k, 0) * BYTE_STEP).to(tl.uint8)
        if FP8:
            p = byte.to(tl.float8e4nv if E4M3 else tl.float8e5, bitcast=True)
        else:  # the bits of e4m3 are those of a float16 2^8 times smaller
            p = (byte.to(tl.uint16) << (7 if E4M3 else 8)).to(tl.float16, bitcast=True)
        value = p.to(tl.float32) * factor
    else:
        value = tl.load(values_ptr + k, mask=k < L, other=0).to(tl.float32)
        value = tl.where(k < L, value + offset, 0.0)
        p = (value / factor).to(tl.float16)
    return p, value


@triton.constexpr_function
def smallest_operand(BYTE_STEP, E4M3, FP8):
    """The value of the operand of code L - 1: of that byte, subnormal or just not."""
    return BYTE_STEP * 2.0 ** ((-9 if FP8 else -17) if E4M3 else -16)


@triton.jit
def factor_of(values_ptr, L: tl.constexpr, BYTE_STEP: tl.constexpr, E4M3: tl.constexpr, FP8: tl.constexpr):
    """P in units of its operand."""
    if BYTE_STEP:
        INVERSE: tl.constexpr = 1 / smallest_operand(BYTE_STEP, E4M3, FP8)
        factor = tl.load(values_ptr + L - 1).to(tl.float32) * INVERSE
    else:
        factor = 2.0 if values_ptr.dtype.element_ty == tl.int32 else 1.0  # integers reach 65535, float16 does not
    return factor


@triton.jit
def ones(N: tl.constexpr, E4M3: tl.constexpr, FP8: tl.constexpr):
    """(N, 16), by their bits: what a dot adds up, it adds up without rounding."""
    if FP8:
        x = tl.full((N, 16), 0x38 if E4M3 else 0x3C, tl.uint8)
        x = x.to(tl.float8e4nv if E4M3 else tl.float8e5, bitcast=True)
    else:
        x = tl.full((N, 16), 1.0, tl.float16)
    return x


@triton.jit
def exponentials(t, top, inverse_octave):
    """2^((t - top) / octave); zero in rows that see no key."""
    top = tl.where(top == -float("inf"), 0.0, top)
    return exp2(tl.maximum((t - top[:, None]) * inverse_octave, -100.0))


@triton.jit
def share_sum(t, top, inverse_octave):
    """The sum of 16-bit codes of probabilities, int32."""
    return tl.sum(rint(exponentials(t, top, inverse_octave) * FULL), axis=1)


@triton.jit
def diffused(p, carry):
    """Bytes of 16-bit codes p (BLOCK_M, BLOCK_N) as int32, and what the last 16 keys add up to, carry included."""
    M: tl.constexpr = p.shape[0]
    N: tl.constexpr = p.shape[1]
    wide = tl.reshape(p, (M, N // 16, 16))
    upto = tl.cumsum(wide, axis=1) + carry[:, None, :]
    taken = (upto >> 8) - ((upto - wide) >> 8)
    return tl.reshape(taken, (M, N)), carry + tl.sum(wide, axis=1)


@triton.jit
def first_row(t, top, offs_m, inverse_octave):
    """2^((t - top) / octave) of query 0, (BLOCK_N,)."""
    t = tl.max(tl.where((offs_m == 0)[:, None], t, -float("inf")), axis=0)
    top = tl.max(tl.where(offs_m == 0, top, -float("inf")), axis=0)
    top = tl.where(top == -float("inf"), 0.0, top)
    return tl.where(t == -float("inf"), 0.0, exp2(tl.maximum((t - top) * inverse_octave, -100.0)))


@triton.jit
def _times_v(
    acc, p, start, n_keys, values, first: tl.constexpr, PART: tl.constexpr, D: tl.constexpr, code: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """acc + p v, for PART columns of v from the first."""
    BLOCK_N: tl.constexpr = p.shape[1]
    PROMOTE: tl.constexpr = code[6]
    v_ptr, stride_vp, stride_vd = values
    offs_d, keys = first + tl.arange(0, PART), tl.arange(0, BLOCK_N)
    mask = tl.broadcast_to((offs_d < D)[:, None], (PART, BLOCK_N))
    if TAIL:
        mask &= (keys < (n_keys - start + ALIGNED - 1) // ALIGNED * ALIGNED)[None, :]
    v_ptrs = v_ptr + start + offs_d[:, None] * stride_vd + keys[None, :]
    for plane in tl.static_range(code[5]):
        v = tl.trans(tl.load(v_ptrs + plane * stride_vp, mask=mask, other=0.0))
        if PROMOTE and not TAIL:
            acc += tl.dot(p, v, max_num_imprecise_acc=BLOCK_N)
        else:
            acc = tl.dot(p, v, acc, out_dtype=acc.dtype)
    return acc


@triton.jit
def _add_bytes(t, top, sums, start, n_keys, coding, values, form: tl.constexpr, code: tl.constexpr, TAIL: tl.constexpr):
    D: tl.constexpr = form[0]
    PART: tl.constexpr = form[1]
    REST: tl.constexpr = form[2]
    total, acc, acc_rest, carry = sums
    p = exponentials(t, top, coding[5])
    f = rint(p * FULL)
    total += tl.sum(f, axis=1)
    if coding[6] is not None:
        keys = start + tl.arange(0, t.shape[1])
        scale = tl.load(coding[6] + keys, mask=keys < n_keys, other=0.0)
        f = rint(p * tl.div_rn(scale, tl.maximum(coding[7], MIN_SCALE))[None, :] * FULL)
    byte, carry = diffused(f, carry)
    for half in tl.static_range(2):  # the lower 7 bits, and the eighth, which is a sign to an int8
        p = ((byte >> 7) if half else (byte & 127)).to(tl.int8)
        unit = 128 if half else 1
        zero = tl.zeros(acc.shape, tl.int32)
        acc += _times_v(zero, p, start, n_keys, values, 0, PART, D, code, TAIL) * unit
        if REST:
            zero = tl.zeros(acc_rest.shape, tl.int32)
            acc_rest += _times_v(zero, p, start, n_keys, values, PART, REST, D, code, TAIL) * unit
    return total, acc, acc_rest, carry


@triton.jit
def _add_codes(
    t, anchor, sums, start, n_keys, coding, values, form: tl.constexpr, code: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    D: tl.constexpr = form[0]
    PART: tl.constexpr = form[1]
    REST: tl.constexpr = form[2]
    total, acc, acc_rest, carry = sums
    if code[7]:
        p = packed_bytes(t, anchor, coding[8], n_keys - start, code[0], code[2], TAIL)
        p = p.to(tl.float8e4nv if code[3] else tl.float8e5, bitcast=True)
    else:
        p, value = probabilities(t, anchor, coding, code)
    if code[2]:
        p = p if code[7] else in_order(p, form[6])
        if code[6] and not TAIL:
            total += tl.dot(p, ones(p.shape[1], code[3], code[4]), max_num_imprecise_acc=p.shape[1])
        else:
            total = tl.dot(p, ones(p.shape[1], code[3], code[4]), total)
    else:
        total += tl.sum(value, axis=1)
    acc = _times_v(acc, p, start, n_keys, values, 0, PART, D, code, TAIL)
    if REST:
        acc_rest = _times_v(acc_rest, p, start, n_keys, values, PART, REST, D, code, TAIL)
    return total, acc, acc_rest, carry


@triton.jit
def add_tile(
    t, anchor, sums, start, n_keys, coding, values, form: tl.constexpr, code: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """sums and what the tile t adds: to the total, to P v in two parts of D, and, of bytes, to their remainders."""
    if coding[0] is None:
        sums = _add_bytes(t, anchor, sums, start, n_keys, coding, values, form, code, TAIL)
    else:
        sums = _add_codes(t, anchor, sums, start, n_keys, coding, values, form, code, TAIL)
    return sums


@triton.jit
def add_columns(t, anchor, scale, columns_ptr, start, n_keys, coding, form: tl.constexpr, code: tl.constexpr):
    """Adds P scale of the tile, summed over its rows."""
    keys = start + keys_of(t.shape[1], form[6])
    if coding[0] is None:
        value = rint(exponentials(t, anchor, coding[5]) * FULL).to(tl.float32)
    else:
        _, value = probabilities(t, anchor, coding, code)
    column = (tl.sum(value * scale[:, None], axis=0) * COLUMN_UNITS).to(tl.int64)
    tl.atomic_add(columns_ptr + keys, column, mask=keys < n_keys, sem="relaxed")
