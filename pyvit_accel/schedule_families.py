"""Families of schedules: one number, and a weight for every block, to a TokenSchedule for any depth and token count.

A family of counts has a profile: which part of the patches goes in each block, before and after its attention. With
`part` and weights these become part * weight * profile, so a search can turn all blocks at once or one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from pyvit_accel.tokens import TokenSchedule
from pyvit_accel.tokens.diffrate import SCHEDULES

EVIT_PLACES = (0.25, 0.5, 0.75)  # of the depth
FIRST = 1 / 6  # of the blocks, where what is merged costs most: left alone by the late families
EVEN, ENDING = ("mae-b", "11.5G"), ("deit-t", "0.8G")  # published; ENDING leaves the last block nearly nothing

Make = Callable[[float, Sequence[float], int, int, int], TokenSchedule]


@dataclass(frozen=True)
class Family:
    """make(part, weights, depth, num_tokens, num_prefix_tokens); the higher part in 0..1, the fewer tokens.

    drops     patches vanish, instead of becoming part of others: for heads that read the prefix only
    weighted  make heeds the weights, one per block
    """

    make: Make
    drops: bool = False
    weighted: bool = True


def _counts(
    part: float, weights: Sequence[float], profile: Sequence[tuple[float, float]], num_tokens: int, prefix: int
) -> list[tuple[int, int]]:
    """Tokens of every block after its first and its second cut; at least one patch stays."""
    patches, gone, counts = num_tokens - prefix, 0.0, []
    for weight, cuts in zip(weights, profile, strict=True):
        pair = []
        for cut in cuts:
            gone += part * weight * cut
            pair.append(prefix + max(1, round(patches * (1 - gone))))
        counts.append((pair[0], pair[1]))
    return counts


def _shaped(shape: Callable[[float], float], depth: int) -> list[tuple[float, float]]:
    """All of it after the attention. shape: of 0 (first) to 1 (last block)."""
    shares = [shape((layer + 0.5) / depth) for layer in range(depth)]
    return [(0.0, share / sum(shares)) for share in shares]


def _late(place: float) -> float:
    return float(place > FIRST)


def _pairs(method: str, shape: Callable[[float], float], **arguments: int) -> Make:
    """r for every block, of a method that merges at most half of the patches."""

    def make(part: float, weights: Sequence[float], depth: int, num_tokens: int, prefix: int) -> TokenSchedule:
        profile = _shaped(shape, depth)
        N, r = num_tokens, []
        for _, wanted in _counts(part, weights, profile, num_tokens, prefix):
            r.append(min(max(N - wanted, 0), (N - prefix) // 2))
            N -= r[-1]
        return TokenSchedule(method, {"r": r} | {name: depth // n for name, n in arguments.items()})

    return make


def _diffrate(profile: Callable[[int], list[tuple[float, float]]]) -> Make:
    def make(part: float, weights: Sequence[float], depth: int, num_tokens: int, prefix: int) -> TokenSchedule:
        counts = _counts(part, weights, profile(depth), num_tokens, prefix)
        prune, merge = (list(of) for of in zip(*counts, strict=True))
        return TokenSchedule("diffrate", {"prune": prune, "merge": merge})

    return make


def _published(model: tuple[str, str], depth: int) -> list[tuple[float, float]]:
    """Cuts of published counts, which sum to 1, resampled to the depth."""
    prune, merge = SCHEDULES[model]
    left, gone = prune[0], [0.0]
    cuts: list[tuple[float, float]] = []
    for p, m in zip(prune, merge, strict=True):
        cuts.append((max(left - p, 0), max(min(left, p) - m, 0)))
        left = min(left, p, m)
        gone.append(gone[-1] + sum(cuts[-1]))
    resampled = []
    for layer in range(depth):
        start, end = (_at(gone, place / depth) for place in (layer, layer + 1))
        drop, merged = cuts[min(int((layer + 0.5) / depth * len(cuts)), len(cuts) - 1)]
        share = drop / (drop + merged) if drop + merged else 0.0
        resampled.append(((end - start) * share / gone[-1], (end - start) * (1 - share) / gone[-1]))
    return resampled


def _at(values: Sequence[float], place: float) -> float:
    """Between the values on a line; place in 0..1."""
    x = place * (len(values) - 1)
    i = min(int(x), len(values) - 2)
    return values[i] + (x - i) * (values[i + 1] - values[i])


def _evit(fuse: bool) -> Make:
    def make(part: float, weights: Sequence[float], depth: int, num_tokens: int, prefix: int) -> TokenSchedule:
        rate = max(round(1 - part, 4), 1 / (num_tokens - prefix))
        layers = sorted({int(place * depth) for place in EVIT_PLACES})
        return TokenSchedule("evit", {"rate": rate, "layers": layers, "fuse": fuse})

    return make


def _zero_tprune(part: float, weights: Sequence[float], depth: int, num_tokens: int, prefix: int) -> TokenSchedule:
    layers = sorted({min(1, depth - 1), *(int(place * depth) for place in EVIT_PLACES)})
    return TokenSchedule("zero_tprune", {"rate": max(round(1 - part, 4), 0.05), "similar": 0, "layers": layers})


def _random(part: float, weights: Sequence[float], depth: int, num_tokens: int, prefix: int) -> TokenSchedule:
    return TokenSchedule("patch_dropout", {"prob": min(round(part, 4), 1 - 1 / (num_tokens - prefix))})


FAMILIES = {
    "tome": Family(_pairs("tome", lambda place: 1.0)),
    "tome, falling": Family(_pairs("tome", lambda place: 1.0 - place)),
    "tome, late": Family(_pairs("tome", _late)),
    "tofu": Family(_pairs("tofu", lambda place: 1.0, switch=2), drops=True),
    "diffrate": Family(_diffrate(partial(_published, EVEN)), drops=True),
    "diffrate, ending": Family(_diffrate(partial(_published, ENDING)), drops=True),
    "diffrate, merging": Family(_diffrate(lambda depth: _shaped(_late, depth)), drops=True),
    "evit": Family(_evit(False), drops=True, weighted=False),
    "evit, fused": Family(_evit(True), drops=True, weighted=False),
    "zero_tprune": Family(_zero_tprune, drops=True, weighted=False),
    "random": Family(_random, drops=True, weighted=False),
}
