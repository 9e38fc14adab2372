"""Codebook: what holds for every format - error bounds, ties, packing, groups - and what bad input gets."""

from __future__ import annotations

import math
import re

import pytest
import torch
from _problems import U32

from pyvit_accel.formats import affine, fp8, log, multiquant, packed, pow2, subset, tan, twin
from pyvit_accel.formats.codebook import Codebook

LOW, HIGH = math.log2(0.01), math.log2(1.01)
CENTRES = torch.linspace(-0.95, 1, 16)
FORMATS = {
    **{f"log2 {b}": log.log2(b, 0.7) for b in (2, 3, 4, 5, 6)},
    "log2 lis": log.log2(4, rounding="lis"),
    "log2 last": log.log2(4, zero="last"),
    "log2 none": log.log2(4, zero="none"),
    **{f"log_sqrt2 {b}": log.log_sqrt2(b, 0.9) for b in (3, 4, 6)},
    **{f"adalog {b} {q}": log.adalog(b, q, 3.2, 0.17) for b, q in ((3, 25), (4, 20), (4, 138), (6, 10))},
    "sulq 4": log.sulq(4, 0.01, LOW, HIGH),
    "sulq 3, merged": log.sulq(3, 0.01, LOW, HIGH).merged(),
    "sulq 6, 15 steps": log.sulq(6, 0.005, -7, 0.01, steps=63),
    "tan": tan.tan(4, math.pi / 4),
    "tan, two sides": tan.tan(5, 1.4, two_sided=True),
    "gelu 4": twin.gelu(4, 0.4),
    "gelu 8": twin.gelu(8, 0.03, 0.001),
    "softmax, released": twin.softmax(4, 2.0**-4),
    "softmax, clean": twin.softmax(8, 2.0**-6, released=False),
    **{f"uniform {b}": twin.uniform(b, 0.05, 2 ** (b - 1), offset=0.3) for b in range(2, 9)},
    "multiquant weight": multiquant.weight(-0.3, 0.5),
    "multiquant activation": multiquant.activation(3, -0.3, 0.5),
    "pow2 q": pow2.q_weight(1.3),
    "pow2 ps": pow2.ps_weight(0.9),
    "pow2 ps 4": pow2.ps_weight(2.0, bits=4),
    "subset": subset.subset(subset.snap(CENTRES)),
    "e4m3": fp8.fp8("e4m3", 0.01),
    "e5m2": fp8.fp8("e5m2", 3.0),
}  # fmt: skip
every_format = pytest.mark.parametrize("name", FORMATS)


def values_around(book, per_cell=40):
    """Inside every cell, on its thresholds and one float beside them, and far outside."""
    ends = book.thresholds[book.thresholds.isfinite()].double()
    beyond = (ends[-1] - ends[0]).abs() + ends.abs().max()
    ends = torch.cat([ends[:1] - beyond, ends, ends[-1:] + beyond])
    parts = torch.cat([torch.rand(per_cell), torch.tensor([0.002, 0.998])]).double()
    inner = ends[:-1, None] + (ends[1:] - ends[:-1])[:, None] * parts
    on = book.thresholds[book.thresholds.isfinite()]
    down, up = (torch.nextafter(on, torch.full_like(on, to)) for to in (-torch.inf, torch.inf))
    u = torch.cat([inner.flatten().float(), on, down, up])
    return u * book.scale + book.offset


@every_format
def test_error_bound_holds_and_is_reached(name):
    """In every cell the largest error is nearly the bound, which all of it obeys."""
    book = FORMATS[name]
    x = values_around(book)
    codes = book.quantize(x)
    error, bound = (book.dequantize(codes).double() - x.double()).abs(), book.error_bound(x)
    assert (error <= bound).all()
    known = 16 * U32 * (x.abs().max() + book.offset.abs())  # cells as narrow are lost in the roundings
    for code in codes.unique():
        cell = codes == code
        assert error[cell].max() > 0.9 * bound[cell].median() - known, (code, error[cell].max(), bound[cell].median())


@every_format
def test_error_bound_holds_for_random_values(name):
    book = FORMATS[name]
    size = book.levels.abs().max() * book.unit * book.scale.max()
    x = torch.cat([torch.randn(4000), torch.randn(4000) * 0.01, torch.exp2(-30 * torch.rand(4000)), torch.zeros(1)])
    x = (x * size).float()
    error = (book.dequantize(book.quantize(x)).double() - x.double()).abs()
    assert (error <= book.error_bound(x)).all()


@every_format
def test_levels_are_their_own_codes(name):
    """quantize undoes dequantize, but for codes with the value of another, and levels that rint moves: SULQ."""
    book = FORMATS[name]
    codes = book.codes.clone()
    values = book.dequantize(codes)
    again = book.dequantize(book.quantize(values))
    if "sulq" in name or "released" in name:
        step = book.levels.diff().max() * book.unit * book.scale
        assert ((again - values).abs() <= step * 1.001).all()
    else:
        assert torch.equal(again, values)
    order = book.quantize(values.sort().values).long()
    assert (book.lut()[order].diff() >= 0).all()


@every_format
def test_a_threshold_belongs_to_the_level_above(name):
    book = FORMATS[name]
    plain = Codebook(book.family, book.bits, book.levels, book.thresholds, codes=book.codes)
    for rank, threshold in enumerate(book.thresholds):
        below = torch.nextafter(threshold, torch.tensor(-torch.inf))
        if not threshold.isfinite() or (rank and book.thresholds[rank - 1] == threshold):
            continue
        last = int((book.thresholds == threshold).nonzero()[-1])
        assert plain.quantize(threshold[None]) == book.codes[last + 1]
        assert plain.quantize(below[None]) == book.codes[rank]


def fits(book):
    return int(book.codes.max()) < 2**book.bits


@every_format
@pytest.mark.parametrize("K", [1, 7, 16, 33])
def test_pack_round_trip(name, K):
    book = FORMATS[name]
    codes = book.codes[torch.randint(len(book.codes), (3, 5, K))]
    if not fits(book):
        text = f"{book.family}: code {2**book.bits} does not fit in {book.bits} bits; build it with zero='last'"
        for call in (book.pack, book.pack_weight):
            with pytest.raises(ValueError, match="^" + re.escape(text)):
                call(codes)
        return
    data = book.pack(codes)
    assert data.dtype == torch.uint8 and data.shape == (3, 5, -(-K * book.bits // 8))
    assert torch.equal(book.unpack(data, K), codes.to(torch.uint8))
    bit = torch.tensor([[int(data[1, 2, i // 8]) >> (i % 8) & 1 for i in range(K * book.bits)]]).view(K, book.bits)
    assert torch.equal((bit << torch.arange(book.bits)).sum(1), codes[1, 2].long())
    with pytest.raises(ValueError, match=rf"K={K + 9} codes of {book.bits} bits are \d+ uint8, got torch.uint8"):
        book.unpack(data, K + 9)


@every_format
def test_pack_weight_round_trip(name):
    book = FORMATS[name]
    if not fits(book) or book.bits not in packed.PLANES:
        return
    codes = book.codes[torch.randint(len(book.codes), (19, 37))].to(torch.uint8)
    if not (book.codes == 2 ** (book.bits - 1)).any():
        with pytest.raises(ValueError, match="which pads weights"):
            book.pack_weight(codes)
        return
    w_packed = book.pack_weight(codes)
    assert tuple(w_packed.shape) == packed.packed_shape(19, 37, book.bits)
    assert torch.equal(book.unpack_weight(w_packed, 19, 37), codes)
    assert torch.equal(packed.unpack(w_packed, 19, 37).int() + 2 ** (book.bits - 1), codes.int())


def test_a_code_that_pads_must_have_a_level():
    book = twin.softmax(4, 0.5)
    assert not (book.codes == 8).any()
    with pytest.raises(ValueError, match=r"no level has code 8, which pads weights of 4 bits; use merged\(\)$"):
        book.pack_weight(torch.zeros(2, 2, dtype=torch.uint8))
    merged = book.merged()
    q = merged.quantize(torch.rand(20, 30))
    assert torch.equal(merged.unpack_weight(merged.pack_weight(q), 20, 30), q)


# ---- against the formulas, in float64


CLOSED = {
    "log2": (log.log2(4), lambda x: -torch.log2(x)),
    "log2, 6 bits": (log.log2(6), lambda x: -torch.log2(x)),
    "log_sqrt2": (log.log_sqrt2(4), lambda x: -2 * torch.log2(x)),
    "adalog": (log.adalog(4, 25), lambda x: -torch.log2(x.clamp(1e-15, 1)) * 37 / 25),
    "adalog, 6 bits": (log.adalog(6, 61), lambda x: -torch.log2(x.clamp(1e-15, 1)) * 37 / 61),
    "adalog, large base": (log.adalog(4, 138), lambda x: -torch.log2(x.clamp(1e-15, 1)) * 37 / 138),
    "sulq": (log.sulq(4, 0.01, LOW, HIGH), lambda x: (torch.log2(x + 0.01) - LOW) / ((HIGH - LOW) / 16)),
    "sulq, 6 bits": (log.sulq(6, 0.03, -5.0, 0.1), lambda x: (torch.log2(x + 0.03) + 5) / (5.1 / 64)),
    "tan": (tan.tan(4, 0.7), lambda x: 15 * torch.tan(0.7 * x) / math.tan(0.7)),
    "tan, two sides": (tan.tan(6, 1.4, True), lambda x: 63 * (1 + torch.tan(1.4 * (2 * x - 1)) / math.tan(1.4)) / 2),
}  # fmt: skip


@pytest.mark.parametrize("name", CLOSED)
def test_thresholds_are_the_formula(name):
    """No code differs, at 50 000 values over 24 octaves and on both sides of every threshold, ties apart."""
    book, formula = CLOSED[name]
    x = torch.cat([torch.exp2(-24 * torch.rand(50_000)), torch.rand(10_000), torch.zeros(1), torch.ones(1)])
    exact = formula(x.double())
    largest = 2**book.bits - (book.family == "tan")
    expected = torch.round(exact).clamp(0, largest)  # of log formats, what lies beyond the last code is the zero
    tie = (exact - exact.floor() - 0.5).abs() < 1e-6
    assert torch.equal(book.quantize(x).double()[~tie], expected[~tie]) and tie.sum() < 20


@pytest.mark.parametrize("operand", ["e4m3", "e5m2"])
def test_fp8_is_the_cast(operand):
    """Every byte, every tie and one float beside it, and random values, saturating as no cast of torch does."""
    book = fp8.fp8(operand)
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[operand]
    ties = ((book.levels[1:] + book.levels[:-1]) / 2).float()
    beside = [torch.nextafter(ties, torch.full_like(ties, to)) for to in (-torch.inf, torch.inf)]
    top = torch.finfo(dtype).max
    x = torch.cat([book.levels.float(), ties, *beside, torch.randn(50_000) * 100, torch.tensor([1e9, -1e9])])
    x = x[x != 0]
    assert torch.equal(book.quantize(x), x.clamp(-top, top).to(dtype).view(torch.uint8))
    held = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    expected = torch.where(held.isfinite(), held, torch.nan)
    assert torch.equal(book.lut().float().nan_to_num(), expected.nan_to_num())
    assert torch.equal(book.lut().isnan(), expected.isnan())
    with pytest.raises(ValueError, match=r"^fp8: 'fp16' is not one of e4m3, e5m2$"):
        fp8.fp8("fp16")


@pytest.mark.parametrize("bits", range(2, 9))
def test_uniform_is_affine(bits):
    x, scale, half = torch.randn(3, 5, 40), torch.rand(5) + 0.1, 2 ** (bits - 1)
    book = twin.uniform(bits, scale, half).with_scale(scale, axis=1)
    codes = affine.quantize(x, scale[:, None], bits=bits)
    assert torch.equal(book.quantize(x).int() - half, codes.int())
    assert torch.equal(book.dequantize(book.quantize(x)), affine.dequantize(codes, scale[:, None]))


# ---- zero, offset, groups


def test_zero_policies():
    """Zero beyond the last level, in its place, or nowhere: then sums over a softmax row swell."""
    x = torch.tensor([1.0, 2.0**-14, 2.0**-15, 2.0**-17, 0])
    codes = {"extra": [0, 14, 15, 16, 16], "last": [0, 14, 15, 15, 15], "none": [0, 14, 15, 15, 15]}
    for zero, expected in codes.items():
        book = log.log2(4, zero=zero)
        assert book.zero_policy == zero and book.quantize(x).tolist() == expected
        assert (book.dequantize(book.quantize(x))[-1] == 0) == (zero != "none")
    assert log.log2(4, zero="last").dequantize(torch.tensor([14, 15])).tolist() == [2.0**-14, 0]
    p = (torch.randn(200, 197) * 3).softmax(1)
    sums = {
        zero: (lambda book: book.dequantize(book.quantize(p)).sum(1).mean().item())(log.log_sqrt2(4, zero=zero))
        for zero in codes
    }
    assert 0.9 < sums["extra"] < 1 and 0.9 < sums["last"] < 1 and sums["none"] > 1.3
    with pytest.raises(ValueError, match=r"^log2: zero 'first' is not one of extra, last, none$"):
        log.log2(4, zero="first")


def test_fold_offset_is_exact():
    book = log.sulq(4, 0.01, LOW, HIGH)
    x, w, bias = torch.rand(5, 24), torch.randn(7, 24), torch.randn(7)
    codes = book.quantize(x)
    full = book.dequantize(codes) @ w.T + bias
    plain = (book.lut()[codes.long()].float() * book.scale) @ w.T
    torch.testing.assert_close(plain + book.fold_offset(w, bias), full)
    torch.testing.assert_close(plain + book.fold_offset(w), full - bias)


def test_operands_times_their_scale_are_the_values():
    for book in FORMATS.values():
        if book.with_operand("fp16").operand_error() > 0:
            continue
        book = book.with_operand("fp16")
        codes = book.codes.long()
        values = book.operand_lut()[codes].double() * book.operand_scale() + book.offset
        assert torch.allclose(values, book.dequantize(codes).double(), rtol=4e-7, atol=1e-7)


def test_operands_that_are_not_exact():
    book = log.log_sqrt2(4).with_operand("e4m3")
    text = "is 0.6875 in e4m3, and the worst level is off by"
    with pytest.raises(ValueError, match=re.escape(text) + r" [\d.e+-]+; use exact=False$"):
        book.operand_lut()
    assert book.operand_lut(exact=False)[:3].tolist() == [1, 0.6875, 0.5]
    with pytest.raises(ValueError, match=r"; use e4m3 or e5m2 or fp16 or bf16 or exact=False$"):
        log.log2(4).with_operand("int8").operand_lut()


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_groups_are_their_books(axis):
    """Heads, channels, branches: a scale, an offset, or a whole table each."""
    x = torch.randn(4, 4, 4)
    points = torch.stack([subset.snap(torch.linspace(-1, 1, 8) * size) for size in (1, 0.8, 0.5, 0.2)])
    lower, upper = torch.tensor([-1.0, -2, -0.5, -3]), torch.tensor([1.0, 1, 2, 3])
    scale = torch.tensor([0.5, 1, 2, 3])
    cases = (
        (multiquant.weight(lower, upper, axis), lambda g: multiquant.weight(lower[g].item(), upper[g].item())),
        (log.log2(3, zero="last").with_scale(scale, axis), lambda g: log.log2(3, scale[g].item(), "last")),
        (subset.subset(points, axis=axis), lambda g: subset.subset(points[g])),
    )
    for book, alone in cases:
        codes = book.quantize(x)
        bound, values = book.error_bound(x), book.dequantize(codes)
        for g in range(4):
            part = x.select(axis, g)
            assert torch.equal(codes.select(axis, g), alone(g).quantize(part))
            assert torch.equal(values.select(axis, g), alone(g).dequantize(codes.select(axis, g)))
            torch.testing.assert_close(bound.select(axis, g), alone(g).error_bound(part), rtol=1e-6, atol=1e-6)
        assert ((values - x).abs() <= bound).all()
        with pytest.raises(ValueError, match=r"x has shape \(3, 3, 3\), but axis -?\d must have 4 entries$"):
            book.quantize(torch.zeros(3, 3, 3))


def test_equal_points_of_a_subset():
    """Codes of the first; and the values of the published search are the best of its restarts."""
    book = subset.subset(torch.tensor([0, 896, 1024, 896]))
    assert book.quantize(torch.tensor([-1.0, 0.4, 0.5, 0.93, 0.94, 2])).tolist() == [0, 0, 1, 1, 3, 3]
    x = torch.rand(3, 500)
    points = subset.select(x, 3)
    assert points.shape == (3, 8) and (points == 0).any(1).all()
    assert torch.equal(points, subset.select(x, 3))
    few = subset.select(x, 3, restarts=1)

    def loss(points):
        book = subset.subset(points, axis=0)
        return (book.dequantize(book.quantize(x)) - x).square().sum(1)

    assert (loss(points) <= loss(few)).all() and (loss(points) < 500 / 7**2 / 12 * 1.5).all()
    with pytest.raises(ValueError, match=r"^subset: 17 / 1024 is not in the universal set; snap gives the nearest$"):
        subset.subset(torch.tensor([0, 17, 32, 1024]))


@pytest.mark.parametrize("after_relu", [False, True])
def test_normalize_of_dfsq(after_relu):
    x = torch.randn(2, 3, 5, 5) * 4
    y, mean, size = subset.normalize(x.relu() if after_relu else x, after_relu)
    assert torch.allclose(y.abs().amax((2, 3)), torch.ones(2, 3))
    assert torch.allclose(y * size + mean, x.relu() if after_relu else x, atol=1e-5)
    assert (mean == 0).all() if after_relu else torch.allclose(mean, x.mean((2, 3), keepdim=True))
    assert subset.normalize(torch.zeros(1, 1, 2, 2), True)[0].isfinite().all()


# ---- what is refused


def book(**changes):
    arguments = {
        "family": "custom",
        "bits": 2,
        "levels": torch.tensor([0.0, 1, 3]),
        "thresholds": torch.tensor([0.5, 2]),
    }
    return Codebook(**(arguments | changes))


ERRORS = [
    ({"bits": 9}, "custom: bits=9 is outside 2..8"),
    ({"levels": torch.tensor([0.0, 2, 1])}, "custom: levels must not decrease, but levels[1] is 2 and levels[2] is 1"),
    ({"thresholds": torch.tensor([2.0, 0.5])}, "custom: thresholds must not decrease, but thresholds[0] is 2 and"),
    ({"thresholds": torch.tensor([0.5, torch.nan])}, "custom: thresholds must not decrease"),
    ({"levels": torch.tensor([0.0, 1, torch.inf])}, "custom: levels must be finite"),
    ({"levels": torch.arange(6.0), "thresholds": torch.arange(5.0)}, "custom: 6 levels; 2 bits have 2 to 5"),
    ({"thresholds": torch.tensor([0.5])}, "custom: levels (3,) and thresholds (1,); use (n,) and (n - 1,), or"),
    ({"scale": 0.0}, "affine: scale[0] is 0.0; every scale must be positive and finite"),
    ({"scale": torch.tensor([1.0, -2])}, "affine: scale[1] is -2.0; every scale must be positive and finite"),
    ({"scale": torch.nan}, "affine: scale[0] is nan; every scale must be positive and finite"),
    ({"offset": torch.inf}, "custom: offset [inf] is not finite"),
    ({"codes": torch.tensor([0, 1, 1])}, "custom: codes [0, 1, 1] are not 3 different ones of 0 to 4"),
    ({"codes": torch.tensor([0, 1, 5])}, "custom: codes [0, 1, 5] are not 3 different ones of 0 to 4"),
    ({"zero_policy": "first"}, "custom: zero_policy 'first' is not one of extra, last, none"),
    ({"operand_dtype": "fp4"}, "operand_dtype 'fp4' is not one of int8, e4m3, e5m2, fp16, bf16"),
    ({"scale": torch.ones(3), "offset": torch.zeros(2)}, "custom: levels (3,), scale (3,) and offset (2,) disagree"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "text"), ERRORS)
def test_constructor_errors(changes, text):
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        book(**changes)


def test_errors_of_constructors():
    for call, text in (
        (lambda: log.adalog(4, 0), "adalog: the base is 2^(q/r) with q, r >= 1, got q=0, r=37"),
        (lambda: log.sulq(4, 0.1, 1.0, 1.0), "sulq: log2(x + eta) reaches from low=1.0 to high=1.0; low must be below"),
        (lambda: log.log2(4, rounding="up"), "log2: rounding 'up' is not one of nearest, lis"),
        (lambda: tan.tan(4, 1.6), "tan: a=1.6 is outside 0..pi/2"),
        (lambda: twin.gelu(4, 0.0), "twin gelu: scale=0.0, negative_scale="),
        (lambda: twin.softmax(4, 0.3), "twin softmax: split=0.3 is not a power of two of at most 1"),
        (lambda: multiquant.weight(1.0, 1.0), "multiquant weight: lower [1.0] must be below upper [1.0]"),
        (lambda: pow2.ps_weight(bits=1), "pow2 ps: bits=1 is outside 2..8"),
        (lambda: subset.select(torch.zeros(4), 3), "subset: x has shape (4,); use (channels, samples)"),
        (lambda: subset.subset(torch.zeros(2, 8)).merged(), "subset: merged needs one codebook, not 2"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(text)):
            call()
    assert book().dequantize(torch.tensor([3])).isnan() and book().quantize(torch.empty(0, 4)).shape == (0, 4)
