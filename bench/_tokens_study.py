"""The schedules of tokens_cpu.py, and what each loses: MACs left, top-1 paired with the model that keeps its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pyvit_accel import TokenSchedule, reduce_tokens
from pyvit_accel.modules.token_step import Rows
from pyvit_accel.tokens import macs
from pyvit_accel.tokens.diffrate import SCHEDULES

DEPTH, TOKENS = 12, 197
FOUND_STEPS = (0.7, 0.65, 0.6, 0.75, 0.55, 0.8)
PUBLISHED = (("deit-t", "0.8G"), ("deit-b", "11.5G"), ("mae-b", "11.5G"))


def schedules() -> Iterator[tuple[str, TokenSchedule]]:
    """Family and schedule, for 12 blocks of 197 tokens; one of every family, about 30 % fewer multiply-adds, first."""
    for place in range(max(len(values) for _, _, values in FAMILIES)):
        for family, make, values in FAMILIES:
            if place < len(values):
                yield family, make(values[place])


def found_schedules(curve: list[dict]) -> Iterator[tuple[str, TokenSchedule]]:
    """Of the points of a FoundSchedule, the one that diverges least in every step of the multiply-adds."""
    for most in FOUND_STEPS:
        points = [point for point in curve if most - 0.05 < point["macs"] <= most]
        if points:
            yield "find_schedule", TokenSchedule(**min(points, key=lambda point: point["divergence"])["schedule"])


def _tome(inflect: float) -> Callable[[int], TokenSchedule]:
    return lambda r: TokenSchedule("tome", {"r": r, "inflect": inflect})


def _evit(fuse: bool) -> Callable[[float], TokenSchedule]:
    return lambda rate: TokenSchedule("evit", {"rate": rate, "fuse": fuse})


def _diffrate(model: str, budget: str) -> Callable[[float], TokenSchedule]:
    """The published cuts times a number: 1 are the published counts."""

    def scaled(part: float) -> TokenSchedule:
        counts = [[max(2, round(TOKENS - part * (TOKENS - n))) for n in of] for of in SCHEDULES[model, budget]]
        return TokenSchedule("diffrate", dict(zip(("prune", "merge"), counts, strict=True)))

    return scaled


FAMILIES: tuple[tuple[str, Callable, Sequence], ...] = (
    ("ToMe", _tome(0.0), (8, 9, 10, 13, 4, 6, 12, 16)),
    *((f"DiffRate, {name}", _diffrate(name, size), (1.0, 0.85, 0.7, 0.5)) for name, size in PUBLISHED[::-1]),
    ("EViT", _evit(False), (0.7, 0.8, 0.75, 0.6, 0.9, 0.5)),
    ("ToMe, falling", _tome(-1.0), (7, 6, 8, 4, 10)),
    ("ToFu", lambda r: TokenSchedule("tofu", {"r": r}), (8, 10, 6, 13)),
    ("Zero-TPrune", lambda rate: TokenSchedule("zero_tprune", {"rate": rate}), (0.85, 0.8, 0.9, 0.7)),
    ("EViT, fused", _evit(True), (0.7, 0.8, 0.6, 0.5)),
    ("random", lambda prob: TokenSchedule("patch_dropout", {"prob": prob}), (0.3, 0.2, 0.1, 0.4)),
)


def macs_part(schedule: TokenSchedule, dim: int, depth: int = DEPTH, num_tokens: int = TOKENS) -> float:
    """Multiply-adds left of the blocks' own."""
    whole = depth * macs([Rows(*[num_tokens] * 4)], dim)
    return macs(schedule.rows(depth, num_tokens), dim) / whole


def predictions(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(batch).argmax(1) for batch in batches])


def lost(fast: nn.Module, schedule: TokenSchedule, batches: Sequence[Tensor], labels: Tensor, plain: Tensor) -> dict:
    """plain: what the model predicts with all tokens. mended and broken: images that only one of the two gets right."""
    found = predictions(reduce_tokens(fast, schedule), batches)
    right, was_right = found == labels, plain == labels
    return {
        "top1": float(right.double().mean()),
        "lost": float((was_right.double() - right.double()).mean()),
        "mended": int((right & ~was_right).sum()),
        "broken": int((was_right & ~right).sum()),
        "agreement": float((found == plain).double().mean()),
    }
