"""Latency of ViT-B with fewer tokens, and the part of it that planning and moving them takes.

Plan: what the steps do, which is everything that a block without one does not. Move: what the attention and the
projection take longer for gathering or merging rows on the way, beside themselves on as many rows that lie ready.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from unittest.mock import patch

import torch
from _tokens_study import macs_part
from torch import Tensor, nn

from pyvit_accel import TokenSchedule, accelerate, ops, recipes, reduce_tokens
from pyvit_accel.measure import build_model, compare_latency, random_images
from pyvit_accel.modules.token_block import ReducingBlock

MODEL, DIM = "vit_base_patch16_224", 768
SCHEDULES = (
    TokenSchedule("tome", {"r": 8}),
    TokenSchedule("tome", {"r": 11}),
    TokenSchedule("tome", {"r": 13}),
    TokenSchedule("evit", {"rate": 0.7}),
    TokenSchedule("diffrate", {"model": "deit-b", "budget": "11.5G"}),
    TokenSchedule("diffrate", {"model": "mae-b", "budget": "11.5G"}),
    TokenSchedule("tofu", {"r": 11}),
    TokenSchedule("zero_tprune", {"rate": 0.8}),
    TokenSchedule("patch_dropout", {"prob": 0.35}),
)
STEPS = ("before", "prune", "merge", "settle")
ALONE = "W8A8"


def measure_latency(batch: int, rounds: int) -> list[dict]:
    """Every model in turn; ms an image, medians."""
    fast, _ = accelerate(build_model(MODEL), recipes.W8A8, [random_images(build_model(MODEL), 8)])
    images = random_images(fast, batch)
    models = {ALONE: fast} | {s.name: reduce_tokens(copy.deepcopy(fast), s) for s in SCHEDULES}
    calls = {name: lambda model=model: model(images) for name, model in models.items()}
    latency = compare_latency(calls, rounds, label=f"batch {batch}")
    rows = [{"schedule": ALONE, "macs": 1.0, "plan_ms": 0.0, "move_ms": 0.0}]
    with torch.inference_mode():
        for schedule in SCHEDULES:
            plan, move = plan_ms(models[schedule.name], images, rounds), move_ms(models[schedule.name], images, rounds)
            rows.append({"schedule": schedule.name, "macs": macs_part(schedule, DIM), "plan_ms": plan, "move_ms": move})
    for row in rows:
        ms = latency[row["schedule"]].median
        row |= {"model": MODEL, "batch": batch, "ms": ms / batch, "min_ms": latency[row["schedule"]].min / batch}
        row |= {"speedup": latency[ALONE].median / ms, "plan_and_move": (row["plan_ms"] + row["move_ms"]) / ms}
    return rows


def plan_ms(model: nn.Module, images: Tensor, rounds: int) -> float:
    """Of one forward, median."""
    spent: list[float] = []

    def timed(call: Callable) -> Callable:
        def run(*args: object) -> object:
            start = time.perf_counter()
            result = call(*args)
            spent.append(time.perf_counter() - start)
            return result

        return run

    steps = [m.step for m in model.modules() if isinstance(m, ReducingBlock) and m.step is not None]
    for step in steps:
        for name in STEPS:
            setattr(step, name, timed(getattr(step, name)))
    totals = []
    for _ in range(rounds):
        spent.clear()
        model(images)
        totals.append(sum(spent))
    for step in steps:
        for name in STEPS:
            delattr(step, name)
    return 1e3 * median(totals[1:])


def move_ms(model: nn.Module, images: Tensor, rounds: int) -> float:
    """Of one forward: each call that moves rows beside the same on rows that lie ready, in turn; medians."""
    pairs: list[tuple[Callable, Callable]] = []
    project, attend = ops.quant_project, ops.quant_attention

    def projected(x: Tensor, residual: Tensor, *weights: object, col=None, ptr=None, weight=None, **formats) -> Tensor:
        lists = {"col": col, "ptr": ptr, "weight": weight}
        y = project(x, residual, *weights, **lists, **formats)
        if col is not None:
            ready, kept = x[:, : y.shape[1]].contiguous(), residual[:, : y.shape[1]].contiguous()
            moving = partial(project, x, residual, *weights, **lists, **formats)
            pairs.append((moving, partial(project, ready, kept, *weights, **formats)))
        return y

    def attended(q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, *scales: object, q_index=None, **formats) -> Tensor:
        chosen = {} if q_index is None else {"q_index": q_index}
        if q_index is not None:
            K = q_index.shape[1]
            ready = q[:, :, :K].contiguous(), k, v, q_scale[..., :K] if q_scale.dim() == 3 else q_scale
            moving = partial(attend, q, k, v, q_scale, *scales, **chosen, **formats)
            pairs.append((moving, partial(attend, *ready, *scales, **formats)))
        return attend(q, k, v, q_scale, *scales, **chosen, **formats)

    with patch.object(ops, "quant_project", projected), patch.object(ops, "quant_attention", attended):
        model(images)
    total = 0.0
    for pair in pairs:
        times: dict[Callable, list[float]] = {call: [] for call in pair}
        for i in range(rounds):
            for call in pair[:: 1 if i % 2 else -1]:
                start = time.perf_counter()
                call()
                times[call].append(time.perf_counter() - start)
        moving, ready = (median(of) for of in times.values())
        total += moving - ready
    return 1e3 * total
