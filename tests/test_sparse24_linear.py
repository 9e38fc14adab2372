"""sparse24_linear against float64, and int8 against lowbit_linear on the unpacked weight, bit for bit."""

from __future__ import annotations

import re

import pytest
import torch
from _problems import CODES, U32, Call, assert_same_bits, codes, padded, reference, sparse_codes, transposed

from pyvit_accel import backends, ops
from pyvit_accel.formats import packed, sparse24
from pyvit_accel.ops.sparse24_linear import dense_form

U16 = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SHAPES = [(1, 4, 1), (7, 37, 19), (3, 130, 129), (197, 192, 64)]  # (M, K, N): chunks, tiles and rows that are padded
shapes = pytest.mark.parametrize(("M", "K", "N"), SHAPES)


def integer_problem(M, K, N, kind="random"):
    w = sparse_codes(N, K, kind)
    x = codes(kind, M, K)
    scales = {"x_scale": torch.rand(M) * 0.1 + 0.01, "w_scale": torch.rand(N) * 0.01 + 1e-4}
    return x, w, scales | {"out_features": N, "w_sum": w.sum(1, dtype=torch.int32)}


@pytest.mark.parametrize("dtype", U16)
@pytest.mark.parametrize("x_dtype", [None, torch.float32], ids=["as values", "float32"])
@shapes
def test_floats_match_float64(M, K, N, dtype, x_dtype):
    w = (sparse_codes(N, K).float() * 0.013).to(dtype)
    x, bias, residual = torch.randn(M, K).to(x_dtype or dtype), torch.randn(N), torch.randn(M, N)
    exact = x.to(dtype).double() @ w.double().T + bias
    size = x.double().abs() @ w.double().abs().T + bias.abs() + residual.abs()
    for kwargs, truth in (({}, exact), ({"residual": residual}, exact + residual)):
        for run in (ops.sparse24_linear, lambda *a, **k: reference(ops.sparse24_linear, *a, **k)):
            y = run(x, *sparse24.pack(w), bias, out_features=N, **kwargs)
            assert y.dtype == x.dtype
            # float32 sums and additions, and one rounding; float16 has subnormals
            bound = (K + 3) * U32 * size + U16[dtype] * truth.abs() * 1.01 + 2.0**-25
            assert ((y.double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("kind", CODES)
@shapes
def test_integers_are_those_of_lowbit_linear(M, K, N, kind):
    x, w, kwargs = integer_problem(M, K, N, kind)
    values, meta = sparse24.pack(w)
    more = {"bias": torch.randn(N), "activation": "gelu", "layer_scale": torch.rand(N), "residual": torch.randn(M, N)}
    dense = (x, kwargs["x_scale"], packed.pack(w), kwargs["w_scale"])
    for rest in ({}, more | {"x_zero_point": -7}, {"out_scale": torch.rand(N) + 0.1, "out_zero_point": 3}):
        expected = ops.lowbit_linear(*dense, **rest)
        call = Call(ops.sparse24_linear, (x, values, meta), kwargs | rest)
        assert_same_bits(call(), expected)
        assert_same_bits(reference(call), expected)
        with_dense = kwargs | rest | {"w_dense": dense_form(values, meta, N, K)}
        assert_same_bits(ops.sparse24_linear(x, values, meta, **with_dense), expected)


@pytest.mark.parametrize("dtype", U16)
def test_identity_returns_the_weight(dtype):
    w = sparse_codes(33, 40).to(dtype)
    y = ops.sparse24_linear(torch.eye(40, dtype=dtype), *sparse24.pack(w), out_features=33)
    assert torch.equal(y, w.T)


def test_activations_and_codes_of_floats():
    M, K, N = 9, 64, 24
    w, x = (sparse_codes(N, K).float() * 0.01).half(), torch.randn(M, K).half()
    for activation in ("gelu", "gelu_tanh", "quick_gelu"):
        y = ops.sparse24_linear(x, *sparse24.pack(w), out_features=N, activation=activation)
        expected = reference(ops.sparse24_linear, x.float(), *sparse24.pack(w), out_features=N, activation=activation)
        torch.testing.assert_close(y.float(), expected, atol=2e-3, rtol=2e-3)  # of float16
        truth = x.double() @ w.double().T
        exact = {
            "gelu": torch.nn.functional.gelu(truth),
            "gelu_tanh": torch.nn.functional.gelu(truth, approximate="tanh"),
            "quick_gelu": truth * torch.sigmoid(1.702 * truth),
        }[activation]
        torch.testing.assert_close(y.double(), exact, atol=2e-3, rtol=2e-3)
    q = ops.sparse24_linear(x, *sparse24.pack(w), out_features=N, out_scale=torch.tensor([0.1]), out_bits=4)
    assert q.dtype == torch.int8 and int(q.min()) >= -8 and int(q.max()) <= 7
    assert ((q - (truth * 10).clamp(-8, 7)).abs() <= 0.501).all()


def test_layouts_and_empty_inputs():
    x, w, kwargs = integer_problem(6, 40, 24)
    values, meta = sparse24.pack(w)
    expected = ops.sparse24_linear(x, values, meta, **kwargs)
    for same in (padded(x), transposed(x)):
        assert_same_bits(ops.sparse24_linear(same, values, meta, **kwargs), expected)
    assert_same_bits(ops.sparse24_linear(x.view(2, 3, 40), values, meta, **kwargs), expected.view(2, 3, 24))
    kwargs["x_scale"] = torch.ones(1)
    assert ops.sparse24_linear(x[:0], values, meta, **kwargs).shape == (0, 24)


def test_a_device_without_sparse_units_is_honest():
    """CPUs multiply with the unpacked weight, and say so."""
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("pyvit_accel::sparse24_linear", "CPU")
    assert {op: cpu for op, cpu, _ in backends.owners()}["sparse24_linear"] == "dense matmul"


W = sparse_codes(24, 40)
VALUES, META = sparse24.pack(W)
HALVES = sparse24.pack(W.half())
X = torch.zeros(3, 40, dtype=torch.int8)
SCALES = {"x_scale": torch.ones(1), "w_scale": torch.ones(24)}
ERRORS = {
    "x is torch.float32 and values are torch.int8; use int8 codes": (TypeError, (X.float(), VALUES, META), {}),
    "x is torch.int8 and values are torch.float16": (TypeError, (X, *HALVES), {}),
    "values are torch.float32 and meta torch.int32": (TypeError, (X, VALUES.float(), META), {}),
    "x has K=300 and out_features=24": (ValueError, (torch.zeros(3, 300, dtype=torch.int8), VALUES, META), {}),
    "x has K=40 and out_features=129": (ValueError, (X, VALUES, META), {"out_features": 129}),
    "scales given: x_scale; int8 values need": (ValueError, (X, VALUES, META), {"x_scale": torch.ones(1)}),
    "scales given: x_scale, w_scale; int8": (ValueError, (X.half(), *HALVES), SCALES),
    "x_zero_point=3 with values of torch.float16": (ValueError, (X.half(), *HALVES), {"x_zero_point": 3}),
    "x_zero_point=3 needs w_sum": (ValueError, (X, VALUES, META), SCALES | {"x_zero_point": 3}),
    "w_sum is torch.float32 (24,)": (ValueError, (X, VALUES, META), SCALES | {"w_sum": torch.ones(24)}),
    "activation 'relu' is not one of": (ValueError, (X, VALUES, META), SCALES | {"activation": "relu"}),
    "bias has shape (23,)": (ValueError, (X, VALUES, META), SCALES | {"bias": torch.ones(23)}),
    "residual is (3, 23)": (ValueError, (X, VALUES, META), SCALES | {"residual": torch.ones(3, 23)}),
    "w_dense is torch.int8 (24, 40)": (ValueError, (X, VALUES, META), SCALES | {"w_dense": W}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    error, args, kwargs = ERRORS[message]
    with pytest.raises(error, match="^sparse24_linear: .*" + re.escape(message)):
        ops.sparse24_linear(*args, **({"out_features": 24} | kwargs))


def test_illegal_metadata_is_refused():
    broken = META.clone()
    broken[0, 0, 5, 0] = 0
    with pytest.raises(ValueError, match=r"row \d+, chunk \d+"):
        ops.sparse24_linear(X, VALUES, broken, out_features=24, **SCALES)
