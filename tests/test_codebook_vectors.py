"""Codes and values of every format against numbers published by, or executed in, the code of the papers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyvit_accel.formats import affine, log, multiquant, pow2, subset, tan, twin

Z = 16  # the exact zero of 4-bit log formats; of 3-bit ones 8
X = [1, 0.75, 0.5, 0.36, 0.2, 0.1, 0.05, 0.02, 0.006, 0.004, 0.001, 3e-5, 1e-6, 0]
LOW, HIGH = math.log2(0.01), math.log2(1.01)
TAN = [0, 0.084757, 0.16877, 0.251332, 0.331809, 0.409666, 0.484476, 0.555931, 0.623833, 0.688083, 0.748668, 0.805641,
       0.859107, 0.909209, 0.956113, 1]  # fmt: skip
TWO_SIDED = [0, 0.00916, 0.0215, 0.038971, 0.065438, 0.109535, 0.193158, 0.368273, 0.631727, 0.806842, 0.890465,
             0.934562, 0.961029, 0.9785, 0.99084, 1]  # fmt: skip
SULQ_4 = [0.99, 0.99, 0.49, 0.49, 0.24, 0.115, 0.0525, 0.02125, 0.005625, 0.005625] + 4 * [-0.0021875]
SULQ_3 = [0.99, 0.99, 0.49, 0.24, 0.24, 0.115, 0.0525, 0.02125, 0.005625, 0.005625] + 4 * [-0.0021875]
SQRT2 = [0.9, 0.6363961, 0.45, 0.3181981, 0.225, 0.1125, 0.05625, 0.01988738, 0.00703125]

VECTORS = {  # name: the codebook, what goes in, its codes, its values to the digits given
    "log2, 4 bits": (
        log.log2(4), X, [0, 0, 1, 1, 2, 3, 4, 6, 7, 8, 10, 15, Z, Z],
        [1, 1, 0.5, 0.5, 0.25, 0.125, 0.0625, 0.015625, 0.0078125, 0.00390625, 0.0009765625, 3.0517578125e-5, 0, 0],
    ),
    "log2, 3 bits": (
        log.log2(3), X, [0, 0, 1, 1, 2, 3, 4, 6, 7, 8, 8, 8, 8, 8],
        [1, 1, 0.5, 0.5, 0.25, 0.125, 0.0625, 0.015625, 0.0078125, 0, 0, 0, 0, 0],
    ),
    "log-sqrt2, 4 bits": (
        log.log_sqrt2(4, 0.9), X, [0, 1, 2, 3, 4, 6, 8, 11, 14, Z, Z, Z, Z, Z], SQRT2 + 5 * [0],
    ),
    "log-sqrt2, 3 bits": (
        log.log_sqrt2(3, 0.9), X, [0, 1, 2, 3, 4, 6, 8, 8, 8, 8, 8, 8, 8, 8], SQRT2[:6] + 8 * [0],
    ),
    "AdaLog, 4 bits": (
        log.adalog(4, 25), X, [0, 1, 1, 2, 3, 5, 6, 8, 11, 12, 15, Z, Z, Z],
        [1, 0.6333333, 0.6333333, 0.4, 0.2416667, 0.09583333, 0.06041667, 0.02395833, 0.005729167, 0.003645833,
         0.0008789063, 0, 0, 0],
    ),
    "AdaLog, 3 bits": (
        log.adalog(3, 25), X, [0, 1, 1, 2, 3, 5, 6, 8, 8, 8, 8, 8, 8, 8],
        [1, 0.6428571, 0.6428571, 0.3928571, 0.25, 0.09821429, 0.05803571, 0, 0, 0, 0, 0, 0, 0],
    ),
    "SULQ, 4 bits": (log.sulq(4, 0.01, LOW, HIGH), X, [16, 15, 14, 13, 11, 8, 6, 4, 2, 1, 0, 0, 0, 0], SULQ_4),
    "SULQ, 3 bits": (log.sulq(3, 0.01, LOW, HIGH), X, [8, 8, 7, 6, 5, 4, 3, 2, 1, 1, 0, 0, 0, 0], SULQ_3),
    "tan, one side": (
        tan.tan(4, math.pi / 4), X, [15, 10, 6, 4, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 0.748668, 0.484476, 0.331809, 0.16877, 0.084757, 0.084757] + 7 * [0],
    ),
    "tan, two sides": (
        tan.tan(4, 1.4, two_sided=True), X, [15, 9, 8, 7, 6, 5, 3, 2, 1, 0, 0, 0, 0, 0],
        [1, 0.806842, 0.631727, 0.368273, 0.193158, 0.109535, 0.038971, 0.0215, 0.00916] + 5 * [0],
    ),
    "shifted AdaLog": (
        log.adalog(4, 20, 3.2, shift=twin.GELU_MINIMUM),
        [-0.17, -0.1, -0.02, 0, 0.05, 0.2, 0.7, 1.3, 2, 3.1, 4, 6], [Z, 10, 8, 8, 7, 6, 3, 2, 1, 0, 0, 0],
        [-0.169971, -0.0933046, -0.00997124, -0.00997124, 0.0566954, 0.163362, 0.843362, 1.32336, 2.07003, 3.03003,
         3.03003, 3.03003],
    ),
    "twin GELU": (  # codes are not published: the integer + 8
        twin.gelu(4, 0.4), [-0.17, -0.08, -0.01, 0, 0.02, 0.3, 1, 2.5, 5], [0, 4, 8, 8, 8, 9, 10, 14, 15],
        [-0.169971, -0.084986, 0, 0, 0, 0.4, 0.8, 2.4, 2.8],
    ),
    "MultiQuant weight": (
        multiquant.weight(-0.3, 0.3), [-0.3, -0.12, -0.05, -0.01, 0, 0.04, 0.1, 0.16, 0.25],
        [0, 1, 1, 1, 2, 2, 2, 2, 3], [-0.3, -0.1, -0.1, -0.1, 0.1, 0.1, 0.1, 0.1, 0.3],
    ),
    "DFSQ": (
        subset.subset(subset.snap(torch.tensor([0, 0.031, 0.07, 0.11, 0.16, 0.22, 0.30, 0.39, 0.49, 0.60, 0.72, 0.80,
                                                0.86, 0.91, 0.95, 0.99]))),
        [0, 0.01, 0.05, 0.09, 0.2, 0.33, 0.5, 0.66, 0.77, 0.9, 0.97, 1], [0, 0, 1, 3, 5, 6, 8, 9, 10, 12, 14, 14],
        [0, 0, 0.03125, 0.109375, 0.2197265625, 0.30078125, 0.5, 0.59375, 0.75, 0.875, 1, 1],
    ),
    "powers of two, Q": (  # codes: 16 + sign * (shift + 16), zero in the middle
        pow2.q_weight(), [0.9, 0.71, 0.7, -0.5, 0.3, -0.24, 0.1, 0.06, -0.011, 0.003, -1e-4, 2e-5, 0, -1.4],
        [32, 32, 31, 1, 30, 2, 29, 28, 7, 24, 13, 17, 16, 0],
        [1, 1, 0.5, -0.5, 0.25, -0.25, 0.125, 0.0625, -0.0078125, 0.00390625, -(2.0**-13), 2.0**-15, 0, -1],
    ),
    "FQ-ViT activation": (  # the zero point inside the rint: an integer one is the same outside
        twin.uniform(8, 0.1, 128), [-20, -1.04, 0, 0.05, 0.151, 3, 40], [0, 118, 128, 128, 130, 158, 255],
        [-12.8, -1, 0, 0, 0.2, 3, 12.7],
    ),
    "TinySAM, activation offset": (
        twin.uniform(8, 0.5, 128, offset=-0.3), [-100, -0.3, 0, 0.4, 1, 100], [0, 128, 129, 129, 131, 255],
        [-64.3, -0.3, 0.2, 0.2, 1.2, 63.2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VECTORS)
def test_vector(name):
    book, x, codes, values = VECTORS[name]
    q = book.quantize(torch.tensor(x, dtype=torch.float32))
    assert q.tolist() == codes
    digits = 5e-7 if "tan" in name or "." in str(values[-1]) else 0  # six decimals are given
    for found, expected in zip(book.dequantize(q).tolist(), values, strict=True):
        assert abs(found - expected) <= max(3e-6 * abs(expected), digits, 1e-12)


def test_lut_of_tan():
    for book, lut in ((tan.tan(4, math.pi / 4), TAN), (tan.tan(4, 1.4, two_sided=True), TWO_SIDED)):
        assert (book.lut() - torch.tensor(lut).double()).abs().max() <= 6e-7


def test_adalog_tables():
    t, m, D = log.adalog_table(4, 25)
    assert D == 30 and t.tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8, 9, 10]
    assert m.tolist() == [30, 19, 24, 29, 18, 23, 29, 18, 23, 28, 18, 22, 28, 17, 22, 27]
    t, m, D = log.adalog_table(3, 25)
    assert D == 14 and t.tolist() == [0, 0, 1, 2, 2, 3, 4, 4] and m.tolist() == [14, 9, 11, 14, 9, 11, 13, 8]
    assert log.adalog_table(6, 25)[2] == 126


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_adalog_levels_of_every_searched_base(bits):
    """Integer mantissas in D/2 .. D times a power of two, strictly monotone; q = 37 is log2."""
    for q in range(10, 139):
        t, m, D = log.adalog_table(bits, q)
        assert int(m.min()) >= D // 2 and int(m.max()) == D
        book = log.adalog(bits, q)
        assert (book.levels.diff() > 0).all()
        assert torch.allclose(book.lut()[:-1], m * 2.0 ** -t.double() / D, rtol=1e-15, atol=0)
    assert torch.equal(log.adalog(bits, 37).lut()[:-1], log.log2(bits).lut()[:-1])
    assert torch.equal(log.adalog(bits, 37).thresholds, log.log2(bits).thresholds) or bits == 6


def test_exponents_of_sulq():
    """Of each code; and of the few different values there are."""
    book = log.sulq(4, 0.01, LOW, HIGH)
    assert book.levels.log2().tolist() == [-7, -6, -6, -5, -5, -5, -4, -4, -3, -3, -2, -2, -2, -1, -1, 0, 0]
    assert log.sulq(3, 0.01, LOW, HIGH).levels.log2().tolist() == [-7, -6, -5, -4, -3, -2, -2, -1, 0]
    for bits in (4, 6):
        for eta in (0.005, 0.01, 0.02, 0.03):
            merged = log.sulq(bits, eta, math.log2(eta), math.log2(1 + eta)).merged()
            assert 6 <= merged.levels.numel() <= 11


def test_the_search_of_sulq_counts_one_step_less():
    assert log.sulq(4, 0.01, LOW, HIGH, steps=15).levels.numel() == 16


def test_affine_codes_of_repq():
    """The per-channel codes of the fold's small example, and the per-tensor ones of its folded norm."""
    rows = torch.tensor([[0.3, -1.2, 0.7, -0.1], [1.5, 0.2, -0.9, 0.6]])
    gamma, beta = torch.tensor([1, 2, 0.5, 4]), torch.tensor([0.1, -0.2, 0, 0.3])
    scale, zero_point = torch.tensor([0.2, 0.05, 0.12, 0.4]), torch.tensor([8, 5, 10, 7])
    folded = rows * torch.tensor([5, 40, 0.5 / 0.12, 10]) + torch.tensor([0.5, -7, 2, -0.25])
    unsigned = [[10, 0, 13, 7], [15, 9, 6, 14]]
    assert (affine.quantize(rows * gamma + beta, scale, zero_point - 8, bits=4) + 8).tolist() == unsigned
    assert affine.quantize(folded, torch.ones(1), bits=4).tolist() == [[2, -8, 5, -1], [7, 1, -2, 6]]
    assert twin.uniform(4, 1.0, 8).quantize(folded).tolist() == unsigned


def test_thresholds_of_log_sqrt2_have_the_published_mantissas():
    bits = log.log_sqrt2(4).thresholds.view(torch.int32) & 0x7FFFFF
    assert set(bits.tolist()) == {0x1837F0, 0x5744FD}


def test_one_instruction_log2():
    """(bits + constant) & 0x7f800000 is the float of 2^-rint(-log2 p); of FQ-ViT's, on the ratio 1 / p."""

    def power(x, add):
        return ((x.view(torch.int32) + add) & 0x7F800000).view(torch.float32)

    p = torch.exp2(-20 * torch.rand(200_000))
    expected = power(p, 0x4AFB0D)
    book = log.log2(4)
    assert torch.equal(book.dequantize(book.quantize(p)), torch.where(expected < 2.0**-15, 0, expected))
    ratio = (1 / p)[((1 / p).frexp()[0] - 0.75).abs() > 1e-6]  # not a tie: 1 / (1.5 2^k) is no float
    expected = 1 / power(ratio, 0x400000)
    assert torch.equal(fqvit_codes(ratio.double()), -expected.log2().double())
    book = log.log2(4, rounding="lis")
    assert torch.equal(book.dequantize(book.quantize(1 / ratio)), torch.where(expected < 2.0**-15, 0, expected))


def fqvit_codes(ratio: Tensor) -> Tensor:
    """The published rounding of log2: up from 1.5 * 2^f on."""
    f = torch.floor(torch.log2(ratio))
    return f + (ratio - 2**f >= 2 ** (f - 1))


def test_integer_softmax_of_fqvit():
    """Logits to integers to ratios to codes: those of the codebook, and those of the published rounding."""
    scale, logits = 0.05, torch.tensor([2.0, 1, 0, -1, -2, -4], dtype=torch.float64)
    integers = torch.round(logits / scale)
    assert integers.tolist() == [40, 20, 0, -20, -40, -80]
    a, b, ln2, n = 0.35815147, 0.96963238, 0.6931, 30
    x0 = math.floor(-ln2 / scale)
    shifted = (integers - integers.max()).clamp_min(n * x0)
    Q = torch.floor(shifted / x0)
    r = shifted - x0 * Q
    polynomial = r * (r + math.floor(b / a / scale)) + math.floor(1 / a / scale**2)
    exponentials = torch.floor(polynomial * 2 ** (n - Q)).clamp_min(0)
    ratio = torch.round(exponentials.sum() / exponentials)
    assert ratio.tolist() == [2, 4, 12, 31, 84, 604]
    book = log.log2(4, rounding="lis")
    codes = book.quantize((1 / ratio).float())
    assert codes.tolist() == fqvit_codes(ratio).tolist() == [1, 2, 4, 5, 6, 9]
    assert book.dequantize(codes).tolist() == [0.5, 0.25, 0.0625, 0.03125, 0.015625, 0.001953125]


def test_integer_softmax_rounds_at_one_and_a_half():
    """Every ratio up to 2^12, ties among them, and what lies beyond the last code."""
    ratio = torch.arange(1, 4097, dtype=torch.float64)
    codes = log.log2(4, rounding="lis").quantize((1 / ratio).float())
    assert torch.equal(codes.double(), fqvit_codes(ratio))
    assert log.log2(3, rounding="lis").quantize(1 / torch.tensor([191.0, 192.0, 4096.0])).tolist() == [7, 8, 8]


def test_released_twin_softmax_adds_both_ranges():
    released, clean = twin.softmax(4, 2.0**-4), twin.softmax(4, 2.0**-4, released=False)
    one = torch.ones(1)
    assert released.dequantize(released.quantize(one)) == 1.0625 and clean.dequantize(clean.quantize(one)) == 1.0
    for split in (1.0, 0.5, 2.0**-4, 2.0**-10, 2.0**-19):
        p, q_max = torch.rand(4000).double() ** 6, 7
        d = split / q_max
        high = torch.round(p.clamp(split, 1) * q_max).clamp(0, q_max) / q_max
        low = torch.round(p.clamp(0, split) / d).clamp(0, q_max) * d
        book = twin.softmax(4, split)
        assert (book.dequantize(book.quantize(p.float())).double() - (high + low)).abs().max() < 1e-6


def test_multiquant_by_its_integers():
    """-3, -1, 1, 3 by codes: 2 code - 3; branches have ranges of their own; activations count up from the lower end."""
    book = multiquant.weight(torch.tensor([-0.3, -0.6]), torch.tensor([0.3, 0.6]))
    assert (book.lut() == 2 * torch.arange(4) - 3).all()
    w = torch.tensor([-0.3, -0.12, 0.04, 0.25])
    assert book.quantize(torch.stack([w, 2 * w])).tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert book.operand_lut().tolist() == [-3, -1, 1, 3]
    x = multiquant.activation(4, -1.0, 2.0)
    assert x.quantize(torch.tensor([[-2.0, -1, -0.95, 0, 0.5, 2, 3]])).tolist() == [[0, 0, 0, 5, 8, 15, 15]]


def test_the_universal_set_of_dfsq():
    assert len(subset.universal_set(signed=False)) == 189 and len(subset.universal_set()) == 377
    assert subset.universal_set().abs().max() == 1024
    centres = [0, 0.031, 0.07, 0.11, 0.16, 0.22, 0.30, 0.39, 0.49, 0.60, 0.72, 0.80, 0.86, 0.91, 0.95, 0.99]
    expected = [0, 32, 72, 112, 164, 225, 308, 400, 512, 608, 768, 832, 896, 896, 1024, 1024]
    assert subset.snap(torch.tensor(centres)).tolist() == expected


def test_trained_shifts():
    """LinearShift: 2^rint(clip(shift)) sgn(rint(sign)), ternary signs, as codes of five bits."""
    shift = torch.tensor([0.0, -0.6, -14.4, -20.0, 3.0, -3.5, -2.5, -1.0])
    sign = torch.tensor([1.0, -0.9, 0.6, -3.0, 1.2, 0.4, -1.0, -0.5])
    values = torch.exp2(torch.round(shift.clamp(-14, 0))) * torch.sign(torch.round(sign))
    book = pow2.ps_weight()
    codes = pow2.ps_codes(shift, sign)
    assert torch.equal(book.dequantize(codes), values) and torch.equal(book.quantize(values), codes)
    assert book.bits == 5 and book.levels.numel() == 31
    assert (pow2.q_weight().levels[17:].log2() == torch.arange(-15, 1)).all()


def test_gelu_minimum():
    x = torch.linspace(-2, 0, 200_001, dtype=torch.float64)
    assert torch.nn.functional.gelu(x).min().item() == pytest.approx(-twin.GELU_MINIMUM, abs=1e-7)
    assert log.adalog(4, 20, 3.2, shift=twin.GELU_MINIMUM).dequantize(torch.tensor([Z])) == -twin.GELU_MINIMUM
