"""pyvit_accel.sparsity: masks against all patterns, SparseGPT against the inverses it stands for, and what is kept."""

from __future__ import annotations

from itertools import combinations, pairwise, permutations, product

import numpy as np
import pytest
import torch
from torch import nn

from pyvit_accel import sparsity
from pyvit_accel.errors import Unsupported
from pyvit_accel.sparsity import Moments
from pyvit_accel.sparsity.masks import PATTERNS
from pyvit_accel.sparsity.moments import Sums
from pyvit_accel.sparsity.permute import _best_swaps, _larger


def chunks(mask):
    return mask.unflatten(1, (-1, 4)).sum(-1)


def test_largest_two_of_all_patterns():
    """No pattern of two keeps more; of equal ones the first in the order of indices."""
    score = torch.randint(0, 4, (300, 4)).float()  # ties in most rows
    mask = sparsity.largest_two(score)
    for row, chosen in zip(score, mask, strict=True):
        best = max(combinations(range(4), 2), key=lambda kept: (sum(row[i] for i in kept), -kept[0], -kept[1]))
        assert chosen.nonzero().flatten().tolist() == list(best)


@pytest.mark.parametrize("K", [1, 2, 3, 5, 6, 7, 8])
def test_the_last_chunk_may_be_short(K):
    mask = sparsity.magnitude(torch.rand(20, K) + 0.1)
    assert mask.shape == (20, K) and (mask[:, : K // 4 * 4].unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert (mask[:, K // 4 * 4 :].sum(1) == min(2, K % 4)).all()


def test_magnitude_looks_at_no_sign():
    w = torch.tensor([[-3.0, 1, 2, -1], [0, -0.0, 0, -5], [0, 0, 0, 0], [-torch.inf, 1, 2, 3]])
    expected = [[1, 0, 1, 0], [1, 0, 0, 1], [1, 1, 0, 0], [1, 0, 0, 1]]
    assert sparsity.magnitude(w).int().tolist() == expected


def test_wanda_weighs_by_the_inputs():
    w, norm = torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([9.0, 4, 3, 1])
    assert sparsity.wanda(w, norm).tolist() == [[True, False, True, False]]
    with pytest.raises(ValueError, match=r"norm \(3,\) for a weight of 4 inputs"):
        sparsity.wanda(w, norm[:3])


def test_there_are_90_patterns():
    tiles = torch.tensor(list(product([0, 1], repeat=16))).view(-1, 4, 4)
    assert int(((tiles.sum(1) == 2).all(-1) & (tiles.sum(2) == 2).all(-1)).sum()) == 90 == len(PATTERNS)
    assert len({tuple(p.flatten().tolist()) for p in PATTERNS}) == 90
    assert (PATTERNS.sum(1) == 2).all() and (PATTERNS.sum(2) == 2).all()


def test_transposable_is_the_best_pattern():
    score = torch.rand(24, 20)
    mask = sparsity.transposable(score)
    assert (chunks(mask) == 2).all() and (chunks(mask.T) == 2).all()
    rows = list(combinations(range(4), 2))
    for i, j in product(range(6), range(5)):
        tile = score[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
        best = max(
            sum(tile[r, c].item() for r, kept in enumerate(chosen) for c in kept)
            for chosen in product(rows, repeat=4)
            if all(sum(c in kept for kept in chosen) == 2 for c in range(4))
        )
        assert (tile * mask[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]).sum().item() == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(("N", "K"), [(1, 1), (5, 6), (4, 7), (9, 4)])
def test_transposable_of_any_size(N, K):
    mask = sparsity.transposable(torch.rand(N, K))
    assert mask.shape == (N, K)
    for part in (mask, mask.T):
        short = -part.shape[1] % 4
        assert (chunks(nn.functional.pad(part, (0, short))) <= 2).all()


def obs(w, gram, damping, mask=None):
    """SparseGPT as its paper derives it: for every column the inverse over the columns left, in float64."""
    w, K = w.astype(np.float64).copy(), w.shape[1]
    damped = gram.astype(np.float64) + damping * np.trace(gram) / K * np.eye(K)
    inverses = [np.linalg.inv(damped[k:, k:]) for k in range(K)]
    out = np.zeros_like(w)
    for n in range(len(w)):
        kept = set()
        for k in range(K):
            if k % 4 == 0:
                group = range(k, min(k + 4, K))
                score = [w[n, c] ** 2 / inverses[c][0, 0] for c in group]
                kept |= {group[i] for i in sorted(range(len(group)), key=lambda i: -score[i])[:2]}
            chosen = k in kept if mask is None else mask[n, k]
            out[n, k] = w[n, k] if chosen else 0
            w[n, k:] -= (w[n, k] - out[n, k]) * inverses[k][0] / inverses[k][0, 0]
    return out


@pytest.mark.parametrize("K", [8, 31, 132])
def test_sparsegpt_is_its_derivation(K):
    """132 columns are more than one block of columns."""
    x = torch.randn(400, K) @ torch.randn(K, K)
    w, gram = torch.randn(3, K), x.T @ x / 400
    found = sparsity.sparsegpt(w, gram)
    expected = obs(w.numpy(), gram.numpy(), 0.01)
    assert np.abs(found.numpy() - expected).max() < 2e-3 * np.abs(expected).max()
    assert np.array_equal(found.numpy() != 0, expected != 0)
    mask = sparsity.magnitude(w)
    found = sparsity.sparsegpt(w, gram, mask)
    expected = obs(w.numpy(), gram.numpy(), 0.01, mask.numpy())
    assert np.abs(found.numpy() - expected).max() < 2e-3 * np.abs(expected).max() and not found[~mask].any()


def test_sparsegpt_makes_good_what_goes():
    """With correlated inputs it errs less than the best mask of the same inputs, and no more with independent ones."""
    w = torch.randn(40, 64)
    x = torch.randn(4000, 64) @ (torch.eye(64) + torch.randn(64, 64) / 8)
    moments = Moments.of(x)
    errors = {
        "sparsegpt": sparsity.output_error(w, sparsity.sparsegpt(w, moments.gram), moments),
        "wanda": sparsity.output_error(w, w * sparsity.wanda(w, moments.norm), moments),
    }
    assert errors["sparsegpt"] < 0.9 * errors["wanda"]
    y = x @ w.T
    exact = ((x @ sparsity.sparsegpt(w, moments.gram).T - y).norm() / y.norm()).item()
    assert errors["sparsegpt"] == pytest.approx(exact, rel=1e-3)
    white = sparsity.sparsegpt(w, torch.eye(64))
    assert torch.allclose(white, w * sparsity.magnitude(w), atol=1e-5)


def test_refit_is_the_least_squares_of_what_is_kept():
    w, x = torch.randn(6, 24), torch.randn(500, 24) @ (torch.eye(24) + torch.randn(24, 24) / 5)
    mask, gram = sparsity.magnitude(w), x.T @ x / 500
    found = sparsity.refit(w, mask, gram, steps=24, damping=0.0)
    assert not found[~mask].any()
    for n in range(6):
        kept = mask[n].numpy()
        truth = np.linalg.lstsq(x.numpy()[:, kept], (x @ w[n]).numpy(), rcond=None)[0]
        assert np.abs(found[n].numpy()[kept] - truth).max() < 1e-4
    damped = gram.double() + 0.01 * gram.diagonal().mean() * torch.eye(24)
    found = sparsity.refit(w, mask, gram)
    for n in range(6):
        kept = mask[n]
        assert torch.allclose(damped[kept] @ (found[n] - w[n]).double(), torch.zeros(12).double(), atol=1e-5)
    errors, moments = [], Moments.of(x)
    for steps in (0, 1, 2, 4, 8, 16, 300):
        start = sparsity.sparsegpt(w, gram)
        errors.append(sparsity.output_error(w, sparsity.refit(w, start != 0, gram, start, steps, 0.0), moments))
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(errors)) and errors[-1] < errors[0]
    assert not sparsity.refit(w, mask, torch.zeros(24, 24), torch.zeros(6, 24)).isnan().any()
    with pytest.raises(ValueError, match="do not fit"):
        sparsity.refit(w, mask, gram[:8, :8])


def test_sparsegpt_of_inputs_never_seen():
    gram = torch.diag(torch.tensor([1.0, 0, 1, 1, 0, 0, 0, 0]))
    found = sparsity.sparsegpt(torch.tensor([[1.0, 9, 2, 3, 1, 2, 3, 4]]), gram)
    assert torch.allclose(found, torch.tensor([[0.0, 0, 2, 3, 0, 0, 0, 0]]))
    assert not sparsity.sparsegpt(torch.ones(2, 8), torch.zeros(8, 8)).any()


@pytest.mark.parametrize("K", [8, 13, 24])
def test_search_never_loses(K):
    for seed in range(5):
        score = torch.randn(6, K, generator=torch.Generator().manual_seed(seed)).square()
        found = sparsity.search(score)
        order, whole = found.order.tolist(), K // 4 * 4
        assert sorted(order) == list(range(K)) and order[whole:] == list(range(whole, K))
        kept = [float((s * sparsity.largest_two(s)).sum() / s.sum()) for s in (score, score[:, found.order])]
        assert [found.before, found.after] == pytest.approx(kept, rel=1e-5) and found.after >= found.before


def test_search_ends_where_no_swap_helps():
    """Every swap of two inputs tried by hand; and of all orders of eight inputs it finds one near the best."""

    def kept(score, order):
        return float((score[:, order] * sparsity.largest_two(score[:, order])).sum())

    for K in (8, 28):
        score = torch.rand(5, K).square()
        found = sparsity.search(score)
        here = kept(score, found.order)
        for i, j in combinations(range(K), 2):
            swapped = found.order.clone()
            swapped[[i, j]] = found.order[[j, i]]
            assert kept(score, swapped) <= here * (1 + 1e-4)
        if K == 8:
            every = {tuple(sorted(first)) for first in permutations(range(8), 4)}
            best = max(kept(score, torch.tensor([*first, *sorted({*range(8)} - {*first})])) for first in every)
            assert here >= 0.97 * best


def test_a_round_of_swaps_never_loses():
    """No chunk is in two swaps of a round, so that what they gain adds up; each round starts where the last ended."""
    score = torch.rand(3, 64).square()
    shares = [sparsity.search(score, rounds).after for rounds in range(6)]
    assert shares[0] == pytest.approx(sparsity.kept_energy(score.sqrt(), sparsity.largest_two(score)), rel=1e-5)
    assert all(later >= earlier for earlier, later in pairwise(shares)) and shares[1] > shares[0]
    assert torch.allclose(_larger(score.T, score.T[:9]), torch.maximum(score.T[:, None], score.T[:9]).sum(-1))
    kept = torch.rand(64, 64) + 100
    swaps = _best_swaps(kept, score.T)
    assert sorted(place // 4 for swap in swaps for place in swap) == list(range(16))
    now = score.view(3, 16, 4).topk(2).values.sum((0, 2))
    gains = [float(kept[i, j] + kept[j, i] - now[i // 4] - now[j // 4]) for i, j in swaps]
    assert gains == sorted(gains, reverse=True)
    pairs = [(i, j) for i, j in combinations(range(64), 2) if i // 4 != j // 4]
    assert swaps[0] == max(pairs, key=lambda p: float(kept[p] + kept[p[::-1]] - now[p[0] // 4] - now[p[1] // 4]))


def test_search_parts_what_crowds_one_chunk():
    """Four large inputs beside each other, two chunks: half of them would go, in the new order none."""
    score = torch.tensor([[9.0, 8, 7, 6, 1, 1, 1, 1]]).repeat(3, 1)
    found = sparsity.search(score)
    assert found.before == pytest.approx(19 / 34) and found.after == pytest.approx(30 / 34)


def test_bimask():
    w = torch.randn(24, 40)
    found = sparsity.bimask(w)
    assert torch.equal(found.forward, sparsity.magnitude(w)) and not (found.backward & ~found.forward).any()
    assert (chunks(found.backward[found.order].T) <= 2).all()
    survivors = (w * found.forward).abs()[found.order].T
    for row, kept in zip(survivors.reshape(-1, 4), found.backward[found.order].T.reshape(-1, 4), strict=True):
        assert (row * kept).sum() == pytest.approx(row.topk(2).values.sum().item())
    assert torch.equal(found.order, sparsity.search((w * found.forward).abs().T).order)
    plain = sparsity.bimask(w, torch.arange(24))
    assert found.kept > plain.kept and 0.5 < plain.kept < 1
    again = sparsity.bimask(w, found.order)
    assert torch.equal(again.backward, found.backward) and again.kept == found.kept
    with pytest.raises(ValueError, match="is no permutation of the 24 rows"):
        sparsity.bimask(w, torch.zeros(24, dtype=torch.long))


def test_branches_are_one_layer():
    w, r = (torch.randn(12, 16, dtype=torch.float64) for _ in range(2))
    mask, x = sparsity.magnitude(w), torch.randn(50, 16, dtype=torch.float64)
    norms = []
    for _ in range(2):
        norm = nn.BatchNorm1d(12).double()
        nn.init.uniform_(norm.weight, -2, 2), nn.init.normal_(norm.bias)
        norm(3 * torch.randn(99, 12, dtype=torch.float64) + 1)
        norms.append(norm.eval())
    weight, bias = sparsity.merge_branches(w, r, mask, *norms)
    expected = norms[0](x @ (w * mask).T) + norms[1](x @ (r * mask).T)
    assert torch.allclose(x @ weight.T + bias, expected, atol=1e-12) and not weight[~mask].any()
    weight, bias = sparsity.merge_branches(w, r, mask, norms[0])
    assert torch.allclose(x @ weight.T + bias, norms[0](x @ (w * mask).T) + x @ (r * mask).T, atol=1e-12)
    with pytest.raises(ValueError, match="differ"):
        sparsity.merge_branches(w, r[:, :8], mask)
    r[3, 5] = torch.nan
    with pytest.raises(ValueError, match="row 3 of the sum is not finite"):
        sparsity.merge_branches(w, r, torch.ones_like(mask))


def test_refused_weights():
    w = torch.ones(6, 12)
    w[4, 9] = torch.nan
    for function in (sparsity.magnitude, sparsity.transposable, sparsity.bimask):
        with pytest.raises(ValueError, match=r"row 4, chunk 2 .*nan"):
            function(w)
    with pytest.raises(ValueError, match="row 4, chunk 2 holds nan"):
        sparsity.sparsegpt(w, torch.eye(12))
    with pytest.raises(ValueError, match=r"must be .*finite and not negative"):
        sparsity.search(w)
    with pytest.raises(ValueError, match=r"expected floats \(out_features, in_features\), got torch.int8"):
        sparsity.largest_two(torch.ones(4, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"must be \(12, 12\) and finite"):
        sparsity.sparsegpt(torch.ones(6, 12), torch.eye(11))


def test_moments():
    x = torch.randn(3, 50, 7)
    counts = torch.rand(3, 50)
    found, rows = Moments.of(x), x.flatten(0, 1)
    assert torch.allclose(found.gram, rows.T @ rows / 150, atol=1e-5) and found.count == 150
    assert torch.allclose(found.centred, torch.cov(rows.T, correction=0), atol=1e-5)
    assert torch.allclose(found.norm, rows.square().mean(0).sqrt(), atol=1e-5)
    weighed, share = Moments.of(x, counts), (counts / counts.sum()).flatten()
    assert torch.allclose(weighed.gram, rows.T @ (rows * share[:, None]), atol=1e-5)
    assert torch.allclose(weighed.mean, share @ rows, atol=1e-5)
    order = torch.randperm(7)
    assert torch.allclose(found.permuted(order).gram, Moments.of(x[..., order]).gram, atol=1e-5)


def test_moments_far_from_zero():
    """float32 sums of x x^T would lose the covariance; inputs that never change have none, and lose their weights."""
    x = 0.3 * torch.randn(4000, 24) + 500 * torch.randn(24)
    x[:, 5], x[:, 9] = 77.7 + 1e-5 * torch.randn(4000), 0  # which is rounding
    sums = Sums()
    for batch in x.split(700):
        sums.add(batch)
    found, exact = sums.result("x"), torch.cov(x.double().T, correction=0)
    assert (found.centred - exact).abs().max() < 1e-5 and found.centred[5].count_nonzero() == 0 == found.mean[9]
    assert torch.allclose(found.gram.double(), x.double().T @ x.double() / 4000, rtol=1e-5)
    assert torch.allclose(found.norm.double(), x.double().square().mean(0).sqrt())
    new = sparsity.sparsegpt(torch.randn(8, 24), found.centred)
    assert not new[:, [5, 9]].any() and (new.count_nonzero(1) > 8).all()


def test_sums_that_rounding_left_negative():
    """Damped until they are positive; refit stays where it is in directions that curve down."""
    basis = torch.linalg.qr(torch.randn(24, 24)).Q
    gram = basis @ torch.diag(torch.cat([torch.rand(20) + 0.5, -0.05 * torch.ones(4)])) @ basis.T
    w = torch.randn(6, 24)
    found = sparsity.sparsegpt(w, gram)
    again = sparsity.refit(w, found != 0, gram, found, steps=99, damping=0.0)
    assert (found.count_nonzero(1) == 12).all() and max(found.abs().max(), again.abs().max()) < 4 * w.abs().max()


def test_observe_names_what_was_not_reached():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model, x = Two().eval(), torch.randn(5, 4)
    found = sparsity.observe(model, [x, (x, torch.zeros(5)), {"x": x}], ["used"])["used"]
    assert torch.allclose(found.gram, x.T @ x / 5, atol=1e-6) and found.count == 15
    model.again = model.used
    assert {name: one.count for name, one in sparsity.observe(model, x, ["used", "again"]).items()} == {
        "used": 5, "again": 5,
    }  # fmt: skip
    with pytest.raises(Unsupported, match="no calibration batch reached unused"):
        sparsity.observe(model, x, ["used", "unused"])
    with pytest.raises(Unsupported, match="no calibration batch reached used"):
        sparsity.observe(model, x[:0], ["used"])
    with pytest.raises(ValueError, match="the input of used is not finite; clean the calibration data"):
        sparsity.observe(model, [x, x * torch.nan], ["used"])
    with pytest.raises(ValueError, match="no calibration batches"):
        sparsity.observe(model, iter(()), ["used"])
    with pytest.raises(TypeError, match="batch 1 is a str"):
        sparsity.observe(model, [x, "x"], ["used"])
    with pytest.raises(ValueError, match="training mode"):
        sparsity.observe(model.train(), x, ["used"])
    assert not model.used._forward_pre_hooks and torch.is_grad_enabled()
