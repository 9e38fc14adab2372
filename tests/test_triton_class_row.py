"""The Triton launcher class_row against float64."""

from __future__ import annotations

import pytest
import torch
from _problems import assert_same_bits, padded
from _triton import kernel, run
from test_class_row import assert_exact, problem

SIZES = [(1, 1, 1), (5, 3, 32), (65, 2, 80), (197, 12, 64), (577, 1, 20)]  # N, H, D


def expanded(q, k, q_scale, k_scale, *rest):
    """Scales as the op hands them on."""
    return q, k, q_scale.expand(q.shape[:3]), k_scale.expand(k.shape[:3]), *rest


def check_row(N, H, D, per_token):
    torch.manual_seed(0)
    args = expanded(*problem(N, H, D, per_token=per_token))
    result = kernel("class_row", *args)
    assert_exact(result, *args)
    assert_same_bits(kernel("class_row", padded(args[0]), args[1].mT.contiguous().mT, *args[2:]), result)
    args = (*args[:5], None)
    assert_exact(kernel("class_row", *args), *args)


def check_hidden_and_images(N):
    """Also a first block of keys of which none is seen, and an image of none."""
    torch.manual_seed(0)
    *tensors, scale, key_bias = expanded(*problem(N, 2, 16, B=3))
    key_bias[0, :66] = -torch.inf
    key_bias[1] = -torch.inf
    result, order = kernel("class_row", *tensors, scale, key_bias), torch.tensor([2, 0, 1])
    assert_exact(result, *tensors, scale, key_bias)
    assert not result[1].any() and not result[0, :66].any()
    permuted = kernel("class_row", *(t[order] for t in tensors), scale, key_bias[order])
    assert_same_bits(permuted, result[order])


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("N", "H", "D"), SIZES)
def test_within_rounding_of_float64(N, H, D, per_token):
    run(check_row, N, H, D, per_token)


def test_hidden_keys_and_images():
    run(check_hidden_and_images, 140)
