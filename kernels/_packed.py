"""Packed weights, layout version 2 of formats/packed.py, from memory to a tensor core's operand.

A chunk holds 16 features x 32 inputs. Its planes are words of four inputs of one feature, in the order (register,
feature), and the operand wants (feature, half h, j): the word of inputs 16 h + 4 j .. 16 h + 4 j + 3. Every word of a
plane of p bits holds both halves of some j, one 4 bits above the other:

    plane of 4:  register j              plane of 2:  register j % 2, shifted down by 2 (j / 2)
    plane of 1:  the register, shifted down by j

so a word becomes two operand words. A wgmma's left operand may come from registers, with just this order in its lanes.
Hence weights are the left operand, y is computed transposed, and words of 4 and 8 bits go from global to shared memory
and from there to the thread that multiplies them, unpacked in its registers. Otherwise the unpacked operand passes
through shared memory again: mma.sync, of every target but sm_90, wants another order, and Triton does not carry the
shifts of the narrow planes into an operand's order.

Codes come out as q 2^(8-bits), the highest bits of a byte: a mask and an exclusive or do for the sign, where moving
them down would cost more. Four bits take three instructions for eight codes; 2, 3, 5 and 6 bits take 5, 10, 8 and 8.
"""

from __future__ import annotations

import triton
import triton.language as tl

ASM = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter has no inline assembly


_FIRST_PLANE = {2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 8: 8}  # width of the plane of the highest bits


@triton.constexpr_function
def first_plane(bits):
    return _FIRST_PLANE[bits]


@triton.constexpr_function
def unpack_asm(bits):
    """PTX that unpacks four codes of each half, $0 and $1, from the planes and the shift of each that has one."""
    p = _FIRST_PLANE[bits]
    r = bits - p
    shifts = [f"${2 + (r > 0) + n}" for n in range(1, 1 + (p < 4) + (r > 0))]
    lines = [".reg .b32 v, t;"]
    for source, width, top, rest, lut in [("$2", p, 8, "0x80808080", 0x6A), ("$3", r, 8 - p, None, 0xEA)]:
        if width == 0:
            break
        if width < 4:
            amount = shifts.pop(0)
            lines.append(f"shf.r.wrap.b32 v, {source}, {source}, {amount};")
            source = "v"
        mask = ((1 << width) - 1) << (top - width)
        for half in (0, 1):
            left, word = top - width - 4 * half, source
            if left:
                lines.append(f"{'shl' if left > 0 else 'shr'}.b32 t, {source}, {abs(left)};")
                word = "t"
            lines.append(f"lop3.b32 ${half}, {word}, 0x{mask * 0x01010101:08X}, {rest or f'${half}'}, 0x{lut:02X};")
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def unpack_constraints(bits):
    inputs = {2: 2, 3: 4, 4: 1, 5: 3, 6: 3}[bits]
    return ",".join(["=&r"] * 2 + ["r"] * inputs)


@triton.constexpr_function
def _e4m3_asm(bits):
    """A mask of the signs; the magnitude less one of negative bytes is their complement, as of all bytes moved down."""
    return (
        "{ .reg .b32 m, t, o; prmt.b32 m, $1, 0, 0xBA98; xor.b32 t, $1, m; "
        f"shr.b32 t, t, {8 - bits}; and.b32 t, t, 0x{((1 << (bits - 1)) - 1) * 0x01010101:08X}; "
        "and.b32 o, m, 0x01010101; add.u32 t, t, o; lop3.b32 $0, m, 0x80808080, t, 0xEA; }"
    )


@triton.jit
def plane_ptrs(w_ptr, tile, stride_wt, START: tl.constexpr, P: tl.constexpr, BITS: tl.constexpr, CHUNKS: tl.constexpr):
    """Pointers (tiles, CHUNKS * 64 P) to the plane of P bits that starts at byte START of every chunk."""
    offs = tl.arange(0, CHUNKS * 64 * P)
    offs = (offs // (64 * P)) * (64 * BITS) + START + offs % (64 * P)
    return w_ptr + tile.to(tl.int64)[:, None] * stride_wt + 64 + offs[None, :]


@triton.jit
def load_plane(ptrs, mask_tile, chunks, P: tl.constexpr, CHUNKS: tl.constexpr):
    """The plane of the next CHUNKS chunks, of which only `chunks` exist."""
    mask = (tl.arange(0, CHUNKS * 64 * P) // (64 * P) < chunks)[None, :]
    return tl.load(ptrs, mask=mask_tile[:, None] & mask, other=0)


@triton.jit
def _words(plane, P: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr):
    """A plane as (tiles, chunks, j, feature, input), and how far every byte of it is to be shifted down."""
    j = tl.arange(0, 4)[None, None, :, None, None]
    if P == 4:
        words, shift = tl.reshape(plane, (TILES, CHUNKS, 4, 16, 4)), j * 0
    elif P == 2:
        words = tl.reshape(plane, (TILES, CHUNKS, 1, 2, 16, 4))
        words = tl.reshape(tl.broadcast_to(words, (TILES, CHUNKS, 2, 2, 16, 4)), (TILES, CHUNKS, 4, 16, 4))
        shift = j // 2 * 2
    else:
        words = tl.reshape(plane, (TILES, CHUNKS, 1, 16, 4))
        words, shift = tl.broadcast_to(words, (TILES, CHUNKS, 4, 16, 4)), j
    return words, tl.broadcast_to(shift.to(tl.int8), (TILES, CHUNKS, 4, 16, 4))


@triton.jit
def _halves(first, second, BITS: tl.constexpr, P: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr):
    R: tl.constexpr = BITS - P
    w, shift = _words(first, P, TILES, CHUNKS)
    if R > 0:
        v, shift2 = _words(second, R, TILES, CHUNKS)
    if ASM:
        if BITS == 4:
            args = [w]
        elif BITS == 2:
            args = [w, shift]
        elif BITS == 3:
            args = [w, v, shift, shift2]
        else:
            args = [w, v, shift2]
        code: tl.constexpr = unpack_asm(BITS)
        constraints: tl.constexpr = unpack_constraints(BITS)
        low, high = tl.inline_asm_elementwise(code, constraints, args, (tl.int8, tl.int8), is_pure=True, pack=4)
    else:
        mask: tl.constexpr = 256 - (1 << (8 - P))
        w = w.to(tl.uint8, bitcast=True) >> shift.to(tl.uint8)
        low, high = ((w << (8 - P)) & mask) ^ 128, ((w << (4 - P)) & mask) ^ 128
        if R > 0:
            mask2: tl.constexpr = ((1 << R) - 1) << (8 - BITS)
            v = v.to(tl.uint8, bitcast=True) >> shift2.to(tl.uint8)
            low |= (v << (8 - BITS)) & mask2
            high |= ((v >> R) if P == 4 else (v << (4 - BITS))) & mask2
        low, high = low.to(tl.int8, bitcast=True), high.to(tl.int8, bitcast=True)
    return low, high


@triton.jit
def unpack(first, second, BITS: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr):
    """Codes times 2^(8-BITS), int8 (16 TILES, 32 CHUNKS), of the loaded planes; second is None where there is one."""
    P: tl.constexpr = first_plane(BITS)
    if BITS == 8:
        w = tl.permute(tl.reshape(first, (TILES, CHUNKS, 8, 16, 4)), (0, 3, 1, 2, 4))
    else:
        low, high = _halves(first, second, BITS, P, TILES, CHUNKS)
        w = tl.permute(tl.join(low, high), (0, 3, 1, 5, 2, 4))
    return tl.reshape(w, (16 * TILES, 32 * CHUNKS))


@triton.jit
def high_to_e4m3(h, BITS: tl.constexpr):
    """floor(h / 2^(8-BITS)) * 2^-9 of int8 h, BITS up to 5, as float8e4nv: bytes 0 .. 16 are linear, 0x80 the sign."""
    if ASM:
        code: tl.constexpr = _e4m3_asm(BITS)
        b = tl.inline_asm_elementwise(code, "=r,r", [h], tl.int8, is_pure=True, pack=4)
    else:
        c = h >> (8 - BITS)
        b = tl.where(c < 0, -c | -128, c).to(tl.int8)
    return b.to(tl.float8e4nv, bitcast=True)


@triton.jit
def low_to_e4m3(x):
    """(x & 15) * 2^-9 of int8 x."""
    return (x & 15).to(tl.float8e4nv, bitcast=True)


@triton.jit
def to_float(h):
    """int8 to float32: the byte becomes the low bits of 2^23 + 128 + h. Conversions have a quarter of a sum's rate."""
    bits = (h.to(tl.int32) & 255) ^ 0x4B000080
    return bits.to(tl.float32, bitcast=True) - 8388736.0
