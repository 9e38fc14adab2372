"""ToMe and ToFu: the spec's vectors, models against the papers' formulas, sizes, order, bad input."""

from __future__ import annotations

import pytest
import torch
from _reduced import VARIANTS, Heads, check, check_batch, check_config, model_of, tofu_rule, tome_rule
from torch import Tensor

from pyvit_accel import ops
from pyvit_accel.adapters import BLOCKS, find
from pyvit_accel.modules.token_block import TokenBlock
from pyvit_accel.modules.token_step import Rows, TokenState
from pyvit_accel.tokens import TokenSchedule
from pyvit_accel.tokens.tofu import DropPairs, FusePairs
from pyvit_accel.tokens.tome import MergePairs, linear_schedule

KEYS = [[1.0, 0], [1, 0], [3, 4], [0, 1], [4, 3], [6, 8], [0, 2], [1, 1]]
X = [10.0, 1, 2, 3, 4, 5, 6, 7]
MANY_KEYS = [[1.0, 0], [1, 0], [2, 0], [0, 1], [5, 0], [0, 3], [0, 1], [-1, 0]]
MANY_X, MANY_SIZES = [2.0, 4, 6, 8, 10, 12, 14, 16], [1.0, 2, 3, 1, 1, 1, 2, 1]


def state_of(N: int, prefix: int, size: list[float] | None = None) -> TokenState:
    state = TokenState(prefix)
    state.start(torch.zeros(1, N, 1))
    state.size = None if size is None else torch.tensor([size])
    return state


def merged(keys: list, x: list, r: int, prefix: int, size: list | None = None) -> tuple[list, TokenState]:
    state = state_of(len(x), prefix, size)
    rows = torch.tensor(x)[None, :, None]
    lists = MergePairs(r).merge(Heads(key=torch.tensor([keys])), rows, state)
    return lists.mean(rows)[0, :, 0].tolist(), state


def test_pairs_are_those_of_the_vectors():
    y, state = merged(KEYS, X, 2, prefix=1)
    assert y == [10, 4, 1, 4.5, 3.5, 7] and state.size.tolist() == [[1, 1, 1, 2, 2, 1]]
    assert state.origin().tolist() == [[0, 2, 4, 3, 1, 4, 3, 5]]  # groups 0; 4; 1; 3, 6; 5, 2; 7
    y, state = merged(KEYS, X, 3, prefix=0)
    assert y == [4, 5.5, 4.5, 3.5, 7] and state.size.tolist() == [[1, 2, 2, 2, 1]]


def test_many_tokens_become_one():
    y, state = merged(MANY_KEYS, MANY_X, 4, 0, MANY_SIZES)
    assert state.size.tolist() == [[7, 3, 1, 1]]
    # 5.428571 is 38 / 7: one division in float32.
    torch.testing.assert_close(y, [38 / 7, 12.0, 12.0, 16.0], rtol=2**-23, atol=0)
    whole = sum(s * v for s, v in zip(MANY_SIZES, MANY_X, strict=True))
    assert sum(s * v for s, v in zip([7, 3, 1, 1], y, strict=True)) == pytest.approx(whole, rel=2**-22)


def test_a_distillation_token_neither_merges_nor_is_merged_with():
    """The spec's order: class, distillation, even tokens that stay, odd ones. Token 1 is like all, and takes none."""
    keys = [[1.0, 0], [1, 0], [1, 0], [0, 1], [0, 1], [1, 1], [0.0, 2], [1, 0]]
    y, _ = merged(keys, X, 2, prefix=2)
    assert y == [10, 1, 6, 3.5, 5, 4.5]  # 2 -> 7, equal to it, as 4 -> 3; of three equal pairs 6 is the last


def test_the_longest_row_gives_its_length():
    """MLERP of (3, 0) and (0, 4)."""
    state = state_of(4, 2)
    step = FusePairs(1)
    assert step.merge(Heads(key=torch.ones(1, 4, 2)), torch.zeros(1, 4, 2), state) is None
    y = step.settle(torch.tensor([[[9.0, 9], [8, 8], [3, 0], [0, 4]]]), state)
    torch.testing.assert_close(y, torch.tensor([[[9.0, 9], [8, 8], [2.4, 3.2]]]), rtol=2**-22, atol=0)
    assert state.size.tolist() == [[1, 1, 2]]


def test_published_counts():
    def left(**arguments) -> list[int]:
        return [rows.out for rows in TokenSchedule("tome", arguments).rows(12, 197, 1)]

    assert left(r=13) == list(range(184, 40, -13))
    falling = linear_schedule(8, -1, 12)
    assert falling == [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0] and sum(falling) == 91
    assert left(r=8, inflect=-1)[-1] == 197 - 91
    assert linear_schedule(8, 1, 12) == [0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16]
    assert left(r=60)[:4] == [137, 77, 39, 20]  # what is left can at most be halved
    assert TokenSchedule("tome", {"r": 13}).rows(12, 197, 1)[0] == Rows(197, 197, 184, 184)
    assert TokenSchedule("tofu", {"r": 13, "switch": 1}).rows(12, 197, 1)[:2] == [
        Rows(197, 184, 184, 184),
        Rows(184, 184, 184, 171),
    ]


TOME = {
    "every block": ({"r": 4}, tome_rule(4)),
    "not proportional": ({"r": 4, "proportional": False}, tome_rule(4, proportional=False)),
    "cut to half": ({"r": 9}, tome_rule(9)),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arguments, rule", TOME.values(), ids=TOME)
def test_tome_is_the_papers(variant, arguments, rule):
    check(variant, TokenSchedule("tome", arguments), rule)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("switch", [0, 2, 5])
def test_tofu_is_the_papers(variant, switch):
    check(variant, TokenSchedule("tofu", {"r": 4, "switch": switch}), tofu_rule(4, switch))


@pytest.mark.parametrize("method, arguments", [("tome", {"r": 5}), ("tofu", {"r": 5, "switch": 2})])
def test_every_image_for_itself(method, arguments):
    check_batch(TokenSchedule(method, arguments))
    check_config(TokenSchedule(method, arguments))


def test_dropped_pairs_leave_the_order_of_merged_ones():
    x = torch.randn(2, 11, 3)
    heads = Heads(key=torch.randn(2, 11, 4))
    states = TokenState(1), TokenState(1)
    for state in states:
        state.start(x)
    index = DropPairs(4).prune(heads, x, states[0])
    MergePairs(4).merge(heads, x, states[1])
    rows = states[1].origin().gather(1, index.long())
    assert rows.tolist() == [list(range(7))] * 2  # the token that stays is in the row that it would be merged into
    odd = (index % 2 == 1).sum(1)
    assert odd.tolist() == [5, 5]  # and every odd one stays


def test_a_size_is_as_many_tokens():
    """log size on a key's scores: the same as the key there so many times."""
    model, _, _ = model_of("class")
    x, size = torch.randn(1, 6, 48), torch.tensor([1, 3, 1, 2, 1, 1])

    def block(x: Tensor, size: Tensor | None) -> Tensor:
        block = TokenBlock(find(BLOCKS, model.blocks[0]).parts(model.blocks[0]))
        state = TokenState(1)
        state.start(x)
        state.size = size
        block.reduce(None, state)
        with torch.inference_mode():
            return block(x)

    often = block(x.repeat_interleave(size, 1), None)
    first = size.cumsum(0) - size
    # Sums of 9 terms instead of 6, in float32; without the bias the outputs differ in the first digit.
    torch.testing.assert_close(block(x, size[None].float()), often[:, first], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(block(x, None), often[:, first], atol=0.05)


def test_merging_what_was_unmerged_changes_nothing():
    """And sum(size x), sum(size) stay as they were."""
    x, size = torch.randn(2, 12, 5), torch.randint(1, 5, (2, 12)).float()
    state = TokenState(1)
    state.start(x)
    state.size = size
    lists = MergePairs(5).merge(Heads(key=torch.randn(2, 12, 4)), x, state)
    y = lists.mean(x)
    again = lists.mean(state.restore(y))
    torch.testing.assert_close(again, y, rtol=12 * 2**-23, atol=12 * 2**-23)
    total = (state.size[..., None].double() * y).sum(1)
    torch.testing.assert_close(total, (size[..., None].double() * x).sum(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(state.size.sum(1), size.sum(1))


def test_sizes_do_not_overflow_half_precision():
    """196 rows of 400 add up to 78400, beyond float16; the mean is 400."""
    x = torch.full((1, 2, 1), 400.0, dtype=torch.float16)
    ptr, col, weight, size = ops.group_tokens(torch.zeros(1, 2, dtype=torch.int32), 1, torch.tensor([[98.0, 98.0]]))
    assert ops.mix_tokens(x, col, ptr, weight, reduce="mean").item() == 400 and size.item() == 196


def test_a_key_that_is_not_a_number_merges_last():
    keys = torch.tensor([[[1.0, 0], [1, 0], [float("nan"), 1], [0, 1], [0, 1], [1, 1]]])
    state = state_of(6, 1)
    MergePairs(1).merge(Heads(key=keys), torch.zeros(1, 6, 1), state)
    assert state.origin().tolist() == [[0, 2, 1, 3, 3, 4]]  # 4 goes to 3; 2, whose key is no number, stays


def test_too_few_tokens_to_merge_stay():
    state = state_of(3, 2)
    assert MergePairs(4).merge(Heads(key=torch.ones(1, 3, 2)), torch.zeros(1, 3, 1), state) is None
    assert DropPairs(4).prune(Heads(key=torch.ones(1, 3, 2)), torch.zeros(1, 3, 1), state) is None
    assert state.moves == []


@pytest.mark.parametrize(
    "method, arguments, text",
    [
        ("tome", {"r": [4, 4]}, "r has 2 entries, the model 5 blocks"),
        ("tome", {"r": -1}, "r=-1; a block merges 0 or more pairs"),
        ("tome", {"r": 13}, "r=13 merges of 26 tokens, 1 of them prefix; at most half of the others, 12,"),
        ("tome", {"r": [3, 3, 3, 10, 0]}, "r=10 merges of 17 tokens, 1 of them prefix; at most half of the others, 8,"),
        ("tome", {"r": 2.5}, "r=2.5 is neither a count nor one per block"),
        ("tofu", {"r": 4, "switch": -1}, "switch=-1"),
        ("tofu", {"r": [4]}, "r has 1 entries, the model 5 blocks"),
        ("tomé", {"r": 4}, "method 'tomé' is not one of"),
        ("tome", {"pairs": 4}, "unexpected keyword argument 'pairs'"),
    ],
)
def test_refused_with_the_numbers(method, arguments, text):
    with pytest.raises(ValueError, match=text):
        TokenSchedule(method, arguments).rows(5, 26, 1)
