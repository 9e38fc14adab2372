"""norm_quant: LayerNorm and quantisation in one pass."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from _problems import U32, assert_nearest_codes, assert_same_bits, padded, reference, transposed

from pyvit_accel import ops

SHAPES = [(1, 1), (1, 16), (3, 5), (2, 63), (13, 64), (7, 65), (1370, 20), (197, 192), (4, 768), (0, 8), (2, 3, 33)]


def assert_equals_reference(kernel, x, weight, bias, *args):
    assert_same_bits(kernel(ops.norm_quant, x, weight, bias, *args), reference(ops.norm_quant, x, weight, bias, *args))


def layer_norm_and_error(x, weight, bias, eps):
    """LayerNorm in float64, and what float32 may add: mean, rstd and each of the four operations rounded once."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    mean = x.mean(-1, keepdim=True)
    gain = weight.abs() / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
    return y, 1.01 * U32 * (gain * (mean.abs() + 4 * (x - mean).abs()) + y.abs())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_equals_reference(kernel, shape, offset):
    C = shape[-1]
    x, weight, bias = torch.randn(shape) * 3 + offset, torch.randn(C), torch.randn(C)
    assert_equals_reference(kernel, x, weight, bias)
    for scale in (torch.rand(1) + 0.01, torch.rand(C) * 0.1 + 0.01):
        for eps in (1e-6, 1e-5):
            assert_equals_reference(kernel, x, weight, bias, scale, eps)


@pytest.mark.parametrize("value", [0.0, 7.0, -1e30])
def test_equals_reference_on_constant_rows(kernel, value):
    x, weight, bias = torch.full((3, 48), value), torch.randn(48), torch.randn(48)
    assert_equals_reference(kernel, x, weight, bias)
    assert_equals_reference(kernel, x, weight, torch.zeros(48))
    assert_equals_reference(kernel, x, weight, bias, torch.tensor([0.02]))


def test_equals_reference_with_outliers(kernel):
    x = torch.randn(20, 100)
    x[:, 3] *= 1e4
    assert_equals_reference(kernel, x, torch.ones(100), torch.zeros(100))


@pytest.mark.parametrize("view", [padded, transposed, lambda x: x[:1].expand(5, -1), lambda x: x[::2, ::3]])
def test_equals_reference_on_strided_rows(kernel, view):
    x = view(torch.randn(11, 50))
    weight, bias, scale = torch.randn(3, 2 * x.shape[1])[:, ::2]
    assert_equals_reference(kernel, x, weight, bias)
    assert_equals_reference(kernel, x, weight, bias, scale.abs() + 0.1)


@pytest.mark.parametrize(("offset", "eps"), [(0.0, 1e-6), (30.0, 1e-5)])
def test_nearest_codes_of_layer_norm(impl, offset, eps):
    x, weight, bias = torch.randn(60, 192) * 2 + offset, torch.randn(192), torch.randn(192)
    y, error = layer_norm_and_error(x, weight, bias, eps)
    for scale in (torch.tensor([0.02]), torch.rand(192) * 0.03 + 0.01):
        q, given = impl(ops.norm_quant, x, weight, bias, scale, eps)
        ratio = y / scale.double()
        assert_nearest_codes(q, ratio, error / scale.double() + 2.01 * U32 * ratio.abs().clamp_max(300))
        assert torch.equal(given, scale)


def test_scale_of_each_row(impl):
    x, weight, bias = torch.randn(2, 30, 192), torch.randn(192), torch.randn(192)
    y, error = layer_norm_and_error(x, weight, bias, 1e-6)
    q, scale = impl(ops.norm_quant, x, weight, bias)
    assert scale.shape == (60,) and scale.dtype == torch.float32
    scale = scale.double().reshape(2, 30, 1)
    amax = y.abs().amax(-1, keepdim=True)
    error = error.amax(-1, keepdim=True)
    assert ((scale - amax / 127).abs() <= error / 127 + U32 * scale).all()
    assert_nearest_codes(q, y / scale, error / scale + 2.01 * U32 * 128)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("clip", [1.0, 0.7])
def test_bits_and_clip(kernel, bits, clip):
    x, weight, bias, scale = torch.randn(30, 192), torch.randn(192), torch.randn(192), torch.rand(192) + 0.1
    q, found = kernel(ops.norm_quant, x, weight, bias, bits=bits, clip=clip)
    assert_same_bits((q, found), reference(ops.norm_quant, x, weight, bias, bits=bits, clip=clip))
    assert q.min() >= -(2 ** (bits - 1)) and q.max() == 2 ** (bits - 1) - 1
    static = reference(ops.norm_quant, x, weight, bias, scale, bits=bits)
    assert_same_bits(kernel(ops.norm_quant, x, weight, bias, scale, bits=bits), static)


def test_dead_row(impl):
    """A constant row normalises to the bias; with none its codes are zero and its scale is usable."""
    q, scale = impl(ops.norm_quant, torch.full((2, 20), 5.0), torch.ones(20), torch.zeros(20))
    assert not q.any() and (scale > 0).all() and (1 / scale).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_computes_in_float32(impl, dtype):
    x, weight, bias = torch.randn(5, 33).to(dtype), torch.randn(33), torch.randn(33)
    assert_same_bits(impl(ops.norm_quant, x, weight, bias), impl(ops.norm_quant, x.float(), weight, bias))


def test_errors():
    x, C = torch.zeros(2, 8), torch.ones(8)
    message = "norm_quant: weight has shape (7,); use (8,)"
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        ops.norm_quant(x, C[:7], C)
    with pytest.raises(ValueError, match=re.escape("norm_quant: bias has shape (1,); use (8,)")):
        ops.norm_quant(x, C, C[:1])
    message = "norm_quant: scale has shape (2,); use (1,) or (8,)"
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        ops.norm_quant(x, C, C, C[:2])
