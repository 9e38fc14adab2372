"""formats/sparse24.py: the test vector of the format, round trips, torch's layout, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from pyvit_accel.formats import sparse24
from pyvit_accel.formats.sparse24 import (
    NIBBLES,
    fragments_of,
    from_torch,
    pack,
    packed_shapes,
    rows_of,
    to_torch,
    unpack,
)

DTYPES = (torch.float16, torch.bfloat16, torch.int8)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16", "int8"])
PATTERNS = [(a, b) for a in range(4) for b in range(a + 1, 4)]


def magnitude(w):
    """The two largest of each chunk, the lower place first among equals; as slow as it is plain."""
    kept = torch.zeros_like(w)
    for row in range(w.shape[0]):
        for start in range(0, w.shape[1], 4):
            order = sorted(range(4), key=lambda i: -abs(w[row, start + i].item()))
            for i in order[:2]:
                kept[row, start + i] = w[row, start + i]
    return kept


def formula(rows, columns):
    r, c = torch.arange(rows)[:, None], torch.arange(columns)[None]
    return (37 * r + 11 * c * c + 5 * r * c + 7) % 19 - 9


def sparse(N, K, dtype, zeros=0.0):
    """A random 2:4 weight; of the kept, a share of zeros is zero too."""
    places = torch.tensor(PATTERNS)[torch.randint(6, (N, -(-K // 4)))]
    kept = torch.randint(-127, 128, places.shape) * (torch.rand(places.shape) >= zeros)
    return torch.zeros(N, places.shape[1], 4).scatter(2, places, kept.float()).flatten(1)[:, :K].to(dtype)


def nibble(meta, dtype, row, chunk):
    """Read from the words as the instruction reads them: lane by lane."""
    if dtype == torch.int8:
        step, s, c = chunk // 16, chunk % 16 // 8, chunk % 8
        tile, h, g = row // 16, row % 16 // 8, row % 8
        word = meta[tile, step // 4, 4 * g + h + 2 * s, step % 4]
        return int(word) >> (4 * c) & 15
    step, s, c = chunk // 8, chunk % 8 // 4, chunk % 4
    pair, which, high, g = row // 32, row % 32 // 16, row % 16 // 8, row % 8
    word = meta[pair, step // 4, 4 * g + 2 * which + s, step % 4]
    return int(word) >> (16 * high + 4 * c) & 15


def element(values, row, column):
    """The kept element of a row as a lane's registers hold it."""
    E = 4 if values.dtype == torch.int8 else 2
    tile, step, column = row // 16, column // (8 * E), column % (8 * E)
    high, g, t, r1, e = row % 16 // 8, row % 8, column % (4 * E) // E, column // (4 * E), column % E
    return values[tile, step, 4 * g + t, (high + 2 * r1) * E + e].item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=["fp16", "int8"])
def test_vector(dtype):
    """8 x 16, embedded in a tile: the words and registers that were computed apart from this code."""
    w = magnitude(formula(8, 16)).to(dtype)
    values, meta = pack(w)
    rows = [0x8999, 0x4E99, 0x4D8C, 0x8EEE, 0xCCD4, 0x9999, 0xE48C, 0xD898]
    lanes = meta[0, 0, :, 0].view(torch.int32).tolist()
    for g, row in enumerate(rows):
        assert lanes[4 * g] & 0xFFFFFFFF == 0x44440000 | row
        assert {lanes[4 * g + i] & 0xFFFFFFFF for i in (1, 2, 3)} == {0x44444444}
    if dtype == torch.int8:
        assert values[0, 0, :4, :4].contiguous().view(torch.int32).flatten().tolist() == [-83426295, 0x0705FCFC, 0, 0]
        assert 0xFB070409 - 2**32 == -83426295
    else:
        a0 = values[0, 0, :8, :2].contiguous().view(torch.int32).flatten().tolist()
        expected = ["44004880", "C5004700", "C400C400", "47004500", "C600C600", "4500C700", "C4004700", "40004700"]
        assert [f"{word & 0xFFFFFFFF:08X}" for word in a0] == expected
    assert not values[0, 0, :, (2 if dtype == torch.float16 else 4) :].any() and not values[1:].any()
    x = torch.arange(16) % 7 - 3
    assert (unpack(values, meta, 8, 16).double() @ x.double()).tolist() == [-30, 35, 33, 24, -4, 31, 26, 58]


def test_vector_of_a_full_tile():
    _, meta = pack(magnitude(formula(16, 32)).half())
    words = "98D48999 48CDC449 CCE84E99 8D4CD444 48CD4D8C 9E8DC99C 84988EEE CD4C9999 " \
        "44D8CCD4 CCD9E8CC 98EE9999 D999444D CCCDE48C EE8C4D8E D999D898 44449D9E"
    assert [f"{int(meta[0, 0, 4 * g + s, 0]) & 0xFFFFFFFF:08X}" for g in range(8) for s in (0, 1)] == words.split()


@every_dtype
@pytest.mark.parametrize(("N", "K"), [(1, 1), (3, 6), (16, 64), (17, 130), (128, 256), (130, 515), (192, 192)])
def test_round_trip(dtype, N, K):
    for zeros in (0.0, 0.5, 1.0):
        w = sparse(N, K, dtype, zeros)
        values, meta = pack(w)
        assert (tuple(values.shape), tuple(meta.shape)) == packed_shapes(N, K, dtype)
        assert values.dtype == dtype and meta.dtype == torch.int32 and values.is_contiguous() and meta.is_contiguous()
        again = unpack(values, meta, N, K)
        assert torch.equal(again, w) and again.dtype == dtype


@every_dtype
def test_a_thousand_tiles(dtype):
    """Random tiles with every share of zeros: exact, by torch's layout too; only the six nibbles."""
    KS = sparse24.tile_inputs(dtype)
    w = torch.cat([sparse(16, 25 * KS, dtype, zeros=i / 39) for i in range(40)]).contiguous()
    w = torch.nn.functional.pad(w, (0, -25 * KS % (4 * KS)))  # 40 x 25 tiles
    values, meta = pack(w)
    assert torch.equal(unpack(values, meta, *w.shape), w)
    seen = meta.view(torch.uint8)
    assert set((seen & 15).unique().tolist()) | set((seen >> 4).unique().tolist()) == set(NIBBLES)
    packed, words = to_torch(values, meta, *w.shape)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed, words), w)
    for mine, back in zip((values, meta), from_torch(packed, words), strict=True):
        assert torch.equal(mine, back)


@every_dtype
def test_lanes(dtype):
    """Every element and nibble lies where the instruction's lane looks for it."""
    w = sparse(128, 256, dtype, zeros=0.3)
    values, meta = pack(w)
    for row in range(0, 128, 3):
        for chunk in range(64):
            found = nibble(meta, dtype, row, chunk)
            dense = [0.0] * 4
            for j in (0, 1):
                dense[found >> 2 * j & 3] = element(values, row, 2 * chunk + j)
            assert found in NIBBLES and dense == w[row, 4 * chunk : 4 * chunk + 4].tolist()


@every_dtype
def test_few_non_zeros(dtype):
    """Of all-zero chunks the first two are kept, beside a single non-zero the first of the others."""
    w = torch.zeros(1, 20)
    for i in range(4):
        w[0, 4 * i + i] = 5.0
    values, meta = pack(w.to(dtype))
    assert [nibble(meta, dtype, 0, chunk) for chunk in range(5)] == [0x4, 0x4, 0x8, 0xC, 0x4]
    assert [element(values, 0, i) for i in range(10)] == [5, 0, 0, 5, 0, 5, 0, 5, 0, 0]
    assert torch.equal(unpack(values, meta, 1, 20), w.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_negative_zero_is_a_zero(dtype):
    """It takes no place from a non-zero, and keeps its sign where it is kept."""
    w = torch.tensor([[-0.0, -0.0, 2.0, 3.0, -0.0, 1.0, -0.0, -0.0]], dtype=dtype)
    values, meta = pack(w)
    assert [nibble(meta, dtype, 0, chunk) for chunk in (0, 1)] == [0xE, 0x4]
    again = unpack(values, meta, 1, 8)
    assert torch.equal(again, w) and again.signbit().tolist() == [[False] * 4 + [True] + [False] * 3]
    other = torch.tensor([[1.0, -0.0, -0.0, 4.0]], dtype=dtype)
    assert nibble(pack(other)[1], dtype, 0, 0) == 0xC


@every_dtype
def test_small_subnormal_and_extreme(dtype):
    ends = [-128, 127, -1, 1] if dtype == torch.int8 else [torch.finfo(dtype).max, torch.finfo(dtype).tiny, 2**-24, -1]
    w = torch.zeros(4, 4, dtype=dtype)
    w[range(4), [0, 3, 1, 2]] = torch.tensor(ends, dtype=dtype)
    assert torch.equal(unpack(*pack(w), 4, 4), w) and w.count_nonzero() == 4


@every_dtype
def test_torch_s_converter_agrees(dtype):
    """Chunks of two non-zeros leave no choice: then the bits are torch's."""
    places = torch.tensor(PATTERNS)[torch.randint(6, (96, 96))]
    kept = torch.randint(1, 128, places.shape) * (1 - 2 * torch.randint(2, places.shape))
    w = torch.zeros(96, 96, 4).scatter(2, places, kept.float()).flatten(1).to(dtype)
    packed, meta = sparse_semi_structured_from_dense_cutlass(w)
    for mine, theirs in zip(to_torch(*pack(w), *w.shape), (packed, meta), strict=True):
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype
    for mine, imported in zip(pack(w), from_torch(packed, meta), strict=True):
        assert torch.equal(mine, imported)


@every_dtype
def test_torch_s_choice_among_zeros_stays(dtype):
    """torch keeps the last two of an all-zero chunk, and other zeros than this format: all legal, all unpacked."""
    w = sparse(32, 128, dtype, zeros=0.6).contiguous()
    packed, meta = sparse_semi_structured_from_dense_cutlass(w)
    imported = from_torch(packed, meta)
    assert torch.equal(unpack(*imported, 32, 128), w)
    assert not torch.equal(imported[1], pack(w)[1])
    for back, given in zip(to_torch(*imported, 32, 128), (packed, meta), strict=True):
        assert torch.equal(back, given)


@every_dtype
def test_rows(dtype):
    """The second form: kept elements row by row."""
    w = sparse(20, 256, dtype, zeros=0.2)
    rows = rows_of(pack(w)[0])
    packed = torch.nn.functional.pad(w, (0, 0, 0, 108))
    assert torch.equal(rows, to_torch(*pack(packed), 128, 256)[0])
    assert torch.equal(fragments_of(rows), pack(w)[0])


@every_dtype
def test_more_than_two(dtype):
    w = sparse(20, 40, dtype)
    w[17, 12:16] = torch.tensor([1, 0, 2, 3]).to(dtype)
    with pytest.raises(ValueError, match=r"row 17, chunk 3 \(inputs from 12 on\) holds \[1\D.*more than two non-zeros"):
        pack(w)
    with pytest.raises(ValueError, match=r"row 0, chunk 1 .*more than two"):
        pack(torch.tensor([[1, 0, 0, 0, 1, 1, 1]]).to(dtype))  # of the last, padded chunk


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(value):
    w = sparse(20, 40, torch.float16)
    w[3, 21] = value
    with pytest.raises(ValueError, match=f"row 3, chunk 5 holds {value}; weights must be finite"):
        pack(w)
    packed = torch.zeros(32, 32, dtype=torch.float16)
    packed[3, 11] = value
    meta = to_torch(*pack(torch.zeros(32, 64, dtype=torch.float16)), 32, 64)[1]
    with pytest.raises(ValueError, match=f"row 3, chunk 5 holds {value}"):
        from_torch(packed, meta)


@every_dtype
@pytest.mark.parametrize("bad", [value for value in range(16) if value not in NIBBLES])
def test_illegal_metadata(dtype, bad):
    """Wherever a nibble lies, padding too: refused by row and chunk, and not read."""
    values, meta = pack(sparse(40, 200, dtype))
    for row, chunk in ((0, 0), (39, 17), (100, 63)):
        broken = meta.clone()
        place = (row // 32, chunk // 32, 4 * (row % 8) + 2 * (row % 32 // 16) + chunk % 8 // 4, chunk % 32 // 8)
        shift = 16 * (row % 16 // 8) + 4 * (chunk % 4)
        if dtype == torch.int8:
            place = (row // 16, chunk // 64, 4 * (row % 8) + row % 16 // 8 + 2 * (chunk % 16 // 8), chunk % 64 // 16)
            shift = 4 * (chunk % 8)
        word = int(broken[place]) & 0xFFFFFFFF & ~(15 << shift) | bad << shift
        broken[place] = word - (word >> 31 << 32)
        with pytest.raises(ValueError, match=f"row {row}, chunk {chunk} has metadata {bad:X}; legal are 4, 8, C, 9"):
            unpack(values, broken, 40, 200)


def test_illegal_metadata_of_torch():
    packed, meta = (t.clone() for t in to_torch(*pack(torch.zeros(64, 64, dtype=torch.float16)), 64, 64))
    meta.view(torch.int32).view(2, 2, 32)[1, 1, 4 * 3 + 2] = 0x44440444  # k-step 1, rows 32 on, g 3, tile 1, chunk 3
    with pytest.raises(ValueError, match="row 51, chunk 11 has metadata 0;"):
        from_torch(packed, meta)


def test_shapes_and_dtypes():
    with pytest.raises(TypeError, match=r"a weight of torch.float32; expected float16, bfloat16 or int8"):
        pack(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"shape \(4, 4, 4\); expected \(out_features, in_features\)"):
        pack(torch.zeros(4, 4, 4, dtype=torch.int8))
    values, meta = pack(torch.zeros(40, 200, dtype=torch.float16))
    for N, K in ((129, 200), (40, 257)):
        with pytest.raises(ValueError, match=rf"a weight \({N}, {K}\) of torch.float16 has values"):
            unpack(values, meta, N, K)
    with pytest.raises(ValueError, match="of int32"):
        unpack(values, meta.long(), 40, 200)
    with pytest.raises(ValueError, match=r"multiples of \(32, 64\), pad it to \(64, 256\) with zeros first"):
        to_torch(values, meta, 40, 200)
    with pytest.raises(ValueError, match=r"multiples of \(32, 64\), pad it to \(32, 128\) with zeros first"):
        to_torch(*pack(torch.zeros(32, 96, dtype=torch.float16)), 32, 96)
    with pytest.raises(ValueError, match=r"multiples of \(32, 32\) and"):
        from_torch(torch.zeros(40, 64, dtype=torch.float16), torch.zeros(40, 8, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"of torch.int16"):
        from_torch(torch.zeros(32, 64, dtype=torch.float16), torch.zeros(32, 8, dtype=torch.int32))
