"""propagate: s <- A^T s again and again, A never in memory."""

from __future__ import annotations

import re

import pytest
import torch
from _implementations import available
from _problems import U32, assert_same_bits, padded

from pyvit_accel import ops
from pyvit_accel import reference as references

SIZES = [(1, 3), (5, 1), (16, 16), (50, 33), (197, 64), (577, 24)]  # N, D


def problem(N, D, B=2, H=1):
    """q, k, start, softmax_scale, key_bias."""
    q, k = torch.randn(2, B, H, N, D)
    return q, k, torch.rand(B, H, N) / N, D**-0.5, torch.randn(B, N)


def exact(q, k, start, softmax_scale, iterations, key_bias):
    """In float64, and how far from it float32 may be.

    Relative to a probability: D products and sums in a score, its scale and bias; a difference and a product in the
    exponent; 2e-7 of exp; N sums. Each weighs on the numerator and on the sum. Every iteration adds N sums and products
    of shares of the total, whose signs may differ.
    """
    q, k, start = q.double(), k.double(), start.double()
    bias = torch.zeros_like(start[:, 0]) if key_bias is None else key_bias.double()
    truth = references.propagate(q, k, start, softmax_scale, iterations, bias)
    within = references.propagate(q, k, start.abs(), softmax_scale, iterations, bias)
    N, D = q.shape[2:]
    scores = q.abs() @ k.abs().mT * softmax_scale
    seen = bias.abs().where(bias.isfinite(), 0)[:, None, None]
    score = ((D + 2) * scores + seen + 6 * (scores + seen)).amax((2, 3)) * U32 + 2e-7
    return truth, iterations * (2 * score[..., None] + (2 * N + 3) * U32) * within + torch.finfo(torch.float32).tiny


def assert_exact(result, *args):
    truth, error = exact(*args)
    assert result.dtype == torch.float32
    assert ((result.double() - truth).abs() <= error).all()


@pytest.mark.parametrize("iterations", [1, 4])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("N", "D"), SIZES)
def test_within_rounding_of_float64(impl, N, D, biased, iterations):
    q, k, start, scale, key_bias = problem(N, D)
    for s in (start, start - start.mean()):
        args = (q, k, s, scale, iterations, key_bias if biased else None)
        assert_exact(impl(ops.propagate, *args), *args)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_computes_in_float32(impl, dtype):
    q, k, start, scale, key_bias = problem(60, 32)
    q, k = q.to(dtype), k.to(dtype)
    assert_exact(impl(ops.propagate, q, k, start, scale, 3, key_bias), q, k, start, scale, 3, key_bias)


def test_large_head(impl):
    """More probabilities than are kept: they are made anew, to the same bits."""
    q, k, start, scale, key_bias = problem(2080, 2, 1, 1)
    result = impl(ops.propagate, q, k, start, scale, 2, key_bias)
    assert_exact(result, q, k, start, scale, 2, key_bias)
    once = impl(ops.propagate, q, k, impl(ops.propagate, q, k, start, scale, 1, key_bias), scale, 1, key_bias)
    assert torch.equal(result, once)


@pytest.mark.parametrize(("N", "D"), SIZES)
def test_instruction_sets_and_steps_agree(kernel, N, D):
    q, k, start, scale, key_bias = problem(N, D)
    expected = available("portable")(ops.propagate, q, k, start, scale, 3, key_bias)
    assert_same_bits(kernel(ops.propagate, q, k, start, scale, 3, key_bias), expected)
    for _ in range(3):
        start = kernel(ops.propagate, q, k, start, scale, 1, key_bias)
    assert_same_bits(start, expected)


@pytest.mark.parametrize("N", [5, 197])
def test_sum_is_conserved(impl, N):
    """Rows of A sum to 1 but for the rounding of N sums, a division and a product."""
    q, k, start, scale, key_bias = problem(N, 16)
    for iterations in (1, 30):
        result = impl(ops.propagate, 4 * q, k, start, scale, iterations, key_bias).double().sum(-1)
        total = start.double().sum(-1)
        assert ((result - total).abs() <= iterations * (2 * N + 5) * U32 * total).all()


def test_uniform_start_gives_column_means(impl):
    q, k, _, scale, _ = problem(197, 16)
    start = torch.full((2, 1, 197), 1 / 197)
    result = impl(ops.propagate, q, k, start, scale)
    means = (q.double() @ k.double().mT * scale).softmax(-1).mean(2)
    _, error = exact(q, k, start, scale, 1, None)
    assert ((result.double() - means).abs() <= error + U32 * means).all()


def test_strides(kernel):
    q, k, start, scale, key_bias = problem(30, 20)
    expected = kernel(ops.propagate, q, k, start, scale, 2, key_bias)
    for view in (padded, lambda t: t.mT.contiguous().mT, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)):
        assert_same_bits(kernel(ops.propagate, view(q), view(k), start, scale, 2, key_bias), expected)
    apart = [torch.stack([t, t], dim=-1)[..., 0] for t in (start, key_bias)]
    assert_same_bits(kernel(ops.propagate, q, k, apart[0], scale, 2, apart[1]), expected)


def test_hidden_keys_get_nothing(impl):
    q, k, start, scale, key_bias = problem(40, 8)
    key_bias[:, 3::4] = -torch.inf
    result = impl(ops.propagate, q, k, start, scale, 2, key_bias)
    assert not result[..., 3::4].any() and (result[..., 1] > 0).all()
    assert_exact(result, q, k, start, scale, 2, key_bias)


def test_nan_stays_in_its_head(impl):
    q, k, start, scale, key_bias = problem(40, 8, H=2)
    q[0, 1, 7, 2] = torch.nan
    key_bias[1] = -torch.inf  # an image in which nothing is seen
    bad = impl(ops.propagate, q, k, start, scale, 2, key_bias).isnan()
    assert bad[0, 1].all() and bad[1].all() and not bad[0, 0].any()


def test_images_do_not_meet(kernel):
    q, k, start, scale, key_bias = problem(33, 12, B=4)
    result, order = kernel(ops.propagate, q, k, start, scale, 5, key_bias), torch.tensor([2, 0, 3, 1])
    assert torch.equal(kernel(ops.propagate, q, k, start, scale, 5, key_bias), result)
    permuted = kernel(ops.propagate, q[order], k[order], start[order], scale, 5, key_bias[order])
    assert torch.equal(permuted, result[order])


def test_number_of_threads_does_not_show(kernel):
    q, k, start, scale, key_bias = problem(60, 16, H=3)
    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(kernel(ops.propagate, q, k, start, scale, 3, key_bias))
    torch.set_num_threads(before)
    assert_same_bits(*results)


def test_empty(impl):
    for B, H, N in ((0, 2, 3), (2, 0, 3), (2, 2, 0)):
        q = torch.zeros(B, H, N, 4)
        assert impl(ops.propagate, q, q, q[..., 0], 0.5, 2).shape == (B, H, N)


A = torch.tensor([
    [(0.4, 0.3, 0.2, 0.1), (0.1, 0.6, 0.2, 0.1), (0.2, 0.5, 0.2, 0.1), (0.25, 0.25, 0.25, 0.25)],
    [(0.3, 0.2, 0.3, 0.2), (0.2, 0.2, 0.4, 0.2), (0.25, 0.15, 0.4, 0.2), (0.25, 0.25, 0.3, 0.2)],
    [(0.26, 0.25, 0.25, 0.24), (0.25, 0.25, 0.26, 0.24), (0.25, 0.25, 0.25, 0.25), (0.25, 0.26, 0.25, 0.24)],
    [(0.9, 0.04, 0.03, 0.03), (0.9, 0.05, 0.03, 0.02), (0.88, 0.04, 0.04, 0.04), (0.9, 0.03, 0.03, 0.04)],
])  # fmt: skip


@pytest.mark.parametrize(("iterations", "head", "scores"), [
    (1, 0, (0.2375, 0.4125, 0.2125, 0.1375)),
    (1, 1, (0.25, 0.20, 0.35, 0.20)),
    (1, 2, (0.2525, 0.2525, 0.2525, 0.2425)),
    (1, 3, (0.895, 0.04, 0.0325, 0.0325)),
    (5, 0, (0.197987, 0.478470, 0.205886, 0.117657)),
    (5, 1, (0.253039, 0.192265, 0.354696, 0.2)),
    (50, 0, (0.197479, 0.478992, 0.205882, 0.117647)),
])  # fmt: skip
def test_published(impl, iterations, head, scores):
    """q = log A and k = I have the probabilities A. Printed to six digits."""
    q, k = A.log()[None], torch.eye(4).expand(1, 4, 4, 4)
    result = impl(ops.propagate, q, k, torch.full((1, 4, 4), 0.25), 1.0, iterations)
    torch.testing.assert_close(result[0, head], torch.tensor(scores), rtol=0, atol=5e-7 + iterations * 30 * U32)


def test_published_start_from_the_class_token(impl):
    """sqrt(N) / N there: conserved, and after 50 iterations 1.25 times what the uniform start gives."""
    q, k, start = A.log()[None], torch.eye(4).expand(1, 4, 4, 4), torch.full((1, 4, 4), 0.25)
    boosted = start.clone()
    boosted[..., 0] = 0.5
    result = impl(ops.propagate, q, k, boosted, 1.0, 1)
    torch.testing.assert_close(result[0, 0], torch.tensor([0.3375, 0.4875, 0.2625, 0.1625]), rtol=0, atol=30 * U32)
    far, uniform = (impl(ops.propagate, q, k, s, 1.0, 50) for s in (boosted, start))
    torch.testing.assert_close(far, 1.25 * uniform, rtol=100 * 30 * U32, atol=0)


def test_errors():
    q, start = torch.ones(2, 3, 5, 4), torch.ones(2, 3, 5)

    def refuses(error, message, *args):
        with pytest.raises(error, match="^" + re.escape(message)):
            ops.propagate(*args)

    refuses(TypeError, "propagate: q must be torch.float32 or torch.float16 or torch.bfloat16", q.int(), q, start, 1.0)
    message = "propagate: q torch.float32 (2, 3, 5, 4) and k torch.float32 (2, 3, 4, 4) differ"
    refuses(ValueError, message, q, q[:, :, :4], start, 1.0)
    refuses(TypeError, "propagate: start must be torch.float32, got torch.float16", q, q, start.half(), 1.0)
    refuses(ValueError, "propagate: start (2, 3, 4) must be (B, H, N) = (2, 3, 5)", q, q, start[..., :4], 1.0)
    refuses(ValueError, "propagate: iterations=0; use 1 or more", q, q, start, 1.0, 0)
    refuses(ValueError, "propagate: key_bias (2, 4) must be (2, 5)", q, q, start, 1.0, 1, torch.ones(2, 4))
