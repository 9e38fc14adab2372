"""repq: the fold of RepQ-ViT in both conventions, its refold, and channels clipped before it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pyvit_accel.calibrate import Activation, bias_correction, fold_linear, fold_norm
from pyvit_accel.calibrate.plan import linear_output, quantized_input
from pyvit_accel.calibrate.repq import channel_scales, clipped_scales, refold, repq_fold, repq_plan
from pyvit_accel.calibrate.scales import fake_affine
from pyvit_accel.formats import affine

# quantization.md 1.2; its zero points less 8
SCALE = torch.tensor([0.2, 0.05, 0.12, 0.4])
ZERO_POINT = torch.tensor([0.0, -3.0, 2.0, -1.0])
GAMMA, BETA = torch.tensor([1.0, 2.0, 0.5, 4.0]), torch.tensor([0.1, -0.2, 0.0, 0.3])
WEIGHT = torch.tensor([[0.5, -1.0, 2.0, 0.25], [1.0, 0.0, -0.5, 0.1]])
BIAS = torch.tensor([0.1, -0.3])
NORMALISED = torch.tensor([[0.3, -1.2, 0.7, -0.1], [1.5, 0.2, -0.9, 0.6]])
CODES = torch.tensor([[2, -8, 5, -1], [7, 1, -2, 6]], dtype=torch.int8)


def uneven(rows: int, channels: int) -> Tensor:
    """What a norm with uneven weights and biases makes."""
    return torch.randn(rows, channels) * torch.logspace(-1, 0.7, channels) + torch.linspace(-1, 1, channels)


def affine_codes(y: Tensor, scale: Tensor | float, zero_point: Tensor | float, bits: int) -> Tensor:
    lo, hi = affine.q_range(bits)
    return (torch.round(y / scale) + zero_point).clamp(lo, hi)


def test_the_signed_convention_matches_the_specification():
    fold, scale, zero_point = repq_fold(SCALE, ZERO_POINT)
    assert (scale, zero_point) == (1, 0)
    torch.testing.assert_close(fold.shift, torch.tensor([0.0, 0.15, -0.24, 0.4]))
    gamma, beta = fold_norm(GAMMA, BETA, fold)
    assert torch.equal(affine.quantize(NORMALISED * gamma + beta, torch.ones(1), bits=4), CODES)
    weight, bias = fold_linear(WEIGHT, BIAS, fold)
    torch.testing.assert_close(
        F.linear(NORMALISED * gamma + beta, weight, bias), torch.tensor([[3.575, -0.085], [0.475, 1.795]])
    )


def test_the_published_convention_takes_the_means():
    fold, scale, zero_point = repq_fold(SCALE, ZERO_POINT, "published")
    assert scale == pytest.approx(0.1925) and zero_point == pytest.approx(-0.5)
    torch.testing.assert_close(fold.ratio, SCALE / 0.1925)
    torch.testing.assert_close(fold.shift, SCALE * (-0.5 - ZERO_POINT))
    assert repq_fold(SCALE, torch.tensor([0.0, -3.0, 2.0, -2.0]), "rounded")[2] == -1  # the mean is -0.75
    with pytest.raises(ValueError, match="unknown convention 'mean'; use 'signed', 'published' or 'rounded'"):
        repq_fold(SCALE, ZERO_POINT, "mean")


def test_the_scale_of_the_fold_is_free():
    """quantization.md 1.3 in float64: whatever s~, codes of activations and weights agree, so outputs do."""
    y = uneven(300, 16).double()
    weight = torch.randn(8, 16, dtype=torch.float64)
    scale, zero_point = (t.double() for t in channel_scales(Activation.of(y), 4))
    outputs = []
    for target in (1.0, float(scale.mean()), float(scale.median()), 123.456):
        ratio, shift = scale / target, scale * (0 - zero_point)
        folded, moved = weight * ratio, (y - shift) / ratio
        codes = affine_codes(moved, target, 0, 4)
        assert torch.equal(codes, affine_codes(y, scale, zero_point, 4))
        step = folded.abs().amax(1, keepdim=True) / 7
        outputs.append(codes * target @ (torch.round(folded / step) * step).T + weight @ shift)
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=0, atol=1e-12)


def test_bias_correction_makes_the_zero_point_free():
    """1.3: what z~ adds to the error of the weights is a constant, and the mean error takes it away."""
    y, weight = uneven(400, 24).double(), torch.randn(12, 24, dtype=torch.float64)
    scale, zero_point = (t.double() for t in channel_scales(Activation.of(y), 4))
    folded = weight * scale
    step = folded.abs().amax(1, keepdim=True) / 7
    weight_hat = torch.round(folded / step) * step
    outputs, plain = [], []
    for target in (-7, 0, 1):
        seen = affine_codes(y, scale, zero_point, 4) - zero_point + (zero_point - target)  # codes less z~, s~ = 1
        bias = folded @ (target - zero_point)
        plain.append(seen @ weight_hat.T + bias)
        outputs.append(plain[-1] + ((folded - weight_hat) @ seen.mean(0)))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs[0], outputs[2], rtol=0, atol=1e-12)
    assert (plain[0] - plain[1]).abs().max() > 0.1


def test_refold_gives_the_published_codes_with_an_integer_zero_point():
    y = uneven(500, 10)
    scale, zero_point = channel_scales(Activation.of(y), 4)
    fold, target, fraction = repq_fold(scale, zero_point, "published")
    assert fraction != round(fraction)
    gamma, beta = fold_norm(None, None, fold)
    weight, bias = torch.randn(6, 10), torch.randn(6)
    weight, bias = fold_linear(weight, bias, fold)

    again, integer = refold(target, fraction, 10)
    gamma2, beta2 = fold_norm(gamma, beta, again)
    weight2, bias2 = fold_linear(weight, bias, again)
    assert integer == round(fraction) and torch.equal(gamma2, gamma) and torch.equal(weight2, weight)
    before, after = y * gamma + beta, y * gamma2 + beta2
    torch.testing.assert_close(F.linear(after, weight2, bias2), F.linear(before, weight, bias), rtol=1e-5, atol=1e-5)

    codes, truth = affine_codes(after, target, integer, 4), affine_codes(y, scale, zero_point, 4)
    tie = ((y / scale) % 1 - 0.5).abs() < 1e-4
    assert torch.equal(codes[~tie], truth[~tie])
    assert codes.unique().numel() == 16
    published = fake_affine(before, torch.tensor(target), fraction, 4)
    assert published.unique().numel() > 16  # the clamp adds levels between two multiples of the scale


def test_refold_by_hand():
    fold, integer = refold(0.5, -0.75, 3)
    assert integer == -1 and torch.equal(fold.ratio, torch.ones(3))
    _, beta = fold_norm(None, torch.zeros(3), fold)
    assert torch.equal(beta, torch.full((3,), 0.125))  # d = (z~ - z_new) s~
    _, bias = fold_linear(torch.tensor([[1.0, 2.0, -5.0]]), None, fold)
    assert bias == 0.25  # -d sum W


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_a_plan_computes_what_the_layer_did(bits):
    norm_weight, norm_bias = torch.rand(32) * 3 + 0.1, torch.randn(32)
    weight, bias = torch.randn(20, 32), torch.randn(20)
    x = torch.randn(400, 32)
    y = x * norm_weight + norm_bias
    gamma, beta, plan = repq_plan(norm_weight, norm_bias, weight, bias, Activation.of(y), bits, bits)
    assert plan.codes is not None and plan.x_scale == 1 and plan.x_zero_point == 0
    fold, _, _ = repq_fold(*channel_scales(Activation.of(y), bits))
    folded_weight, folded_bias = fold_linear(weight, bias, fold)
    folded, one = x * gamma + beta, torch.ones(1)
    assert torch.equal(plan.weight, folded_weight)
    seen = affine.dequantize(affine.quantize(folded, one, bits=bits), one)
    assert torch.equal(quantized_input(plan, folded), seen)

    # Both roundings at their worst, and what the correction moved; 1e-3 for the float32 sums of all of them.
    lost = (plan.weight - plan.weight_hat()).abs()
    correction = bias_correction(plan.weight, plan.weight_hat(), seen.mean(0))
    bound = affine.error_bound(folded, one, bits=bits) @ plan.weight_hat().abs().T + folded.abs() @ lost.T
    assert ((linear_output(plan, folded) - F.linear(y, weight, bias)).abs() <= bound + correction.abs() + 1e-3).all()
    torch.testing.assert_close(plan.bias, folded_bias + correction, rtol=1e-4, atol=1e-4)


def test_a_dead_channel_does_not_inflate_the_weights():
    y = uneven(200, 8)
    y[:, 3] = 0.0
    scale, _ = channel_scales(Activation.of(y), 4)
    assert scale[3] == pytest.approx(float(scale.max()) * 1e-3)
    assert bool((scale > 0).all())


# ---- channels clipped before the fold


def test_clipped_scales_cut_an_outlying_channel():
    y = torch.randn(600, 32)
    y[::200, 5] = 20  # three tokens; their scale would leave every other column of W' with codes of zero
    weight = torch.randn(24, 32)
    y = Activation.of(y)
    plain, _ = channel_scales(y, 4)
    scale, zero_point = clipped_scales(y, weight)
    assert scale[5] < 0.8 * plain[5]
    kept = torch.arange(32) != 5
    assert (scale[kept] == plain[kept]).float().mean() > 0.8
    assert torch.equal(zero_point, zero_point.round())

    def error(scales):
        _, _, plan = repq_plan(None, None, weight, None, y, scales=scales)
        return (linear_output(plan, plan.seen.sample) - y.sample @ weight.T).square().mean()

    assert error((scale, zero_point)) < error(None)


def test_clipped_scales_can_leave_everything():
    y = Activation.of(uneven(300, 12))
    clipped = clipped_scales(y, torch.randn(8, 12), percentiles=(100.0,))
    for a, b in zip(clipped, channel_scales(y, 4), strict=True):
        assert torch.equal(a, b)


def test_a_clipped_channel_keeps_what_surrounds_its_mean():
    y = torch.rand(500, 4)
    y[:, 3] = y[:, 3] * 10 + 20
    quiet = torch.eye(4) * torch.tensor([1.0, 1.0, 1.0, 1e-4])
    scale, zero_point = clipped_scales(Activation.of(y), quiet, percentiles=(60.0,))
    lo, hi = (-8 - zero_point[3]) * scale[3], (7 - zero_point[3]) * scale[3]
    assert scale[3] < 0.08 and lo < y[:, 3].mean() < hi
    y[:, 3] = torch.arange(500) / 50  # mean 5, but the last rows lie far beyond: the range must not leave what was seen
    y[-30:, 3] = 1000
    scale, zero_point = clipped_scales(Activation.of(y), quiet, percentiles=(60.0,))
    assert (-7 - zero_point[3]) * scale[3] >= 0 and (7 - zero_point[3]) * scale[3] <= 1000
