"""mma, mma.sp, ldmatrix, stmatrix, movmatrix in the emulator, against the layouts as specifications spell them out."""

from __future__ import annotations

import _ptx_matrix as ptx
import numpy as np
import pytest
import torch
from _ptx_matrix import ASCENDING
from ptx_emulator import Fault, NotEmulated, floats8

DENSE = [  # shape, d, a, b
    *[(f"m16n8k{K}", "s32", a, b) for K in (16, 32) for a in ("s8", "u8") for b in ("s8", "u8")],
    ("m16n8k64", "s32", "s4", "u4"), ("m16n8k32", "s32", "u4", "s4"), ("m16n8k64", "s32", "s4", "s4"),
    *[(f"m16n8k{K}", d, "f16", "f16") for K in (8, 16) for d in ("f16", "f32")],
    *[(f"m16n8k{K}", "f32", "bf16", "bf16") for K in (8, 16)],
    *[(f"m16n8k{K}", "f32", "tf32", "tf32") for K in (4, 8)],
    *[("m16n8k32", d, a, b) for d in ("f16", "f32") for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")],
    ("m16n8k16", "f32", "e4m3", "e5m2"),
]  # fmt: skip


def dense(shape, d, a, b, swap=(), satfinite=False, seed=0):
    """Runs one mma on random operands; whether the result is right. swap: two registers of A that change places."""
    rng, bits, K = np.random.default_rng(seed), ptx.BITS[a], int(shape.split("k")[1])
    A, B = ptx.random_codes(rng, (16, K), a), ptx.random_codes(rng, (K, 8), b)
    C = ptx.accumulator_codes(rng, (16, 8), d)
    elements_a, elements_b = 16 * K // 32, 8 * K // 32
    wa = ptx.words(ptx.spread(ptx.A_LAYOUT[shape, bits], A, elements_a), bits)
    wb = ptx.words(ptx.spread(ptx.B_LAYOUT[shape, bits], B, elements_b), bits)
    wc = ptx.words(ptx.spread(ptx.d_layout, C, 4), 16 if d == "f16" else 32)
    if swap:
        wa[:, list(swap)] = wa[:, list(swap[::-1])]
    n_a, n_b, n_d = wa.shape[1], wb.shape[1], wc.shape[1]
    operands = [ptx.names("o", 0, n_d)]
    operands += [ptx.names("i", first, n) for first, n in ((0, n_a), (n_a, n_b), (n_a + n_b, n_d))]
    sat = ".satfinite" if satfinite else ""
    text = f"mma.sync.aligned.{shape}.row.col{sat}.{d}.{a}.{b}.{d} {', '.join(operands)};"
    out = ptx.launch(text, np.concatenate([wa, wb, wc], axis=1), n_d)
    lanes = out.view(np.uint16 if d == "f16" else np.uint32).reshape(32, 4)
    got = ptx.gather(ptx.d_layout, lanes, (16, 8))
    return ptx.is_product(got, ptx.decode(A, a), ptx.decode(B, b), C, d, satfinite)


@pytest.mark.parametrize("shape,d,a,b", DENSE)
def test_mma(shape, d, a, b):
    assert dense(shape, d, a, b)


@pytest.mark.parametrize("a,b", [("s8", "s8"), ("u8", "u8"), ("s4", "s4")])
def test_mma_saturates_when_asked(a, b):
    shape = "m16n8k64" if a == "s4" else "m16n8k32"
    assert dense(shape, "s32", a, b, satfinite=True)


@pytest.mark.parametrize("shape,d,a,b", DENSE[::3])
def test_swapped_registers_of_a_show(shape, d, a, b):
    assert not dense(shape, d, a, b, swap=(0, 1))


def test_mma_writes_over_its_own_operands():
    """D may be C's and A's registers: all are read before any is written."""
    text = "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%i0,%i1,%i2,%i3}, {%i0,%i1}, {%i2}, {%i0,%i1,%i2,%i3};"
    moves = "".join(f"mov.u32 %o{i}, %i{i};" for i in range(4))
    aside = "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%o0,%o1,%o2,%o3}, {%i0,%i1}, {%i2}, {%i0,%i1,%i2,%i3};"
    given = np.random.default_rng(1).integers(0, 1 << 32, (64, 4))
    assert np.array_equal(ptx.launch(text + moves, given, 4), ptx.launch(aside, given, 4))


# sparse A: shape, types of D, A, B, 32-bit words of a compressed row, selectors
SPARSE = [
    *[("m16n8k32", d, a, a, 8, 2) for d, a in (("f32", "f16"), ("f16", "f16"), ("f32", "bf16"))],
    *[("m16n8k16", "f32", a, a, 4, 4) for a in ("f16", "bf16")],
    *[("m16n8k64", "s32", a, b, 8, 1) for a, b in (("s8", "u8"), ("u8", "s8"))],
    ("m16n8k32", "s32", "s8", "s8", 4, 2),
    *[("m16n8k64", d, a, b, 8, 1) for d, a, b in (("f32", "e4m3", "e5m2"), ("f16", "e5m2", "e4m3"))],
    *[(shape, "f32", "tf32", "tf32", KW, n) for shape, KW, n in (("m16n8k16", 8, 2), ("m16n8k8", 4, 4))],
    ("m16n8k128", "s32", "s4", "u4", 8, 1),
]
DESCENDING = (0x1, 0x2, 0x3, 0x6, 0x7, 0xB)


def sparse_truth(A, B, E, KW, a, b, sel):
    """A B (16, 8) as one warp's registers mean it, element by element, and |A| |B|; section 1.6 of the specification.

    A (32, KW / 2), B (32, KW / 2) and E (32,) are words. tf32 keeps one of two, so its chunks have one value; the
    positions of s4 are of bytes, two elements each.
    """
    EPW = 32 // max(ptx.BITS[a], 8)
    kept = 1 if a == "tf32" else 2
    left, right = (values(words, kind, EPW) for words, kind in ((A, a), (B, b)))
    D, bound = np.zeros((16, 8)), np.zeros((16, 8))
    for row in range(16):
        for q in range(KW * EPW // kept):
            nib = ptx.nibble(E, KW, EPW, sel, row, q)
            for j in range(kept):
                e = kept * q + j
                x = left[4 * (row & 7) + (e // EPW & 3), 2 * (e // EPW >> 2) + (row >> 3), e % EPW]
                k = 2 * q + (nib >> 3) if kept == 1 else 4 * q + (nib >> 2 * j & 3)
                for col in range(8):
                    y = right[4 * col + (k // EPW & 3), k // EPW >> 2, k % EPW]
                    D[row, col] += x @ y
                    bound[row, col] += np.abs(x) @ np.abs(y)
    return D, bound


def values(words, kind, EPW):
    """Words (32, n) to numbers (32, n, EPW, 1), of s4 (32, n, EPW, 2)."""
    bits = ptx.BITS[kind]
    codes = words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & np.uint32((1 << bits) - 1 & 0xFFFFFFFF)
    return ptx.decode(codes, kind).reshape(*words.shape, EPW, -1)


def sparse_operands(rng, KW, a, b, nibbles):
    """Words of A, B and E at random; the metadata's nibbles out of those given."""
    A, B = (ptx.words(ptx.random_codes(rng, (32, KW * 16 // ptx.BITS[k]), k), ptx.BITS[k]) for k in (a, b))
    return A, B, ptx.words(rng.choice(nibbles, (32, 8)), 4)[:, 0]


def sparse(shape, d, a, b, KW, sel, ordered, A, B, E, C):
    n, n_d = KW // 2, C.shape[1]
    operands = [ptx.names("o", 0, n_d), ptx.names("i", 0, n), ptx.names("i", n, n), ptx.names("i", 2 * n + 1, n_d)]
    name = "sp::ordered_metadata" if ordered else "sp"
    text = f"mma.{name}.sync.aligned.{shape}.row.col.{d}.{a}.{b}.{d} {', '.join(operands)}, %i{2 * n}, {sel};"
    return ptx.launch(text, np.concatenate([A, B, E[:, None], C], axis=1), n_d)


def check_sparse(shape, d, a, b, KW, sel, ordered, nibbles, seed=0):
    rng = np.random.default_rng(seed)
    A, B, E = sparse_operands(rng, KW, a, b, nibbles)
    C = ptx.accumulator_codes(rng, (16, 8), d)
    wc = ptx.words(ptx.spread(ptx.d_layout, C, 4), 16 if d == "f16" else 32)
    out = sparse(shape, d, a, b, KW, sel, ordered, A, B, E, wc)
    got = ptx.gather(ptx.d_layout, out.view(C.dtype).reshape(32, 4), (16, 8))
    exact, bound = sparse_truth(A, B, E, KW, a, b, sel)
    if d == "s32":
        assert np.array_equal(got, ((exact.astype(np.int64) + C.view(np.int32)) & 0xFFFFFFFF).astype(np.uint32))
    else:
        value, start = (x.view(np.float16 if d == "f16" else np.float32).astype(np.float64) for x in (got, C))
        unit = 2.0**-11 if d == "f16" else 2.0**-24
        assert (np.abs(value - (exact + start)) <= unit * (bound + np.abs(start))).all()


@pytest.mark.parametrize("shape,d,a,b,KW,selectors", SPARSE, ids=lambda v: str(v))
def test_sparse_mma(shape, d, a, b, KW, selectors):
    """With every selector; lanes it does not name hold metadata of other values, which must not count."""
    for sel in range(selectors):
        check_sparse(shape, d, a, b, KW, sel, True, (0x4, 0xE) if a == "tf32" else ASCENDING, sel)


@pytest.mark.parametrize("shape,d,a,b,KW,selectors", [SPARSE[0], SPARSE[5], SPARSE[8]], ids=lambda v: str(v))
def test_plain_sparse_mma_takes_positions_in_either_order(shape, d, a, b, KW, selectors):
    check_sparse(shape, d, a, b, KW, 0, False, ASCENDING + DESCENDING)


@pytest.mark.parametrize("bad,ordered", [(n, o) for n in range(16) for o in (True, False) if n not in ASCENDING])
def test_illegal_metadata_is_found(bad, ordered):
    """Chunk 5 of row 11 of an 8-bit tile: lane 4 * 3 + 1, bits 20 to 23."""
    rng = np.random.default_rng(0)
    A, B, E = sparse_operands(rng, 8, "s8", "s8", ASCENDING)
    E[13] = E[13] & ~np.uint32(15 << 20) | np.uint32(bad << 20)
    arguments = ("m16n8k64", "s32", "s8", "s8", 8, 0, ordered, A, B, E, np.zeros((32, 4), np.uint32))
    if not ordered and bad in DESCENDING:
        sparse(*arguments)
        return
    with pytest.raises(Fault, match=rf"metadata 0x{bad:X}, chunk 5 of row 11, in lane 13 at bit 20") as fault:
        sparse(*arguments)
    assert fault.value.thread == 13


@pytest.mark.parametrize("bad", [n for n in range(16) if n not in (0x4, 0xE)])
def test_illegal_metadata_of_tf32_is_found(bad):
    """Pair 6 of row 3 of 16 x 16: lane 4 * 3 + 1, bits 8 to 11."""
    rng = np.random.default_rng(0)
    A, B, E = sparse_operands(rng, 8, "tf32", "tf32", (0x4, 0xE))
    E[13] = E[13] & ~np.uint32(15 << 8) | np.uint32(bad << 8)
    with pytest.raises(Fault, match=rf"metadata 0x{bad:X}, chunk 6 of row 3, in lane 13 at bit 8"):
        sparse("m16n8k16", "f32", "tf32", "tf32", 8, 0, bad % 2 == 0, A, B, E, np.zeros((32, 4), np.uint32))


def test_metadata_of_lanes_the_selector_skips_is_not_looked_at():
    rng = np.random.default_rng(0)
    A, B, E = sparse_operands(rng, 8, "f16", "f16", ASCENDING)
    for sel in (0, 1):
        ignored = E.copy()
        ignored[np.arange(32) // 2 % 2 != sel] = 0
        form = ("m16n8k32", "f32", "f16", "f16", 8, sel, True)
        assert np.array_equal(*(sparse(*form, A, B, e, np.zeros((32, 4))) for e in (E, ignored)))


def test_pruned_positions_are_not_read():
    """Infinities and NaN of B at positions 2 and 3 of every chunk do not reach sums that keep 0 and 1."""
    rng = np.random.default_rng(0)
    A, B, _ = sparse_operands(rng, 8, "f16", "f16", ASCENDING)
    E = np.full(32, 0x44444444, np.uint32)
    clean = B.copy()
    odd = np.arange(32)[:, None] & 1 == np.ones((1, 4))  # lanes t = 1, 3 hold k = 2, 3 of a chunk
    clean[odd], B[odd] = 0, 0x7C007E00
    form = ("m16n8k32", "f32", "f16", "f16", 8, 0, True)
    assert np.array_equal(*(sparse(*form, A, b, E, np.zeros((32, 4))) for b in (B, clean)))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(count, trans):
    """Rows at scattered places: lane 8 j + i gives the address of row i of matrix j; lane l gets two of row l / 4."""
    rng = np.random.default_rng(count)
    place = 1 + rng.permutation(63)[:32]
    image = rng.integers(0, 1 << 16, (64, 8)).astype(np.uint16)
    mods = f"x{count}{'.trans' if trans else ''}.shared.b16"
    text = f"add.u32 %x8, %x0, %i0; ldmatrix.sync.aligned.m8n8.{mods} {ptx.names('o', 0, count)}, [%x8+16];"
    addresses = np.where(np.arange(32) < 8 * count, place * 16 - 16, 1 << 20)  # those of other lanes do not count
    got = ptx.launch(text, addresses[:, None], count, image)
    for lane in range(32):
        for j in range(count):
            matrix = image[place[8 * j : 8 * j + 8]]
            matrix = matrix.T if trans else matrix
            low, high = matrix[lane // 4, lane % 4 * 2], matrix[lane // 4, lane % 4 * 2 + 1]
            assert got[lane, j] == int(low) | int(high) << 16


def test_ldmatrix_of_a_generic_address():
    image = np.arange(64, dtype=np.uint16).reshape(8, 8)
    text = "mul.lo.u32 %x8, %x1, 16; add.u32 %x8, %x0, %x8; cvt.u64.u32 %d9, %x8; cvta.shared.u64 %d9, %d9;"
    got = ptx.launch(text + "ldmatrix.sync.aligned.m8n8.x1.b16 {%o0}, [%d9];", np.zeros((32, 1)), 1, image)
    assert np.array_equal(got.view(np.uint16).reshape(8, 8), image)
    with pytest.raises(Fault, match="not of shared memory"):
        ptx.launch("ldmatrix.sync.aligned.m8n8.x1.b16 {%o0}, [%d2];", np.zeros((32, 1)), 1, image)


@pytest.mark.parametrize("trans", [False, True])
def test_stmatrix_is_the_way_back(trans):
    rng = np.random.default_rng(0)
    mods = f"x4{'.trans' if trans else ''}.shared.b16"
    text = "mul.lo.u32 %x8, %x1, 16; add.u32 %x8, %x0, %x8;"
    text += f"stmatrix.sync.aligned.m8n8.{mods} [%x8], {ptx.names('i', 0, 4)}; bar.sync 0;"
    text += "".join(f"ld.shared.u32 %o{i}, [%x8+{4 * i}];" for i in range(4))
    given = rng.integers(0, 1 << 32, (32, 4)).astype(np.uint32)
    rows = ptx.launch(text, given, 4, np.zeros(512, np.uint8)).view(np.uint16).reshape(4, 8, 8)
    for lane in range(32):
        for j in range(4):
            matrix = rows[j].T if trans else rows[j]
            pair = matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            assert int(pair[0]) | int(pair[1]) << 16 == given[lane, j]


def test_movmatrix():
    given = np.random.default_rng(0).integers(0, 1 << 32, (32, 1)).astype(np.uint32)
    got = ptx.launch("movmatrix.sync.aligned.m8n8.trans.b16 %o0, %i0;", given, 1)
    assert np.array_equal(got.view(np.uint16).reshape(8, 8), given.view(np.uint16).reshape(8, 8).T)


@pytest.mark.parametrize("address,reason", [("%x0+8", "misaligned"), ("%x0+1024", "out-of-bounds")])
def test_ldmatrix_of_a_bad_address(address, reason):
    text = f"ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%o0}}, [{address}];"
    with pytest.raises(Fault, match=reason):
        ptx.launch(text, np.zeros((32, 1)), 1, np.zeros(512, np.uint8))


@pytest.mark.parametrize("first,last", [(0, 39), (16, 47)])
def test_a_warp_that_is_not_whole(first, last):
    """Threads first to last do what takes whole warps: 40 of them, and 32 of two warps."""
    text = f"sub.u32 %x8, %x1, {first}; setp.gt.u32 %p1, %x8, {last - first}; @%p1 bra L;"
    text += "movmatrix.sync.aligned.m8n8.trans.b16 %i0, %i0; L: mov.u32 %o0, %i0;"
    reason = r"deadlock.*waits for the rest of warp [01]|needs all 32 threads of warp [01]"
    with pytest.raises(Fault, match=reason):
        ptx.launch(text, np.zeros((64, 1)), 1)


D4, A4, B2 = "{%o0,%o1,%o2,%o3}", "{%i0,%i1,%i2,%i3}", "{%i0,%i1}"
UNKNOWN = [
    "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%o0,%o1}, {%i0}, {%i1}, {%i2,%i3};",
    f"mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32 {D4}, {A4}, {B2}, {A4};",
    f"mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32 {D4}, {A4}, {B2}, {A4};",
    f"mma.sync.aligned.m16n8k16.row.col.f16.bf16.bf16.f16 {{%o0,%o1}}, {A4}, {B2}, {B2};",
    f"mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.xor.popc {D4}, {A4}, {B2}, {A4};",
    f"mma.sync.aligned.m16n8k32.row.col.kind::f8f6f4.f32.e4m3.e4m3.f32 {D4}, {A4}, {B2}, {A4};",
    f"mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {D4}, {B2}, {B2}, {A4};",
    f"mma.sp.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {D4}, {A4}, {A4}, {A4}, %i4, 2;",
    "ldmatrix.sync.aligned.m8n16.x1.shared.b8x16.b6x16_p32 {%o0}, [%x0];",
    "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%o0}, [%x0];",
    "stmatrix.sync.aligned.m16n8.x1.trans.shared.b8 [%x0], {%i0};",
    "movmatrix.sync.aligned.m8n8.b16 %o0, %i0;",
]


@pytest.mark.parametrize("text", UNKNOWN)
def test_unknown_forms_are_named(text):
    with pytest.raises(NotEmulated) as error:
        ptx.launch(text, np.zeros((32, 5)), 1)
    assert str(error.value).startswith(f"not implemented: {text.rstrip(';')}")


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_8_bit_floats_agree_with_torch(kind):
    """All codes; and every float32 next to a code or to the middle between two, infinities and overflow."""
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[kind]
    decode, encode = getattr(floats8, f"decode_{kind}"), getattr(floats8, f"encode_{kind}")
    codes = np.arange(256, dtype=np.uint8)
    numbers = torch.from_numpy(codes).view(dtype).float().numpy()
    assert np.array_equal(decode(codes), numbers, equal_nan=True)
    finite = np.sort(numbers[np.isfinite(numbers)])
    middles = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    x = np.concatenate([finite, middles, np.random.default_rng(0).standard_normal(1000).astype(np.float32)])
    x = np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf))])
    x = x[np.abs(x) <= finite[-1]]
    assert np.array_equal(encode(x), torch.from_numpy(x).to(dtype).view(torch.uint8).numpy())
    top = {"e4m3": 0x7E, "e5m2": 0x7B}[kind]
    over = np.array([finite[-1] * 1.2, -1e30, np.inf, -np.inf, np.nan], np.float32)
    assert encode(over).tolist() == [top, top | 0x80, top, top | 0x80, 0x7F]
    infinity = {"e4m3": 0x7F, "e5m2": 0x7C}[kind]
    assert encode(over, satfinite=False).tolist() == [infinity, infinity | 0x80, infinity, infinity | 0x80, 0x7F]


def test_16_and_19_bit_floats():
    x = np.random.default_rng(0).integers(0, 1 << 32, 100_000).astype(np.uint32).view(np.float32)
    x = np.concatenate([x[~np.isnan(x)], [np.inf, -np.inf, 0.0, -0.0, 3.4028235e38]]).astype(np.float32)
    bf16 = torch.from_numpy(x).bfloat16()
    assert np.array_equal(floats8.encode_bf16(x), bf16.view(torch.uint16).numpy())
    assert np.array_equal(floats8.decode_bf16(floats8.encode_bf16(x)), bf16.float().numpy())
    assert floats8.encode_bf16(np.array([np.nan], np.float32)) == 0x7FFF
    one = 0x3F800000
    ties = np.array([one | 0x1000, one | 0x0FFF, one | 0x3000, one | 0x1001], np.uint32).view(np.float32)
    assert [hex(v) for v in floats8.encode_tf32(ties)] == [hex(one + 0x2000 * i) for i in (1, 0, 2, 1)]
    assert [hex(v) for v in floats8.encode_tf32(ties, False)] == [hex(one + 0x2000 * i) for i in (0, 0, 2, 1)]
    assert floats8.decode_tf32(np.array([one | 0x1FFF], np.uint32)) == 1
