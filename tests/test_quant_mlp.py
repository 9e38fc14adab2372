"""quant_mlp: the bits of the ops it consists of, for any division of rows over threads and panels."""

from __future__ import annotations

import pytest
import torch
from _problems import assert_same_bits, block, mlp, reference

from pyvit_accel import ops

SHAPES = [(1, 1, 16, 1, 16), (2, 5, 36, 3, 50), (3, 70, 32, 2, 64), (9, 50, 48, 3, 100)]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(kernel, shape, static):
    args = mlp(block(*shape, static=static))
    x = args["x"].clone()
    assert_same_bits(kernel(ops.quant_mlp, **args), reference(ops.quant_mlp, **args))
    assert torch.equal(args["x"], x)


@pytest.mark.parametrize(("w_bits", "x_bits"), [(4, 4), (3, 6)])
def test_bits(kernel, w_bits, x_bits):
    args = mlp(block(2, 33, 36, 3, 50, w_bits=w_bits, x_bits=x_bits))
    assert_same_bits(kernel(ops.quant_mlp, **args), reference(ops.quant_mlp, **args))


def test_any_leading_shape(kernel):
    args = mlp(block(4, 6, 16, 2, 24))
    y = kernel(ops.quant_mlp, **args)
    for shape in ((24, 16), (2, 2, 6, 16), (2, 12, 16)):
        assert_same_bits(kernel(ops.quant_mlp, **args | {"x": args["x"].reshape(shape)}), y.reshape(shape))
    empty = kernel(ops.quant_mlp, **args | {"x": args["x"][:0]})
    assert empty.shape == (0, 6, 16)


def test_errors():
    args = mlp(block(2, 5, 16, 2, 24))
    with pytest.raises(TypeError, match=r"quant_mlp: x must be float32, got torch.float16"):
        ops.quant_mlp(**args | {"x": args["x"].half()})
    with pytest.raises(ValueError, match=r"quant_mlp: activation 'relu' is not one of none, gelu"):
        ops.quant_mlp(**args | {"activation": "relu"})
    with pytest.raises(ValueError, match=r"quant_mlp: fc1_x_bits=9"):
        ops.quant_mlp(**args | {"fc1_x_bits": 9})
