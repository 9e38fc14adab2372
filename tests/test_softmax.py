"""formats/softmax.py: codes and values of log2 p, beside the published vectors, fp8 as torch decodes it, and bounds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_codebook_vectors import VECTORS, fqvit_codes

from pyvit_accel.calibrate.adalog import BASES
from pyvit_accel.formats import log, tan, twin
from pyvit_accel.formats.softmax import SoftmaxFormat, linear_mantissa, log2, of_codebook

SLACK = 2.0**-20  # relative, of p: thresholds are log2 p below 2^5 in float32, off by 2^-20 ln 2 at most
LOW, HIGH = math.log2(0.01), math.log2(1.01)
PUBLISHED = [
    "log2, 4 bits", "log2, 3 bits", "log-sqrt2, 4 bits", "log-sqrt2, 3 bits", "AdaLog, 4 bits", "AdaLog, 3 bits",
    "SULQ, 4 bits", "SULQ, 3 bits", "tan, one side", "tan, two sides",
]  # fmt: skip
FP8 = {1: (torch.float8_e5m2, 2, 30), 2: (torch.float8_e5m2, 1, 56), 3: (torch.float8_e4m3fn, 1, 104)}
# bits of mantissa: the type, bytes from a code to the next, codes

STEPPED = {
    **{f"linear mantissa {bits}": linear_mantissa(bits) for bits in range(4)},
    **{f"log2 {bits}": log2(bits) for bits in range(2, 6)},
    "log2 of a codebook": of_codebook(log.log2(4)),
    "log2, last": of_codebook(log.log2(3, zero="last")),
    "log-sqrt2 3": of_codebook(log.log_sqrt2(3)),
    "log-sqrt2 4": of_codebook(log.log_sqrt2(4), "max"),
    "AdaLog 3": of_codebook(log.adalog(3, 25)),
    "AdaLog 4": of_codebook(log.adalog(4, 17)),
    "AdaLog 6": of_codebook(log.adalog(6, 10), "max"),
}
CUT = {
    "SULQ": of_codebook(log.sulq(4, 0.01, LOW, HIGH)),
    "tan, one side": of_codebook(tan.tan(4, math.pi / 4)),
    "tan, two sides": of_codebook(tan.tan(4, 1.4, two_sided=True), "max"),
    "twin 4": of_codebook(twin.softmax(4, 2.0**-4, released=False), "max"),
    "twin 8": of_codebook(twin.softmax(8, 2.0**-6, released=False)),
    "twin, released": of_codebook(twin.softmax(4, 2.0**-4)),
    "uniform 4": of_codebook(twin.uniform(4, 1 / 15), "max"),
    "uniform 8": of_codebook(twin.uniform(8, 1 / 255)),
    "log2 of FQ-ViT": of_codebook(log.log2(4, rounding="lis")),
}
stepped = pytest.mark.parametrize("form", STEPPED.values(), ids=list(STEPPED))
FP8_READ, TWICE_ROUNDED = [f"linear mantissa {bits}" for bits in (1, 2, 3)], ["SULQ", "twin, released"]
NEAREST = {name: form for name, form in (STEPPED | CUT).items() if name not in (*FP8_READ, *TWICE_ROUNDED)}
every = pytest.mark.parametrize("form", [*STEPPED.values(), *CUT.values()], ids=[*STEPPED, *CUT])


def octaves(count: int = 20_000, depth: float = 45.0) -> torch.Tensor:
    """log2 p, float64: evenly to `depth`, evenly in p, the ends, and a key that is not seen."""
    ends = torch.tensor([0.0, -1e-9, -depth, -torch.inf])
    return torch.cat([-depth * torch.rand(count).double(), torch.rand(count).double().log2(), ends.double()])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_vector(name):
    """of_codebook on log2 x gives the published codes and values of x; p = 0 is no key, so SULQ's last is zero."""
    book, x, codes, values = VECTORS[name]
    form = of_codebook(book, "lse")
    k = form.codes(torch.tensor(x).double().log2())
    if name.startswith("tan"):  # counted from the largest value down
        assert k.tolist() == [15 - code for code in codes]
    elif not name.startswith("SULQ"):
        assert k.tolist() == codes
    if name.startswith("SULQ"):
        values = [*values[:-1], 0]
    digits = 5e-7 if name.startswith("tan") else 0  # six decimals are given
    for found, expected in zip(form.dequantize(k).tolist(), values, strict=True):
        assert abs(found - expected) <= max(3e-6 * abs(expected), digits, 1e-9)


def test_codes_of_sulq():
    """One for each different value, 0 the largest: of 4 bits the few that its 17 codes have."""
    assert of_codebook(log.sulq(4, 0.01, LOW, HIGH)).codes(torch.tensor([1, 0.36, 0.2, 0.001]).log2()).tolist() == [
        0, 1, 2, 7,
    ]  # fmt: skip
    for bits in (3, 4):
        form = of_codebook(log.sulq(bits, 0.01, LOW, HIGH))
        assert form.values.log2().tolist() == list(range(15, 7, -1))
        assert form.offset * form.unit == pytest.approx(-0.01, rel=1e-7)


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("anchor", ["max", "lse"])
def test_linear_mantissa_is_fp8(bits, anchor):
    """Values are what torch decodes from byte_step (L - k), and so 2^floor(u) (1 + u - floor(u)) of u = -k / steps."""
    dtype, byte_step, L = FP8[bits]
    form = linear_mantissa(bits, anchor)
    k = torch.arange(L + 1)
    decoded = (byte_step * (L - k)).to(torch.uint8).view(dtype).double()
    assert form.values.shape == (L,) and torch.equal(form.dequantize(k), decoded / decoded[0])
    assert (form.steps, form.operand) == (2.0**bits, "e4m3" if bits == 3 else "e5m2")
    u = -k[: L - 2**bits + 1].double() / 2**bits  # the last bytes are subnormal
    assert torch.equal(form.dequantize(k[: len(u)]), torch.exp2(u.floor()) * (1 + u - u.floor()))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_log2_is_an_e5m2_byte(bits):
    form, L = log2(bits), 2**bits
    k = torch.arange(L + 1)
    decoded = (4 * (L - k)).to(torch.uint8).view(torch.float8_e5m2).double()
    assert form.operand == "e5m2" and torch.equal(form.dequantize(k), decoded / decoded[0])


def test_no_mantissa_is_log2():
    a, b = linear_mantissa(0, "lse", normalize=False), log2(4, "lse")
    assert torch.equal(a.values, b.values) and a.arguments()[2:] == b.arguments()[2:]


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_log2_is_a_power_of_the_nearest_integer(bits):
    """2^rint(log2 p), ties included, down to the last level; zero below it."""
    form = log2(bits, "lse")
    x = torch.cat([octaves(), -torch.arange(0, 40, 0.5, dtype=torch.float64)])
    nearest = torch.round(x)
    expected = torch.where(nearest > -(2**bits), torch.exp2(nearest), 0)
    assert torch.equal(form.dequantize(form.codes(x)), expected)
    assert (form.dequantize(torch.arange(2**bits)).frexp().mantissa == 0.5).all()


def test_log_sqrt2_toggles_between_two_scales():
    """2^-ceil(k / 2), and sqrt(2) times it where k is odd."""
    k = torch.arange(16)
    expected = torch.exp2(-((k + 1) // 2).double()) * torch.where(k % 2 == 1, math.sqrt(2), 1.0)
    found = of_codebook(log.log_sqrt2(4)).dequantize(k)
    assert ((found / expected - 1).abs() <= 2.0**-24).all()  # values are float32


@pytest.mark.parametrize("bits", [3, 4, 5, 6])
def test_adalog_of_every_base(bits):
    for q in BASES:
        form = of_codebook(log.adalog(bits, q))
        t, m, D = log.adalog_table(bits, q)
        assert form.steps == 37 / q
        expected = m * torch.exp2(-t.double()) / D
        error = (form.dequantize(torch.arange(2**bits)) - expected).abs()
        assert (error <= 2.0**-24 * expected + 2.0**-150).all()  # values are float32


@every
def test_values_are_what_kernels_hold(form):
    """Integers of 1 .. 65535, or floats within float16's range; the largest first."""
    values = form.values.double()
    assert (values.diff() < 0).all()
    if form.values.dtype == torch.int32:
        assert values.min() >= 1 and values.max() <= 65535 and form.offset == 0
    else:
        assert form.values.dtype == torch.float32 and values.max() <= 2**15
    if form.operand != "fp16":
        dtype = torch.float8_e5m2 if form.operand == "e5m2" else torch.float8_e4m3fn
        L, step = form.values.numel(), (4 if form.operand == "e5m2" else 8) / form.steps
        decoded = (step * torch.arange(L, 0, -1)).to(torch.uint8).view(dtype).double()
        assert torch.equal(values / values[0], decoded / decoded[0])


def half_error(form: SoftmaxFormat) -> float:
    """Largest relative error of a value in float16."""
    return (form.values.half().double() / form.values.double() - 1).abs().max().item()


def test_float16_holds_the_values():
    """Those of log2, uniform, SULQ, the clean twin with any split and 3-bit AdaLog with any base; of 4 bits most."""
    assert all(half_error(log2(bits)) == 0 for bits in (2, 3, 4, 5))
    assert all(half_error(of_codebook(twin.uniform(bits, 1 / (2**bits - 1)))) == 0 for bits in (3, 4, 6, 8))
    assert half_error(CUT["SULQ"]) == 0
    splits = [2.0**-i for i in range(20)]
    assert all(half_error(of_codebook(twin.softmax(b, s, released=False))) == 0 for b in (4, 6, 8) for s in splits)
    exact = {bits: sum(half_error(of_codebook(log.adalog(bits, q))) == 0 for q in BASES) for bits in (3, 4)}
    assert exact[3] == len(BASES) == 129 and 0 < exact[4] < 129
    assert half_error(STEPPED["log-sqrt2 4"]) < 1.1e-4
    assert all(half_error(CUT[name]) < 5e-4 for name in ("tan, one side", "tan, two sides"))


@every
def test_codes_count_down(form):
    """Monotone, from 0 of the maximum to L, which is zero and the code of a key that is not seen."""
    x = octaves().sort(descending=True).values
    k = form.codes(x)
    L = form.values.numel()
    assert k.dtype == torch.int64 and k[0] == 0 and (k.diff() >= 0).all() and k[-1] == L
    assert form.dequantize(torch.tensor([L])) == 0 and (form.dequantize(k).diff()[:-1] <= 0).all()
    assert k.unique().numel() == L + 1  # every code is reached
    assert torch.equal(form.codes(x.reshape(2, -1).T), k.reshape(2, -1).T)  # whatever the strides
    assert form.codes(x[:0]).shape == (0,)


@pytest.mark.parametrize("form", NEAREST.values(), ids=list(NEAREST))
def test_values_are_their_own_codes(form):
    """Values lie inside their cells, but where a byte is read as it is or what is published rounds twice."""
    k = torch.arange(form.values.numel())
    assert torch.equal(form.codes(form.dequantize(k).log2()), k)


def relative_bound(form: SoftmaxFormat) -> tuple[float, float]:
    """How far below and above p the value of a code may lie, as factors.

    Half a step of the logarithm either way. The value of the code is 2^(-k / steps), but AdaLog's mantissa, an integer
    of at least D / 2, is half of one off at most, 1 / D; and 1 + f, which a linear mantissa takes for 2^f, is up to
    2 / (e ln 2) = 1.0615 times as much.
    """
    half = 2 ** (0.5 / form.steps)
    off = 0.0
    if form.name.startswith("adalog"):
        off = 1 / (2 ** (int(form.name.split()[1]) + 1) - 2)
    over = 2 / (math.e * math.log(2)) if form.name.startswith("linear") else 1.0
    return (1 - off) / half, (1 + off) * half * over


@stepped
def test_relative_error(form):
    """From below only of values that fp8 has as normal ones; zero from half a step past the last on."""
    x = octaves()
    p, k = torch.exp2(x), form.codes(x)
    value, L = form.dequantize(k), form.values.numel()
    least, most = relative_bound(form)
    last_normal = L - form.steps if form.name.startswith("linear") else L - 1
    assert (value[k <= last_normal] >= (p * least * (1 - SLACK))[k <= last_normal]).all()
    assert (value <= p * most * (1 + SLACK)).all()
    zero = k == L
    assert (p[zero] <= 2 ** (-(L - 0.5) / form.steps)).all() and (value[zero] == 0).all()
    assert (p[~zero] >= 2 ** (-(L - 0.5) / form.steps)).all()


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_linear_mantissa_is_too_large_between_octaves_alone(bits):
    """1 + f against 2^f: on these grids the worst is f = 1/2, 6.1 percent."""
    k = torch.arange(12 * 2**bits)
    over = linear_mantissa(bits).dequantize(k) * torch.exp2(k.double() / 2**bits)
    assert ((over == 1) == (k % 2**bits == 0)).all() and (over >= 1).all()
    assert over.max().item() == pytest.approx(1.5 / math.sqrt(2), rel=1e-12)


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_absolute_error_of_uniform_and_twin(bits):
    p = torch.rand(20_000).double() ** 4
    form = of_codebook(twin.uniform(bits, 1 / (2**bits - 1)))
    assert ((form.dequantize(form.codes(p.log2())) - p).abs() <= 0.5 / (2**bits - 1) + SLACK * p).all()
    for split in (1.0, 0.25, 2.0**-6, 2.0**-19):
        form = of_codebook(twin.softmax(bits, split, released=False))
        top = 2 ** (bits - 1) - 1
        step = torch.where(p <= split, split / top, 1 / top)  # the first large level is at most so far from the split
        assert ((form.dequantize(form.codes(p.log2())) - p).abs() <= step / 2 + SLACK * p).all()


@pytest.mark.parametrize("two_sided", [False, True])
def test_error_of_tan_is_half_a_step_of_the_tangent(two_sided):
    a = 1.4 if two_sided else math.pi / 4
    form = of_codebook(tan.tan(4, a, two_sided))
    p = torch.rand(20_000).double()

    def code(x):
        if two_sided:
            return 15 * (1 + torch.tan(a * (2 * x - 1)) / math.tan(a)) / 2
        return 15 * torch.tan(a * x) / math.tan(a)

    slope = 15 * a / math.tan(a) / math.cos(a) ** 2  # d code / dp at its steepest: float32 values and thresholds
    error = (code(form.dequantize(form.codes(p.log2()))) - code(p)).abs()
    assert (error <= 0.5 + SLACK * slope).all()


def test_error_of_sulq_is_half_a_step_and_half_an_octave():
    """Of log2(p + eta), inside the range of calibration: the code is rounded, then the exponent."""
    for bits in (3, 4, 6):
        form = of_codebook(log.sulq(bits, 0.01, LOW, HIGH))
        p = torch.rand(20_000).double() ** 3
        found = form.dequantize(form.codes(p.log2()))
        error = ((found + 0.01).log2() - (p + 0.01).log2()).abs()
        assert (error <= 0.5 + (HIGH - LOW) / 2**bits / 2 + 8 * SLACK).all()  # eta and thresholds are float32


def test_fqvit_rounds_at_one_and_a_half():
    form = CUT["log2 of FQ-ViT"]
    ratio = 1 + 4095 * torch.rand(20_000).double()
    assert form.steps == 0 and torch.equal(form.codes(-ratio.log2()).double(), fqvit_codes(ratio))


def test_a_scale_shifts_codes_of_lse_alone():
    """Of the maximum it has no meaning: the row's sum divides it away."""
    x, book = octaves(), log.log_sqrt2(4, 0.9)
    scaled, plain = of_codebook(book, "lse"), of_codebook(log.log_sqrt2(4), "lse")
    assert torch.equal(scaled.codes(x), plain.codes(x - math.log2(book.scale.item())))
    assert torch.allclose(scaled.dequantize(torch.arange(17)), plain.dequantize(torch.arange(17)) * book.scale.item())
    top = of_codebook(book, "max")
    assert (top.shift, top.unit) == (0.0, plain.unit) and torch.equal(top.codes(x), plain.codes(x))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_last_code_as_zero(bits):
    """One value less, the others the same."""
    extra, last = (of_codebook(log.log2(bits, zero=zero)) for zero in ("extra", "last"))
    x = octaves()
    value = extra.dequantize(extra.codes(x))
    assert torch.equal(last.dequantize(last.codes(x)), torch.where(value < 2.0 ** (2 - 2**bits), 0, value))


def test_labels():
    labels = {form.label for form in (*STEPPED.values(), *CUT.values())}
    assert labels >= {
        "linear mantissa, 1 bit, max", "linear mantissa, 3 bits, max", "log2, 4 bits, max", "log2, 4 bits, lse",
        "log-sqrt2, 4 bits, max", "adalog, 4 bits, lse", "tan, 4 bits, lse", "twin softmax, 4 bits, max",
        "uniform, 8 bits, lse",
    }  # fmt: skip
    assert log2(4, "lse", normalize=True).label == "log2, 4 bits, lse, divided by the sum"
    assert linear_mantissa(3, "lse").label == "linear mantissa, 3 bits, lse, divided by the sum"


def test_divided_by_the_sum():
    """Always for the maximum; of published formats not for lse, unless asked for."""
    for book in (log.log2(4), twin.uniform(4, 1 / 15)):
        assert of_codebook(book, "max").normalize and not of_codebook(book, "lse").normalize
        assert of_codebook(book, "lse", normalize=True).normalize
    assert log2(3).normalize and not log2(3, "lse").normalize


def test_arguments_are_the_operator_s():
    form = CUT["SULQ"]
    values, thresholds, *numbers = form.arguments()
    assert values is form.values and thresholds is form.thresholds and len(thresholds) == len(values)
    assert numbers == [0.0, 0.0, form.unit, form.offset, "fp16", "lse", False]
    moved = form.to("meta")
    assert moved.values.is_meta and moved.thresholds.is_meta and log2(3).to("meta").values.is_meta


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: linear_mantissa(4), "linear_mantissa: bits=4 is outside 0..3"),
        (lambda: linear_mantissa(-1), "bits=-1 is outside 0..3"),
        (lambda: log2(1), "log2: bits=1 is outside 2..5"),
        (lambda: log2(6), "log2: bits=6 is outside 2..5"),
        (lambda: log2(4, "row"), "log2, 4 bits: anchor 'row' is not one of max, lse"),
        (lambda: of_codebook(log.log2(4, zero="none")), "log2: zero='none' makes every small probability"),
        (lambda: of_codebook(log.adalog(4, 25, zero="none"), "max"), "use 'extra'"),
        (lambda: of_codebook(log.log2(4, torch.tensor([0.5, 1.0]))), "one codebook for all heads"),
        (lambda: of_codebook(log.log_sqrt2(8)), "256 values that are not zero"),
        (lambda: replace(log2(4), anchor="lsm"), "anchor 'lsm'"),
    ],
)
def test_errors(make, said):
    with pytest.raises(ValueError, match=said):
        make()
