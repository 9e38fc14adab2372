"""match_tokens, merge_pairs, mean_heads: values within a derived bound, whole numbers and ties exactly."""

from __future__ import annotations

import re

import pytest
import torch
from _matching import METRICS, assert_nearest, even_and_odd, scores_and_error, whole_numbers
from _problems import U32, assert_same_bits, padded, reference

from pyvit_accel import backends, ops


def tome(impl, metric, size, r, prefix):
    """What one step of ToMe decides: best value and partner, new row of every token, and the groups' lists."""
    N = metric.shape[1]
    value, index = impl(ops.match_tokens, *even_and_odd(metric), "cosine", 1, prefix // 2)
    rows = impl(ops.merge_pairs, value[..., 0], index[..., 0], N, r, prefix)
    return value[0, :, 0], index[0, :, 0], rows, impl(ops.group_tokens, rows, N - r, size)


def groups_of(ptr, col):
    return [col[0, ptr[0, g] : ptr[0, g + 1]].tolist() for g in range(ptr.shape[1] - 1)]


def merged(x, lists):
    """sum size x / sum size of every group, in float64."""
    ptr, col, weight, total = lists
    sums = [
        (x[0, col[0, i:j].long()].double() * weight[0, i:j].double()).sum()
        for i, j in zip(ptr[0], ptr[0, 1:], strict=False)
    ]
    return torch.stack(sums) / total[0]


@pytest.fixture
def pairs():
    """The tokens of vector V2."""
    metric = torch.tensor([[[1.0, 0], [1, 0], [3, 4], [0, 1], [4, 3], [6, 8], [0, 2], [1, 1]]])
    return metric, torch.tensor([[10.0, 1, 2, 3, 4, 5, 6, 7]]), torch.ones(1, 8)


def printed(values):
    return pytest.approx(values, abs=6e-7)  # six decimals


def test_published_similarities(impl, pairs):
    a, b = even_and_odd(pairs[0])
    value, index = impl(ops.match_tokens, a, b, "cosine", 4)
    S = torch.empty(4, 4).scatter_(1, index[0].long(), value[0])
    root = 0.707107
    assert S[0].tolist() == printed([1, 0, 0.6, root]) and S[1].tolist() == printed([0.6, 0.8, 1, 0.989949])
    assert S[2].tolist() == printed([0.8, 0.6, 0.96, 0.989949]) and S[3].tolist() == printed([0, 1, 0.8, root])


def test_published_merge_with_class_token(impl, pairs):
    """V2. The even class token has a best partner, which merge_pairs does not look at."""
    metric, x, size = pairs
    value, index, rows, lists = tome(impl, metric, size, 2, 1)
    assert value[1:].tolist() == printed([1, 0.989949, 1]) and index[1:].tolist() == [2, 3, 1]
    assert rows.tolist() == [[0, 2, 4, 3, 1, 4, 3, 5]]
    assert groups_of(*lists[:2]) == [[0], [4], [1], [3, 6], [2, 5], [7]]
    assert lists[3].tolist() == [[1, 1, 1, 2, 2, 1]]
    assert merged(x, lists).tolist() == [10, 4, 1, 4.5, 3.5, 7]


def test_published_merge_without_class_token(impl, pairs):
    metric, x, size = pairs
    _, index, _, lists = tome(impl, metric, size, 3, 0)
    assert index[[0, 1, 3]].tolist() == [0, 2, 1]
    assert lists[3].tolist() == [[1, 2, 2, 2, 1]] and merged(x, lists).tolist() == [4, 5.5, 4.5, 3.5, 7]


def test_published_merge_of_many_into_one(impl):
    """V2; a zero row besides, which is like nothing."""
    metric = torch.tensor([[[1.0, 0], [1, 0], [2, 0], [0, 1], [5, 0], [0, 3], [0, 1], [-1, 0]]])
    x, size = torch.arange(2.0, 18, 2)[None], torch.tensor([[1.0, 2, 3, 1, 1, 1, 2, 1]])
    _, index, _, lists = tome(impl, metric, size, 4, 0)
    assert index.tolist() == [0, 0, 0, 1]
    assert merged(x, lists).tolist() == printed([5.428571, 12, 12, 16]) and lists[3].tolist() == [[7, 3, 1, 1]]
    assert (size * x).sum() == (merged(x, lists) * lists[3]).sum().round(decimals=4)
    value, index = impl(ops.match_tokens, torch.zeros(1, 1, 2), metric)
    assert value.tolist() == [[[0]]] and index.tolist() == [[[0]]]


def test_published_matching_of_diffrate(impl):
    """V3: rows 3 and 4 of the sorted tokens go to 1 or 2, not to the class token."""
    x = torch.tensor([[[9.0, 9], [0, 1], [2, 2], [0, 2], [1, 0]]])
    value, index = impl(ops.match_tokens, x[:, 3:], x[:, :3], "cosine", 3, 1)
    assert index.tolist() == [[[1, 2, -1], [2, 1, -1]]]
    assert value[0, 0].tolist() == printed([1, 0.707107, -float("inf")])
    assert value[0, 1].tolist() == printed([0.707107, 0, -float("inf")])


def test_published_similarity_stage_of_zero_tprune(impl):
    """V7."""
    importance = torch.tensor([[0.10, 0.30, 0.15, 0.25, 0.20]])
    keys = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 1], [-1, 2]])
    order = impl(ops.select_tokens, importance, 5)[0][0].long()
    assert order.tolist() == [1, 3, 4, 2, 0]
    value, index = impl(ops.match_tokens, keys[order[3:]][None], keys[order[:3]][None])
    assert value[0, :, 0].tolist() == printed([0.948683, 0.894427]) and order[index[0, :, 0].long()].tolist() == [3, 3]
    dropped = order[3:][impl(ops.select_tokens, value[..., 0], 1)[0][0].long()]
    assert dropped.tolist() == [2]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("N", "D", "topk"), [(2, 3, 1), (5, 1, 2), (196, 64, 1), (197, 3, 20), (197, 64, 1), (257, 192, 32), (41, 768, 2)]
)
def test_match_is_within_its_bound(impl, metric, N, D, topk):
    x = torch.randn(2, N, D) * torch.rand(2, N, 1)
    a, b = even_and_odd(x)
    value, index = impl(ops.match_tokens, a, b, metric, topk)
    if D == 1 and metric == "cosine":  # every similarity is 1 or -1: nothing but ties
        assert (value.abs() - 1).abs().max() <= 8 * U32
        return
    assert_nearest(value, index, *scores_and_error(a, b, metric), metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("topk", [1, 3])
def test_match_of_long_sequences(impl, metric, topk):
    a, b = torch.randn(1, 33, 16), torch.randn(1, 1025, 16)
    assert_nearest(*impl(ops.match_tokens, a, b, metric, topk), *scores_and_error(a, b, metric), metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("topk", [1, 2, 20, 40])
def test_match_leaves_out_the_prefix_and_itself(impl, metric, topk):
    x, first = torch.randn(2, 40, 24), 5
    exclude = torch.arange(40).int().expand(2, -1).clone()
    exclude[:, ::7] = -1
    value, index = impl(ops.match_tokens, x, x, metric, topk, first, exclude)
    assert not (index == exclude[..., None])[exclude >= 0].any() and not ((index >= 0) & (index < first)).any()
    assert_nearest(value, index, *scores_and_error(x, x, metric), metric, first, exclude)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("Na", "Nb", "topk"), [(1, 1, 1), (2, 17, 2), (17, 16, 1), (99, 98, 1), (50, 257, 20)])
def test_ties_go_to_the_lower_index(kernel, metric, Na, Nb, topk):
    """NaN ranks last, rows of zeros are as near to all."""
    a, b = whole_numbers(2, Na, 6), whole_numbers(2, Nb, 6)
    a[0, -1] = 0
    for nan in (0.0, float("nan")):
        a[1, Na // 2, 2] += nan
        b[1, Nb // 3 :: 4, 1] += nan
        for first, exclude in ((0, None), (Nb // 4, torch.randint(-1, Nb, (2, Na)).int())):
            args = (ops.match_tokens, a, b, metric, topk, first, exclude)
            assert_same_bits(kernel(*args), reference(*args))


@pytest.mark.parametrize("metric", METRICS)
def test_only_nan_is_left(impl, metric):
    nothing = torch.inf if metric == "l2" else -torch.inf
    a, b = torch.randn(1, 2, 4), torch.full((1, 5, 4), torch.nan)
    exclude = torch.tensor([[1, 4]]).int()
    for topk, expected in ((1, [[1 + 1], [1]]), (5, [[2, 3, 4, -1, -1], [1, 2, 3, -1, -1]])):
        value, index = impl(ops.match_tokens, a, b, metric, topk, 1, exclude)
        assert index.tolist() == [expected] and (value == nothing).all()


def test_nothing_to_match(impl):
    for b in (torch.randn(2, 0, 4), torch.randn(2, 3, 4)):
        value, index = impl(ops.match_tokens, torch.randn(2, 3, 4), b, "dot", 1, b.shape[1])
        assert index.shape == value.shape == (2, 3, 1) and (index == -1).all() and (value == -torch.inf).all()
    assert impl(ops.match_tokens, torch.randn(2, 0, 4), torch.randn(2, 3, 4))[0].shape == (2, 0, 1)
    assert impl(ops.match_tokens, torch.randn(0, 3, 4), torch.randn(0, 3, 4))[0].shape == (0, 3, 1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("topk", [1, 20])
def test_every_instruction_set_gives_the_same_bits(kernel, metric, topk):
    x = torch.randn(2, 129, 77)
    args = (ops.match_tokens, *even_and_odd(x), metric, topk, 1)
    with backends.use_isa("portable"):
        expected = ops.match_tokens(*args[1:])
    assert_same_bits(kernel(*args), expected)


def every_second_column(x):
    return x[:, :, ::2], x[:, :, 1::2]


@pytest.mark.parametrize("view", [even_and_odd, every_second_column, lambda x: (padded(x), x[:1].expand_as(x))])
def test_strides_do_not_show(kernel, view):
    a, b = view(torch.randn(2, 30, 40))
    for topk in (1, 3):
        expected = kernel(ops.match_tokens, a.contiguous(), b.contiguous(), "cosine", topk)
        assert_same_bits(kernel(ops.match_tokens, a, b, "cosine", topk), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_match_computes_in_float32(impl, dtype):
    a, b = even_and_odd(torch.randn(2, 30, 40).to(dtype))
    expected = impl(ops.match_tokens, a.float().contiguous(), b.float().contiguous())
    assert_same_bits(impl(ops.match_tokens, a.contiguous(), b.contiguous()), expected)


@pytest.mark.parametrize("threads", [1, 4])
def test_images_are_independent_and_runs_equal(impl, threads):
    before, x, order = torch.get_num_threads(), torch.randn(5, 99, 24), torch.randperm(5)
    torch.set_num_threads(threads)
    try:
        args = (ops.match_tokens, *even_and_odd(x), "cosine", 2)
        expected = impl(*args)
        assert_same_bits(impl(*args), expected)
        permuted = impl(ops.match_tokens, *even_and_odd(x[order]), "cosine", 2)
        assert_same_bits(permuted, [t[order] for t in expected])
        alone = [impl(ops.match_tokens, *even_and_odd(image[None]), "cosine", 2) for image in x]
    finally:
        torch.set_num_threads(before)
    if impl.active is not backends.use_reference:  # whose matrix product depends on the batch
        assert_same_bits([torch.cat(parts) for parts in zip(*alone, strict=True)], expected)


@pytest.mark.parametrize("N", [1, 2, 5, 196, 197, 257, 1025])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_merge_pairs_equals_reference(kernel, N, prefix):
    if prefix > N:
        return
    even = (N + 1) // 2
    value = torch.randint(-4, 5, (3, even)) / 4
    value[torch.rand(3, even) > 0.9] = torch.nan
    index = torch.randint(0, max(N // 2, 1), (3, even)).int()
    most = even - (prefix + 1) // 2 if prefix // 2 < N // 2 else 0
    for merges in {0, most // 2, most}:
        args = (ops.merge_pairs, value, index, N, merges, prefix)
        assert_same_bits(kernel(*args), reference(*args))
        assert_same_bits(kernel(ops.merge_pairs, value.mT.contiguous().mT, *args[2:]), reference(*args))


@pytest.mark.parametrize("prefix", [0, 1, 2, 4])
def test_merged_rows_are_all_used_and_the_prefix_stays(impl, prefix):
    x, r = torch.randn(3, 197, 16), 40
    value, index = impl(ops.match_tokens, *even_and_odd(x), "cosine", 1, prefix // 2)
    rows = impl(ops.merge_pairs, value[..., 0], index[..., 0], 197, r, prefix)
    size = torch.randint(1, 5, (3, 197)).float()
    *_, total = impl(ops.group_tokens, rows, 197 - r, size)
    assert (rows[:, :prefix] == torch.arange(prefix)).all()
    assert (total[:, :prefix] > 0).all() and (total > 0).all() and torch.equal(total.sum(1), size.sum(1))
    for b in range(3):
        moved = [i for i in range(0, 197, 2) if (rows[b, 1::2] == rows[b, i]).any()]
        assert len(moved) == r and all(rows[b, i] == rows[b, 2 * index[b, i // 2, 0] + 1] for i in moved)
        stay = [i for i in range(0, 197, 2) if i not in moved]
        assert min(value[b, i // 2, 0] for i in moved) >= max(value[b, i // 2, 0] for i in stay if i >= prefix)
        ranks = stay if prefix else sorted(stay, key=lambda i, b=b: -value[b, i // 2, 0])
        assert rows[b, ranks].tolist() == sorted(rows[b, ranks].tolist())
    order = torch.randperm(3)
    again = impl(ops.merge_pairs, value[order][..., 0], index[order][..., 0], 197, r, prefix)
    assert_same_bits(again, rows[order])


def test_merge_refuses_a_partner_that_is_none(kernel):
    """On the CPU; only of those that merge."""
    value, index = torch.tensor([[0.9, 0.1, 0.8]]), torch.tensor([[0, -1, 2]]).int()
    with pytest.raises(ValueError, match=re.escape("merge_pairs: index[0, 2] is 2; use 0..1")):
        kernel(ops.merge_pairs, value, index, 5, 2)
    index[0, 2] = 1
    assert kernel(ops.merge_pairs, value, index, 5, 2).tolist() == [[1, 1, 0, 2, 2]]
    with pytest.raises(ValueError, match=re.escape("merge_pairs: index[0, 1] is -1; use 0..1")):
        kernel(ops.merge_pairs, value, index, 5, 3)


def heads_of(x):
    """(B, H, N, D) as it lies in the buffer (B, N, 3, H, D)."""
    return torch.stack([x, x, x], dim=2)[:, :, 1].transpose(1, 2)


@pytest.mark.parametrize("H", [1, 3, 12])
@pytest.mark.parametrize("D", [1, 3, 64, 80, 192])
@pytest.mark.parametrize("codes", [True, False])
def test_mean_heads_equals_reference(kernel, H, D, codes):
    x = torch.randn(2, 19, H, D) * 100
    x = heads_of(x.clamp(-128, 127).to(torch.int8) if codes else x)
    for scale in (torch.rand(1), torch.rand(H, 1), torch.rand(2, H, 19), torch.rand(2, 19, H).mT):
        assert_same_bits(kernel(ops.mean_heads, x, scale), reference(ops.mean_heads, x, scale))


def test_mean_heads_is_within_its_bound(impl):
    """H products, as many sums, one quotient."""
    x, scale = torch.randint(-128, 128, (2, 12, 50, 64), dtype=torch.int8), torch.rand(2, 12, 50)
    terms = x.double() * scale[..., None]
    error = (impl(ops.mean_heads, x, scale) - terms.mean(1)).abs()
    assert (error <= 1.01 * U32 * (12 + 2) * terms.abs().mean(1)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mean_heads_computes_in_float32(impl, dtype):
    x, scale = torch.randn(2, 3, 7, 20).to(dtype), torch.rand(3, 1)
    assert_same_bits(impl(ops.mean_heads, x, scale), impl(ops.mean_heads, x.float(), scale))


def refusal(op, *args, error=ValueError):
    with pytest.raises(error) as raised:
        op(*args)
    return str(raised.value)


def test_errors_of_match():
    match, a, b = ops.match_tokens, torch.zeros(2, 4, 8), torch.zeros(2, 3, 8)
    none = torch.zeros(2, 3).int()
    assert refusal(match, a, b, "l1") == "match_tokens: metric='l1' is not one of cosine, dot, l2"
    assert refusal(match, a, b, "l2", 4) == "match_tokens: topk=4, but b has 3 tokens"
    assert refusal(match, a, b, "l2", 0) == "match_tokens: topk=0, but b has 3 tokens"
    expected = "match_tokens: first=4 is outside 0..3, the tokens of b"
    assert refusal(match, a, b, "l2", 1, 4) == expected
    expected = "match_tokens: a torch.float32 (2, 4, 8) and b torch.float32 (2, 3, 7) do not fit"
    assert refusal(match, a, b[..., :7]) == expected
    assert refusal(match, a[0], b) == "match_tokens: a has shape (4, 8), expected 3 dimensions"
    assert refusal(match, a, b, "l2", 1, 0, none) == "match_tokens: exclude (2, 3) must be (B, Na) = (2, 4)"
    expected = "match_tokens: a must be torch.float32 or torch.float16 or torch.bfloat16, got torch.float64"
    assert refusal(match, a.double(), b, error=TypeError) == expected


def test_errors_of_merge_and_mean():
    value, index = torch.zeros(2, 4), torch.zeros(2, 4).int()
    merge, mean = ops.merge_pairs, ops.mean_heads
    assert refusal(merge, value, index, 9, 1) == "merge_pairs: value (2, 4), index (2, 4); of 9 tokens 5 are even"
    expected = "merge_pairs: merges=4; 8 tokens with a prefix of 1 have 3"
    assert refusal(merge, value, index, 8, 4, 1) == expected
    expected = "merge_pairs: merges=1; 3 tokens with a prefix of 2 have 0"  # token 2 has no odd one besides the prefix
    assert refusal(merge, value[:, :2], index[:, :2], 3, 1, 2) == expected
    x = torch.zeros(2, 3, 4, 8)
    assert refusal(mean, x, torch.ones(2)) == "mean_heads: scale (2,) does not broadcast to (2, 3, 4)"
    expected = "mean_heads: scale must be float32, got torch.float64"
    assert refusal(mean, x, torch.ones(1).double(), error=TypeError) == expected
