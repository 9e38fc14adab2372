"""wgmma in the emulator: layouts in shared memory, all types, dense and sparse."""

from __future__ import annotations

import _ptx_matrix as ptx
import numpy as np
import pytest
from _ptx_matrix import ASCENDING
from ptx_emulator import Fault, NotEmulated

SWIZZLE = {16: 0, 128: 1, 64: 2, 32: 3}


def descriptor(start, leading, stride, span, base_offset=0):
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | base_offset << 49 | SWIZZLE[span] << 62


def place(image, address, span, values):
    """Bytes to an address of a tile that TMA swizzles: bits 4.. of an address are turned by its bits 7.. ."""
    address ^= (address >> 7 & span // 16 - 1) << 4
    image[address : address + len(values)] = values


def k_major(codes, span, start, k0=0):
    """The image of rows (n, K) of codes from `start` on, their first byte k0 bytes into rows of `span`."""
    rows = np.ascontiguousarray(codes).view(np.uint8).reshape(len(codes), -1)
    image = np.zeros(start + len(rows) * max(span, rows.shape[1]) + 256, np.uint8)
    size = 16 if span == 16 else 4
    for r, row in enumerate(rows):
        for b in range(0, len(row), size):
            core = (r // 8 * len(row) // 16 + b // 16) * 128 + r % 8 * 16  # of 8 rows by 16 bytes: along K first
            place(image, start + (core if span == 16 else r * span + k0 + b), span, row[b : b + size])
    strides = (128, 8 * rows.shape[1]) if span == 16 else (0, 8 * span)
    return image, descriptor(start + k0, *strides, span)


def mn_major(codes, span, start):
    """The image of rows (n, K) of two-byte codes with the rows running along memory."""
    n, K = codes.shape
    image = np.zeros(start + 4 * max(n, 64) * K, np.uint8)
    columns = np.ascontiguousarray(codes.T).view(np.uint8).reshape(K, 2 * n)
    across = -(-2 * n // span) if span > 16 else 2 * n // 16
    for k in range(K):
        for b in range(0, 2 * n, 16):
            at, within = divmod(b, span)
            core = (k // 8 * across + at) * 128 + k % 8 * 16  # matrices of 8 k by 16 bytes: along the rows first
            atom = (at * K + k) * span + within  # of 8 k by `span` bytes: along k first
            place(image, start + (core if span == 16 else atom), span, columns[k, b : b + 16])
    leading, stride = (128 * across, 128) if span == 16 else (K * span, 8 * span)
    return image, descriptor(start, leading, stride, span)


def d_place(lane, i):
    """Row and column of element i of a thread of the warpgroup."""
    return 16 * (lane // 32) + lane % 32 // 4 + (8 if i % 4 >= 2 else 0), i // 4 * 8 + lane % 4 * 2 + i % 2


def from_d(elements, N):
    matrix = np.zeros((64, N), elements.dtype)
    for lane in range(128):
        for i in range(N // 2):
            matrix[d_place(lane, i)] = elements[lane, i]
    return matrix


def to_d(matrix):
    return np.array([[matrix[d_place(lane, i)] for i in range(matrix.shape[1] // 2)] for lane in range(128)])


def a_words(A, kind):
    """The registers (128, 4) of rows (64, 256 bits): warp w has rows 16 w to 16 w + 15, as an mma of them."""
    bits, K = ptx.BITS[kind], A.shape[1]
    layout, per_lane = ptx.A_LAYOUT[f"m16n8k{K}", bits], 16 * K // 32
    return np.concatenate([ptx.words(ptx.spread(layout, A[r : r + 16], per_lane), bits) for r in range(0, 64, 16)])


def narrow(codes, kind):
    return codes.astype({8: np.uint8, 16: np.uint16, 32: np.uint32}[ptx.BITS[kind]])


BODY = """mov.u64 %d10, {a}; mov.u64 %d11, {b}; setp.{scale}.u32 %p1, 0, 0;
wgmma.fence.sync.aligned;
wgmma.mma_async{sp}.sync.aligned.{shape} {D}, {A}, %d11, {meta}%p1{tail};
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;"""


def issue(shape, inputs, n_d, image, a, b, tail="", meta="", sp="", from_registers=False, accumulate=True):
    """One wgmma. inputs (128, ...) words: D first, then A when from registers, then metadata; returns D's words."""
    D, A = ptx.names("i", 0, n_d), ptx.names("i", n_d, 4) if from_registers else "%d10"
    scale = "eq" if accumulate else "ne"
    text = BODY.format(a=a, b=b, scale=scale, sp=sp, shape=shape, D=D, A=A, meta=meta, tail=tail)
    return ptx.launch(text + "".join(f"mov.u32 %o{i}, %i{i};" for i in range(n_d)), inputs, n_d, image)


def both(first, second):
    """Two images as one: the second made for a start behind the first."""
    image = np.zeros(max(len(first), len(second)), np.uint8)
    image[: len(first)] |= first
    image[: len(second)] |= second
    return image


# d, a, b, N, bytes of a row of A's and of B's layout (negative: rows run along memory), first byte of both in a row
CASES = [
    ("s32", "s8", "s8", 8, 128, 128, 0), ("s32", "u8", "s8", 24, 128, 64, 0), ("s32", "s8", "u8", 48, 64, 128, 32),
    ("s32", "u8", "u8", 128, 32, 32, 0), ("s32", "s8", "s8", 16, 16, 16, 0), ("s32", "s8", "s8", 256, 128, 128, 96),
    ("f32", "f16", "f16", 8, 128, 128, 64), ("f16", "f16", "f16", 40, 128, 16, 0),
    ("f32", "bf16", "bf16", 72, 64, 64, 32), ("f32", "tf32", "tf32", 16, 128, 128, 32),
    ("f32", "e4m3", "e5m2", 200, 128, 128, 0), ("f16", "e5m2", "e4m3", 8, 32, 64, 0),
    ("f32", "f16", "f16", 64, -128, -128, 0), ("f32", "bf16", "bf16", 96, -64, -32, 0),
    ("f32", "f16", "f16", 24, -32, 128, 0), ("f32", "f16", "f16", 16, -16, -16, 0),
    ("f32", "f16", "f16", 136, 128, -128, 0), ("f32", "bf16", "bf16", 8, 64, -128, 0),
]  # fmt: skip


@pytest.mark.parametrize("d,a,b,N,span_a,span_b,k0", CASES)
@pytest.mark.parametrize("from_registers", [False, True])
def test_wgmma(d, a, b, N, span_a, span_b, k0, from_registers):
    rng, K = np.random.default_rng(N), 256 // ptx.BITS[a]
    A, B = narrow(ptx.random_codes(rng, (64, K), a), a), narrow(ptx.random_codes(rng, (N, K), b), b)
    C = ptx.accumulator_codes(rng, (64, N), d)
    image_a, desc_a = k_major(A, span_a, 1024, k0) if span_a > 0 else mn_major(A, -span_a, 1024)
    start = 1024 + 64 * 128 + 1024
    image_b, desc_b = k_major(B, span_b, start, k0) if span_b > 0 else mn_major(B, -span_b, start)
    words_d = ptx.words(to_d(C), 16 if d == "f16" else 32)
    turned = [int(span_b < 0)] if from_registers else [int(span_a < 0), int(span_b < 0)]
    tail = ", ".join(["", *map(str, [1, -1, *(turned if ptx.BITS[a] == 16 else [])])]) if d != "s32" else ""
    image = image_b if from_registers else both(image_a, image_b)
    inputs = np.concatenate([words_d, a_words(A, a)], axis=1)
    shape = f"m64n{N}k{K}.{d}.{a}.{b}"
    out = issue(shape, inputs, words_d.shape[1], image, desc_a, desc_b, tail, from_registers=from_registers)
    got = from_d(out.view(C.dtype).reshape(128, N // 2), N)
    sign = 1 if d == "s32" else -1
    assert ptx.is_product(got, ptx.decode(A, a), sign * ptx.decode(B, b).T, C, d)


# d, a, b, N, bytes of a row of A's and of B's layout, first byte of A in its row
SPARSE = [
    ("f32", "f16", "f16", 24, 64, 128, 32), ("f16", "f16", "f16", 8, 128, 64, 96),
    ("f32", "bf16", "bf16", 64, -128, -128, 0), ("s32", "s8", "u8", 48, 64, 128, 0),
    ("s32", "u8", "s8", 128, 128, 16, 64), ("f32", "e4m3", "e4m3", 40, 32, 128, 0),
    ("f16", "e5m2", "e4m3", 16, 16, 64, 0), ("f32", "tf32", "tf32", 8, 128, 128, 96),
]  # fmt: skip


@pytest.mark.parametrize("d,a,b,N,span_a,span_b,k0", SPARSE)
@pytest.mark.parametrize("from_registers", [False, True])
def test_sparse_wgmma(d, a, b, N, span_a, span_b, k0, from_registers):
    """Warp w holds the metadata of rows 16 w to 16 w + 15, as an mma.sp of them; every selector."""
    rng, K = np.random.default_rng(N), 512 // ptx.BITS[a]
    A, B = narrow(ptx.random_codes(rng, (64, K // 2), a), a), narrow(ptx.random_codes(rng, (N, K), b), b)
    C = ptx.accumulator_codes(rng, (64, N), d)
    E = ptx.words(rng.choice(ASCENDING if a != "tf32" else (0x4, 0xE), (128, 8)), 4)
    image_a, desc_a = k_major(A, span_a, 1024, k0) if span_a > 0 else mn_major(A, -span_a, 1024)
    start = 1024 + 64 * 128 + 1024
    image_b, desc_b = k_major(B, span_b, start) if span_b > 0 else mn_major(B, -span_b, start)
    words_d = ptx.words(to_d(C), 16 if d == "f16" else 32)
    n_d = words_d.shape[1]
    turned = [int(span_b < 0)] if from_registers else [int(span_a < 0), int(span_b < 0)]
    tail = ", ".join(["", *map(str, [1, 1, *(turned if ptx.BITS[a] == 16 else [])])]) if d != "s32" else ""
    image = image_b if from_registers else both(image_a, image_b)
    inputs = np.concatenate([words_d, a_words(A, a), E], axis=1)
    for sel in range(2 if ptx.BITS[a] > 8 else 1):
        shape, meta = f"m64n{N}k{K}.{d}.{a}.{b}", f"%i{n_d + 4}, {sel}, "
        out = issue(shape, inputs, n_d, image, desc_a, desc_b, tail, meta, ".sp", from_registers)
        dense, kept = np.zeros((64, K)), 1 if a == "tf32" else 2
        for row in range(64):
            for q in range(K // 2 // kept):
                nib = ptx.nibble(E[row // 16 * 32 :, 0], 8, 32 // ptx.BITS[a], sel, row % 16, q)
                for j in range(kept):
                    k = 2 * q + (nib >> 3) if kept == 1 else 4 * q + (nib >> 2 * j & 3)
                    dense[row, k] = ptx.decode(A[row, kept * q + j : kept * q + j + 1], a)[0]
        got = from_d(out.view(C.dtype).reshape(128, N // 2), N)
        assert ptx.is_product(got, dense, ptx.decode(B, b).T, C, d)


def small(rng=None, N=8, start=1024):
    """An s8 product of m64n8k32: images, descriptors, A, B."""
    rng = rng or np.random.default_rng(0)
    A, B = (narrow(ptx.random_codes(rng, (n, 32), "s8"), "s8") for n in (64, N))
    image_a, desc_a = k_major(A, 128, start)
    image_b, desc_b = k_major(B, 128, start + 64 * 128)
    return both(image_a, image_b), desc_a, desc_b, A, B


def test_without_accumulation_the_old_sums_do_not_count():
    image, desc_a, desc_b, A, B = small()
    out = issue("m64n8k32.s32.s8.s8", np.full((128, 4), 0xFFFFFFFF), 4, image, desc_a, desc_b, accumulate=False)
    assert np.array_equal(from_d(out.view(np.int32), 8), A.view(np.int8).astype(int) @ B.view(np.int8).T.astype(int))


def test_saturation():
    image, desc_a, desc_b, A, B = small()
    C = ptx.accumulator_codes(np.random.default_rng(1), (64, 8), "s32")
    out = issue("m64n8k32.satfinite.s32.s8.s8", to_d(C), 4, image, desc_a, desc_b)
    assert ptx.is_product(from_d(out, 8), ptx.decode(A, "s8"), ptx.decode(B, "s8").T, C, "s32", True)


def test_illegal_metadata_is_found():
    """Chunk 9 of row 21 of the tile: warp 1, lane 4 * 5 + 2."""
    image, desc_a, desc_b, _, _ = small()
    E = np.full(128, 0x44444444, np.uint32)
    E[32 + 22] = 0x44444404
    inputs = np.concatenate([np.zeros((128, 4)), E[:, None]], axis=1)
    with pytest.raises(Fault, match="metadata 0x0, chunk 9 of row 5, in lane 22 at bit 4") as fault:
        issue("m64n8k64.s32.s8.s8", inputs, 4, image, desc_a, desc_b, "", "%i4, 0, ", ".sp")
    assert fault.value.thread == 54


@pytest.mark.parametrize("a,b,reason", [
    (descriptor(1024 + 112, 0, 1024, 128), None, "of A: 32 bytes from byte 112 of a row on leave the 128 bytes"),
    (None, descriptor(1024 + 128, 0, 1024, 128), "of B: the tile starts at byte 1152, .* multiples of 1024"),
    (None, descriptor(1024 + 256, 0, 512, 64), "of B: the tile starts at byte 1280, .* multiples of 512"),
    (None, descriptor(1024, 0, 512, 64, 2), "of B: the tile starts at byte 1024, .* base offset is 2"),
    (descriptor(1024, 0, 1024, 128) | 1 << 46, None, "of A: reserved bits"),
    (descriptor(1024, 0, 1 << 16, 128), None, r"A, row 8, k from 0 on: out-of-bounds"),
    (None, descriptor(1024, 1 << 16, 1024, 16), r"B, row 0, k from 16 on: out-of-bounds"),
])  # fmt: skip
def test_ill_formed_descriptors(a, b, reason):
    image, desc_a, desc_b, _, _ = small()
    with pytest.raises(Fault, match=reason):
        issue("m64n8k32.s32.s8.s8", np.zeros((128, 4)), 4, image, a or desc_a, b or desc_b)


def test_rows_along_memory_that_leave_the_swizzle():
    image, desc_a, _, _, _ = small()
    b = descriptor(1024 + 112, 0, 1024, 128)
    with pytest.raises(Fault, match="of B: 32 bytes from byte 112 of a row on leave the 128 bytes"):
        issue("m64n16k16.f32.f16.f16", np.zeros((128, 8)), 8, image, desc_a, b, ", 1, 1, 0, 1")


D4 = "{%o0,%o1,%o2,%o3}"
UNKNOWN = [
    f"wgmma.mma_async.sync.aligned.m64n40k32.s32.s8.s8 {D4}, %d1, %d1, %p1;",
    f"wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.bf16 {D4}, %d1, %d1, %p1, 1, 1, 0, 0;",
    f"wgmma.mma_async.sync.aligned.m64n8k32.f32.f16.f16 {D4}, %d1, %d1, %p1, 1, 1, 0, 0;",
    f"wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {D4}, %d1, %d1, %p1, 1, 2, 0, 0;",
    f"wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {D4}, %d1, %d1, %p1, 1, 1, 0, 1;",
    f"wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {D4}, %d1, %d1, %p1, 1, 1;",
    f"wgmma.mma_async.sync.aligned.m64n8k256.s32.b1.b1.and.popc {D4}, %d1, %d1, %p1;",
    f"wgmma.mma_async.sync.aligned.m64n16k32.s32.s8.s8 {D4}, %d1, %d1, %p1;",
    f"wgmma.mma_async.sp.sync.aligned.m64n8k64.s32.s8.s8 {D4}, %d1, %d1, %i0, 1, %p1;",
    "wgmma.wait_group.sync.aligned %i0;",
]


@pytest.mark.parametrize("text", UNKNOWN)
def test_unknown_forms_are_named(text):
    with pytest.raises(NotEmulated) as error:
        ptx.launch(text, np.zeros((128, 1)), 4)
    assert str(error.value).startswith(f"not implemented: {text.rstrip(';')}")
