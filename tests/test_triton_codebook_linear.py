"""The Triton launcher codebook_linear against its reference.

Levels are integers whose sums every unit holds, so that results are the reference's bit for bit; any others are within
a derived bound.
"""

from __future__ import annotations

from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from _problems import U32
from _triton import DEVICE, assert_equal, kernel, launches, random_codes, run, uniform

from pyvit_accel import reference
from pyvit_accel.formats import operands
from pyvit_accel.formats.packed import pack

BITS = (2, 3, 4, 5, 6, 8)
FP8 = ("e4m3", "e5m2")
# Largest level with which 128 products add up to what the unit holds: 13 bits of Hopper's fp8 sums, float32.
LARGEST = {"fp16": 128, "bf16": 128, "e4m3": 8, "e5m2": 8}
RUNNABLE = [o for o in operands.OPERANDS if o != "int8" and (o != "bf16" or DEVICE == "cuda")]


@contextmanager
def on(architecture):
    """The launcher does what it does on a GPU of this architecture."""
    module = import_module("pyvit_accel.kernels.codebook_linear")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_capability", lambda x: divmod(architecture, 10))
        yield


def integers(operand, n):
    """n levels, no two neighbours related; of 256 fp8 levels, those of its bytes."""
    if n == 256 and operand in FP8:
        return torch.arange(256, dtype=torch.uint8).view(operands.OPERANDS[operand]).float()
    return torch.randint(-LARGEST[operand], LARGEST[operand] + 1, (n,)).float()


def small(operand, lut):
    """Codes of integer levels small enough to be exact."""
    return ((lut.abs() <= LARGEST[operand]) & (lut == lut.round())).nonzero()[:, 0]


def choose(allowed, *shape):
    return allowed[torch.randint(len(allowed), shape)]


def arguments(
    operand, w_bits, levels, M, N, K, activation="none", parts="", out_columns=None, out_bits=8, gap=3
):  # fmt: skip
    """Arguments with the named parts: r x_scale per row, b bias, l layer scale, + residual; rows lie a gap apart."""
    x_lut, w_lut = integers(operand, levels), integers(operand, 2**w_bits)
    x = choose(small(operand, x_lut), M, K + gap).to(torch.uint8)[:, :K]
    w = (choose(small(operand, w_lut), N, K) - 2 ** (w_bits - 1)).to(torch.int8)
    return (
        x, uniform(M if "r" in parts else 1), x_lut, pack(w, w_bits), uniform(N), w_lut,
        torch.randn(N) if "b" in parts else None, operand, activation, torch.randn(N) if "l" in parts else None,
        torch.randn(M, N + gap)[:, :N] if "+" in parts else None,
        None if out_columns is None else uniform(out_columns) * 2 ** (8 - out_bits),
        0 if out_columns is None else -3, out_bits,
    )  # fmt: skip


def check(*args):
    torch.manual_seed(0)
    assert_equal("codebook_linear", *arguments(*args))


def check_on(architecture, *args):
    with on(architecture):
        check(*args)


@pytest.mark.parametrize("levels", [3, 17, 256])
@pytest.mark.parametrize("w_bits", BITS)
@pytest.mark.parametrize("operand", RUNNABLE)
def test_matches_reference(operand, w_bits, levels):
    run(check, operand, w_bits, levels, 35, 37, 159)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU shows what it does itself")
@pytest.mark.parametrize("architecture", [80, 100])
@pytest.mark.parametrize("operand, w_bits, levels", [("e4m3", 8, 256), ("e5m2", 4, 9)])
def test_fp8_on_other_architectures(operand, w_bits, levels, architecture):
    """As float16, and without the second sum."""
    run(check_on, architecture, operand, w_bits, levels, 35, 37, 159)


@pytest.mark.parametrize("operand, w_bits, levels", [("fp16", 3, 17), ("e4m3", 4, 17), ("e4m3", 8, 256)])
@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (1, 5, 16), (65, 79, 128), (70, 130, 257), (0, 16, 8)])
def test_tails(operand, w_bits, levels, M, N, K):
    run(check, operand, w_bits, levels, M, N, K, "none", "rb+")


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize("parts, out_columns, out_bits", [("", 1, 8), ("rbl+", None, 8), ("bl", 33, 4), ("r+", 33, 2)])
def test_epilogue(parts, out_columns, out_bits, activation):
    run(check, "fp16", 4, 17, 37, 33, 40, activation, parts, out_columns, out_bits)


def check_missing_levels(operand, K):
    """Codes that no level has are NaN in the tables, code 0 among them, and none of them is in the operands."""
    torch.manual_seed(0)
    x_lut, w_lut = integers(operand, 16), integers(operand, 16)
    x_lut[::3] = w_lut[::3] = torch.nan
    has = (~w_lut.isnan()).nonzero()[:, 0]
    x, w = choose(has, 5, K).to(torch.uint8), (choose(has, 18, K) - 8).to(torch.int8)
    assert not w_lut[8].isnan()  # the code that pads a packed weight
    one = torch.ones(18)
    args = x, one[:1], x_lut, pack(w, 4), one, w_lut, None, operand, "none", None, None, None, 0, 8
    assert_equal("codebook_linear", *args)


@pytest.mark.parametrize("operand", ["fp16", "e5m2"])
@pytest.mark.parametrize("K", [1, 32, 130])
def test_codes_without_a_level(operand, K):
    run(check_missing_levels, operand, K)


def check_identity(operand, w_bits):
    """x = I, as codes of the levels 0 and 1, returns the decoded weight."""
    torch.manual_seed(0)
    K, N, one = 150, 45, torch.ones(45)
    w_lut = operands.round_to(operand, torch.randn(2**w_bits).double() * 3).float()
    if w_bits == 8 and operand in FP8:
        w_lut = integers(operand, 256)
    # The interpreter converts subnormals of e5m2 wrongly.
    known = w_lut.isfinite() & ((w_lut == 0) | (w_lut.abs() >= 2.0**-14) | (operand != "e5m2") | (DEVICE == "cuda"))
    codes = choose(known.nonzero()[:, 0], N, K)
    w_packed = pack((codes - 2 ** (w_bits - 1)).to(torch.int8), w_bits)
    args = one[:1], torch.tensor([0.0, 1.0]), w_packed, one, w_lut, None, operand, "none", None, None, None, 0, 8
    assert torch.equal(kernel("codebook_linear", torch.eye(K).to(torch.uint8), *args).T, w_lut[codes])


@pytest.mark.parametrize("w_bits", [3, 4, 8])
@pytest.mark.parametrize("operand", RUNNABLE)
def test_identity_returns_the_weight(operand, w_bits):
    run(check_identity, operand, w_bits)


def check_bound(operand, K):
    """Levels of any size: a float32 sum; fp8 sums keep 13 bits on Hopper, over 128 inputs, four instructions."""
    torch.manual_seed(0)
    x_lut, w_lut = (operands.round_to(operand, torch.randn(64).double() * 5).float() for _ in range(2))
    x, q = torch.randint(64, (40, K), dtype=torch.uint8), random_codes(6, 70, K)
    x_scale, w_scale = uniform(40), uniform(70)
    rest = None, operand, "none", None, None, None, 0, 8
    y = kernel("codebook_linear", x, x_scale, x_lut, pack(q, 6), w_scale, w_lut, *rest)
    a, b = x_lut.double()[x.int()], w_lut.double()[q.int() + 32]
    scale = x_scale.double()[:, None] * w_scale.double()
    relative = (K + 2) * U32 + (4 * 2.0**-12 if operand in FP8 and DEVICE == "cuda" else 0)
    assert ((y.double() - (a @ b.T) * scale).abs() <= 1.01 * relative * (a.abs() @ b.abs().T) * scale).all()
    truth = reference.codebook_linear(x, x_scale, x_lut, pack(q, 6), w_scale, w_lut, *rest)
    assert ((y - truth).abs() <= 2.02 * relative * (a.abs() @ b.abs().T) * scale).all()


@pytest.mark.parametrize("K", [33, 500])
@pytest.mark.parametrize("operand", RUNNABLE)
def test_within_bound_of_float64(operand, K):
    run(check_bound, operand, K)


@pytest.mark.parametrize("architecture", [80, 89, 90, 100])
@pytest.mark.parametrize(
    "operand, levels, lookups", [("fp16", 256, 1), ("e4m3", 256, 0), ("e5m2", 256, 0), ("e4m3", 17, 1)]
)
def test_all_bytes_of_fp8_need_no_lookup(operand, levels, lookups, architecture):
    with on(architecture):
        args = arguments(operand, 8, levels, 5, 8, 32)
        kernels = "_decode_kernel", "_codebook_linear_kernel"
        recorded = launches("codebook_linear", lambda m: m.codebook_linear(*args), *kernels)
    assert len(recorded) == 1 + (lookups if architecture >= 89 else 1)
