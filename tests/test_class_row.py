"""class_row: the class token's probabilities within a derived bound of float64, and as quant_attention emits them."""

from __future__ import annotations

import re

import pytest
import torch
from _implementations import available
from _problems import CODES, U32, assert_same_bits, codes, padded

from pyvit_accel import ops

SIZES = [(1, 1, 1), (5, 3, 32), (17, 2, 80), (197, 12, 64), (577, 1, 1), (64, 12, 130)]  # N, H, D


def problem(N, H, D, B=2, per_token=True, kind="random"):
    """q, k as views of qkv, q_scale, k_scale, softmax_scale, key_bias with a third of the keys hidden."""
    q, k, _ = codes(kind, B, N, 3, H, D).permute(2, 0, 3, 1, 4)
    q_scale, k_scale = torch.rand(2, *((B, H, N) if per_token else (H, 1))) * 0.02 + 0.01
    key_bias = torch.randn(B, N)
    key_bias[:, 1::3] = -torch.inf
    return q, k, q_scale, k_scale, D**-0.5, key_bias


def exact(q, k, q_scale, k_scale, softmax_scale, key_bias=None):
    """In float64, and how far from it float32 may be.

    A score has four roundings of products and one of the bias; its exponent a difference, a constant and a product
    more, of at most twice the largest score; 2e-7 of exp2, again where a sum is brought to a higher maximum, and 2^-100
    of what is far below. Such an error weighs on the numerator and on the sum, which has N additions. A division, a
    product, and H sums and a division of the mean follow.
    """
    B, H, N = k.shape[:3]
    q_scale, k_scale = q_scale.expand(B, H, q.shape[2])[:, :, 0, None].double(), k_scale.expand(B, H, N).double()
    scores = torch.einsum("bhd,bhnd->bhn", q[:, :, 0].double(), k.double()) * q_scale * k_scale * softmax_scale
    size = scores.abs()
    if key_bias is not None:
        scores = scores + key_bias[:, None].double()
        size = size + key_bias.abs().where(key_bias.isfinite(), 0)[:, None].double()
    e = (scores - scores.amax(dim=-1, keepdim=True)).exp().nan_to_num()
    truth = (e / e.sum(dim=-1, keepdim=True).clamp(min=1e-300)).mean(dim=1)
    of_score = 11 * U32 * size.amax(dim=(1, 2))[:, None] + 2e-7 * (1 + N / 64)
    return truth, truth * (2 * of_score + (N + H + 4) * U32) + 1e-30


def assert_exact(result, *args):
    truth, error = exact(*args)
    assert result.dtype == torch.float32 and result.shape == truth.shape
    assert ((result.double() - truth).abs() <= error).all()


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("N", "H", "D"), SIZES)
def test_within_rounding_of_float64(impl, N, H, D, biased, per_token):
    args = problem(N, H, D, per_token=per_token)[: 6 if biased else 5]
    assert_exact(impl(ops.class_row, *args), *args)


@pytest.mark.parametrize("kind", CODES)
def test_extreme_codes(impl, kind):
    """Pairs of products that overflow 16 bits."""
    q, *rest = problem(35, 2, 200, kind=kind)
    for first in (q, codes("lowest", *q.shape)):
        assert_exact(impl(ops.class_row, first, *rest), first, *rest)


@pytest.mark.parametrize(("N", "H", "D"), SIZES)
def test_is_what_attention_emits(impl, N, H, D):
    """Both are that far from the truth."""
    q, k, q_scale, k_scale, scale, key_bias = problem(N, H, D)
    one = torch.ones(1)
    for bias in (None, key_bias):
        _, cls = impl(ops.quant_attention, q, k, k, q_scale, k_scale, one, scale, key_bias=bias, emit=("cls",))
        result = impl(ops.class_row, q, k, q_scale, k_scale, scale, bias)
        assert ((result.double() - cls).abs() <= 2 * exact(q, k, q_scale, k_scale, scale, bias)[1]).all()


@pytest.mark.parametrize(("N", "H", "D"), SIZES)
def test_instruction_sets_agree(kernel, N, H, D):
    args = problem(N, H, D)
    result = kernel(ops.class_row, *args)
    assert_same_bits(result, available("portable")(ops.class_row, *args))
    assert_same_bits(result, kernel(ops.class_row, *args))


def test_hidden_keys_get_nothing(impl):
    args = problem(40, 3, 16, B=3)
    args[-1][1] = -torch.inf  # an image in which nothing is seen
    result = impl(ops.class_row, *args)
    assert not result[1].any() and not result[:, 1::3].any() and (result[0, ::3] > 0).all()
    assert_exact(result, *args)


def test_only_the_first_query_is_read(impl):
    q, k, q_scale, k_scale, scale, key_bias = problem(40, 3, 16)
    expected = impl(ops.class_row, q, k, q_scale, k_scale, scale, key_bias)
    others, scales = codes("random", *q.shape), torch.rand_like(q_scale)
    others[:, :, 0], scales[..., 0] = q[:, :, 0], q_scale[..., 0]
    assert_same_bits(impl(ops.class_row, others, k, scales, k_scale, scale, key_bias), expected)
    assert_same_bits(impl(ops.class_row, q[:, :, :1], k, q_scale[..., :1], k_scale, scale, key_bias), expected)


def test_strides(kernel):
    q, k, q_scale, k_scale, scale, key_bias = problem(30, 2, 20)
    expected = kernel(ops.class_row, q, k, q_scale, k_scale, scale, key_bias)
    for view in (torch.Tensor.contiguous, padded, lambda t: t.mT.contiguous().mT):
        assert_same_bits(kernel(ops.class_row, view(q), view(k), q_scale, k_scale, scale, key_bias), expected)
    apart = [torch.stack([t, t], dim=-1)[..., 0] for t in (q_scale, k_scale, key_bias)]
    assert_same_bits(kernel(ops.class_row, q, k, *apart[:2], scale, apart[2]), expected)


def test_images_do_not_meet(kernel):
    *tensors, scale, key_bias = problem(33, 3, 12, B=4)
    order = torch.tensor([2, 0, 3, 1])
    result = kernel(ops.class_row, *tensors, scale, key_bias)
    assert_same_bits(kernel(ops.class_row, *(t[order] for t in tensors), scale, key_bias[order]), result[order])


def test_number_of_threads_does_not_show(kernel):
    """Not divided, by images, and by heads: two of five threads have an image and a half each."""
    args, before, results = problem(1500, 2, 128, B=3), torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(kernel(ops.class_row, *args))
    torch.set_num_threads(before)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_empty(impl):
    for B, N in ((0, 3), (2, 0)):
        q, k = torch.zeros(B, 2, 1, 4, dtype=torch.int8), torch.zeros(B, 2, N, 4, dtype=torch.int8)
        assert impl(ops.class_row, q, k, torch.ones(1), torch.ones(1), 0.5).shape == (B, N)


def test_errors():
    q, one = codes("random", 2, 3, 5, 4), torch.ones(1)

    def refuses(error, message, *args):
        with pytest.raises(error, match="^" + re.escape(message)):
            ops.class_row(*args)

    refuses(TypeError, "class_row: q must be torch.int8, got torch.float32", q.float(), q, one, one, 1.0)
    refuses(TypeError, "class_row: k must be torch.int8, got torch.uint8", q, q.byte(), one, one, 1.0)
    refuses(ValueError, "class_row: k has shape (3, 5, 4), expected 4 dimensions", q, q[0], one, one, 1.0)
    message = "class_row: q (2, 3, 5, 4) and k (2, 3, 5, 3) do not fit together"
    refuses(ValueError, message, q, q[..., :3], one, one, 1.0)
    refuses(ValueError, "class_row: q (2, 3, 0, 4) needs a head and a first query", q[:, :, :0], q, one, one, 1.0)
    refuses(TypeError, "class_row: q_scale must be float32, got torch.float64", q, q, one.double(), one, 1.0)
    message = "class_row: k_scale (4,) does not broadcast to (2, 3, 5)"
    refuses(ValueError, message, q, q, one, torch.ones(4), 1.0)
    message = "class_row: key_bias must be torch.float32, got torch.int64"
    refuses(TypeError, message, q, q, one, one, 1.0, torch.ones(2, 5).long())
    message = "class_row: key_bias (2, 4) must be (B, N) = (2, 5)"
    refuses(ValueError, message, q, q, one, one, 1.0, torch.ones(2, 4))
