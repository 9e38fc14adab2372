"""select_tokens, split_tokens, group_tokens: integers, so every comparison is exact."""

from __future__ import annotations

import re

import pytest
import torch
from _problems import assert_same_bits, reference, transposed

from pyvit_accel import ops

SIZES = (1, 2, 5, 196, 197, 257, 1025)


def awkward_scores(B, N):
    """Few levels, so that most are tied; zeros of both signs, infinities and NaN."""
    scores = torch.randint(-3, 4, (B, N)) / 2
    scores = torch.where((scores == 0) & (torch.rand(B, N) > 0.5), -0.0, scores)
    for value in (float("nan"), float("inf"), -float("inf")):
        scores[torch.rand(B, N) > 0.9] = value
    return scores


def counts(most):
    return sorted({0, 1, most // 2, most} & set(range(most + 1)))


def ranked(scores):
    """The rule of the contract, said in Python: larger first, then the lower index; NaN as -inf."""
    key = [-float("inf") if s != s else s for s in scores.tolist()]
    return sorted(range(len(key)), key=lambda i: (-key[i], i))


def test_published_vector(impl):
    """V1."""
    scores = torch.tensor([[0.10, 0.30, 0.20, 0.30, 0.05, 0.05], [0.02, 0.01, 0.40, 0.07, 0.40, 0.10]])
    index, dropped, _ = impl(ops.select_tokens, scores, 3, 0, "rank")
    assert index.tolist() == [[1, 3, 2], [2, 4, 5]] and dropped.tolist() == [[0, 4, 5], [0, 1, 3]]
    index, dropped, inverse = impl(ops.select_tokens, scores, 3, 0, "index")
    assert index.tolist() == [[1, 2, 3], [2, 4, 5]] and dropped.tolist() == [[0, 4, 5], [0, 1, 3]]
    assert inverse.tolist() == [[-1, 0, 1, 2, -1, -1], [-1, -1, 0, -1, 1, 2]]


def test_published_order_of_diffrate(impl):
    """V3: the class token, then the patches by its attention."""
    scores = torch.tensor([[0.0, 0.10, 0.30, 0.25, 0.05, 0.20]])
    assert impl(ops.select_tokens, scores, 5, 1, "rank")[0].tolist() == [[0, 2, 3, 5, 1, 4]]
    index, dropped, _ = impl(ops.select_tokens, scores, 4, 1, "rank")
    assert index.tolist() == [[0, 2, 3, 5, 1]] and dropped.tolist() == [[4]]


@pytest.mark.parametrize("N", SIZES)
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_select_equals_reference(kernel, N, prefix):
    scores = awkward_scores(3, N)
    for keep in counts(N - prefix):
        for order in ("rank", "index"):
            args = (ops.select_tokens, scores, keep, prefix, order)
            assert_same_bits(kernel(*args), reference(*args))


@pytest.mark.parametrize("order", ["rank", "index"])
@pytest.mark.parametrize(("N", "prefix", "keep"), [(1, 0, 1), (5, 1, 2), (197, 1, 138), (257, 5, 0), (197, 0, 197)])
def test_select_follows_the_rule(impl, N, prefix, keep, order):
    """Against the rule said in Python; what was dropped and what was kept partition the tokens."""
    scores = awkward_scores(3, N)
    index, dropped, inverse = impl(ops.select_tokens, scores, keep, prefix, order)
    assert index.dtype == dropped.dtype == inverse.dtype == torch.int32
    for b in range(3):
        kept = [prefix + i for i in ranked(scores[b, prefix:])][:keep]
        assert index[b].tolist() == [*range(prefix), *(sorted(kept) if order == "index" else kept)]
        assert sorted(index[b].tolist() + dropped[b].tolist()) == list(range(N))
        assert dropped[b].tolist() == sorted(dropped[b].tolist())
        assert inverse[b, index[b].long()].tolist() == list(range(prefix + keep))
        assert (inverse[b, dropped[b].long()] == -1).all()


def test_nan_ranks_last_and_zeros_tie(impl):
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([[nan, -0.0, 0.0, -inf, nan, -1.0], [0.0, -0.0, nan, inf, -inf, -nan]])
    index, _, _ = impl(ops.select_tokens, scores, 6)
    assert index.tolist() == [[1, 2, 5, 0, 3, 4], [3, 0, 1, 2, 4, 5]]


def test_scores_of_the_prefix_are_not_read(impl):
    scores = torch.rand(2, 20)
    expected = impl(ops.select_tokens, scores, 7, 3)
    for value in (float("nan"), 9.0, -9.0):
        scores[:, :3] = value
        assert_same_bits(impl(ops.select_tokens, scores, 7, 3), expected)


def test_images_are_independent_and_runs_equal(impl):
    scores, mask, groups = awkward_scores(6, 197), torch.rand(6, 197) > 0.4, torch.randint(-1, 50, (6, 197)).int()
    weight, order = torch.rand(6, 197), torch.randperm(6)
    for results, permuted in (
        (impl(ops.select_tokens, scores, 90, 1), impl(ops.select_tokens, scores[order], 90, 1)),
        (impl(ops.split_tokens, mask, 1)[:2], impl(ops.split_tokens, mask[order], 1)[:2]),
        (impl(ops.group_tokens, groups, 50, weight), impl(ops.group_tokens, groups[order], 50, weight[order])),
    ):
        assert_same_bits(permuted, [r[order] for r in results])
    for args in ((ops.select_tokens, scores, 90), (ops.split_tokens, mask), (ops.group_tokens, groups, 50, weight)):
        assert_same_bits(impl(*args), impl(*args))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_scores(kernel, dtype):
    scores = torch.randn(3, 197).to(dtype)
    assert_same_bits(kernel(ops.select_tokens, scores, 90, 1), reference(ops.select_tokens, scores.float(), 90, 1))


@pytest.mark.parametrize("view", [transposed, lambda x: x[:, ::2], lambda x: x[:1].expand(4, -1), lambda x: x[:0]])
def test_strides_and_no_images(kernel, view):
    scores, mask = view(awkward_scores(4, 30)), view(torch.rand(4, 30) > 0.5)
    groups, weight = view(torch.randint(-1, 7, (4, 30)).int()), view(torch.rand(4, 30))
    keep = scores.shape[1] // 2
    for args in (
        (ops.select_tokens, scores, keep),
        (ops.split_tokens, mask),
        (ops.group_tokens, groups, 7, weight),
    ):
        assert_same_bits(kernel(*args), reference(*args))


@pytest.mark.parametrize("N", SIZES)
@pytest.mark.parametrize("prefix", [0, 1])
def test_split_equals_reference(kernel, N, prefix):
    for likely in (0.0, 0.3, 1.0):
        mask = torch.rand(4, N) < likely
        assert_same_bits(kernel(ops.split_tokens, mask, prefix), reference(ops.split_tokens, mask, prefix))


def test_split_follows_its_words(impl):
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    index, count, cu_seqlens, rows = impl(ops.split_tokens, mask, 1)
    assert index.tolist() == [[0, 1, 3, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert count.tolist() == [3, 1, 3] and cu_seqlens.tolist() == [0, 3, 4, 7]
    assert rows.tolist() == [0, 1, 3, 4, 8, 9, 10, *[-1] * 5]


def test_published_packing(impl):
    """V10: counts 3, 1, 4."""
    mask = torch.arange(5) < torch.tensor([[3], [1], [4]])
    assert impl(ops.split_tokens, mask)[2].tolist() == [0, 3, 4, 8]


@pytest.mark.parametrize("N", SIZES)
@pytest.mark.parametrize("weighted", [False, True])
def test_group_equals_reference(kernel, N, weighted):
    weight = torch.randn(3, N) if weighted else None
    for groups in (1, N // 2 + 1, N + 3):
        assign = torch.randint(-1, groups, (3, N)).int()
        args = (ops.group_tokens, assign, groups, weight)
        assert_same_bits(kernel(*args), reference(*args))
    none = (ops.group_tokens, torch.full((3, N), -1).int(), 0, weight)
    assert_same_bits(kernel(*none), reference(*none))


def test_group_follows_its_words(impl):
    assign = torch.tensor([[2, 0, -1, 2, 0, 0, 3]]).int()
    weight = torch.tensor([[0.5, 1.0, 9.0, 0.25, 2.0, 4.0, 7.0]])
    ptr, col, entry, total = impl(ops.group_tokens, assign, 5, weight)
    assert ptr.tolist() == [[0, 3, 3, 5, 6, 6]] and col.tolist() == [[1, 4, 5, 0, 3, 6, -1]]
    assert entry.tolist() == [[1, 2, 4, 0.5, 0.25, 7, 0]] and total.tolist() == [[7, 0, 0.75, 7, 0]]


def test_published_sizes_of_diffrate(impl):
    """V3: a source adds its similarity to the size of its destination."""
    weight = torch.tensor([[1, 1, 1, 1, 0.5**0.5]])
    ptr, col, _, total = impl(ops.group_tokens, torch.tensor([[0, 1, 2, 1, 2]]).int(), 3, weight)
    assert ptr.tolist() == [[0, 1, 3, 5]] and col.tolist() == [[0, 1, 3, 2, 4]]
    assert torch.equal(total, torch.tensor([[1, 2, 1 + 0.5**0.5]]))


def test_group_refuses_what_is_no_group(kernel):
    """On the CPU, whose memory it would overwrite."""
    for group in (4, -2, 2**31 - 1):
        assign = torch.zeros(2, 3).int()
        assign[1, 2] = group
        with pytest.raises(ValueError, match=re.escape(f"group_tokens: assign[1, 2] is {group}; use -1..3")):
            kernel(ops.group_tokens, assign, 4)


def refusal(op, *args, error=ValueError):
    with pytest.raises(error) as raised:
        op(*args)
    return str(raised.value)


def test_errors():
    scores, mask, assign = torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.bool), torch.zeros(2, 8).int()
    select, group = ops.select_tokens, ops.group_tokens
    assert refusal(select, scores, 8, 1) == "select_tokens: keep=8 of 8 tokens, 1 of them prefix; use 0..7"
    assert refusal(select, scores, -1) == "select_tokens: keep=-1 of 8 tokens, 0 of them prefix; use 0..8"
    expected = "select_tokens: num_prefix_tokens=9 is outside 0..8, the tokens there are"
    assert refusal(select, scores, 0, 9) == expected
    assert refusal(select, scores, 3, 0, "best") == "select_tokens: order='best' is not one of rank, index"
    assert refusal(select, scores[0], 3) == "select_tokens: scores has shape (8,), expected 2 dimensions"
    expected = "select_tokens: scores must be torch.float32 or torch.float16 or torch.bfloat16, got torch.int32"
    assert refusal(select, assign, 3, error=TypeError) == expected
    assert refusal(ops.split_tokens, scores, error=TypeError) == (
        "split_tokens: mask must be torch.bool, got torch.float32"
    )
    expected = "split_tokens: num_prefix_tokens=-1 is outside 0..8, the tokens there are"
    assert refusal(ops.split_tokens, mask, -1) == expected
    assert refusal(group, assign, -1) == "group_tokens: groups=-1; use 0 or more"
    assert refusal(group, assign, 3, scores[:1]) == "group_tokens: weight (1, 8) must be like assign (2, 8)"
    assert refusal(group, scores, 3, error=TypeError) == "group_tokens: assign must be torch.int32, got torch.float32"
