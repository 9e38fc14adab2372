"""The Triton launcher propagate against its reference in float64."""

from __future__ import annotations

import pytest
import torch
from _problems import U32, padded
from _triton import kernel, run
from test_propagate import A, exact, problem

SIZES = [(1, 3), (5, 1), (64, 33), (65, 16), (129, 20)]  # N, D; of float32 64 tokens are one program


def assert_exact(*args):
    """Beside what exact allows: 2^-22 of each product of float32, which are three of tf32."""
    result, (truth, error) = kernel("propagate", *args), exact(*args)
    assert result.dtype == torch.float32
    q, k, _, scale, iterations, _ = args
    products = (q.double().abs() @ k.double().abs().mT * scale).amax((2, 3))[..., None]
    within = exact(q, k, args[2].abs(), *args[3:])[0]
    error = error + iterations * 2 * (2.0**-22) * products * within
    assert ((result.double() - truth).abs() <= error).all()


def check_iterations(N, D, iterations, dtype):
    torch.manual_seed(0)
    q, k, start, scale, key_bias = problem(N, D)
    q, k = q.to(dtype), k.to(dtype)
    assert_exact(q, k, start, scale, iterations, key_bias)
    assert_exact(padded(q), k.transpose(0, 2).contiguous().transpose(0, 2), start, scale, iterations, None)


def check_hidden(N):
    """Keys without a weight, an image without a key, and NaN, which stays in its head. e^88.75 is not in range."""
    torch.manual_seed(0)
    q, k, start, scale, key_bias = problem(N, 8, B=3)
    key_bias[0] = 88.75
    key_bias[:, 3::4] = -torch.inf
    key_bias[1] = -torch.inf
    q[2, 0, 1, 2] = torch.nan
    result = kernel("propagate", q, k, start, scale, 2, key_bias)
    assert result[1:].isnan().all() and not result[0, :, 3::4].any() and (result[0, :, 1] > 0).all()


def check_sums_and_images(N):
    torch.manual_seed(0)
    q, k, start, scale, key_bias = problem(N, 16)
    result, order = kernel("propagate", 4 * q, k, start, scale, 3, key_bias), torch.tensor([1, 0])
    permuted = kernel("propagate", 4 * q[order], k[order], start[order], scale, 3, key_bias[order])
    assert torch.equal(permuted, result[order])
    total = start.double().sum(-1)
    assert ((result.double().sum(-1) - total).abs() <= 3 * (2 * N + 5) * U32 * total).all()


def check_published():
    q, k, start = A.log()[None], torch.eye(4).expand(1, 4, 4, 4), torch.full((1, 4, 4), 0.25)
    for iterations, head, scores in (
        (1, 1, (0.25, 0.20, 0.35, 0.20)),
        (1, 3, (0.895, 0.04, 0.0325, 0.0325)),
        (5, 0, (0.197987, 0.478470, 0.205886, 0.117657)),
        (50, 0, (0.197479, 0.478992, 0.205882, 0.117647)),
    ):
        result = kernel("propagate", q, k, start, 1.0, iterations, None)[0, head]
        torch.testing.assert_close(result, torch.tensor(scores), rtol=0, atol=5e-7 + iterations * 30 * U32)


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize(("N", "D"), SIZES)
def test_within_rounding_of_float64(N, D, iterations):
    run(check_iterations, N, D, iterations, torch.float32)


def test_float16():
    for N in (128, 130):
        run(check_iterations, N, 70, 2, torch.float16)


@pytest.mark.parametrize("N", [40, 140])
def test_hidden_keys_and_nan(N):
    run(check_hidden, N)


@pytest.mark.parametrize("N", [40, 140])
def test_sum_is_conserved_and_images_do_not_meet(N):
    run(check_sums_and_images, N)


def test_published_scores():
    run(check_published)
