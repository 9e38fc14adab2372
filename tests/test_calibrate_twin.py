"""sulq, twin, optm, log-sqrt2: quantizers of softmax and GELU outputs and the searches for their numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from pyvit_accel.calibrate.optm import PARTS, RATIOS, optm_gelu
from pyvit_accel.calibrate.repq import fake_log_sqrt2, log_sqrt2_scale
from pyvit_accel.calibrate.sulq import ETAS, fake_sulq, sulq_search
from pyvit_accel.calibrate.twin import GELU_MINIMUM, fake_twin, fake_twin_softmax, twin_gelu, twin_softmax

# quantization.md 11
X = torch.tensor([1, 0.75, 0.5, 0.36, 0.2, 0.1, 0.05, 0.02, 0.006, 0.004, 0.001, 3e-5, 1e-6, 0])


def softmax(tokens: int = 40) -> torch.Tensor:
    return (torch.randn(2, 2, tokens, tokens) * 2).softmax(-1)


# ---- log-sqrt2


def test_log_sqrt2_matches_the_specification():
    values = {
        4: [0.9, 0.6363961, 0.45, 0.3181981, 0.225, 0.1125, 0.05625, 0.01988738, 0.00703125, 0, 0, 0, 0, 0],
        3: [0.9, 0.6363961, 0.45, 0.3181981, 0.225, 0.1125, 0, 0, 0, 0, 0, 0, 0, 0],
    }
    for bits, truth in values.items():
        torch.testing.assert_close(fake_log_sqrt2(X, 0.9, bits), torch.tensor(truth))


def test_log_sqrt2_scale_is_the_best_percentile():
    p = softmax()
    deltas = [float(torch.quantile(p.double(), part)) for part in (0.999, 0.9999, 0.99999)]
    errors = [float((fake_log_sqrt2(p, delta, 4) - p).square().mean()) for delta in deltas]
    assert log_sqrt2_scale(p, 4) == pytest.approx(deltas[errors.index(min(errors))], rel=1e-6)


# ---- SULQ


@pytest.mark.parametrize("bits", [3, 4])
def test_sulq_matches_the_specification(bits):
    fine = [0.99, 0.99, 0.49, 0.49, 0.24, 0.115, 0.0525, 0.02125, 0.005625, 0.005625]
    coarse = [0.99, 0.99, 0.49, 0.24, 0.24, 0.115, 0.0525, 0.02125, 0.005625, 0.005625]
    truth = torch.tensor([*(fine if bits == 4 else coarse), *[-0.0021875] * 4])
    torch.testing.assert_close(fake_sulq(X, 0.01, math.log2(0.01), math.log2(1.01), bits), truth)


def test_sulq_search_is_the_published_one():
    p = softmax()
    best = None
    for eta in ETAS:
        u = torch.log2(p + eta)
        d = (u.max() - u.min()) / 15
        code = torch.round((u - u.min()) / d).clamp(0, 15)
        error = (2.0 ** torch.round(code * d + u.min()) - eta - p).square().mean()
        if best is None or error < best[0]:
            best = error, eta, u.min(), u.max()
    eta, minv, maxv = sulq_search(p, 4)
    assert eta == best[1]
    assert minv == pytest.approx(float(best[2])) and maxv == pytest.approx(float(best[3]))
    with pytest.raises(ValueError, match="sulq_search: p"):
        sulq_search(p - 1, 4)


def test_sulq_has_few_values():
    p = softmax()
    assert 2 <= fake_sulq(p, *sulq_search(p, 6), 6).unique().numel() <= 11  # quantization.md 0.5
    assert sulq_search(torch.full((3,), 0.25), 4)[0] in ETAS  # a single value


# ---- twin


def test_twin_matches_the_specification():
    x = torch.tensor([-0.17, -0.08, -0.01, 0, 0.02, 0.3, 1, 2.5, 5])
    truth = torch.tensor([-0.169971, -0.084986, 0, 0, 0, 0.4, 0.8, 2.4, 2.8])
    torch.testing.assert_close(fake_twin(x, 0.4, -GELU_MINIMUM / 8, 4), truth, rtol=1e-5, atol=1e-6)


def test_clean_twin_softmax_by_hand():
    p = torch.tensor([0.0, 0.01, 0.0625, 0.07, 0.1, 0.5, 1.0])
    split = 0.0625
    found = fake_twin_softmax(p, split, 4)
    torch.testing.assert_close(found, torch.tensor([0, split / 7, split, 0, 1 / 7, 4 / 7, 1]))  # 3.5 rounds to even


def test_twin_gelu_is_the_best_of_its_grid():
    x, weight = F.gelu(torch.randn(100, 16) * 2), torch.randn(12, 16)
    small = -GELU_MINIMUM / 8

    def error(scale):
        return float(((fake_twin(x, scale, small, 4) - x) @ weight.T).square().sum())

    scale = twin_gelu(x, weight, 4)
    assert error(scale) <= min(error(float(x.max()) / 7.5 * i / 100) for i in range(1, 121)) * 1.02
    with pytest.raises(ValueError, match="twin_gelu: no value of x is positive"):
        twin_gelu(-torch.rand(3, 16), weight, 4)


def test_twin_softmax_is_a_power_of_two_that_helps():
    p, v = softmax(), torch.randn(2, 2, 40, 8)

    def error(split):
        return float(((fake_twin_softmax(p, split, 6) - p) @ v).square().sum())

    split = twin_softmax(p, v, 6)
    assert math.log2(split).is_integer() and error(split) == min(error(2.0**-i) for i in range(20))
    assert error(split) < 0.5 * error(1.0)


# ---- OPT-m


def test_optm_is_the_best_of_its_grid():
    x, weight = F.gelu(torch.randn(100, 16) * 2), torch.randn(12, 16)
    full = -GELU_MINIMUM / 8

    def error(small, m):
        return float(((fake_twin(x, small * 2**m, small, 4) - x) @ weight.T).square().sum())

    small, m = optm_gelu(x, weight, 4)
    assert m in RATIOS and full * PARTS[0] <= small <= full * PARTS[-1]
    assert error(small, m) == pytest.approx(min(error(full * part, m) for part in PARTS for m in RATIOS))
    assert error(small, m) <= error(full, m)


def test_optm_values_are_multiples_of_one_step():
    x, weight = F.gelu(torch.randn(60, 8) * 3), torch.randn(6, 8)
    small, m = optm_gelu(x, weight, 4)
    multiples = fake_twin(x, small * 2**m, small, 4) / small
    torch.testing.assert_close(multiples, multiples.round(), rtol=0, atol=1e-4)
