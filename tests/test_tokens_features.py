"""PruMerge, SiT and ToP-ViM: the spec's vectors, the formulas in float64 image by image, modes of counts, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from _reduced import check_batch, check_config, model_of, ranked, reduced, small_images, small_vit, tokens_of
from torch import Tensor
from torch._subclasses import FakeTensorMode

from pyvit_accel import accelerate, ops, recipes, token_state
from pyvit_accel.modules.token_step import Rows, TokenState
from pyvit_accel.tokens import TokenSchedule
from pyvit_accel.tokens.prumerge import class_attention, count_outliers, most_outliers, prumerge
from pyvit_accel.tokens.sit import SlimTokens, slim
from pyvit_accel.tokens.top_vim import held, importance, keep_count, select_in_order

U = 2**-24
X = torch.tensor([[[1.0, 0], [0, 1], [2, 0], [0, 2], [3, 3], [1, 1]]])
KEYS = torch.tensor([[[1, 0], [0, 1], [1, 0.1], [0.1, 1], [1, 1], [-1, 0]]])
ATTENTION = torch.tensor([[0.05, 0.10, 0.40, 0.25, 0.15, 0.05]])
OUTLIERS = [0.02, 0.02, 0.03, 0.03, 0.04, 0.04, 0.05, 0.05, 0.06, 0.16, 0.20, 0.30]


def test_merged_as_in_the_vector():
    merged = prumerge(X, KEYS, ATTENTION, keep=2, neighbours=2)
    expected = torch.tensor([[[2.5, 0.45], [0.45, 2.55], [0.55, 0.60]]])
    torch.testing.assert_close(merged.tokens, expected, rtol=4 * U, atol=0)
    assert merged.kept.tolist() == [[2, 3, -1]] and merged.count.tolist() == [3]
    assert merged.mask.all()
    normal = prumerge(X, KEYS, ATTENTION, keep=2, neighbours=2, normalize=True)
    divided = expected / torch.tensor([1 + 0.05 + 0.15, 1 + 0.10 + 0.15, 0.05 + 0.10 + 0.15 + 0.05])[:, None]
    torch.testing.assert_close(normal.tokens, divided, rtol=8 * U, atol=0)


def test_outliers_are_those_of_the_vector():
    a = torch.tensor([OUTLIERS])
    assert count_outliers(a).tolist() == [2]  # above 0.1675
    assert count_outliers(a.flip(1)).tolist() == [2]
    assert count_outliers(torch.cat([a, 0 * a + 0.1])).tolist() == [2, 0]
    assert count_outliers(torch.cat([a, a]), "batch").tolist() == [2, 2]
    assert count_outliers(torch.cat([a, 0 * a]), "batch").tolist() == [1, 1]  # 3 of 24 are, half of them rounded down
    # NaN is the least: of 13 numbers the quartiles are the 4th and the 10th, 0.03 and 0.06.
    assert count_outliers(torch.tensor([[float("nan"), *OUTLIERS]])).tolist() == [3]


@pytest.mark.parametrize("N", [5, 12, 196, 576])
def test_outliers_are_above_the_quartiles(N):
    """torch.quantile in float64; and no more than most_outliers can be, a row of which reaches it."""
    a = torch.rand(6, N) ** 8
    q1, q3 = (torch.quantile(a.double(), q, dim=1, keepdim=True) for q in (0.25, 0.75))
    assert torch.equal(count_outliers(a), (a > q3 + 1.5 * (q3 - q1)).sum(1))
    flat = a.double().flatten()
    q1, q3 = torch.quantile(flat, 0.25), torch.quantile(flat, 0.75)
    assert count_outliers(a, "batch").tolist() == [int((flat > q3 + 1.5 * (q3 - q1)).sum()) // 6] * 6
    most = torch.zeros(1, N)
    most[0, : most_outliers(N)] = 1
    assert count_outliers(most).tolist() == [most_outliers(N)]
    most[0, most_outliers(N)] = 1
    assert count_outliers(most).tolist() == [0]


def test_counts_are_counted_and_not_multiplied_back():
    """int(N (count / N)) is one short for 16 of the counts of 196 tokens: 1 + 1 rows come of one outlier."""
    short = [count for count in range(197) if int(196 * (count / 196)) != count]
    assert len(short) == 16 and short[:6] == [1, 2, 4, 8, 16, 27]
    assert not [count for count in range(577) if int(576 * (count / 576)) != count]
    x, a = torch.randn(1, 196, 4), torch.full((1, 196), 0.1)
    for count in (1, 2, 4, 8, 16, 27):
        a[0, :count] = 0.5
        assert prumerge(x, x, a).count.tolist() == [count + 1]


def eager(x: Tensor, keys: Tensor, a: Tensor, keep: int, plus: bool, neighbours: int, normalize: bool) -> Tensor:
    """Of one image x (N, C), float64, as published: sums over lists, one after the other."""
    N = len(x)
    kept = ranked(a, 0)[:keep]
    if plus and keep:
        stride = int(int(1 / (keep / N)) / 3)
        kept += [j for j in range(0, N - 1, stride) if j not in kept]
    similarity = F.cosine_similarity(keys[:, None], keys[None], dim=-1)
    rows = []
    for i in kept:
        nearest = [j for j in ranked(similarity[i], 0) if j != i][:neighbours]
        total, weight = x[i].clone(), 1.0
        for j in nearest:
            total, weight = total + a[j] * x[j], weight + a[j]
        rows.append(total / weight if normalize else total)
    others = [j for j in range(N) if j not in kept]
    total = sum((a[j] * x[j] for j in others), torch.zeros_like(x[0]))
    return torch.stack([*rows, total / sum(a[j] for j in others) if normalize and others else total])


@pytest.fixture(scope="module")
def features() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, keys = torch.randn(3, 48, 6, generator=generator), torch.randn(3, 48, 8, generator=generator)
    return x, keys, torch.rand(3, 48, generator=generator) ** torch.tensor([[6.0], [1], [12]])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("keep", [None, 5, 16])
def test_prumerge_is_the_papers(features, keep, plus, normalize):
    x, keys, a = features
    merged = prumerge(x, keys, a, keep=keep, plus=plus, neighbours=6, normalize=normalize)
    counts = count_outliers(a).tolist() if keep is None else [keep] * 3
    assert keep or (len(set(counts)) == 3 and 0 in counts)
    for b, count in enumerate(counts):
        truth = eager(x[b].double(), keys[b].double(), a[b].double(), count, plus, 6, normalize)
        rows = merged.count[b]
        assert rows == len(truth)
        # At most 48 terms below |x| each, the weights' sum as long: float32 sums in order.
        assert (merged.tokens[b, :rows] - truth).abs().max() <= 2 * 48 * U * max(a[b].sum(), 1) * x.abs().max()
        assert (merged.tokens[b, rows:] == 0).all() and (merged.kept[b, rows - 1 :] == -1).all()
        assert merged.kept[b, :count].tolist() == ranked(a[b], 0)[:count]
    assert torch.equal(merged.mask.sum(1), merged.count)


def test_images_do_not_see_each_other(features):
    x, keys, a = features
    merged = prumerge(x, keys, a, neighbours=6)
    order = torch.tensor([2, 0, 1])
    permuted = prumerge(x[order], keys[order], a[order], neighbours=6)
    assert torch.equal(permuted.tokens, merged.tokens[order]) and torch.equal(permuted.count, merged.count[order])
    assert torch.equal(prumerge(x, keys, a, neighbours=6).tokens, merged.tokens)
    batch = prumerge(x, keys, a, neighbours=6, scope="batch")
    assert len(set(batch.count.tolist())) == 1  # the published rule: every image gets the mean count


def test_packed_rows_follow_each_other(features):
    x, keys, a = features
    merged = prumerge(x, keys, a, neighbours=6)
    tokens, cu_seqlens = merged.packed()
    assert cu_seqlens.tolist() == [0, *merged.count.cumsum(0).tolist()]
    assert tokens.shape == merged.tokens.flatten(0, 1).shape
    total = int(cu_seqlens[-1])
    assert torch.equal(tokens[:total], merged.tokens[merged.mask]) and (tokens[total:] == 0).all()


def test_a_capacity_cuts_the_last_kept_ones(features):
    x, keys, a = features
    whole, cut = prumerge(x, keys, a, neighbours=6), prumerge(x, keys, a, neighbours=6, capacity=3)
    assert cut.tokens.shape[1] == 4 and cut.count.tolist() == whole.count.clamp(max=4).tolist()
    rows = [b for b in range(3) if cut.count[b] == whole.count[b]]
    assert torch.equal(cut.tokens[rows], whole.tokens[rows, :4])
    assert torch.equal(cut.kept[:, :3], whole.kept[:, :3])


@pytest.mark.parametrize("keep, candidates", [(32, 96), (64, 192), (192, 575)])
def test_grids_of_576(keep, candidates):
    """Attention that makes every kept one no candidate: stride 6, 3 and, for the most that fit, 1."""
    x, a = torch.randn(1, 576, 2), torch.rand(1, 576)
    merged = prumerge(x, x, a, keep=keep, plus=True, neighbours=1)
    overlap = sum(j % (576 // keep // 3) == 0 and j < 575 for j in ranked(a[0], 0)[:keep])
    assert merged.count.item() == keep + candidates - overlap + 1
    grid = merged.kept[0, keep : merged.count.item() - 1]
    assert (grid.diff() > 0).all()


def test_nothing_is_read_by_the_host(features):
    with FakeTensorMode() as mode:
        x, keys, a = (mode.from_tensor(t) for t in features)
        for arguments in ({}, {"keep": 4}, {"plus": True}, {"scope": "batch"}):
            merged = prumerge(x, keys, a, **arguments)
            tokens, cu_seqlens = merged.packed()
            assert tokens.shape == (3 * merged.tokens.shape[1], 6) and cu_seqlens.shape == (4,)


def test_the_class_token_attends_as_one_head():
    q, k = torch.randn(2, 9), torch.randn(2, 13, 9)
    a = class_attention(q, k, num_prefix_tokens=3)
    truth = torch.stack([(k[b].double() @ q[b].double() / 3).softmax(0)[3:] for b in range(2)])
    torch.testing.assert_close(a.double(), truth, rtol=9 * 4 * U * 10, atol=0)
    assert not torch.allclose(class_attention(q, k, 1.0, 3), a)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"keep": 7}, "keep=7 of N=6 tokens; use 1..6"),
        ({"keep": 3, "plus": True}, "keep=3 of N=6 tokens; use 1..2 with plus"),
        ({"keep": 0}, "keep=0"),
        ({"scope": "all"}, "scope='all' is not one of image, batch"),
        ({"capacity": 0}, "capacity=0"),
        ({"neighbours": 0}, "neighbours=0"),
    ],
)
def test_prumerge_refuses_with_the_numbers(arguments, text):
    with pytest.raises(ValueError, match=text):
        prumerge(X, KEYS, ATTENTION, **arguments)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"attention \(1, 5\); expected \(B, N, C\), \(B, N, D\) and \(B, N\)"):
        prumerge(X, KEYS, ATTENTION[:, 1:])
    with pytest.raises(ValueError, match=r"q \(2, 3\) must be \(B, D\) of k \(B, N, D\) = \(1, 4, 3\)"):
        class_attention(torch.zeros(2, 3), torch.zeros(1, 4, 3))


def test_slots_are_those_of_the_vector():
    y, weight = slim(torch.tensor([[[1.0, 0], [0, 1], [2, 2]]]), torch.tensor([[[1.0, 0], [0, 2], [0, 0]]]))
    expected = torch.tensor([[[0.576117, 0.106507], [0.211942, 0.786986], [0.211942, 0.106507]]])
    torch.testing.assert_close(weight, expected, rtol=0, atol=6e-7)
    torch.testing.assert_close(y, torch.tensor([[[1.0, 0.635825], [0.319521, 1]]]), rtol=0, atol=1e-6)


def test_sit_is_attention_with_fixed_queries():
    """Rows of the last Linear ask, hidden features answer, its bias says nothing; the prefix passes."""
    step = SlimTokens(8, 3)
    with torch.no_grad():
        step.scale.fill_(1.7)
        step.slots.bias.copy_(torch.tensor([5.0, -4, 1]))
    x = torch.randn(2, 11, 8)
    state = TokenState(2)
    state.start(x)
    with torch.inference_mode():
        y = step.before(x, state)
        wide = copy.deepcopy(step).double()
        patches = x[:, 2:].double()
        keys = F.gelu(wide.hidden(wide.norm(patches)))
        queries = (1.7 * wide.slots.weight).expand(2, -1, -1)
        truth = F.scaled_dot_product_attention(queries, keys, patches, scale=1.0)
    torch.testing.assert_close(y[:, 2:].double(), truth, rtol=0, atol=32 * U * x.abs().max().item())
    assert torch.equal(y[:, :2], x[:, :2])
    heaviest = (queries @ keys.mT).softmax(-1).argmax(1) + 2
    assert torch.equal(state.origin()[:, 2:].long(), heaviest) and state.origin()[:, :2].tolist() == [[0, 1]] * 2
    assert torch.equal(state.restore(y)[0, 5], y[0, heaviest[0, 3]])
    assert step.rows(11, 2) == Rows(5, 5, 5, 5)


def test_sit_in_a_model():
    assert [r.out - 1 for r in TokenSchedule("sit", {"dim": 8, "layers": [2, 3, 4]}).rows(5, 197, 1)[1:]] == [
        196,
        98,
        49,
        24,
    ]
    schedule = TokenSchedule("sit", {"dim": 48, "patches": 25, "layers": [1, 3]})
    check_batch(schedule)
    check_config(schedule)
    model, images, _ = model_of("registers, qk norm")
    new, state = reduced(model, schedule)
    assert tokens_of(new, images).shape == (3, 3 + 6, 48)
    assert state.origin().min() == 0 and state.origin().max() <= 8
    with pytest.raises(ValueError, match="block 1 gets 26 tokens, 1 of them prefix, and 99 leave it"):
        TokenSchedule("sit", {"dim": 48, "layers": [1]}).rows(5, 26, 1)
    with pytest.raises(ValueError, match="keep=0"):
        TokenSchedule("sit", {"dim": 48, "patches": 1, "layers": [1]}).rows(5, 26, 1)


def test_counts_of_top_vim_are_odd():
    counts, N = [], 197
    for _ in range(3):
        N = keep_count(N, 0.8)
        counts.append(N)
    assert counts == [157, 125, 101]
    assert all(keep_count(N, r) % 2 == 1 and keep_count(N, r) <= N for N in range(1, 60, 2) for r in (0.01, 0.5, 1.0))
    with pytest.raises(ValueError, match=r"N=197, rate=1.2"):
        keep_count(197, 1.2)


@pytest.mark.parametrize("class_token", [0, 4, 8])
def test_order_stays_and_the_class_token_is_in_the_middle(class_token):
    y = torch.randn(3, 9, 5)
    y[1, class_token] = 100.0  # of the second image too, the class token's own score counts for nothing
    y[2, (class_token + 3) % 9] = float("nan")
    scores = importance(y)
    index, dropped, inverse = select_in_order(scores, 5, class_token)
    for b in range(3):
        truth = [sum(max(0.0, v) for v in row) for row in y[b].tolist()]
        patches = [j for j in range(9) if j != class_token and not y[b, j].isnan().any()]
        best = sorted(sorted(patches, key=lambda j: -truth[j])[:4])
        assert index[b].tolist() == [*best[:2], class_token, *best[2:]]
    hidden, residual = torch.randn(3, 9, 2), torch.randn(3, 9, 4)
    for x in (hidden, residual):
        assert torch.equal(ops.mix_tokens(x, index), x.gather(1, index.long()[..., None].expand(-1, -1, x.shape[2])))
    both = torch.cat([index, dropped], 1).sort(1).values
    assert torch.equal(both, torch.arange(9, dtype=torch.int32).expand(3, 9)) and (dropped.diff(dim=1) > 0).all()
    assert torch.equal(inverse.gather(1, index.long()), torch.arange(5, dtype=torch.int32).expand(3, 5))
    assert (inverse.gather(1, dropped.long()) == -1).all()
    assert select_in_order(scores, 1, class_token)[0].tolist() == [[class_token]] * 3


def scan(x: Tensor, decay: float) -> Tensor:
    h, states = torch.zeros_like(x[:, 0]), []
    for i in range(x.shape[1]):
        h = decay * h + x[:, i]
        states.append(h)
    return torch.stack(states, 1)


def test_states_hold_or_decay_as_in_the_vectors():
    x = torch.arange(1.0, 7)[None, :, None]
    index, _, inverse = select_in_order(torch.tensor([[1.0, 0, 0, 1, 0, 1]]), 3)
    assert index.tolist() == [[0, 3, 5]]
    states = ops.mix_tokens(scan(ops.mix_tokens(x, index), 0.5), held(inverse))
    assert states.flatten().tolist() == [1, 1, 1, 4.5, 4.5, 8.25]
    zeroed = torch.where(inverse[..., None] < 0, 0.0, x)
    assert scan(zeroed, 0.5).flatten().tolist() == [1, 0.5, 0.25, 4.125, 2.0625, 7.03125]
    assert scan(x, 0.5)[0, -1].item() == 10.03125
    late = held(select_in_order(torch.tensor([[0.0, 0, 1, 0]]), 1)[2])
    assert late.tolist() == [[-1, -1, 0, 0]]  # before the first one that stays the state is zero
    assert ops.mix_tokens(torch.ones(1, 1, 1), late).flatten().tolist() == [0, 0, 1, 1]


def test_top_vim_refuses_with_the_numbers():
    scores = torch.zeros(1, 9)
    with pytest.raises(ValueError, match=r"class_token=9 is outside 0..8"):
        select_in_order(scores, 5, 9)
    with pytest.raises(ValueError, match=r"keep=10 of 9 tokens"):
        select_in_order(scores, 10, 4)


@pytest.mark.parametrize("recipe", [None, recipes.W8A8], ids=["float", "W8A8"])
def test_prumerge_behind_the_last_block(recipe):
    """The rows of prumerge, of the block's own keys and attention; every patch has a row."""
    net, images = small_vit(), small_images()
    reduced, _ = accelerate(net, recipes.PRUMERGE(6) if recipe is None else recipe + recipes.PRUMERGE(6), [images])
    seen = {}
    step = reduced.blocks[-1].step
    prune, settle = step.prune, step.settle

    def watched_prune(heads, x, state):
        seen["q"], seen["k"] = (t.transpose(1, 2).flatten(2) for t in heads.floats())
        return prune(heads, x, state)

    def watched_settle(y, state):
        seen["y"], seen["out"] = y.clone(), settle(y, state)
        return seen["out"]

    step.prune, step.settle = watched_prune, watched_settle
    with torch.no_grad():
        features = reduced.forward_features(images)
    assert features.shape[1] == 1 + 6 + 1
    attention = class_attention(seen["q"][:, 0], seen["k"])
    merged = prumerge(seen["y"][:, 1:], seen["k"][:, 1:], attention, keep=6)
    assert torch.equal(seen["out"][:, 1:], merged.tokens) and torch.equal(seen["out"][:, :1], seen["y"][:, :1])
    origin = token_state(reduced).origin()
    assert (origin[:, 0] == 0).all() and (origin == 7).sum(1).eq(25 - 6).all()
    for row in range(6):
        assert torch.equal((origin == row + 1).int().argmax(1), merged.kept[:, row].long() + 1)


def test_prumerge_in_a_block_refuses_with_the_numbers():
    with pytest.raises(ValueError, match=r"keep=25 of 25 patches behind 1 tokens of the prefix; keep fewer"):
        accelerate(small_vit(), recipes.PRUMERGE(25))
    with pytest.raises(ValueError, match=r"layers \(5,\) must ascend within 0\.\.4"):
        accelerate(small_vit(), recipes.PRUMERGE(6, layer=5))
