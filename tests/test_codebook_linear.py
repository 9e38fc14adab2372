"""codebook_linear: products of levels summed in float32, against float64; every operand, every epilogue."""

from __future__ import annotations

import re

import pytest
import torch
from _problems import CODES, U32, assert_same_bits, codes, padded, transposed, weights
from test_lowbit_linear import epilogue_and_error
from test_scalar import ERROR

from pyvit_accel import ops, reference
from pyvit_accel.formats import fp8, log, multiquant, operands, packed, pow2, subset, twin

SHAPES = [(1, 16, 16), (1, 3, 1), (5, 63, 17), (25, 65, 48), (3, 300, 100), (260, 20, 33)]
INTEGERS = torch.arange(256).float() - 128
PAIRS = {  # of x and w: every family as an operand, each in a type that holds both exactly
    "e4m3 x e4m3": (fp8.fp8("e4m3"), fp8.fp8("e4m3"), "e4m3"),
    "e5m2 x e5m2": (fp8.fp8("e5m2"), fp8.fp8("e5m2"), "e5m2"),
    "e4m3 x pow2": (fp8.fp8("e4m3"), pow2.ps_weight(), "e4m3"),
    "int8 x pow2": (twin.uniform(8, 1.0, 128), pow2.q_weight(), "fp16"),
    "log2 x int4": (log.log2(4), twin.uniform(4, 1.0, 8), "e4m3"),
    "log2, the last code zero, x pow2": (log.log2(4, zero="last"), pow2.q_weight(), "e5m2"),
    "adalog x int6": (log.adalog(4, 25), twin.uniform(6, 1.0, 32), "fp16"),
    "twin gelu x int4": (twin.gelu(4, 0.5, 0.0625), twin.uniform(4, 1.0, 7), "fp16"),
    "int5 x multiquant": (twin.uniform(5, 1.0, 16), multiquant.weight(-1.0, 1.0), "bf16"),
    "subset x int3": (subset.subset(subset.universal_set()[100::12][:16]), twin.uniform(3, 1.0, 4), "fp16"),
}


def tables(books):
    """The operands of a pair of codebooks by code, and the codes that occur: of x any, of w packed ones."""
    x_book, w_book, operand = books
    x_book, w_book = (book.with_operand(operand) for book in (x_book, w_book))
    assert all(operands.exact_prescales(book.levels, operand) for book in (x_book, w_book))
    return x_book.operand_lut(), w_book.operand_lut(), x_book.codes, w_book.codes, w_book.bits


def problem(M, K, N, books):
    """A call with every argument but the epilogue, and x and w (float64) as they are multiplied."""
    x_lut, w_lut, x_codes, w_codes, bits = tables(books)
    x = x_codes[torch.randint(len(x_codes), (M, K))].to(torch.uint8)
    w = w_codes[torch.randint(len(w_codes), (N, K))]
    w_packed = packed.pack((w.int() - 2 ** (bits - 1)).to(torch.int8), bits)
    args = x, torch.rand(M) * 0.02 + 1e-4, x_lut, w_packed, torch.rand(N) * 0.01 + 1e-4, w_lut
    return args, x_lut.double()[x.long()], w_lut.double()[w.long()]


def sums_and_error(x, w):
    """x @ w.T and what K float32 products and sums of it may be off."""
    return x @ w.T, (x.shape[1] + 0.01) * U32 * (x.abs() @ w.abs().T)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pair", PAIRS)
def test_within_bound_of_float64(impl, pair, shape):
    args, x, w = problem(*shape, PAIRS[pair])
    sums, error = sums_and_error(x, w)
    scale = args[1].double()[:, None] * args[4].double()
    y = impl(ops.codebook_linear, *args, operand=PAIRS[pair][2])
    assert y.dtype == torch.float32 and y.shape == sums.shape
    assert ((y.double() - sums * scale).abs() <= (error + 3.01 * U32 * sums.abs()) * scale).all()


@pytest.mark.parametrize("pair", PAIRS)
def test_decodes_weights_exactly(impl, pair):
    """x with a single one in each row gives every level of w, bit for bit; and the other way round."""
    (x, _, x_lut, w_packed, _, w_lut), _, w = problem(40, 40, 33, PAIRS[pair])
    one, operand = torch.ones(1), PAIRS[pair][2]
    y = impl(ops.codebook_linear, torch.eye(40).byte(), one, torch.tensor([0.0, 1.0]), w_packed, torch.ones(33), w_lut,
             operand=operand)  # fmt: skip
    assert_same_bits(y, w.T.float())
    identity, of_identity = packed.pack(torch.eye(40, dtype=torch.int8), 2), torch.tensor([0.0, 0.0, 0.0, 1.0])
    y = impl(ops.codebook_linear, x, one, x_lut, identity, torch.ones(40), of_identity, operand=operand)
    assert_same_bits(y, x_lut[x.int()])


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_integer_levels_are_lowbit_linear(impl, bits, kind):
    """The op it shares its epilogue with, bit for bit where float32 sums are exact, in every form of the epilogue."""
    _, w_packed, w_scale = weights(37, 50, kind, bits)
    x, levels = codes("random", 13, 50), torch.arange(2.0**bits) - 2 ** (bits - 1)
    parts = {"activation": "gelu", "layer_scale": torch.randn(37), "residual": torch.randn(13, 37)}
    for epilogue in ({}, parts, parts | {"out_scale": torch.rand(37) + 0.1, "out_zero_point": -3, "out_bits": 4}):
        for bias, x_scale in ((torch.randn(37), torch.rand(13)), (None, torch.rand(1))):
            truth = ops.lowbit_linear(x, x_scale, w_packed, w_scale, bias, **epilogue)
            args = (x.view(torch.uint8) ^ 128), x_scale, INTEGERS, w_packed, w_scale, levels, bias
            assert_same_bits(impl(ops.codebook_linear, *args, **epilogue), truth)


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "quick_gelu"])
def test_epilogue_within_bound_of_float64(impl, activation):
    integer = twin.uniform(8, 1.0, 128)
    (x, x_scale, x_lut, w_packed, w_scale, w_lut), *_ = problem(29, 50, 65, (integer, integer, "fp16"))
    bias = torch.randn(65)
    kwargs = {"layer_scale": torch.randn(65), "residual": torch.randn(29, 65), "activation": activation}
    y = impl(ops.codebook_linear, x, x_scale, x_lut, w_packed, w_scale, w_lut, bias, **kwargs)
    integers = (x ^ 128).view(torch.int8), x_scale, w_packed, w_scale, bias  # sums stay below 2^24: exact
    truth, error = epilogue_and_error(integers, kwargs | {"x_zero_point": 0}, activation)
    assert activation in ERROR and ((y.double() - truth).abs() <= error).all()


def test_weights_are_decoded_in_blocks(monkeypatch):
    """Whatever the size of a block, each feature meets its own scale and bias."""
    args, x, w = problem(7, 40, 50, PAIRS["e4m3 x pow2"])
    sums, error = sums_and_error(x, w)
    scale = args[1].double()[:, None] * args[4].double()
    module = __import__("sys").modules["pyvit_accel.reference.codebook_linear"]
    for block in (1, 16 * 40, 32 * 40, 10**6):
        monkeypatch.setattr(module, "BLOCK", block)
        y = reference.codebook_linear(*args, None, "e4m3", "none", None, None, None, 0, 8)
        assert ((y.double() - sums * scale).abs() <= (error + 3.01 * U32 * sums.abs()) * scale).all()


@pytest.mark.parametrize("layout", [padded, transposed, lambda x: x[:1].expand(9, -1), lambda x: x[::2, ::3]])
def test_strided_rows(impl, layout):
    x_lut, w_lut, *_ = tables(PAIRS["e4m3 x e4m3"])
    x = layout(torch.randint(0, 127, (11, 50), dtype=torch.uint8))
    _, w_packed, w_scale = weights(33, x.shape[1])
    args = torch.ones(1), x_lut, w_packed, w_scale, w_lut.nan_to_num()
    expected = impl(ops.codebook_linear, x.contiguous(), *args, operand="fp16")
    assert_same_bits(impl(ops.codebook_linear, x, *args, operand="fp16"), expected)


def test_leading_dimensions_and_empty(impl):
    (x, x_scale, *args), *_ = problem(24, 37, 19, PAIRS["log2 x int4"])
    residual = torch.randn(24, 19)
    flat = impl(ops.codebook_linear, x, x_scale, *args, operand="e4m3", residual=residual)
    shaped = {"operand": "e4m3", "residual": residual.view(2, 3, 4, 19)}
    y = impl(ops.codebook_linear, x.view(2, 3, 4, 37), x_scale, *args, **shaped)
    assert_same_bits(y, flat.view(2, 3, 4, 19))
    assert impl(ops.codebook_linear, x[0], x_scale[:1], *args, operand="e4m3").shape == (19,)
    for shape in ((0, 37), (2, 0, 37)):
        y = impl(ops.codebook_linear, torch.empty(shape, dtype=torch.uint8), x_scale[:1], *args, operand="e4m3")
        assert y.shape == (*shape[:-1], 19)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    args, *_ = problem(24, 37, 19, PAIRS["e4m3 x e4m3"])
    compiled = torch.compile(ops.codebook_linear, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (24, 7):
        call = (args[0][:rows], args[1][:rows], *args[2:])
        assert_same_bits(compiled(*call, operand="e4m3"), ops.codebook_linear(*call, operand="e4m3"))


def refused(kind, text, *args, **kwargs):
    with pytest.raises(kind, match="^codebook_linear: " + re.escape(text)):
        ops.codebook_linear(*args, **kwargs)


def test_errors():
    args, *_ = problem(5, 10, 20, PAIRS["e4m3 x pow2"])
    x, x_scale, w_lut = args[0], args[1], args[5]
    x_text = "x must be uint8 codes, got torch.int8; quantize it with Codebook.quantize"
    refused(TypeError, x_text, x.view(torch.int8), *args[1:])
    wide = torch.zeros(5, 70, dtype=torch.uint8)
    refused(ValueError, "x has K=70 and w_scale N=20, but w_packed of", wide, *args[1:])
    refused(ValueError, "operand 'int8' is not one of fp16, bf16, e4m3, e5m2", *args, operand="int8")
    refused(ValueError, "activation 'relu' is not one of none, gelu", *args, operand="e4m3", activation="relu")
    for length in (257, 0):
        text = f"x_lut has shape ({length},); use (L,), 256 levels or fewer"
        refused(ValueError, text, x, x_scale, torch.zeros(length), *args[3:])
    refused(ValueError, "w_lut has shape (16,); use (32,)", *args[:5], w_lut[:16])
    refused(TypeError, "w_lut must be float32, got torch.float64", *args[:5], w_lut.double())
    refused(ValueError, "x_scale has shape (4,); use (1,) or (5,)", x, x_scale[:4], *args[2:], operand="e4m3")
    refused(ValueError, "bias has shape (3,); use (20,)", *args, torch.zeros(3))
    refused(ValueError, "out_bits=9; codes have 2 to 8 bits", *args, operand="e4m3", out_bits=9)
    refused(ValueError, "residual is (5, 19), the output (5, 20)", *args, operand="e4m3", residual=torch.zeros(5, 19))


def test_levels_that_the_operand_does_not_hold():
    """Refused with the number and what it would have become; NaN stands for codes that no level has."""
    args, *_ = problem(5, 10, 20, PAIRS["e4m3 x pow2"])
    x, x_scale, x_lut, *_, w_lut = args
    short = x_lut[:100].clone()
    short[3] = 0.3
    text = "x_lut[3] is 0.300000012, which e4m3 holds as 0.3125; use an operand that holds every level"
    refused(ValueError, text, x, x_scale, short, *args[3:], operand="e4m3")
    off = w_lut.clone()
    off[7] = 2.0**9
    refused(ValueError, "w_lut[7] is 512, which e4m3 holds as 448", *args[:5], off, operand="e4m3")
    off[7] = torch.inf
    refused(ValueError, "w_lut[7] is inf, which e4m3 holds as 448", *args[:5], off, operand="e4m3")
    swapped = x_lut.clone()
    swapped[[8, 9]] = x_lut[[9, 8]]
    text = "x_lut[8] is 0.017578125, but x_lut has 256 levels of e4m3, so codes are its bytes, and byte 8 is 0.015625"
    refused(ValueError, text, x, x_scale, swapped, *args[3:], operand="e4m3")
    assert ops.codebook_linear(x, x_scale, swapped, *args[3:], operand="fp16").isfinite().all()
    assert x_lut[127].isnan()
