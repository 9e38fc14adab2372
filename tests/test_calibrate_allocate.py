"""allocate: bits per layer under a budget, against brute force."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from pyvit_accel.calibrate.allocate import by_relevance, greedy, least_loss

BITS = (3, 4, 6, 8)


def problem(layers: int, whole: bool, seed: int) -> tuple[dict, dict]:
    """Costs about proportional to the bits, losses falling fourfold with each."""
    draw = random.Random(seed)
    costs, losses = {}, {}
    for layer in range(layers):
        size, weight = draw.randint(1, 40), draw.random() + 0.05
        cost = {bits: size * bits * (64 if whole else draw.uniform(0.9, 1.1) * 1e-5) for bits in BITS}
        costs[f"layer{layer}"] = cost
        losses[f"layer{layer}"] = {bits: weight * 4.0**-bits * draw.uniform(0.5, 2) for bits in BITS}
    return costs, losses


def total(table: dict, bits: dict) -> float:
    return math.fsum(table[layer][bits[layer]] for layer in bits)


def every_assignment(costs: dict):
    for bits in itertools.product(*(costs[layer] for layer in costs)):
        yield dict(zip(costs, bits, strict=True))


def budgets(costs: dict) -> list[float]:
    cheapest, dearest = (math.fsum(end(of.values()) for of in costs.values()) for end in (min, max))
    return [cheapest + part * (dearest - cheapest) for part in (0, 0.1, 0.35, 0.7, 1, 1.5)]


def test_greedy_by_hand():
    costs = {"a": {8: 80, 4: 40, 2: 20}, "b": {8: 8, 4: 4, 2: 2}}
    losses = {"a": {8: 0.0, 4: 8.0, 2: 30.0}, "b": {8: 0.0, 4: 0.5, 2: 4.0}}
    # scores: a 8->4 5, 4->2 20/22; b 8->4 8, 4->2 2/3.5
    assert greedy(costs, losses, 88) == {"a": 8, "b": 8}
    assert greedy(costs, losses, 87) == greedy(costs, losses, 84) == {"a": 8, "b": 4}
    assert greedy(costs, losses, 83) == greedy(costs, losses, 44) == {"a": 4, "b": 4}
    assert greedy(costs, losses, 43) == greedy(costs, losses, 24) == {"a": 2, "b": 4}
    assert greedy(costs, losses, 23) == greedy(costs, losses, 22) == {"a": 2, "b": 2}


def test_least_loss_by_hand():
    costs = {"a": {8: 80, 4: 40, 2: 20}, "b": {8: 8, 4: 4, 2: 2}}
    losses = {"a": {8: 0.0, 4: 8.0, 2: 30.0}, "b": {8: 0.0, 4: 0.5, 2: 4.0}}
    assert least_loss(costs, losses, 83) == {"a": 8, "b": 2}  # one more step than greedy finds
    assert least_loss(costs, losses, 48) == {"a": 4, "b": 8}


def test_relevance_by_hand():
    costs = {layer: {4: 4, 8: 8} for layer in "abc"}
    assert by_relevance(costs, {"a": 0.2, "b": 0.5, "c": 0.3}, 17) == {"a": 4, "b": 8, "c": 4}
    assert by_relevance(costs, {"a": 0.2, "b": 0.5, "c": 0.3}, 20) == {"a": 4, "b": 8, "c": 8}
    wide = {**costs, "b": {4: 40, 8: 80}}  # the most relevant layer is too large for what is left
    assert by_relevance(wide, {"a": 0.2, "b": 0.5, "c": 0.3}, 56) == {"a": 8, "b": 4, "c": 8}


@pytest.mark.parametrize("whole", [True, False], ids=["bytes", "seconds"])
@pytest.mark.parametrize("seed", range(6))
def test_the_table_finds_what_brute_force_finds(whole, seed):
    costs, losses = problem(5, whole, seed)
    relevance = {layer: losses[layer][4] for layer in costs}
    score = {layer: {bits: relevance[layer] * bits for bits in BITS} for layer in costs}
    for budget in budgets(costs):
        within = [bits for bits in every_assignment(costs) if total(costs, bits) <= budget * (1 + 1e-12)]
        found = least_loss(costs, losses, budget * (1 + 1e-12))
        assert total(costs, found) <= budget * (1 + 2e-12)
        assert total(losses, found) == pytest.approx(min(total(losses, bits) for bits in within), rel=1e-12)
        found = by_relevance(costs, relevance, budget * (1 + 1e-12))
        assert total(costs, found) <= budget * (1 + 2e-12)
        assert total(score, found) == pytest.approx(max(total(score, bits) for bits in within), rel=1e-12)


def test_seconds_of_a_large_model_are_nearly_exact():
    """More assignments than are kept; the bound is the best that a mixture of assignments could do."""
    costs, losses = problem(60, False, 7)
    for budget in budgets(costs)[1:5]:
        found = least_loss(costs, losses, budget)
        assert total(costs, found) <= budget * (1 + 1e-12)
        prices = [10.0 ** (i / 50) for i in range(-300, 300)]
        bound = max(
            math.fsum(min(losses[layer][b] + price * costs[layer][b] for b in BITS) for layer in costs) - price * budget
            for price in prices
        )
        assert bound * (1 - 1e-12) <= total(losses, found) <= 1.05 * bound


@pytest.mark.parametrize("whole", [True, False], ids=["bytes", "seconds"])
def test_greedy_stays_within_and_near(whole):
    for seed in range(8):
        costs, losses = problem(30, whole, seed)
        for budget in budgets(costs)[1:]:
            found, best = greedy(costs, losses, budget), least_loss(costs, losses, budget)
            assert max(total(costs, found), total(costs, best)) <= budget * (1 + 1e-12)
            assert total(losses, best) <= total(losses, found) * (1 + 1e-3) <= 3 * total(losses, best)


def test_more_budget_is_never_worse():
    costs, losses = problem(12, True, 1)
    cheapest, dearest = budgets(costs)[0], budgets(costs)[4]
    losts = [total(losses, least_loss(costs, losses, cheapest + i / 20 * (dearest - cheapest))) for i in range(21)]
    assert losts == sorted(losts, reverse=True)


def test_bits_that_others_beat_are_skipped():
    """3 bits slower than 4, and 8 worse than 6: neither is chosen by greedy or by the table."""
    costs, losses = {"a": {8: 8.0, 6: 6.0, 4: 4.0, 3: 5.0}}, {"a": {8: 0.2, 6: 0.1, 4: 1.0, 3: 3.0}}
    for budget, bits in ((9, 6), (6, 6), (5.5, 4), (4, 4)):
        assert greedy(costs, losses, budget) == least_loss(costs, losses, budget) == {"a": bits}


def test_ties_go_to_the_first_layer_and_the_cheaper_bits():
    costs = {layer: {4: 4, 8: 8} for layer in "ab"}
    losses = {layer: {4: 1.0, 8: 0.0} for layer in "ab"}
    assert greedy(costs, losses, 12) == {"a": 4, "b": 8}
    flat = {layer: {4: 1.0, 8: 1.0} for layer in "ab"}
    assert greedy(costs, flat, 16) == least_loss(costs, flat, 16) == {"a": 4, "b": 4}
    assert by_relevance(costs, {"a": 0.0, "b": 0.0}, 16) == {"a": 4, "b": 4}


def test_the_smallest_budget_is_met_and_a_smaller_one_refused():
    for whole in (True, False):
        costs, losses = problem(7, whole, 3)
        smallest = budgets(costs)[0]
        for found in (greedy(costs, losses, smallest), least_loss(costs, losses, smallest)):
            assert found == dict.fromkeys(costs, 3)
        assert by_relevance(costs, dict.fromkeys(costs, 1.0), smallest) == dict.fromkeys(costs, 3)
    costs = {"a": {4: 40, 8: 80}, "b": {4: 4, 8: 8}}
    message = "budget=43 is below 44, the cost of the cheapest bits everywhere"
    for function in (greedy, least_loss):
        with pytest.raises(ValueError, match=f"{function.__name__}: {message}"):
            function(costs, costs, 43)
    with pytest.raises(ValueError, match=f"by_relevance: {message}"):
        by_relevance(costs, {"a": 1.0, "b": 1.0}, 43)
    with pytest.raises(ValueError, match="budget=nan"):
        greedy(costs, costs, math.nan)


def test_arguments_are_checked():
    costs = {"a": {4: 40, 8: 80}}
    with pytest.raises(ValueError, match=r"greedy: a has costs for bits \[4, 8\] and losses for \[4\]; give both"):
        greedy(costs, {"a": {4: 1.0}}, 100)
    with pytest.raises(ValueError, match=r"least_loss: a has costs for bits \[4, 8\] and losses for none"):
        least_loss(costs, {}, 100)
    with pytest.raises(ValueError, match="a at 4 bits costs -1; it must be finite and >= 0"):
        greedy({"a": {4: -1}}, {"a": {4: 1.0}}, 100)
    with pytest.raises(ValueError, match="a at 8 bits has loss nan; it must be finite"):
        greedy(costs, {"a": {4: 1.0, 8: math.nan}}, 100)
    with pytest.raises(ValueError, match="greedy: no layers"):
        greedy({}, {}, 100)
    with pytest.raises(ValueError, match="a has no choice of bits"):
        greedy({"a": {}}, {"a": {}}, 100)
    with pytest.raises(ValueError, match="no relevance for a; relevance has 1 layers"):
        by_relevance(costs, {"b": 1.0}, 100)
    with pytest.raises(ValueError, match="the relevance of a is -1"):
        by_relevance(costs, {"a": -1}, 100)
