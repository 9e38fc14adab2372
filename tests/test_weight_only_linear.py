"""weight_only_linear: float activations x packed integer weights, accumulated in float32 in any order."""

from __future__ import annotations

import re

import pytest
import torch
from _problems import U32, assert_same_bits, padded, transposed, weights

from pyvit_accel import ops

SHAPES = [(1, 16, 16), (1, 3, 1), (2, 4, 16), (5, 63, 17), (13, 64, 33), (25, 65, 48), (12, 768, 40), (1370, 20, 17)]
UNIT_ROUNDOFF = {torch.float32: U32, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def product_and_error(x, w, w_scale, bias):
    """The product in float64, and what a float32 sum over K in any order, scale, bias and the result may add."""
    scaled = w.double() * w_scale.double()[:, None]
    y = x.double() @ scaled.T
    error = (x.shape[-1] + 1.01) * U32 * (x.double().abs() @ scaled.abs().T)
    if bias is not None:
        y = y + bias.double()
        error = error + 1.01 * U32 * y.abs()
    return y, error + UNIT_ROUNDOFF[x.dtype] * y.abs() + (2.0**-25 if x.dtype == torch.float16 else 0)


def assert_within_bound(impl, x, w, *args, bias=None):
    w_packed, w_scale = args
    y, error = product_and_error(x, w, w_scale, bias)
    actual = impl(ops.weight_only_linear, x, w_packed, w_scale, bias)
    assert actual.dtype == x.dtype and actual.shape == y.shape
    assert ((actual.double() - y).abs() <= error).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", list(UNIT_ROUNDOFF))
def test_within_bound_of_float64(impl, shape, dtype):
    M, K, N = shape
    x = torch.randn(M, K).to(dtype)
    assert_within_bound(impl, x, *weights(N, K), bias=torch.randn(N))
    assert_within_bound(impl, x, *weights(N, K))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(("K", "groups"), [(60, 1), (60, 4), (192, 3), (37, 37), (130, 10), (66, 2)])
def test_groups(impl, bits, K, groups):
    """Identity inputs give the decoded weight bit for bit, others the product within its bound."""
    q, w_packed, _ = weights(33, K, bits=bits)
    scale, zero_point = torch.rand(33, groups) + 0.01, torch.randint(-9, 9, (33, groups)).float()
    runs = q.view(33, groups, -1).float()
    for zero in (zero_point, None):
        w = ((runs - (0 if zero is None else zero[..., None])) * scale[..., None]).flatten(1)
        args = w_packed, scale, torch.randn(33), zero
        decoded = impl(ops.weight_only_linear, torch.eye(K), w_packed, scale, None, zero)
        assert_same_bits(decoded, w.T.contiguous())
        for M in (1, 7, 25):
            x = torch.randn(M, K)
            y, error = product_and_error(x, w, torch.ones(33), args[2])
            assert ((impl(ops.weight_only_linear, x, *args).double() - y).abs() <= error).all()


@pytest.mark.parametrize("M", range(1, 27))
def test_every_remainder_of_rows(impl, M):
    assert_within_bound(impl, torch.randn(M, 37), *weights(50, 37))


@pytest.mark.parametrize("kind", ["lowest", "highest", "zeros", "alternating"])
def test_extreme_weights_and_activations(impl, kind):
    assert_within_bound(impl, torch.randn(7, 130) * torch.logspace(-15, 15, 130), *weights(33, 130, kind))


def test_decodes_weights_exactly(impl):
    w, w_packed, w_scale = weights(33, 50)
    decoded = w.T.float() * w_scale
    for dtype in UNIT_ROUNDOFF:
        y = impl(ops.weight_only_linear, torch.eye(50, dtype=dtype), w_packed, w_scale)
        assert_same_bits(y, decoded.to(dtype))


@pytest.mark.parametrize("layout", [padded, transposed, lambda x: x[:1].expand(9, -1), lambda x: x[::2, ::3]])
def test_strided_rows(kernel, layout):
    """Bit for bit what the contiguous rows give. (The reference's matmul adds them in another order.)"""
    x = layout(torch.randn(11, 50))
    w, w_packed, w_scale = weights(33, x.shape[1])
    bias = torch.randn(66)[::2]
    expected = kernel(ops.weight_only_linear, x.contiguous(), w_packed, w_scale, bias.contiguous())
    assert_same_bits(kernel(ops.weight_only_linear, x, transposed(w_packed), padded(w_scale), bias), expected)
    assert_within_bound(kernel, x, w, w_packed, w_scale, bias=bias)


def test_leading_dimensions(impl):
    _, w_packed, w_scale = weights(19, 37)
    x = torch.randn(24, 37)
    flat = impl(ops.weight_only_linear, x, w_packed, w_scale)
    assert_same_bits(impl(ops.weight_only_linear, x.reshape(2, 3, 4, 37), w_packed, w_scale), flat.reshape(2, 3, 4, 19))
    assert impl(ops.weight_only_linear, x[0], w_packed, w_scale).shape == (19,)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_empty(impl, shape):
    _, w_packed, w_scale = weights(5, 16)
    assert impl(ops.weight_only_linear, torch.empty(shape), w_packed, w_scale).shape == (*shape[:-1], 5)


def test_errors():
    _, w_packed, w_scale = weights(20, 10)
    text = "weight_only_linear: x has K=70 and w_scale N=20, but w_packed of N=20, K=70 has shape (2, 448) for 2 bits"
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        ops.weight_only_linear(torch.zeros(2, 70), w_packed, w_scale)
    text = "weight_only_linear: x must be float, got torch.int8; integer codes go to lowbit_linear"
    with pytest.raises(TypeError, match="^" + re.escape(text) + "$"):
        ops.weight_only_linear(torch.zeros(2, 10, dtype=torch.int8), w_packed, w_scale)
    text = "weight_only_linear: x has K=10 and w_scale N=40, but w_packed of N=40, K=10 has shape (3, 192) for 2 bits"
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        ops.weight_only_linear(torch.zeros(2, 10), w_packed, torch.ones(40))
    text = "weight_only_linear: w_scale has shape (20, 3); use (N,), or (N, G) where G divides K=10"
    with pytest.raises(ValueError, match="^" + re.escape(text) + "$"):
        ops.weight_only_linear(torch.zeros(2, 10), w_packed, torch.ones(20, 3))
    text = "weight_only_linear: w_zero_point (20, 2) needs a w_scale (N, G) of its shape, got (20,)"
    with pytest.raises(ValueError, match="^" + re.escape(text) + "$"):
        ops.weight_only_linear(torch.zeros(2, 10), w_packed, w_scale, None, torch.zeros(20, 2))
