"""The Triton launchers select_tokens, split_tokens and group_tokens against their references.

Integers, and sums in the reference's order: nothing here has a tolerance.
"""

from __future__ import annotations

import pytest
import torch
from _triton import assert_equal, run

SIZES = (1, 2, 5, 197, 257)


def check_select(N, prefix, order):
    torch.manual_seed(0)
    scores = torch.randint(-3, 4, (2, N)) / 2
    scores = torch.where((scores == 0) & (torch.rand(2, N) > 0.5), -0.0, scores)
    for value in (float("nan"), float("inf"), -float("inf")):
        scores[torch.rand(2, N) > 0.9] = value
    for keep in {0, (N - prefix) // 2, N - prefix}:
        assert_equal("select_tokens", scores, keep, prefix, order)
    assert_equal("select_tokens", scores.mT.contiguous().mT.half(), (N - prefix) // 3, prefix, order)


def check_split(N, prefix):
    torch.manual_seed(0)
    mask = torch.rand(3, 2 * N) > 0.5
    mask[1] = False
    assert_equal("split_tokens", mask[:, :N], prefix)
    assert_equal("split_tokens", mask[:, ::2], prefix)


def check_group(N, groups):
    torch.manual_seed(0)
    assign, weight = torch.randint(-1, groups, (2, 2 * N)).int(), torch.randn(2, 2 * N)
    assert_equal("group_tokens", assign[:, :N], groups, None)
    assert_equal("group_tokens", assign[:, ::2], groups, weight[:, 1::2])


def check_nothing():
    for B, N in ((0, 5), (2, 0)):
        assert_equal("select_tokens", torch.zeros(B, N), 0, 0, "rank")
        assert_equal("split_tokens", torch.zeros(B, N, dtype=torch.bool), 0)
        assert_equal("group_tokens", torch.zeros(B, N).int(), 3, None)
    assert_equal("group_tokens", torch.full((2, 5), -1).int(), 0, None)


@pytest.mark.parametrize("order", ["rank", "index"])
@pytest.mark.parametrize(("N", "prefix"), [*((N, N > 1) for N in SIZES), (5, 5), (197, 0)])
def test_select_tokens(N, prefix, order):
    run(check_select, N, int(prefix), order)


@pytest.mark.parametrize("N", SIZES)
def test_split_tokens(N):
    run(check_split, N, min(N, 2))


@pytest.mark.parametrize(("N", "groups"), [(1, 1), (2, 5), (5, 2), (65, 300), (100, 63)])
def test_group_tokens(N, groups):
    run(check_group, N, groups)


def test_nothing():
    run(check_nothing)
