"""The Triton launchers quantize and norm_quant against their references, bit for bit.

Nothing here has a tolerance: the kernels perform the reference's float32 operations in its order, uncontracted. Codes
of norm_quant could differ by one where the mean or rstd lies within a few float64 roundings of a float32 tie; none is.
"""

from __future__ import annotations

from inspect import signature

import pytest
import torch
from _triton import assert_equal, run, uniform

from pyvit_accel import reference

BITS = (2, 3, 4, 5, 6, 7, 8)


def test_launchers_take_what_references_take():
    from pyvit_accel import kernels

    for op in kernels.__all__:
        launcher, truth = (signature(getattr(module, op)) for module in (kernels, reference))
        assert launcher == truth, op


def check_quantize(M, K, per_column, zero_point, bits):
    torch.manual_seed(0)
    scale = uniform(K if per_column else 1) * 2 ** (8 - bits)
    assert_equal("quantize", torch.randn(M, K + 3)[:, :K], scale, zero_point, bits)  # rows at a distance
    assert_equal("quantize", torch.randn(K, M).T, scale, zero_point, bits)


def check_ties(zero_point, bits):
    x = torch.arange(-600, 600).reshape(24, 50) / 2
    x = torch.cat([x, torch.tensor([0.0, -0.0, 3e38, -3e38, float("inf"), -float("inf")]).expand(24, 6)], dim=1)
    for scale in (1.0, 1e-30):  # 1e-30 is the scale of a row of zeros
        assert_equal("quantize", x, torch.tensor([scale]), zero_point, bits)


def check_dynamic(M, K, bits, clip):
    torch.manual_seed(0)
    x = torch.randn(M, K + 3)[:, :K] * torch.logspace(-20, 20, M)[:, None]
    x[M // 2 :][:1] = 0
    assert_equal("quantize_dynamic", x, None, bits, clip, None)


def check_minimum(M, K, minimum, bits, clip):
    """The row's largest value is below -minimum, so a tail read as 0 would show; one row is all minimum."""
    torch.manual_seed(0)
    x = minimum + torch.rand(M, K + 3)[:, :K] * torch.logspace(-6, -1, M)[:, None]
    x[M // 2 :][:1] = minimum
    assert_equal("quantize_dynamic", x, minimum, bits, clip, None)


def check_table(minimum, clip):
    """Every code is looked up; a table of any stride."""
    torch.manual_seed(0)
    table = torch.randint(-128, 128, (256,), dtype=torch.int8)
    x = torch.linspace(-1.1, 1.1, 5 * 300).reshape(5, 300)
    x = x if minimum is None else (x - x.min()) + minimum
    assert_equal("quantize_dynamic", x, minimum, 8, clip, table)
    assert_equal("quantize_dynamic", x, minimum, 8, clip, torch.stack([table, table], dim=1)[:, 0])


@pytest.mark.parametrize("zero_point", [0, -128, 37])
@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("M, K", [(1, 1), (37, 53), (130, 300), (0, 8), (8, 0)])
def test_quantize(M, K, per_column, zero_point):
    run(check_quantize, M, K, per_column, zero_point, 8)


@pytest.mark.parametrize("bits", BITS)
def test_quantize_to_bits(bits):
    run(check_quantize, 9, 53, True, -(2 ** (bits - 1)), bits)


@pytest.mark.parametrize("zero_point, bits", [(0, 8), (-128, 8), (127, 8), (0, 4), (-8, 4), (1, 2)])
def test_quantize_rounds_ties_to_even_and_clips(zero_point, bits):
    run(check_ties, zero_point, bits)


@pytest.mark.parametrize("bits, clip", [(8, 1.0), (4, 0.85)])
@pytest.mark.parametrize("M, K", [(1, 1), (37, 53), (5, 5000), (0, 8)])
def test_quantize_dynamic(M, K, bits, clip):
    run(check_dynamic, M, K, bits, clip)


@pytest.mark.parametrize("bits", BITS)
def test_quantize_dynamic_to_bits(bits):
    run(check_dynamic, 19, 53, bits, 0.7)
    run(check_minimum, 19, 53, -0.1701, bits, 0.7)


@pytest.mark.parametrize("bits, clip", [(8, 1.0), (4, 0.85)])
@pytest.mark.parametrize("minimum", [-0.17, 0.0, -2.0])
@pytest.mark.parametrize("M, K", [(37, 53), (3, 5000)])
def test_quantize_dynamic_spans_from_a_minimum(M, K, minimum, bits, clip):
    run(check_minimum, M, K, minimum, bits, clip)


@pytest.mark.parametrize("minimum, clip", [(None, 1.0), (None, 0.7), (-0.1701, 0.9)])
def test_quantize_dynamic_replaces_codes_by_a_table(minimum, clip):
    run(check_table, minimum, clip)


def check_norm_quant(M, C, eps, bits, clip):
    torch.manual_seed(0)
    x = torch.randn(M, C + 3)[:, :C] * torch.logspace(-6, 3, M)[:, None] + torch.linspace(-50, 50, M)[:, None]
    x[M // 2 :][:1] = 7.0  # a constant row: variance zero
    weight, bias = torch.randn(C), torch.randn(C)
    assert_equal("norm_quant_dynamic", x, weight, bias, eps, bits, clip)
    for columns in (1, C):
        assert_equal("norm_quant", x, weight, bias, uniform(columns) * 2 ** (8 - bits), eps, bits)


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
@pytest.mark.parametrize("M, C", [(1, 1), (37, 5), (50, 192), (9, 1000), (3, 1537), (0, 8)])
def test_norm_quant(M, C, eps):
    run(check_norm_quant, M, C, eps, 8, 1.0)


@pytest.mark.parametrize("bits", BITS)
def test_norm_quant_to_bits(bits):
    run(check_norm_quant, 20, 96, 1e-6, bits, 0.7)
