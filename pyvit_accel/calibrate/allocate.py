"""How many bits each layer gets under a budget. Costs are bytes or seconds alike; this file only adds them up.

costs   {layer: {bits: cost}}     losses  {layer: {bits: loss}}     the same layers and bits in both
budget  an upper bound of the sum of the costs

greedy       after MPTQ-ViT (arXiv:2401.14895): from the highest bits down, one step of one layer at a time
least_loss   the assignment with the least sum of losses
by_relevance after LRP-QViT (arXiv:2401.11243): the assignment with the greatest sum of relevance * bits

Neither paper has public code: these are our re-implementations and do not claim their numbers. Nothing is random, ties
go to the layer named first and to the cheaper choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Costs = Mapping[str, Mapping[int, float]]

# Partial assignments that least_loss and by_relevance carry from layer to layer. Of more they keep the best of those
# that cost the same within a part in so many of the budget: bytes stay exact, for they coincide; seconds nearly.
MOST = 10_000


def greedy(costs: Costs, losses: Costs, budget: float) -> dict[str, int]:
    """{layer: bits}. Each step lowers the layer with the greatest (cost saved) / (loss added) until the budget is met.

    Bits that cost no less than others with a smaller loss are never chosen: a kernel for 3 bits may be slower than one
    for 4.
    """
    _check("greedy", costs, losses, budget)
    steps = {layer: _useful(costs[layer], losses[layer]) for layer in costs}  # most expensive first
    at = dict.fromkeys(costs, 0)

    def score(layer: str) -> float:
        now, lower = steps[layer][at[layer]], steps[layer][at[layer] + 1]
        return (costs[layer][now] - costs[layer][lower]) / (losses[layer][lower] - losses[layer][now])

    while math.fsum(costs[layer][steps[layer][at[layer]]] for layer in costs) > budget:
        at[max((layer for layer in costs if at[layer] + 1 < len(steps[layer])), key=score)] += 1
    return {layer: steps[layer][at[layer]] for layer in costs}


def least_loss(costs: Costs, losses: Costs, budget: float) -> dict[str, int]:
    """{layer: bits} with the least sum of losses: exact while no more than MOST partial assignments compete."""
    _check("least_loss", costs, losses, budget)
    return _best(costs, {layer: {bits: -loss for bits, loss in losses[layer].items()} for layer in costs}, budget)


def by_relevance(costs: Costs, relevance: Mapping[str, float], budget: float) -> dict[str, int]:
    """{layer: bits} with the greatest sum of relevance * bits, as exact as least_loss. relevance: one per layer, >= 0.

    The score is linear in the bits, so layers tend to the highest and the lowest number offered.
    """
    missing = [layer for layer in costs if layer not in relevance]
    if missing:
        raise ValueError(f"by_relevance: no relevance for {', '.join(missing)}; relevance has {len(relevance)} layers")
    for layer in costs:
        if not 0 <= relevance[layer] < math.inf:
            raise ValueError(
                f"by_relevance: the relevance of {layer} is {relevance[layer]}; it must be finite and >= 0"
            )
    values = {layer: {bits: relevance[layer] * bits for bits in costs[layer]} for layer in costs}
    _check("by_relevance", costs, values, budget)
    return _best(costs, values, budget)


def _best(costs: Costs, values: Costs, budget: float) -> dict[str, int]:
    """The greatest sum of values within the budget: layer by layer, the assignments that none beats in both sums."""
    left = budget - _smallest(costs) + 1e-12 * budget  # the sums' own rounding must not shut out what just fits
    spent, value = torch.zeros(2, 1, dtype=torch.float64)  # beyond the cheapest choice everywhere
    trail = []
    for layer, of in costs.items():
        options = sorted(of, key=lambda bits: (of[bits], bits))
        extra = torch.tensor([of[bits] - of[options[0]] for bits in options], dtype=torch.float64)
        gain = torch.tensor([values[layer][bits] for bits in options], dtype=torch.float64)
        all_spent, all_value = (extra[:, None] + spent).flatten(), (gain[:, None] + value).flatten()
        kept = _undominated(all_spent, all_value, left)
        trail.append((layer, options, kept // len(spent), kept % len(spent)))
        spent, value = all_spent[kept], all_value[kept]
    at, found = len(spent) - 1, {}  # the last is the dearest, so the best
    for layer, options, option, before in reversed(trail):
        found[layer], at = options[int(option[at])], int(before[at])
    return {layer: found[layer] for layer in costs}


def _undominated(spent: Tensor, value: Tensor, left: float) -> Tensor:
    """Indices of what fits, spends more than the one before and is worth more; at most about MOST of them."""
    order = value.argsort(descending=True, stable=True)
    order = order[spent[order].argsort(stable=True)]
    order = order[spent[order] <= left]
    rising = value[order].cummax(0).values
    order = order[torch.cat([torch.ones(1, dtype=torch.bool), rising[1:] > rising[:-1]])]
    if len(order) <= MOST:
        return order
    bucket = (spent[order] * (MOST / left)).floor()
    return order[torch.cat([bucket[1:] > bucket[:-1], torch.ones(1, dtype=torch.bool)])]  # the dearest is the best


def _useful(costs: Mapping[int, float], losses: Mapping[int, float]) -> list[int]:
    """Bits from the most expensive down, each with more loss than the last: what no other choice beats in both."""
    kept: list[int] = []
    for bits in sorted(costs, key=lambda bits: (costs[bits], losses[bits], bits)):  # cheapest first
        if not kept or losses[bits] < losses[kept[-1]]:
            kept.append(bits)
    return kept[::-1]


def _smallest(costs: Costs) -> float:
    return math.fsum(min(of.values()) for of in costs.values())


def _check(function: str, costs: Costs, scores: Costs, budget: float) -> None:
    if not costs:
        raise ValueError(f"{function}: no layers; give the cost of at least one")
    for layer, of in costs.items():
        if not of:
            raise ValueError(f"{function}: {layer} has no choice of bits; give at least one")
        if layer not in scores or set(scores[layer]) != set(of):
            given = sorted(scores[layer]) if layer in scores else "none"
            raise ValueError(f"{function}: {layer} has costs for bits {sorted(of)} and losses for {given}; give both")
        for bits in of:
            if not 0 <= of[bits] < math.inf:
                raise ValueError(f"{function}: {layer} at {bits} bits costs {of[bits]}; it must be finite and >= 0")
            if not math.isfinite(scores[layer][bits]):
                raise ValueError(
                    f"{function}: {layer} at {bits} bits has loss {scores[layer][bits]}; it must be finite"
                )
    smallest = _smallest(costs)
    if not budget >= smallest:
        raise ValueError(
            f"{function}: budget={budget:g} is below {smallest:g}, the cost of the cheapest bits everywhere"
        )
