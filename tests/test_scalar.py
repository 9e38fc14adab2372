"""The scalar functions of the epilogues against float64, over a dense grid of float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit_accel.reference import scalar

TRUTH = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
ERROR = {"none": 0.0, "gelu": 2.5e-7, "gelu_tanh": 1.7e-7, "quick_gelu": 1.7e-7}  # of max(1, |x|)
EXP2_ERROR = 2.0e-7  # relative: 9e-8 of the polynomial, the rest its float32 evaluation


def floats(lo: float, hi: float, step: int) -> Tensor:
    """Every step-th float32 in lo..hi and their negatives, lo >= 0."""
    first, last = torch.tensor([lo, hi]).view(torch.int32).tolist()
    x = torch.arange(first, last + 1, step, dtype=torch.int32).view(torch.float32)
    return torch.cat([x, -x])


EXP2_GRIDS = [(0.0, 2.0**-30, 9973), (2.0**-30, 0.25, 499), (0.25, 2.0, 31), (2.0, 100.0, 97)]
GRIDS = [(0.0, 2.0**-20, 9973), (2.0**-20, 0.5, 499), (0.5, 8.0, 97), (8.0, 3e38, 2003)]


@pytest.mark.parametrize(("lo", "hi", "step"), EXP2_GRIDS)
def test_exp2(lo, hi, step):
    t = floats(lo, hi, step)
    assert (scalar.exp2(t).double() / torch.exp2(t.double()) - 1).abs().max() <= EXP2_ERROR


def test_exp2_of_integers_is_exact():
    t = torch.arange(-100, 101).float()
    assert torch.equal(scalar.exp2(t), torch.exp2(t.double()).float())


@pytest.mark.parametrize(("lo", "hi", "step"), GRIDS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
def test_activation(activation, lo, hi, step):
    x = floats(lo, hi, step)
    error = (scalar.ACTIVATIONS[activation](x).double() - TRUTH[activation](x.double())).abs()
    assert (error <= ERROR[activation] * x.abs().clamp_min(1).double()).all()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
def test_activation_of_zero_is_zero(activation):
    """Padding and dead features stay exactly dead."""
    assert scalar.ACTIVATIONS[activation](torch.zeros(1)).item() == 0.0


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
def test_activation_of_large_values(activation):
    """Beyond the range of the approximation the function is x or zero."""
    x = torch.tensor([20.0, 1e4, 1e30])
    assert torch.equal(scalar.ACTIVATIONS[activation](x), x)
    assert (scalar.ACTIVATIONS[activation](-x).abs() <= 2.0**-23 * x).all()
