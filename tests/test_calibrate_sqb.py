"""sqb: the fold of MPTQ-ViT, by hand and against what it must leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyvit_accel.calibrate import Activation, fold_linear, fold_norm
from pyvit_accel.calibrate.plan import LinearPlan, linear_output
from pyvit_accel.calibrate.sqb import sqb_fold


def test_the_fold_by_hand():
    y = Activation.of(torch.tensor([[0.0, 10.0], [2.0, -6.0], [4.0, -4.0]]))
    weight = torch.tensor([[1.0, -0.5], [-4.0, 0.25]])
    fold = sqb_fold(y, weight)
    torch.testing.assert_close(fold.shift, torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(fold.ratio, torch.tensor([(2 / 4) ** 0.5, (10 / 0.5) ** 0.5]))
    torch.testing.assert_close(sqb_fold(y, weight, 1.0).ratio, torch.tensor([2.0, 10.0]))
    torch.testing.assert_close(sqb_fold(y, weight, 0.0).ratio, torch.tensor([1 / 4, 1 / 0.5]))
    plain = sqb_fold(y, weight, 1.0, shift=False)
    assert plain.ratio.tolist() == [4, 10] and not plain.shift.any()


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.8, 1.0])
def test_the_float_output_stays(strength):
    norm, linear = nn.LayerNorm(16), nn.Linear(16, 12)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    norm.weight.data[3] = norm.bias.data[3] = 0.0  # a dead channel
    linear.weight.data[:, 5] = 0.0  # a dead column
    x = torch.randn(60, 16)
    fold = sqb_fold(Activation.of(norm(x)), linear.weight, strength)
    gamma, beta = fold_norm(norm.weight, norm.bias, fold)
    folded = F.linear(F.layer_norm(x, (16,), gamma, beta), *fold_linear(linear.weight, linear.bias, fold))
    torch.testing.assert_close(folded, linear(norm(x)), rtol=1e-4, atol=1e-4)


def test_it_helps_uneven_channels_off_centre():
    y = torch.randn(300, 32) * torch.logspace(-1, 1, 32) + torch.linspace(-5, 5, 32)
    weight = torch.randn(24, 32) / torch.logspace(-1, 1, 32)
    truth = y @ weight.T

    def error(fold):
        w, bias, moved = weight, None, y
        if fold is not None:
            w, bias = fold_linear(weight, None, fold)
            moved = (y - fold.shift) / fold.ratio
        plan = LinearPlan(w, bias, 4, 4, x_scale=moved.abs().max().reshape(1) / 7)
        return (linear_output(plan, moved) - truth).square().mean()

    seen = Activation.of(y)
    assert error(sqb_fold(seen, weight)) < 0.8 * error(sqb_fold(seen, weight, shift=False)) < 0.5 * error(None)


def test_arguments_are_checked():
    y = Activation.of(torch.randn(5, 4))
    with pytest.raises(ValueError, match=r"sqb_fold: strength=2 is outside 0\.\.1"):
        sqb_fold(y, torch.ones(3, 4), 2)
    with pytest.raises(ValueError, match=r"weight \(3, 5\) does not take the 4 channels of y"):
        sqb_fold(y, torch.ones(3, 5))
