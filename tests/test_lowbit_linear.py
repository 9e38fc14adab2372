"""lowbit_linear: exact integer sums, then the float32 epilogue, against the reference and against float64."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch
from _problems import CODES, U32, assert_nearest_codes, assert_same_bits, codes, padded, reference, transposed, weights
from test_scalar import ERROR, TRUTH

from pyvit_accel import ops
from pyvit_accel.formats import packed

SHAPES = [(1, 16, 16), (1, 3, 1), (2, 4, 16), (5, 63, 17), (13, 64, 33), (25, 65, 48), (50, 300, 100), (1370, 20, 17)]
ACTIVATIONS = ["none", "gelu", "gelu_tanh", "quick_gelu"]


def problem(M, K, N, kind="random"):
    """A call with every argument: (x, x_scale, w_packed, w_scale, bias) and the keywords of the epilogue."""
    _, w_packed, w_scale = weights(N, K, kind)
    args = codes(kind, M, K), torch.rand(M) * 0.02 + 1e-4, w_packed, w_scale, torch.randn(N)
    return args, {"x_zero_point": -5, "layer_scale": torch.randn(N), "residual": torch.randn(M, N)}


def assert_equals_reference(kernel, *args, **kwargs):
    expected = reference(ops.lowbit_linear, *args, **kwargs)
    assert_same_bits(kernel(ops.lowbit_linear, *args, **kwargs), expected)


def epilogue_and_error(args, kwargs, activation):
    """The op's formula in float64, and what float32 may add: each operation in turn rounds once.

    1.13 is the steepest slope of the activations; their own error is ERROR max(1, |x|), tests/test_scalar.py.
    """
    x, x_scale, w_packed, w_scale, bias = args
    w = packed.unpack(w_packed, w_scale.shape[0], x.shape[1]).double()
    y = (x.double() - kwargs["x_zero_point"]) @ w.T * (x_scale.double()[:, None] * w_scale.double())
    error = 3.01 * U32 * y.abs()
    y = y + bias.double()
    error = error + 1.01 * U32 * y.abs()
    error = 1.13 * error + ERROR[activation] * y.abs().clamp_min(1)
    y = TRUTH[activation](y) * kwargs["layer_scale"].double()
    error = error * kwargs["layer_scale"].double().abs() + 1.01 * U32 * y.abs()
    y = y + kwargs["residual"].double()
    return y, error + 1.01 * U32 * y.abs()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_reference(kernel, shape, activation):
    args, kwargs = problem(*shape)
    N = shape[2]
    for out_scale in (None, torch.tensor([0.05]), torch.rand(N) * 0.1 + 0.01):
        assert_equals_reference(kernel, *args, **kwargs, activation=activation, out_scale=out_scale, out_zero_point=-9)
        assert_equals_reference(kernel, args[0], args[1][:1], *args[2:4], activation=activation, out_scale=out_scale)


@pytest.mark.parametrize("w_bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("x_bits", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("shape", [(1, 3, 1), (3, 37, 17), (13, 64, 33), (40, 129, 50)])
def test_every_pair_of_bits(kernel, w_bits, x_bits, shape):
    M, K, N = shape
    q, w_packed, w_scale = weights(N, K, bits=w_bits)
    x = codes("random", M, K) >> (8 - x_bits)
    exact = x.long() @ q.long().T
    unscaled = torch.ones(1), w_packed, torch.ones(N)
    assert_same_bits(kernel(ops.lowbit_linear, x, *unscaled), exact.float())
    kwargs = {"x_zero_point": -3, "activation": "gelu", "out_scale": torch.rand(N) + 0.01, "out_zero_point": 1}
    args = x, torch.rand(M) * 0.02, w_packed, w_scale, torch.randn(N)
    assert_equals_reference(kernel, *args, **kwargs, out_bits=x_bits)
    codes_out = kernel(ops.lowbit_linear, *args, **kwargs, out_bits=x_bits)
    assert codes_out.min() >= -(2 ** (x_bits - 1)) and codes_out.max() <= 2 ** (x_bits - 1) - 1


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_low_bit_extremes(impl, bits, kind):
    w, w_packed, _ = weights(18, 3072, kind, bits)
    x = codes("lowest", 3, 3072)
    y = impl(ops.lowbit_linear, x, torch.ones(1), w_packed, torch.ones(18), x_zero_point=127)
    assert_same_bits(y, ((x.long() - 127) @ w.long().T).float())


@pytest.mark.parametrize("M", range(1, 27))
def test_equals_reference_for_every_remainder_of_rows(kernel, M):
    args, kwargs = problem(M, 37, 50)
    assert_equals_reference(kernel, *args, **kwargs)


@pytest.mark.parametrize(("x_kind", "w_kind"), list(product(CODES, CODES)))
def test_sums_are_exact(impl, x_kind, w_kind):
    """Extreme codes and zero points: float32 of the exact integer, also where it exceeds 2^24."""
    for K, zero_point in ((5, 0), (67, 127), (3072, -128)):
        w, w_packed, _ = weights(18, K, w_kind)
        x = codes(x_kind, 3, K)
        exact = (x.long() - zero_point) @ w.long().T
        y = impl(ops.lowbit_linear, x, torch.ones(1), w_packed, torch.ones(18), x_zero_point=zero_point)
        assert_same_bits(y, exact.float())


def test_decodes_weights_exactly(impl):
    """x = identity gives every code times its scale, once each, with the zero point taken off again."""
    w, w_packed, w_scale = weights(33, 50)
    decoded = w.T.float() * w_scale
    identity = torch.eye(50, dtype=torch.int8)
    assert_same_bits(impl(ops.lowbit_linear, identity, torch.ones(1), w_packed, w_scale), decoded)
    shifted = impl(ops.lowbit_linear, identity - 7, torch.ones(1), w_packed, w_scale, x_zero_point=-7)
    assert_same_bits(shifted, decoded)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_within_bound_of_float64(impl, activation):
    args, kwargs = problem(29, 130, 65)
    y, error = epilogue_and_error(args, kwargs, activation)
    assert ((impl(ops.lowbit_linear, *args, **kwargs, activation=activation).double() - y).abs() <= error).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nearest_codes_of_float64(impl, activation):
    args, kwargs = problem(29, 130, 65)
    y, error = epilogue_and_error(args, kwargs, activation)
    for out_scale in (torch.tensor([0.03]), torch.rand(65) * 0.1 + 0.01):
        q = impl(ops.lowbit_linear, *args, **kwargs, activation=activation, out_scale=out_scale, out_zero_point=11)
        ratio = y / out_scale.double()
        assert_nearest_codes(q, ratio + 11, error / out_scale.double() + 2.01 * U32 * ratio.abs().clamp_max(300))


@pytest.mark.parametrize("layout", [padded, transposed, lambda x: x[:1].expand(9, -1), lambda x: x[::2, ::3]])
def test_equals_reference_on_strided_rows(kernel, layout):
    x = layout(codes("random", 11, 50))
    M, K = x.shape
    _, w_packed, w_scale = weights(33, K)
    out_scale, bias, layer_scale = (torch.randn(66).abs() + 0.1 for _ in range(3))
    kwargs = {"layer_scale": layer_scale[::2], "residual": layout(torch.randn(11, 99))[:, :33], "activation": "gelu"}
    for scale in (None, out_scale[::2]):
        args = x, torch.rand(2 * M)[::2], transposed(w_packed), padded(w_scale), bias[::2]
        assert_equals_reference(kernel, *args, **kwargs, out_scale=scale)


def test_residual_of_every_layout(kernel):
    args, kwargs = problem(13, 20, 33)
    for residual in (padded(kwargs["residual"]), transposed(kwargs["residual"]), kwargs["residual"][:1].expand(13, 33)):
        assert_equals_reference(kernel, *args, **(kwargs | {"residual": residual}))


def test_leading_dimensions(impl):
    args, kwargs = problem(24, 37, 19)
    flat = impl(ops.lowbit_linear, *args, **kwargs)
    residual = kwargs.pop("residual")
    x = args[0].reshape(2, 3, 4, 37)
    folded = impl(ops.lowbit_linear, x, *args[1:], **kwargs, residual=residual.reshape(2, 3, 4, 19))
    assert_same_bits(folded, flat.reshape(2, 3, 4, 19))
    one = impl(ops.lowbit_linear, args[0][5], args[1][5:6], *args[2:], **kwargs, residual=residual[5])
    assert_same_bits(one, flat[5])


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_empty(impl, shape):
    _, w_packed, w_scale = weights(5, 16)
    x = torch.empty(shape, dtype=torch.int8)
    for out_scale, dtype in ((None, torch.float32), (torch.ones(1), torch.int8)):
        for x_scale in (torch.ones(1), torch.ones(0)):
            y = impl(ops.lowbit_linear, x, x_scale, w_packed, w_scale, out_scale=out_scale)
            assert y.shape == (*shape[:-1], 5) and y.dtype == dtype


def test_errors():
    (x, x_scale, w_packed, w_scale, bias), kwargs = problem(6, 10, 20)

    def message(text):
        return "^" + re.escape(text) + "$"

    text = "lowbit_linear: x must be int8 codes, got torch.float32; quantize it with ops.quantize"
    with pytest.raises(TypeError, match=message(text)):
        ops.lowbit_linear(x.float(), x_scale, w_packed, w_scale)
    shapes = "has shape ({0}, 192) for 2 bits, ({0}, 320) for 4 bits, ({0}, 576) for 8 bits ...; got (2, {1})"
    text = "lowbit_linear: x has K=9 and w_scale N=20, but w_packed of N=20, K=9 " + shapes.format(2, 1088)
    with pytest.raises(ValueError, match=message(text)):
        ops.lowbit_linear(x[:, :9], x_scale, weights(20, 33)[1], w_scale)
    text = "lowbit_linear: x has K=10 and w_scale N=16, but w_packed of N=16, K=10 " + shapes.format(1, 576)
    with pytest.raises(ValueError, match=message(text)):
        ops.lowbit_linear(x, x_scale, w_packed, w_scale[:16])
    text = "lowbit_linear: activation 'relu' is not one of none, gelu, gelu_tanh, quick_gelu"
    with pytest.raises(ValueError, match=message(text)):
        ops.lowbit_linear(x, x_scale, w_packed, w_scale, activation="relu")
    for wrong in (x_scale[:5], x_scale[:, None]):
        text = f"lowbit_linear: x_scale has shape {tuple(wrong.shape)}; use (1,) or (6,)"
        with pytest.raises(ValueError, match=message(text)):
            ops.lowbit_linear(x, wrong, w_packed, w_scale)
    for name, wrong in (("bias", w_scale[:1]), ("layer_scale", w_scale[:, None])):
        text = f"lowbit_linear: {name} has shape {tuple(wrong.shape)}; use (20,)"
        with pytest.raises(ValueError, match=message(text)):
            ops.lowbit_linear(x, x_scale, w_packed, w_scale, **{name: wrong})
    with pytest.raises(ValueError, match=message("lowbit_linear: out_scale has shape (6,); use (1,) or (20,)")):
        ops.lowbit_linear(x, x_scale, w_packed, w_scale, out_scale=w_scale[:6])
    with pytest.raises(TypeError, match=message("lowbit_linear: residual must be float32, got torch.float64")):
        ops.lowbit_linear(x, x_scale, w_packed, w_scale, residual=torch.zeros(6, 20, dtype=torch.float64))
    text = "lowbit_linear: residual is (20,), the output (6, 20)"
    with pytest.raises(ValueError, match=message(text)):
        ops.lowbit_linear(x, x_scale, w_packed, w_scale, bias, residual=kwargs["residual"][0])
