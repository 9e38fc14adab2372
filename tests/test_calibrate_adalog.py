"""adalog: the search in rounds, what it finds for linears and heads, and the bases of softmax and GELU outputs."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pyvit_accel.calibrate import Activation
from pyvit_accel.calibrate.adalog import (
    BASES,
    GELU_SHIFT,
    adalog_gelu,
    adalog_plan,
    adalog_softmax,
    fake_adalog,
    fpcs,
    fpcs_heads,
    fpcs_input,
    fpcs_weight,
    shift_bias,
)
from pyvit_accel.calibrate.plan import LinearPlan, linear_output
from pyvit_accel.calibrate.scales import affine_scale, fake_affine, percentile_search
from pyvit_accel.formats import affine

LAST = (0.0008789063, 0, 0, 0)
X = torch.tensor([1, 0.75, 0.5, 0.36, 0.2, 0.1, 0.05, 0.02, 0.006, 0.004, 0.001, 3e-5, 1e-6, 0])


# ---- the search


def test_fpcs_finds_the_least_of_a_smooth_loss():
    """|scale - 0.7310| + |zero_point + 3| has one minimum; six rounds divide the first step by 7.5^5."""
    target = torch.tensor([0.7310, 0.31])
    calls = []

    def loss(scale, zero_point):
        calls.append((scale, zero_point))
        return (scale - target).abs() + (zero_point + 3).abs()

    scales = torch.linspace(0.1, 0.9, 8)[:, None].expand(8, 2)
    scale, zero_point = fpcs(loss, scales, torch.arange(-8, 8))
    assert len(calls) == 6 * 128
    assert torch.equal(zero_point, torch.tensor([-3.0, -3.0]))
    step = 0.8 / 7
    torch.testing.assert_close(scale, target, rtol=0, atol=step / 7.5**4)


def test_fpcs_first_scores_the_whole_grid():
    calls = []

    def loss(scale, zero_point):
        calls.append((float(scale), float(zero_point)))
        return scale

    scale, _ = fpcs(loss, torch.tensor([[1.0], [2.0]]), torch.tensor([0, 5]), keep=2, expand=3, rounds=2)
    assert calls[:4] == [(1, 0), (2, 0), (1, 5), (2, 5)]
    assert calls[4:] == [(0.5, 0), (1, 0), (1.5, 0), (0.5, 5), (1, 5), (1.5, 5)]
    assert scale == 0.5


def test_fpcs_never_proposes_a_scale_of_zero():
    lowest = []
    fpcs(lambda s, z: lowest.append(float(s)) or s.clone(), torch.tensor([[0.1], [1.0]]), torch.zeros(1))
    assert min(lowest) > 0


# ---- linears and heads


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_an_input_is_quantized_for_its_output(bits):
    x = torch.randn(300, 24) * torch.logspace(-1, 0.5, 24)
    weight = torch.randn(40, 24)
    weight[:, -4:] *= 0.01  # the widest channels hardly matter: what the output needs is a finer step

    def error(scale, zero_point):
        return ((fake_affine(x, scale, zero_point, bits) - x) @ weight.T).square().mean()

    scale, zero_point = fpcs_input(x, weight, bits)
    assert scale.shape == (1,) and isinstance(zero_point, int)
    others = [affine_scale(x, bits=bits), affine_scale(x, "mse", bits=bits), percentile_search(x, bits)]
    assert error(scale, zero_point) < 0.9 * min(error(*other) for other in others)


def test_the_shape_of_the_weight_does_not_matter():
    """A tall weight goes through its triangular factor: the same loss, so the same choice."""
    x, weight = torch.randn(100, 8), torch.randn(50, 8)
    factor = torch.linalg.cholesky(weight.double().T @ weight.double()).T.float()  # (8, 8), the same lengths
    scale, zero_point = fpcs_input(x, weight, 4)
    again, same = fpcs_input(x, factor, 4)
    assert zero_point == same
    torch.testing.assert_close(scale, again, rtol=1e-3, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_are_quantized_for_their_output(symmetric):
    weight = torch.randn(16, 24) + 0.3
    x = torch.randn(200, 24) * torch.logspace(-1, 1, 24)

    def error(scale, zero_point, x):
        lost = fake_affine(weight, scale[:, None], zero_point[:, None], 4) - weight
        return (lost @ x.T).square().sum(1)

    plain = fpcs_weight(weight, 4, symmetric=symmetric)
    aware = fpcs_weight(weight, 4, x, symmetric)
    assert (error(*aware, x) <= error(*plain, x) * (1 + 1e-4)).all()
    other = (affine.weight_scale(weight, 4), torch.zeros(16)) if symmetric else percentile_search(weight.T, 4, 16)
    eye = torch.eye(24)
    assert (error(*plain, eye) <= error(*other, eye) * (1 + 1e-4)).float().mean() > 0.8
    assert bool((aware[1] == 0).all()) == symmetric


def test_heads_are_searched_one_by_one():
    q, k = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    q[:, 1] *= 10
    scale, zero_point = fpcs_heads(q, lambda e: e @ k.mT, 4)
    assert scale.shape == zero_point.shape == (3,)
    assert scale[1] > 5 * scale[[0, 2]].max()
    alone, zero_alone = fpcs_heads(q[:, 1:2], lambda e: e @ k[:, 1:2].mT, 4)
    assert alone == scale[1] and zero_alone == zero_point[1]


def test_a_plan_beats_plain_scales():
    x = torch.randn(200, 24) * torch.logspace(-0.5, 0.5, 24)
    weight, bias = torch.randn(30, 24), torch.randn(30)
    truth = F.linear(x, weight, bias)
    plan = adalog_plan(weight, bias, Activation.of(x))
    scale, zero_point = affine_scale(x, "mse", bits=4)
    plain = LinearPlan(weight, bias, 4, 4, x_scale=scale, x_zero_point=zero_point)
    error, before = ((linear_output(p, x) - truth).square().mean() for p in (plan, plain))
    assert plan.codes is not None and plan.bias is bias
    assert error < 0.95 * before


def test_zeros_have_usable_scales():
    scale, _ = fpcs_input(torch.zeros(5, 4), torch.randn(3, 4), 4)
    assert scale > 0
    scale, _ = fpcs_weight(torch.zeros(3, 4), 4)
    assert (scale > 0).all()


# ---- levels: quantization.md 11


def test_adalog_levels_match_the_specification():
    values = {
        4: [
            1,
            0.6333333,
            0.6333333,
            0.4,
            0.2416667,
            0.09583333,
            0.06041667,
            0.02395833,
            0.005729167,
            0.003645833,
            *LAST,
        ],
        3: [1, 0.6428571, 0.6428571, 0.3928571, 0.25, 0.09821429, 0.05803571, 0, 0, 0, 0, 0, 0, 0],
    }
    for bits, truth in values.items():
        torch.testing.assert_close(fake_adalog(X, 1.0, 25, bits), torch.tensor(truth))


def test_shifted_gelu_matches_the_specification():
    x = torch.tensor([-0.17, -0.1, -0.02, 0, 0.05, 0.2, 0.7, 1.3, 2, 3.1, 4, 6])
    truth = [-0.169971, -0.0933046, -0.00997124, -0.00997124, 0.0566954, 0.163362, 0.843362, 1.32336, 2.07003]
    found = fake_adalog(x + GELU_SHIFT, 3.2, 20, 4) - GELU_SHIFT
    torch.testing.assert_close(found, torch.tensor([*truth, 3.03003, 3.03003, 3.03003]), rtol=1e-5, atol=1e-6)


def test_softmax_base_is_the_best_of_all():
    p, v = (torch.randn(2, 2, 20, 20) * 2).softmax(-1), torch.randn(2, 2, 20, 6)
    errors = {q: float(((fake_adalog(p, 1.0, q, 4) - p) @ v).square().sum()) for q in BASES}
    assert list(errors) == list(range(10, 139))
    found = adalog_softmax(p, v, 4)
    assert errors[found] == pytest.approx(min(errors.values()), rel=1e-5)
    assert adalog_softmax(p, v, 3) > found  # fewer levels, a larger base


@pytest.mark.parametrize("bits", [3, 4])
def test_gelu_base_and_scale_beat_every_base_at_the_largest_scale(bits):
    x, weight = F.gelu(torch.randn(80, 24) * 2), torch.randn(12, 24)
    x[0, 0] = 30  # an outlier that the scale should give up, were it not so far
    shifted = x + GELU_SHIFT

    def error(scale, q):
        return float(((fake_adalog(shifted, scale, q, bits) - shifted) @ weight.T).square().sum())

    scale, q = adalog_gelu(x, weight, bits)
    assert q in BASES and 0 < scale <= float(shifted.max()) * 1.2
    assert error(scale, q) <= min(error(float(shifted.max()), q) for q in BASES) * (1 + 1e-5)
    with pytest.raises(ValueError, match="adalog_gelu: no value of x is positive"):
        adalog_gelu(-torch.rand(5, 24), weight, bits)


def test_the_shift_goes_into_the_bias_exactly():
    x, weight, bias = F.gelu(torch.randn(20, 10)).double(), torch.randn(7, 10).double(), torch.randn(7).double()
    moved = shift_bias(weight, bias)
    torch.testing.assert_close(
        F.linear(x + GELU_SHIFT, weight) + moved, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5
    )
    assert shift_bias(torch.tensor([[1.0, 2.0]]), None, 0.5) == -1.5
