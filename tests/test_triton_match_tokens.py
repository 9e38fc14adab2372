"""The Triton launchers match_tokens, merge_pairs and mean_heads against their references."""

from __future__ import annotations

import pytest
import torch
from _matching import METRICS, assert_nearest, even_and_odd, scores_and_error, whole_numbers
from _triton import assert_equal, kernel, run


def check_bound(metric, Na, Nb, D, topk):
    torch.manual_seed(0)
    a, b = torch.randn(2, Na, D), even_and_odd(torch.randn(2, 2 * Nb, D) * torch.rand(2, 2 * Nb, 1))[1]
    exclude = torch.randint(-1, Nb, a.shape[:2]).int()
    assert_nearest(*kernel("match_tokens", a, b, metric, topk, 0, None), *scores_and_error(a, b, metric), metric)
    found = kernel("match_tokens", a, b, metric, topk, 1, exclude)
    assert_nearest(*found, *scores_and_error(a, b, metric), metric, 1, exclude)
    for result, again in zip(found, kernel("match_tokens", a, b, metric, topk, 1, exclude), strict=True):
        assert torch.equal(result, again)


def check_ties(metric, Na, Nb, topk):
    """Whole numbers, so every value is exact; NaN ranks last, half floats are widened."""
    torch.manual_seed(0)
    a, b = whole_numbers(2, Na, 6), whole_numbers(2, Nb, 6)
    a[0, -1] = 0
    assert_equal("match_tokens", a.half(), b.half(), metric, topk, 0, None)
    a[1, Na // 2, 2] = torch.nan
    b[1, Nb // 3 :: 4, 1] = torch.nan
    exclude = torch.randint(-1, Nb, (Na, 2)).int().T
    assert_equal("match_tokens", a.mT.contiguous().mT, b, metric, topk, Nb // 4, exclude)


def check_nothing():
    for metric in METRICS:
        none = torch.zeros(2, 3, 4), torch.full((2, 5, 4), torch.nan)
        assert_equal("match_tokens", *none, metric, 1, 0, None)
        assert_equal("match_tokens", *none, metric, 3, 4, None)
        assert_equal("match_tokens", none[0], none[1][:, :0], metric, 1, 0, None)
        assert_equal("match_tokens", none[0][:, :0], none[1], metric, 2, 0, None)


def check_merge(N, prefix):
    torch.manual_seed(0)
    even = (N + 1) // 2
    value = torch.randint(-4, 5, (even, 2)) / 4
    value[torch.rand(even, 2) > 0.9] = torch.nan
    index = torch.randint(0, max(N // 2, 1), (2, even)).int()
    most = even - (prefix + 1) // 2 if prefix // 2 < N // 2 else 0
    for merges in {0, most // 2, most}:
        assert_equal("merge_pairs", value.T, index, N, merges, prefix)


def check_mean(N, H, D):
    """Bit for bit: the same sums in the same order."""
    torch.manual_seed(0)
    codes = torch.randint(-128, 128, (2, N, 3, H, D), dtype=torch.int8)[:, :, 1].transpose(1, 2)
    assert_equal("mean_heads", codes, torch.rand(H, 1).expand(2, H, N))
    assert_equal("mean_heads", torch.randn(2, H, N, D), torch.rand(2, H, N))
    assert_equal("mean_heads", torch.randn(2, H, D, N).half().mT, torch.rand(1).expand(2, H, N))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("Na", "Nb", "D", "topk"), [(2, 2, 3, 1), (34, 66, 40, 1), (17, 50, 33, 5), (3, 257, 50, 2)])
def test_match_is_within_its_bound(metric, Na, Nb, D, topk):
    run(check_bound, metric, Na, Nb, D, topk)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("Na", "Nb", "topk"), [(1, 1, 1), (17, 130, 1), (17, 66, 3), (5, 40, 20)])
def test_ties_go_to_the_lower_index(metric, Na, Nb, topk):
    run(check_ties, metric, Na, Nb, topk)


def test_nothing_to_match():
    run(check_nothing)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("N", [1, 2, 5, 196, 197])
def test_merge_pairs(N, prefix):
    if prefix <= N:
        run(check_merge, N, prefix)


@pytest.mark.parametrize(("N", "H", "D"), [(1, 1, 1), (5, 3, 64), (50, 12, 20), (17, 2, 192)])
def test_mean_heads(N, H, D):
    run(check_mean, N, H, D)
