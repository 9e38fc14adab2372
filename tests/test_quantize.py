"""quantize: int8 codes of float rows, static scales and one per row."""

from __future__ import annotations

import re

import pytest
import torch
from _problems import U32, assert_nearest_codes, assert_same_bits, padded, reference, transposed

from pyvit_accel import ops

SHAPES = [(1, 1), (1, 16), (3, 5), (2, 63), (13, 64), (7, 65), (1370, 20), (4, 1000), (0, 8), (2, 3, 33)]


def assert_equals_reference(kernel, x, *args):
    assert_same_bits(kernel(ops.quantize, x, *args), reference(ops.quantize, x, *args))


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(kernel, shape):
    x = torch.randn(shape) * 20
    assert_equals_reference(kernel, x)
    for scale in (torch.rand(1) + 0.05, torch.rand(shape[-1]) + 0.05):
        for zero_point in (0, -128, 127, 40):
            assert_equals_reference(kernel, x, scale, zero_point)


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-30, -3e38, 0.1, float(2**22 + 1)])
def test_equals_reference_on_constant_rows(kernel, value):
    x = torch.full((3, 37), value)
    assert_equals_reference(kernel, x)
    assert_equals_reference(kernel, x, torch.tensor([0.3]), 7)


def test_equals_reference_on_ties_and_infinities(kernel):
    x = torch.cat([torch.arange(-300, 301) / 2, torch.tensor([torch.inf, -torch.inf])])[None]
    for zero_point in (0, 1, -3):
        assert_equals_reference(kernel, x, torch.ones(1), zero_point)


VIEWS = [padded, transposed, lambda x: x[:1].expand(5, -1), lambda x: x[::2, ::3], lambda x: x[0].expand(2, 3, -1)]


@pytest.mark.parametrize("view", VIEWS)
def test_equals_reference_on_strided_rows(kernel, view):
    x = view(torch.randn(11, 50))
    assert_equals_reference(kernel, x)
    assert_equals_reference(kernel, x, torch.rand(2 * x.shape[-1])[::2] + 0.1, 3)


@pytest.mark.parametrize("zero_point", [0, 17])
def test_nearest_codes(impl, zero_point):
    """x / scale in float32 is off by the rounding of 1 / scale and of the product."""
    x, scale = torch.randn(40, 100), torch.rand(100) * 0.05 + 0.001
    q, given = impl(ops.quantize, x, scale, zero_point)
    ratio = x.double() / scale.double()
    assert_nearest_codes(q, ratio + zero_point, 2.01 * U32 * ratio.abs().clamp_max(300))
    assert torch.equal(given, scale)


def test_scale_of_each_row_is_its_maximum_over_127(impl):
    x = torch.randn(2, 9, 70) * torch.logspace(-9, 9, 9)[:, None]
    x[1, 4] = 0
    q, scale = impl(ops.quantize, x)
    rows = x.reshape(18, 70)
    live = rows.abs().amax(1) > 0
    assert q.shape == x.shape and scale.shape == (18,) and live.sum() == 17
    assert torch.equal(scale[live], rows[live].abs().amax(1) / 127)
    assert scale[13] > 0 and not q[1, 4].any()
    assert (q.reshape(18, 70)[live].abs().amax(1) == 127).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("minimum", [-0.17, 0.0, 3.0])
def test_equals_reference_above_a_minimum(kernel, shape, minimum):
    for x in (torch.rand(shape) * 5 + minimum, torch.full(shape, minimum), transposed(torch.rand(9, 50) + minimum)):
        expected = reference(ops.quantize, x, minimum=minimum)
        assert_same_bits(kernel(ops.quantize, x, minimum=minimum), expected)


def test_codes_span_minimum_to_row_maximum(impl):
    """Values x >= minimum come back as (q + 128) scale + minimum, off by half a step; the row's maximum is code 127."""
    minimum = -0.17
    x = torch.rand(2, 9, 70) * torch.logspace(-3, 3, 9)[:, None] + minimum
    q, scale = impl(ops.quantize, x, minimum=minimum)
    step = scale.double().reshape(2, 9, 1)
    shifted = x.double() - minimum
    top = shifted.amax(-1, keepdim=True)
    assert ((step - top / 255).abs() <= 3 * U32 * (top / 255 + abs(minimum))).all()
    assert (q.amax(-1) == 127).all()
    assert_nearest_codes(q, shifted / step - 128, U32 * (abs(minimum) + x.double().abs()) / step + 3 * U32 * 256)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("clip", [1.0, 0.61])
def test_bits_and_clip(kernel, bits, clip):
    x = torch.randn(2, 9, 70) * torch.logspace(-3, 3, 9)[:, None]
    for kwargs in ({"clip": clip}, {"clip": clip, "minimum": x.min().item()}):
        q, scale = kernel(ops.quantize, x, bits=bits, **kwargs)
        assert_same_bits((q, scale), reference(ops.quantize, x, bits=bits, **kwargs))
        assert q.min() >= -(2 ** (bits - 1)) and q.amax(-1).eq(2 ** (bits - 1) - 1).any()
    q, scale = kernel(ops.quantize, x, bits=bits, clip=clip)
    step = x.abs().amax(-1, keepdim=True).double() * clip / (2 ** (bits - 1) - 1)
    assert ((scale.view(2, 9, 1) - step).abs() <= 4 * U32 * step).all()
    static = torch.rand(70) + 0.1
    assert_same_bits(kernel(ops.quantize, x, static, 3, bits=bits), reference(ops.quantize, x, static, 3, bits=bits))


TABLES = {
    "16 levels": torch.randint(-128, 128, (16,)).sort().values.repeat_interleave(16),
    "squares": ((torch.arange(256) ** 2) // 256 - 128),
    "any": torch.randint(-128, 128, (256,)),
    "one": torch.full((256,), -7),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (13, 64), (7, 65), (4, 1000), (0, 8), (2, 3, 33)])
def test_table_takes_the_place_of_codes(kernel, shape, table):
    x, table = torch.randn(shape) * 3, TABLES[table].to(torch.int8)
    for kwargs in ({}, {"clip": 0.7}, {"minimum": -1.0}):
        q, scale = kernel(ops.quantize, x, **kwargs)
        assert_same_bits(kernel(ops.quantize, x, **kwargs, table=table), (table[q.long() + 128], scale))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_computes_in_float32(impl, dtype):
    x = torch.randn(5, 33).to(dtype)
    assert_same_bits(impl(ops.quantize, x), impl(ops.quantize, x.float()))


def test_one_row_without_batch(impl):
    x = torch.randn(33)
    q, scale = impl(ops.quantize, x)
    assert q.shape == (33,) and scale.shape == (1,) and q.abs().max() == 127


def test_errors():
    x = torch.zeros(2, 8)
    message = "quantize: scale has shape (3,); use (1,) or (8,)"
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        ops.quantize(x, torch.ones(3))
    with pytest.raises(ValueError, match=re.escape("quantize: scale has shape (1, 8); use (1,) or (8,)")):
        ops.quantize(x, torch.ones(1, 8))
    with pytest.raises(TypeError, match=r"quantize: scale must be float32, got torch\.float64"):
        ops.quantize(x, torch.ones(1, dtype=torch.float64))
    for shape in ((), (2, 0)):
        message = f"x has shape {shape}; it needs a last dimension of at least 1"
        with pytest.raises(ValueError, match=re.escape(message)):
            ops.quantize(torch.zeros(shape))
    message = "quantize: zero_point=5 needs a static scale; per-row scales are symmetric"
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        ops.quantize(x, zero_point=5)
    for bits in (1, 9):
        with pytest.raises(ValueError, match=f"^quantize: bits={bits}; codes have 2 to 8 bits$"):
            ops.quantize(x, bits=bits)
    for clip in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match=f"^quantize: clip={clip} is outside"):
            ops.quantize(x, clip=clip)
    with pytest.raises(ValueError, match=r"^quantize: clip=0\.5 is for scales per row"):
        ops.quantize(x, torch.ones(1), clip=0.5)
    table = torch.arange(-128, 128, dtype=torch.int8)
    for wrong in (table.int(), table[:255]):
        with pytest.raises(ValueError, match=r"^quantize: table must be int8 \(256,\), got torch.int"):
            ops.quantize(x, table=wrong)
    with pytest.raises(ValueError, match=r"^quantize: a table replaces codes of 8 bits, got bits=4$"):
        ops.quantize(x, bits=4, table=table)
    with pytest.raises(ValueError, match=r"^quantize: a table is for scales per row; give no scale with it"):
        ops.quantize(x, torch.ones(1), table=table)
    message = "quantize: minimum=-1.0 is for scales per row; a static scale takes a zero_point"
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        ops.quantize(x, torch.ones(1), minimum=-1.0)
