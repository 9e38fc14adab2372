"""Which levels each operand type holds exactly, by a round trip through the type; and what the others are off by."""

from __future__ import annotations

import pytest
import torch

from pyvit_accel.formats import fp8, log, multiquant, operands, pow2, subset, tan, twin

NONE, ANY = [], "any"


def span(first, last):
    return list(range(first, last + 1))


def integers(largest):
    return torch.arange(-largest, largest + 1).double()


def sulq():
    """Exponents 0 .. -7: what it has without its offset."""
    return log.sulq(4, 0.01, -6.6438562, 0.0143553).merged().levels


# Levels (zero among them unless the format has none) and the prescales with which each type holds them.
TYPES = ("int8", "e4m3", "e5m2", "fp16", "bf16")
TABLE = {
    "log2, 2 bits": (log.log2(2).levels, span(3, 6), span(-6, 8), ANY, ANY, ANY),
    "log2, 3 bits": (log.log2(3).levels, NONE, span(-2, 8), ANY, ANY, ANY),
    "log2, 4 bits": (log.log2(4).levels, NONE, span(6, 8), span(-1, 15), ANY, ANY),
    "log2, 5 bits": (log.log2(5).levels, NONE, NONE, [15], span(7, 15), ANY),
    "2^0 .. 2^-14": (pow2.ps_weight().levels, NONE, span(5, 8), ANY, ANY, ANY),
    "2^0 .. 2^-15": (pow2.q_weight().levels, NONE, span(6, 8), span(-1, 15), ANY, ANY),
    "2^0 .. 2^-6": (pow2.ps_weight(bits=4).levels, [6], ANY, ANY, ANY, ANY),
    "SULQ": (sulq(), NONE, ANY, ANY, ANY, ANY),
    "log-sqrt2": (log.log_sqrt2(4).levels, NONE, NONE, NONE, NONE, NONE),
    "int4": (integers(8), ANY, ANY, ANY, ANY, ANY),
    "differences of int4": (integers(15), ANY, ANY, NONE, ANY, ANY),
    "differences of int6": (integers(63), ANY, NONE, NONE, ANY, ANY),
    "int8": (integers(127), [0], NONE, NONE, ANY, ANY),
    "MultiQuant": (multiquant.weight(-1.0, 1.0).levels, ANY, ANY, ANY, ANY, ANY),
    "DFSQ": (subset.universal_set().double() / 1024, NONE, NONE, NONE, ANY, NONE),
    "tan": (tan.tan(4, 1.4, two_sided=True).levels, NONE, NONE, NONE, NONE, NONE),
    "e4m3": (fp8.fp8("e4m3").levels, NONE, [0], NONE, ANY, ANY),
    "e5m2": (fp8.fp8("e5m2").levels, NONE, NONE, [0], ANY, ANY),
}


@pytest.mark.parametrize("name", TABLE)
def test_exact_prescales(name):
    levels, *expected = TABLE[name]
    for operand, prescales in zip(TYPES, expected, strict=True):
        found = operands.exact_prescales(levels, operand)
        assert found if prescales == ANY else found == prescales, (operand, found)
        for prescale in found:
            assert operands.relative_error(levels, operand, prescale) == 0.0


def test_uint8_would_hold_three_bits_of_log2():
    """1 .. 128: one more than int8 has. Four bits take two passes of 2^(7-q)."""
    levels = log.log2(3).levels * 2**7
    assert levels.max() == 128 and torch.equal(levels, levels.to(torch.uint8).double())
    powers = log.log2(4).lut()[:16]
    first, second = powers[:8] * 2**7, powers[8:] * 2**15
    assert torch.equal(first, second) and torch.equal(first.to(torch.uint8).double(), first)


@pytest.mark.parametrize("bits, exact", [(3, (75, 6, 129, 129)), (4, (0, 0, 83, 129)), (6, (0, 0, 10, 93))])
def test_adalog_over_every_base(bits, exact):
    """How many of the 129 searched bases are exact in e4m3, e5m2, fp16 and bf16, with levels m 2^-t."""
    counts = dict.fromkeys(("e4m3", "e5m2", "fp16", "bf16"), 0)
    for q in range(10, 139):
        t, m, _ = log.adalog_table(bits, q)
        levels = torch.cat([m * 2.0 ** -t.double(), torch.zeros(1)])
        for operand in counts:
            counts[operand] += bool(operands.exact_prescales(levels, operand))
    assert tuple(counts.values()) == exact


def test_adalog_in_e4m3():
    """3 bits: all bases, once levels below 2^-10 of the largest are zero. More bits: off by up to 5.9 %."""
    worst = dict.fromkeys((3, 4, 6), 0.0)
    for bits in worst:
        for q in range(10, 139):
            t, m, D = log.adalog_table(bits, q)
            levels = m * 2.0 ** -t.double()
            kept = levels[levels >= D * 2.0**-10]
            least = min(operands.relative_error(kept, "e4m3", p) for p in range(-2, 9))
            worst[bits] = max(worst[bits], least)
    assert worst[3] == 0.0 and 0.05 < worst[4] <= 0.0591 and 0.05 < worst[6] <= 0.0591


def test_powers_of_two_in_a_row():
    """32 fit e5m2 and 18 e4m3, no more."""
    for operand, most in (("e5m2", 32), ("e4m3", 18)):
        for n, fits in ((most, True), (most + 1, False)):
            assert bool(operands.exact_prescales(2.0 ** -torch.arange(n).double(), operand)) == fits


def test_how_far_the_inexact_are_off():
    sqrt2 = log.log_sqrt2(4)
    for operand, error in (("fp16", 1.07e-4), ("e4m3", 0.0277), ("e5m2", 0.0607)):
        assert operands.relative_error(sqrt2.levels[-4:], operand) == pytest.approx(error, rel=0.01)
    root = torch.tensor(2.0).double().sqrt()
    assert [operands.round_to(name, root).item() for name in ("fp16", "e4m3", "e5m2")] == [1.4140625, 1.375, 1.5]
    for two_sided, a in ((True, 1.4), (False, 0.785398)):
        book = tan.tan(4, a, two_sided)
        assert 0 < book.with_operand("fp16").operand_error() < 5e-4
        assert 5e-4 < book.with_operand("bf16").operand_error() < 4e-3
    held = {"e4m3": 64, "e5m2": 37, "bf16": 155, "int8": 68, "fp16": 189}
    values = subset.universal_set(signed=False).double()
    for operand, count in held.items():
        most = max(int((operands.round_to(operand, values * 2.0**p) == values * 2.0**p).sum()) for p in range(-12, 7))
        assert most == count, (operand, most)


@pytest.mark.parametrize("m", range(20))
def test_twin_softmax_in_fp16(m):
    """Clean ranges: integers of up to 7 bits times one of two steps, exact whatever their ratio 2^m.

    The released sum of both is 127 (2^m + 1) at most: twelve bits, and so inexact, from m = 4 on.
    """
    split = 2.0**-m
    assert bool(operands.exact_prescales(twin.softmax(8, split).levels, "fp16")) == (m <= 3)
    assert operands.exact_prescales(twin.softmax(8, split, released=False).levels, "fp16")


def test_bytes_of_log2():
    """Codes 0 .. 15 and zero: the closed forms that a kernel may use instead of a table."""
    q = torch.arange(16)
    book = log.log2(4)
    assert (book.operand_dtype, book.prescale_log2) == ("e5m2", 8)  # keeps all levels normal
    e5m2 = book.operand_lut().to(torch.float8_e5m2).view(torch.uint8)
    assert e5m2.tolist() == [*(92 - 4 * q).tolist(), 0]
    assert e5m2[:2].tolist() == [0x5C, 0x58] and e5m2[15] == 0x20
    e4m3 = book.with_operand("e4m3", 8).operand_lut().to(torch.float8_e4m3fn).view(torch.uint8)
    assert e4m3.tolist() == [*((15 - q[:15]) << 3).tolist(), 4, 0]
    fp16 = book.with_operand("fp16", 0).operand_lut().half().view(torch.int16)
    assert fp16.tolist() == [*((15 - q[:15]) << 10).tolist(), 0x200, 0]


def test_bytes_of_integers_in_e4m3():
    expected = "00 38 40 44 48 4a 4c 4e 50 51 52 53 54 55 56 57"
    found = torch.arange(16).float().to(torch.float8_e4m3fn).view(torch.uint8)
    assert [f"{byte:02x}" for byte in found.tolist()] == expected.split()
    negative = (-torch.arange(1, 16)).float().to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(negative, found[1:] | 128)


def test_choose():
    assert operands.choose(log.log2(4).levels, "int8", "e4m3", "e5m2") == ("e4m3", 6)
    assert operands.choose(log.log2(4).levels, "int8", "e5m2", prefer=8) == ("e5m2", 8)
    assert operands.choose(log.log_sqrt2(4).levels, "e4m3", "fp16") == ("fp16", 0)
    assert operands.exact_prescales(torch.zeros(3), "e4m3") == [0]
    with pytest.raises(ValueError, match=r"^operand_dtype 'fp4' is not one of int8, e4m3, e5m2, fp16, bf16$"):
        operands.round_to("fp4", torch.ones(1))
