"""DiffRate: the spec's vector, schedules and multiply-adds; TokenSchedule: counts, JSON, tiles, bad input."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from _reduced import VARIANTS, Heads, check, check_batch, check_config, diffrate_rule

from pyvit_accel.modules.token_step import Rows, TokenState
from pyvit_accel.tokens import METHODS, TokenSchedule, macs, snap_schedule
from pyvit_accel.tokens.diffrate import SCHEDULES, SortPruneMerge, diffrate_macs

X = torch.tensor([[[9.0, 9], [1, 0], [0, 1], [2, 2], [1, 1], [0, 2]]])
ATTENTION = torch.tensor([[0.0, 0.10, 0.30, 0.25, 0.05, 0.20]])


def test_pruned_and_merged_as_in_the_vector():
    step, state = SortPruneMerge(5, 3), TokenState(1)
    state.start(X)
    index = step.prune(Heads(ATTENTION), X, state)
    assert index.tolist() == [[0, 2, 3, 5, 1]]
    y = step.settle(X[:, index[0].long()], state)
    assert y.tolist() == [[[9, 9], [0, 1.5], [1.5, 1]]]
    # 1.707107 = 1 + a cosine of 1 / sqrt 2, whose two norms, product and sum are rounded.
    torch.testing.assert_close(state.size, torch.tensor([[1, 2, 1 + 0.5**0.5]]), rtol=6 * 2**-24, atol=0)
    assert state.origin().tolist() == [[0, 2, 1, 2, -1, 1]]


def test_sizes_follow_the_order_and_grow_by_similarity():
    step, state = SortPruneMerge(5, 3), TokenState(1)
    state.start(X)
    state.size = torch.tensor([[1.0, 2, 3, 4, 5, 6]])
    index = step.prune(Heads(ATTENTION), X, state)
    assert state.size.tolist() == [[1, 3, 4, 6, 2]]
    y = step.settle(X[:, index[0].long()], state)
    assert y.tolist() == [[[9, 9], [0, 1.5], [1.5, 1]]]  # a plain mean
    torch.testing.assert_close(state.size, torch.tensor([[1, 9, 4 + 2 * 0.5**0.5]]), rtol=6 * 2**-24, atol=0)


def test_rows_that_are_unlike_do_not_take_size_away():
    """A similarity of -1 would leave a size of 1 - 3, whose log is no number."""
    step, state = SortPruneMerge(3, 2), TokenState(1)
    x = torch.tensor([[[1.0, 1], [1, 0], [-1, 0]]])
    state.start(x)
    state.size = torch.tensor([[1.0, 1, 3]])
    step.prune(Heads(torch.tensor([[0.0, 2, 1]])), x, state)
    assert step.settle(x, state).tolist() == [[[1, 1], [0, 0]]]
    assert state.size.tolist() == [[1, 1]] and state.key_bias.tolist() == [[0, 0]]


PRUNE, MERGE = (26, 24, 20, 21, 9), (26, 22, 20, 12, 10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffrate_is_the_papers(variant):
    """The fourth block's 21 are more than there are, the third and the last one merge nothing, the first one sorts."""
    check(variant, TokenSchedule("diffrate", {"prune": PRUNE, "merge": MERGE}), diffrate_rule(PRUNE, MERGE))


def test_every_image_for_itself():
    schedule = TokenSchedule("diffrate", {"prune": PRUNE, "merge": MERGE})
    check_batch(schedule)
    check_config(schedule)


@pytest.mark.parametrize("model, budget", SCHEDULES)
def test_published_schedules_run_in_their_models(model, budget):
    prune, merge = SCHEDULES[model, budget]
    tokens = 257 if model == "mae-h" else 197
    rows = TokenSchedule("diffrate", {"model": model, "budget": budget}).rows(len(prune), tokens, 1)
    N = tokens
    for row, p, m in zip(rows, prune, merge, strict=True):
        kept = min(p, N)
        assert row == Rows(N, kept, kept, min(m, kept))
        N = row.out
    assert min(prune[-1], merge[-1]) == N


@pytest.mark.parametrize(
    "model, budget, dim, tokens, pixels, published, unpruned",
    [
        ("deit-s", "2.9G", 384, 197, 768, 2.905256, 4.599177),
        ("deit-b", "11.5G", 768, 197, 768, 11.517240, 17.564418),
        ("mae-l", "42.3G", 1024, 197, 768, 42.290, None),
        ("mae-h", "103.4G", 1280, 257, 588, 103.337, None),
    ],
)
def test_multiply_adds_are_those_published(model, budget, dim, tokens, pixels, published, unpruned):
    prune, merge = SCHEDULES[model, budget]
    digits = 6 if unpruned else 3
    assert round(diffrate_macs(prune, merge, dim, tokens, pixels) / 1e9, digits) == published
    if unpruned:
        whole = [tokens] * len(prune)
        assert round(diffrate_macs(whole, whole, dim, tokens, pixels) / 1e9, 6) == unpruned
        blocks = macs(TokenSchedule("tome", {"r": 0}).rows(len(prune), tokens, 1), dim)
        ends = tokens * pixels * dim + 1000 * dim
        assert blocks + ends == diffrate_macs(whole, whole, dim, tokens, pixels)


def test_multiply_adds_of_what_is_left_out():
    """Of 10 tokens 6 are attended from and projected and 4 reach the MLP; 2 C per key and query."""
    rows = [Rows(10, 6, 6, 4)]
    assert macs(rows, 8) == 10 * 3 * 64 + 2 * 6 * 10 * 8 + 6 * 64 + 4 * 8 * 64
    assert macs(rows, 8, mlp_ratio=2) == macs(rows, 8) - 4 * 4 * 64


def test_counts_that_fill_tiles():
    assert snap_schedule([197, 139, 128, 100], 1, 128) == [128, 128, 128, 100]
    assert snap_schedule([197, 139, 129], 64, 128) == [196, 138, 128]
    assert snap_schedule([50], 3, 128) == [42]  # 126 rows of 128; 43 would be two tiles
    for count in range(1, 200):
        (snapped,) = snap_schedule([count], 5, 64)
        whole = 5 * count // 64
        assert snapped == count if not whole else -(-5 * snapped // 64) == whole
    with pytest.raises(ValueError, match=r"counts \[0\], batch=1, tile=128 must be positive"):
        snap_schedule([0], 1, 128)


def test_schedules_are_files(tmp_path):
    for method, arguments in [("diffrate", {"model": "deit-s", "budget": "2.9G"}), ("evit", {"layers": (3, 6)})]:
        schedule = TokenSchedule(method, arguments)
        schedule.save(tmp_path / "schedule.json")
        assert TokenSchedule.load(tmp_path / "schedule.json") == schedule
    assert json.loads(schedule.to_json()) == {"method": "evit", "arguments": {"layers": [3, 6]}}
    assert TokenSchedule("tome", {"r": 13, "inflect": -1}).name == "TOME(r=13, inflect=-1)"
    assert {"tome", "tofu", "evit", "diffrate", "dynamic_vit", "zero_tprune", "sit", "patch_dropout"} <= set(METHODS)


@pytest.mark.parametrize("text", ["{}", "[]", '{"method": "tome"}', '{"method": "tome", "arguments": {}, "r": 1}'])
def test_files_that_are_no_schedule(text):
    with pytest.raises(ValueError, match="is no object of method and arguments"):
        TokenSchedule.from_json(text)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"model": "deit-s", "budget": "3G"}, "no schedule 'deit-s' '3G'; there are deit-t 0.8G, deit-s 2.9G"),
        ({"model": "deit-s", "budget": "2.9G"}, "the schedule has 12 blocks, the model 5"),
        ({"prune": [20] * 5, "merge": [20] * 4}, "5 counts to prune to and 4 to merge to"),
        ({"prune": [20, 20, 20, 1, 1], "merge": [20] * 5}, "1 tokens are left of 20, 2 of them prefix"),
        ({"prune": [20, 20, 20, 3, 3], "merge": [20, 20, 20, 2, 2]}, "2 tokens are left of 20, 2 of them prefix"),
        ({"prune": torch.tensor([20])}, "Tensor is not JSON serializable; pass numbers"),
    ],
)
def test_refused_with_the_numbers(arguments, text):
    with pytest.raises(ValueError, match=text):
        TokenSchedule("diffrate", arguments).rows(5, 26, 2)


def test_importance_is_the_class_tokens_alone():
    """All patches are sorted, the prefix is not, and a score that is not a number comes last."""
    state = TokenState(2)
    x = torch.zeros(1, 6, 1)
    state.start(x)
    row = F.pad(torch.tensor([[0.1, float("nan"), 0.3, 0.2]]), (2, 0))
    assert SortPruneMerge(6, 6).prune(Heads(row), x, state).tolist() == [[0, 1, 4, 5, 2, 3]]
