"""quant_block: the bits of the ops it consists of, for any division of rows over threads, images and panels."""

from __future__ import annotations

import pytest
import torch
from _problems import assert_same_bits, block, reference

from pyvit_accel import ops
from pyvit_accel.formats.softmax import linear_mantissa, log2

# B, N, C, H, hidden: tails everywhere; few rows, which divides the matmuls; many, which makes panels and image groups
SHAPES = [(1, 1, 16, 1, 16), (2, 5, 36, 3, 50), (1, 17, 72, 2, 130), (3, 70, 32, 2, 64), (9, 50, 48, 3, 100)]


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(kernel, threads, shape, static):
    args = block(*shape, static=static)
    assert_same_bits(kernel(ops.quant_block, **args), reference(ops.quant_block, **args))


BITS = [(4, 4, 8), (4, 8, 8), (3, 3, 4), (2, 5, 3), (6, 6, 6), (5, 3, 8)]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("w_bits", "x_bits", "head_bits"), BITS)
@pytest.mark.parametrize("shape", [(2, 5, 36, 3, 50), (3, 70, 32, 2, 64)])
def test_bits(kernel, shape, w_bits, x_bits, head_bits, static):
    args = block(*shape, static=static, w_bits=w_bits, x_bits=x_bits, head_bits=head_bits)
    if static:
        args["fc2_x_zero_point"] = -(2 ** (x_bits - 1)) + 1
    assert_same_bits(kernel(ops.quant_block, **args), reference(ops.quant_block, **args))


@pytest.mark.parametrize("softmax", [linear_mantissa(3), log2(3)], ids=lambda softmax: softmax.name)
@pytest.mark.parametrize("shape", SHAPES)
def test_softmax_formats(kernel, threads, shape, softmax):
    """With static scales: of v at run time the products are sums of floats."""
    args = block(*shape, static=True, softmax=softmax)
    y = kernel(ops.quant_block, **args)
    assert_same_bits(y, reference(ops.quant_block, **args))
    bytes_ = args | {"p_values": None, "p_steps": 0.0, "p_operand": ""}
    assert shape[1] == 1 or not torch.equal(y, kernel(ops.quant_block, **bytes_))


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "quick_gelu"])
def test_activations_without_vectors(kernel, activation):
    args = block(2, 40, 64, 2, 128, activation=activation, vectors=False)
    if activation == "none":
        args |= {"fc2_x_minimum": None, "fc2_x_zero_point": 0}
    assert_same_bits(kernel(ops.quant_block, **args), reference(ops.quant_block, **args))


@pytest.mark.parametrize("shape", SHAPES)
def test_table(kernel, shape):
    """Of codes that the activation of the first matmul of the MLP has, whoever writes them."""
    args = block(*shape) | {"fc2_x_table": torch.randint(-128, 128, (256,), dtype=torch.int8)}
    assert_same_bits(kernel(ops.quant_block, **args), reference(ops.quant_block, **args))


@pytest.mark.parametrize("bias", [-30.0, -1.0, -0.76])
def test_hidden_rows_without_a_positive_value(kernel, bias):
    """The largest activation is then not that of the largest input."""
    args = block(1, 30, 32, 2, 48)
    args |= {"fc1_w_scale": torch.full((48,), 1e-9), "fc1_bias": torch.linspace(bias, 2 * bias, 48)}
    assert_same_bits(kernel(ops.quant_block, **args), reference(ops.quant_block, **args))


@pytest.mark.parametrize("tokens", [0, 1, 6, 33])
@pytest.mark.parametrize("static", [False, True])
def test_first_tokens(impl, static, tokens):
    args = block(3, 33, 48, 3, 96, static=static)
    assert_same_bits(impl(ops.quant_block, **args, tokens=tokens), impl(ops.quant_block, **args)[:, :tokens])


def test_rows_that_are_not_contiguous(kernel):
    args = block(2, 9, 32, 2, 64)
    expected = kernel(ops.quant_block, **args)
    args["x"] = args["x"].mT.contiguous().mT
    assert_same_bits(kernel(ops.quant_block, **args), expected)


def test_no_images(impl):
    args = block(0, 9, 32, 2, 64)
    assert impl(ops.quant_block, **args).shape == (0, 9, 32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 9, 32).double()}, ValueError, r"must be float32 \(B, N, C\), got torch.float64"),
        ({"x": torch.zeros(9, 32)}, ValueError, r"got torch.float32 \(9, 32\)"),
        ({"activation": "relu"}, ValueError, "activation 'relu' is not one of none, gelu"),
        ({"tokens": 10}, ValueError, "tokens=10, but x has 9 tokens"),
    ],
)
def test_refuses(impl, change, error, message):
    with pytest.raises(error, match=message):
        impl(ops.quant_block, **(block(2, 9, 32, 2, 64) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "not q, k and v of 5 heads"),
        ({"fc1_bias": torch.zeros(63)}, "fc1 must have shape"),
        ({"proj_w": torch.zeros(2, 64, dtype=torch.uint8)}, "w_packed has shape"),
        ({"head_scale": torch.ones(3, 2)}, "head_scale must have shape"),
        ({"layer_scale2": torch.ones(1)}, "layer_scale2 must have shape"),
        ({"norm1_weight": torch.ones(33)}, "norm weight must have shape"),
        ({"fc2_x_scale": torch.ones(5)}, "fc2_x_scale must have shape"),
    ],
)
def test_kernel_refuses_what_it_would_read_beyond(kernel, change, message):
    with pytest.raises(ValueError, match=message):
        kernel(ops.quant_block, **(block(2, 9, 32, 2, 64) | change))
