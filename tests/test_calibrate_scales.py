"""scales: observers at every number of bits, and the percentile search of RepQ-ViT."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyvit_accel.calibrate import Activation
from pyvit_accel.calibrate.scales import REPQ_PERCENTILES, affine_scale, fake_affine, percentile_search, symmetric_scale
from pyvit_accel.formats import affine

BITS = range(2, 9)


@pytest.mark.parametrize("bits", BITS)
def test_minmax_reaches_the_last_code(bits):
    x = torch.tensor([[-3.0, 1.0], [6.0, 2.0]])
    q_max = 2 ** (bits - 1) - 1
    torch.testing.assert_close(symmetric_scale(x, bits=bits), torch.tensor([6.0 / q_max]))
    torch.testing.assert_close(symmetric_scale(x, bits=bits, groups=2), torch.tensor([6.0 / q_max, 2.0 / q_max]))
    scale, zero_point = affine_scale(x, bits=bits)
    torch.testing.assert_close(scale, torch.tensor([9.0 / (2**bits - 1)]))
    assert zero_point == round(-(2 ** (bits - 1)) + (2**bits - 1) / 3)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_affine_codes_stay_in_range_and_hold_zero(method, bits):
    x = nn.functional.gelu(torch.randn(500, 8) * 2)
    scale, zero_point = affine_scale(x, method, bits=bits)
    lo, hi = affine.q_range(bits)
    assert lo <= zero_point <= hi
    assert fake_affine(torch.zeros(1), scale, zero_point, bits) == 0
    if method == "minmax":  # half a step of the code, half a step of the rounded zero point, float32 roundings
        assert (fake_affine(x, scale, zero_point, bits) - x).abs().max() <= scale * (1 + 1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_mse_is_the_best_of_a_fine_grid(bits):
    """A Gaussian clipped at the best place: within 2 percent of the least error over 400 places."""
    x = torch.randn(20_000, 1)
    lo, hi = affine.weight_range(bits)

    def error(scale):
        return ((x / scale).round().clamp(lo, hi) * scale - x).square().mean()

    least = min(error(x.abs().max() / hi * i / 400) for i in range(1, 401))
    assert error(symmetric_scale(x, "mse", bits=bits)) <= 1.02 * least
    assert error(symmetric_scale(x, "mse", bits=bits)) < error(symmetric_scale(x, bits=bits))


@pytest.mark.parametrize("bits", [1, 9])
def test_other_bits_are_refused(bits):
    for function in (symmetric_scale, affine_scale, percentile_search):
        with pytest.raises(ValueError, match=f"bits={bits} is outside 2..8"):
            function(torch.randn(3, 4), bits=bits)


# ---- percentile_search


def published(x, bits, percentiles=REPQ_PERCENTILES):
    """quantization.md 1.1 word for word: unsigned codes, torch.quantile; float64, for its float32 ranks are coarse."""
    x, best = x.double(), None
    for percentile in percentiles:
        top, bottom = torch.quantile(x, percentile / 100), torch.quantile(x, 1 - percentile / 100)
        delta = (top - bottom) / (2**bits - 1)
        zero_point = torch.round(-bottom / delta)
        x_hat = ((torch.round(x / delta) + zero_point).clamp(0, 2**bits - 1) - zero_point) * delta
        error = (x_hat - x).square().mean()
        if best is None or error < best[0]:
            best = error, delta, zero_point
    return best[1:]


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("groups", [1, 3, 12])
def test_percentile_search_is_the_published_one(bits, groups):
    x = torch.randn(700, 12).pow(3) + torch.arange(12) / 3
    scale, zero_point = percentile_search(x, bits, groups)
    assert scale.shape == zero_point.shape == (groups,)
    for g, run in enumerate(x.reshape(700, groups, -1).unbind(1)):
        delta, published_zero_point = published(run.flatten(), bits)
        torch.testing.assert_close(scale[g].double(), delta, rtol=1e-6, atol=0)
        assert zero_point[g] == published_zero_point - 2 ** (bits - 1)


def test_percentile_search_by_hand():
    """0, 1 .. 15 in each of two channels, the second times -2 and shifted: 4 bits hold both exactly."""
    x = torch.arange(16.0)[:, None] * torch.tensor([1.0, -2.0]) + torch.tensor([0.0, 8.0])
    scale, zero_point = percentile_search(x, bits=4, groups=2, percentiles=(100.0,))
    assert scale.tolist() == [1, 2] and zero_point.tolist() == [-8, 3]  # -22 .. 8 in steps of 2
    assert torch.equal(fake_affine(x, scale, zero_point, 4), x)


def test_percentile_search_of_weights_is_per_row():
    w = torch.randn(5, 40) * torch.logspace(-3, 1, 5)[:, None]
    scale, zero_point = percentile_search(w.T, bits=4, groups=5)
    error = (fake_affine(w, scale[:, None], zero_point[:, None], 4) - w).abs().amax(1)
    assert (error <= 1.2 * scale).all()


def test_constant_channels_are_exact_and_never_negligible():
    x = torch.randn(50, 4)
    x[:, 1], x[:, 2] = 0.3, 0.0
    scale, zero_point = percentile_search(x, bits=4, groups=4)
    assert torch.equal(fake_affine(x, scale, zero_point, 4)[:, 1:3], x[:, 1:3])
    scale, _ = percentile_search(Activation.of(x), bits=4, groups=4, smallest=0.01)
    torch.testing.assert_close(scale[1], scale[[0, 3]].max() / 100, rtol=0.01, atol=0)


def test_percentile_search_checks_its_groups():
    with pytest.raises(ValueError, match="percentile_search: 4 channels do not divide into groups=3"):
        percentile_search(torch.randn(3, 4), groups=3)
