"""EViT, DynamicViT, PatchDropout and Zero-TPrune: the spec's vectors, models against their formulas, bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from _reduced import (
    VARIANTS,
    Heads,
    check,
    check_batch,
    check_config,
    eager,
    evit_rule,
    model_of,
    ranked,
    reduced,
    tokens_of,
    unreduced,
    zero_tprune_rule,
)
from torch import Tensor

from pyvit_accel import ops
from pyvit_accel.modules.token_step import Rows, TokenState
from pyvit_accel.tokens import TokenSchedule
from pyvit_accel.tokens.dynamic_vit import KeepPredicted, Predictor
from pyvit_accel.tokens.evit import KeepAttended
from pyvit_accel.tokens.patch_dropout import DropRandom, noise
from pyvit_accel.tokens.zero_tprune import KeepImportant, over_heads, start_scores, without_similar

NAN = float("nan")


def started(x: Tensor, prefix: int = 1, keeps_dropped: bool = False) -> TokenState:
    state = TokenState(prefix, keeps_dropped)
    state.start(x)
    return state


def left(method: str, depth: int = 12, **arguments) -> list[int]:
    """Patches after every block that changes their number."""
    outs = [rows.out - 1 for rows in TokenSchedule(method, arguments).rows(depth, 197, 1)]
    return [n for n, before in zip(outs, [196, *outs], strict=False) if n != before]


def test_published_counts():
    assert left("evit", rate=0.7, fuse=True) == [139, 99, 71]
    assert left("evit", rate=0.7) == [138, 97, 68]
    assert left("evit", rate=0.5, fuse=True) == [99, 51, 27]
    assert left("dynamic_vit", dim=8) == [137, 96, 67]
    assert left("patch_dropout") == [147]
    assert TokenSchedule("evit", {"rate": 0.7}).rows(12, 197, 1)[3] == Rows(197, 139, 139, 139)
    assert TokenSchedule("evit", {"rate": 0.7, "fuse": True}).rows(12, 197, 1)[3] == Rows(197, 197, 197, 140)
    assert DropRandom(0.99).keep(20) == 1
    assert KeepAttended(0.55).rows(101, 1).out == 1 + 56  # 0.55 * 100 is a little more than 55 in floats


ATTENTION = torch.tensor([[0.10, 0.30, 0.20, 0.30, 0.05, 0.05], [0.02, 0.01, 0.40, 0.07, 0.40, 0.10]])


def test_the_attended_stay_and_the_others_are_summed():
    row = F.pad(ATTENTION, (1, 0), value=0.5)
    y = torch.arange(7.0)[None, :, None].expand(2, 7, 1).contiguous()
    step, state = KeepAttended(0.5, fuse=True), started(y)
    assert step.prune(Heads(row), y, state) is None
    y = step.settle(y, state)[..., 0]
    assert y[:, :4].tolist() == [[0, 2, 4, 3], [0, 3, 5, 6]]  # x_j is j + 1, by rank, ties by index
    torch.testing.assert_close(y[:, 4], torch.tensor([0.65, 0.32]), rtol=4 * 2**-24, atol=0)
    assert state.origin().tolist() == [[0, -1, 1, 3, 2, -1, -1], [0, -1, -1, 1, -1, 2, 3]]


def test_a_score_that_is_not_a_number_goes_first():
    x = torch.zeros(1, 7, 1)
    row = torch.tensor([[0.9, NAN, 0.3, 0.2, -math.inf, 0.1, NAN]])
    assert KeepAttended(0.5).prune(Heads(row), x, started(x)).tolist() == [[0, 2, 3, 5]]
    assert KeepAttended(0.8).prune(Heads(row), x, started(x)).tolist() == [[0, 2, 3, 5, 1, 4]]


def test_nothing_to_drop_is_nothing_to_add():
    x = torch.randn(1, 5, 3)
    step, state = KeepAttended(1.0, fuse=True), started(x)
    assert step.prune(Heads(torch.rand(1, 5)), x, state) is None
    assert step.settle(x, state) is x and state.moves == [] and step.rows(5, 1).out == 5


LAYERS = (0, 2, 4)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_evit_is_the_papers(variant, fuse):
    arguments = {"rate": 0.6, "layers": LAYERS, "fuse": fuse}
    check(variant, TokenSchedule("evit", arguments), evit_rule(0.6, LAYERS, fuse))


@pytest.mark.parametrize("similar", [0, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_tprune_is_the_papers(variant, similar):
    arguments = {"rate": 0.7, "similar": similar, "layers": LAYERS, "iterations": (3, 2, 1)}
    check(variant, TokenSchedule("zero_tprune", arguments), zero_tprune_rule(0.7, similar, LAYERS, {0: 3, 2: 1, 4: 1}))


def test_pruning_after_attention_is_pruning_after_the_block():
    """What follows is per token: rows of the whole block's output, where only one block prunes."""
    model, images, error = model_of("class")
    schedule = TokenSchedule("zero_tprune", {"rate": 0.5, "similar": 3, "layers": [4], "iterations": [5, 5, 5]})
    new, state = reduced(model, schedule)
    x, origin = tokens_of(new, images), state.origin()
    whole, _ = reduced(model, TokenSchedule("evit", {"layers": []}))
    kept = tokens_of(whole, images)[origin >= 0].view_as(x)
    assert (x - kept).abs().max() <= 2 * error and (origin >= 0).sum(1).tolist() == [14] * 3


@pytest.mark.parametrize(
    "method, arguments",
    [
        ("evit", {"rate": 0.6, "layers": LAYERS}),
        ("evit", {"rate": 0.6, "layers": LAYERS, "fuse": True}),
        ("zero_tprune", {"rate": 0.7, "similar": 2, "layers": LAYERS}),
        ("dynamic_vit", {"dim": 48, "patches": 25, "layers": LAYERS}),
    ],
    ids=lambda value: value if isinstance(value, str) else "fuse" * ("fuse" in value),
)
def test_every_image_for_itself(method, arguments):
    check_batch(TokenSchedule(method, arguments))
    check_config(TokenSchedule(method, arguments))


VOTES = torch.tensor(
    [
        [[0.4, 0.3, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1], [0.2, 0.5, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]],
        [[0.3, 0.2, 0.3, 0.2], [0.2, 0.2, 0.4, 0.2], [0.25, 0.15, 0.4, 0.2], [0.25, 0.25, 0.3, 0.2]],
        [[0.26, 0.25, 0.25, 0.24], [0.25, 0.25, 0.26, 0.24], [0.25, 0.25, 0.25, 0.25], [0.25, 0.26, 0.25, 0.24]],
        [[0.9, 0.04, 0.03, 0.03], [0.9, 0.05, 0.03, 0.02], [0.88, 0.04, 0.04, 0.04], [0.9, 0.03, 0.03, 0.04]],
    ]
)[None]


def votes(iterations: int, start: str = "uniform") -> Tensor:
    """(1, 4, 4): log A as q and the identity as k give A."""
    k = torch.eye(4).expand(1, 4, 4, 4).contiguous()
    return ops.propagate(VOTES.log(), k, start_scores(k, start), 1.0, iterations)


def test_importance_is_that_of_the_vectors():
    near = {"rtol": 0, "atol": 1e-6}  # six digits are given
    once = [[0.2375, 0.4125, 0.2125, 0.1375], [0.25, 0.20, 0.35, 0.20], [0.2525, 0.2525, 0.2525, 0.2425]]
    once += [[0.895, 0.04, 0.0325, 0.0325]]
    s = votes(1)
    torch.testing.assert_close(s, torch.tensor([once]), **near)
    torch.testing.assert_close((4 * s).var(-1, correction=0), torch.tensor([[0.1625, 0.06, 0.0003, 2.21895]]), **near)
    torch.testing.assert_close(over_heads(s), torch.tensor([[0.243830, 0.324158, 0.289531, 0.171619]]), **near)
    s = votes(5)
    torch.testing.assert_close(s[:, 0], torch.tensor([[0.197987, 0.478470, 0.205886, 0.117657]]), **near)
    torch.testing.assert_close(s[:, 1], torch.tensor([[0.253039, 0.192265, 0.354696, 0.2]]), **near)
    variance = torch.tensor([[0.297458, 0.067215, 0.000298, 2.249392]])
    torch.testing.assert_close((4 * s).var(-1, correction=0), variance, rtol=0, atol=3e-6)
    torch.testing.assert_close(over_heads(s), torch.tensor([[0.227187, 0.364623, 0.289999, 0.164078]]), **near)
    torch.testing.assert_close(votes(50)[:, 0], torch.tensor([[0.197479, 0.478992, 0.205882, 0.117647]]), **near)
    s = votes(1, "class")
    torch.testing.assert_close(s[:, 0], torch.tensor([[0.3375, 0.4875, 0.2625, 0.1625]]), **near)
    torch.testing.assert_close(s.sum(-1), torch.full((1, 4), 1.25), **near)
    torch.testing.assert_close(votes(50, "class"), 1.25 * votes(50), rtol=50 * 4 * 2**-24, atol=0)


def test_heads_that_all_fail_all_count():
    s = torch.full((1, 3, 4), 0.25)
    assert torch.equal(over_heads(s), s[:, 0])
    some = votes(1)
    torch.testing.assert_close(over_heads(some, 1.0, 3.0), some[:, 3])
    torch.testing.assert_close(over_heads(some, scaled=False), some[:, [0, 3]].square().mean(1).sqrt())
    spiked = torch.zeros(1, 2, 197)
    spiked[:, 0, 3] = spiked[:, 1, 4] = 1
    assert over_heads(spiked, scaled=False).count_nonzero() == 2  # of 197 none can reach 0.01, not even this one


def test_similar_patches_go_as_in_the_vector():
    importance = torch.tensor([[0.10, 0.30, 0.15, 0.25, 0.20]])
    keys = torch.tensor([[[1.0, 0], [0, 1], [1, 1], [2, 1], [-1, 2]]])
    assert without_similar(importance, keys, 1, 0).tolist() == [[0, 1, 3, 4]]
    assert without_similar(importance, keys, 2, 0).tolist() == [[1, 3, 4]]
    prefixed = F.pad(importance, (1, 0)), F.pad(keys, (0, 0, 1, 0), value=1.0)
    assert without_similar(*prefixed, 1, 1).tolist() == [[0, 1, 2, 4, 5]]  # like the prefix counts for nothing
    keys[0, 0] = NAN
    assert without_similar(importance, keys, 1, 0).tolist() == [[0, 1, 3, 4]]
    assert without_similar(importance, torch.ones(1, 5, 2), 1, 0).tolist() == [[1, 2, 3, 4]]  # ties: the lower goes


def test_votes_are_many_in_shallow_blocks():
    steps = TokenSchedule("zero_tprune", {"layers": [0, 2, 3, 8, 9, 11], "similar": 1}).steps(12)
    assert [step.iterations for step in steps if step] == [30, 30, 5, 5, 1, 1]
    steps = TokenSchedule("zero_tprune", {"rate": [0.9, 0.8], "similar": [3, 1], "layers": [1, 4]}).steps(6)
    assert [(s.rate, s.similar) for s in steps if s] == [(0.9, 3), (0.8, 1)]


def test_dynamic_vit_gathers_by_the_formula():
    """Scores and rows written out in float64; nothing else happens to the rows."""
    torch.manual_seed(3)
    step = KeepPredicted(8, 5)
    x = torch.randn(2, 12, 8)
    state = started(x, 2, keeps_dropped=True)
    with torch.inference_mode():
        y = step.before(x, state)
        predictor = step.predictor.double()
        patches = x[:, 2:].double()
        centred = patches - patches.mean(-1, keepdim=True)
        h = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        h = h * predictor.norm.weight + predictor.norm.bias
        h = F.gelu(h @ predictor.embed.weight.mT + predictor.embed.bias)
        h = torch.cat([h[..., :4], h[..., 4:].sum(1, keepdim=True).expand(-1, 10, -1) / 10], -1)
        for linear in (predictor.hidden1, predictor.hidden2):
            h = F.gelu(h @ linear.weight.mT + linear.bias)
        h = (h @ predictor.score.weight.mT + predictor.score.bias).exp()
        scores = (h[..., 0] / h.sum(-1)).log()
    for b in range(2):
        rows = [0, 1, *(2 + j for j in ranked(scores[b], 0)[:5])]
        assert torch.equal(y[b], x[b, rows])
    assert step.rows(12, 2) == Rows(7, 7, 7, 7)
    assert torch.equal(state.restore(y), x)  # what went is as it was


def test_predictors_are_trained_elsewhere():
    """Linears C -> C -> C / 2 -> C / 4 -> 2 behind a norm."""
    shapes = [tuple(t.shape) for t in Predictor(48).state_dict().values()]
    assert shapes == [(48,), (48,), (48, 48), (48,), (24, 48), (24,), (12, 24), (12,), (2, 12), (2,)]
    schedule = TokenSchedule("dynamic_vit", {"dim": 48, "patches": 25, "layers": [1, 3]})
    model, images, _ = model_of("class")
    (one, _), (two, _) = reduced(model, schedule), reduced(model, schedule)
    assert "blocks.1.step.predictor.embed.weight" in one.state_dict()
    assert not torch.equal(tokens_of(one, images), tokens_of(two, images))
    two.load_state_dict(one.state_dict())
    assert torch.equal(tokens_of(one, images), tokens_of(two, images))


def test_dynamic_vit_in_a_model():
    model, images, error = model_of("registers, qk norm")
    new, state = reduced(model, TokenSchedule("dynamic_vit", {"dim": 48, "patches": 25, "layers": [0, 3]}))
    x = tokens_of(new, images)
    assert x.shape == (3, 3 + 12, 48)
    kept = state.origin()
    assert kept[:, :3].tolist() == [[0, 1, 2]] * 3 and [sorted(row)[14:] for row in kept.tolist()]
    # Only the first layer drops tokens here: a model whose embedding has these rows alone.
    new, state = reduced(model, TokenSchedule("dynamic_vit", {"dim": 48, "patches": 25, "layers": [0]}))
    x = tokens_of(new, images)
    for b, row in enumerate(state.origin()):
        index = row.argsort()[(row < 0).sum() :]
        alone = eager_of_rows(model, images[b : b + 1], index)
        assert (x[b] - alone).abs().max() <= 4 * error


def eager_of_rows(model, images: Tensor, index: Tensor) -> Tensor:
    """(K, C) float64 of a model into which only the tokens in index (K,) come."""
    chosen = copy.deepcopy(model)
    chosen._embed = lambda x: model._embed(x)[:, index].double()
    return eager(chosen, images, unreduced)[0][0]


@pytest.mark.parametrize("order", ["rank", "index"])
def test_random_patches_are_the_seeds(order):
    x = torch.arange(101.0).expand(64, 101)[..., None].contiguous()
    step = DropRandom(0.25, 7, order)
    rows = step.before(x, started(x))[..., 0].long()
    assert torch.equal(rows, step.before(x, started(x))[..., 0]) and rows.shape == (64, 76)
    assert (rows[:, 0] == 0).all() and all(len(set(row)) == 76 for row in rows.tolist())
    assert (rows.diff(dim=1) > 0).all() == (order == "index")
    assert len({tuple(sorted(row)) for row in rows.tolist()}) == 64  # every image loses others
    other = DropRandom(0.25, 8, order).before(x, started(x))[..., 0]
    assert (other != rows).any(1).all()
    stays = torch.bincount(rows.flatten(), minlength=101)[1:]
    # Of 64 images a patch stays in 48, standard deviation 3.46: 5 of them leave out 100 patches' chance of 6e-5.
    assert (stays - 48).abs().max() <= 5 * math.sqrt(64 * 0.75 * 0.25)


def test_noise_has_no_favourites():
    draws = noise(500, 40, 0) / 2**24
    assert abs(draws.mean() - 0.5) < 5 / math.sqrt(12 * draws.numel())
    first = torch.bincount(draws.argmax(1), minlength=40).double()
    assert ((first - 12.5) ** 2 / 12.5).sum() < 39 + 5 * math.sqrt(78)  # chi squared of 39 degrees, five deviations
    assert torch.equal(noise(2, 40, 0)[0], noise(1, 40, 0)[0])
    assert not torch.isin(noise(1, 40, 0), noise(1, 40, 1)).any()  # nor the same numbers elsewhere


def test_patch_dropout_in_a_model():
    schedule = TokenSchedule("patch_dropout", {"prob": 0.4, "layers": [0, 2]})
    check_config(schedule)
    model, images, _ = model_of("class")
    new, state = reduced(model, schedule, keeps_dropped=True)
    x = tokens_of(new, images)
    assert x.shape[1] == 1 + 9 and torch.equal(tokens_of(new, images), x)  # 25, 15, 9 patches
    assert ((state.origin() >= 0).sum(1) == 10).all()


@pytest.mark.parametrize(
    "method, arguments, text",
    [
        ("evit", {"rate": 0.0}, "rate=0.0"),
        ("evit", {"rate": 1.2}, "rate=1.2"),
        ("evit", {"layers": [3, 5]}, r"layers \(3, 5\) must ascend within 0..4: the model has 5 blocks"),
        ("evit", {"layers": [3, 1]}, r"layers \(3, 1\) must ascend within 0..4"),
        ("dynamic_vit", {"dim": 8, "layers": [1]}, "block 1 gets 26 tokens, 1 of them prefix, and 138 leave it"),
        ("dynamic_vit", {"dim": 6, "layers": [1]}, "dim=6 must be a positive multiple of 4"),
        ("dynamic_vit", {"dim": 8, "rate": 0.1, "patches": 5, "layers": [1]}, "keep=0; keep 1 patch or more"),
        ("dynamic_vit", {"dim": 8, "rate": 7, "layers": [1]}, "rate=7"),
        ("patch_dropout", {"prob": 1.0}, "prob=1.0"),
        ("patch_dropout", {"order": "random"}, "order='random'"),
        ("zero_tprune", {"rate": 0.8, "similar": 9, "layers": [1]}, "similar=9 of 25 patches, 20 of which stay.* 5 "),
        ("zero_tprune", {"rate": 0.2, "similar": 13, "layers": [1]}, "similar=13 of 25 patches.* most 12 can go"),
        ("zero_tprune", {"rate": [0.8], "layers": [1, 2]}, "rate has 1 entries for 2 layers"),
        ("zero_tprune", {"iterations": [30, 5]}, r"iterations=\(30, 5\); pass three"),
        ("zero_tprune", {"start": "cls"}, "start='cls' is not one of class, uniform"),
        ("zero_tprune", {"rate": 1.5}, "rate=1.5"),
    ],
)
def test_refused_with_the_numbers(method, arguments, text):
    with pytest.raises(ValueError, match=text):
        TokenSchedule(method, arguments).rows(5, 26, 1)


def test_impossible_votes_are_refused():
    with pytest.raises(ValueError, match="iterations=0"):
        KeepImportant(0.5, iterations=0)
