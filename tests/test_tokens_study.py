"""bench/tokens_cpu.py: its schedules, its counting, and that timing a model leaves it as it was."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from _vits import pixels, vit
from torch import nn

from pyvit_accel import TokenSchedule, accelerate, ops, recipes, reduce_tokens
from pyvit_accel.modules.token_block import ReducingBlock

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import _tokens_study
import _tokens_time


def test_schedules_fit_and_each_family_starts_near_the_bar():
    found = list(_tokens_study.schedules())
    parts = [_tokens_study.macs_part(schedule, 192) for _, schedule in found]
    assert all(0.4 < part < 0.9 for part in parts)
    families = dict.fromkeys(family for family, _ in found)
    assert list(families) == [family for family, _ in found[: len(families)]]
    assert all(0.62 < part < 0.74 for part in parts[: len(families)])
    assert len({schedule.name for _, schedule in found}) == len(found)


def test_scaled_counts_are_published_ones_at_1():
    model, budget = _tokens_study.PUBLISHED[0]
    scaled = _tokens_study._diffrate(model, budget)(1.0)
    assert scaled.rows(12, 197) == TokenSchedule("diffrate", {"model": model, "budget": budget}).rows(12, 197)


def test_lost_is_paired(monkeypatch):
    """Of five images, one was mended and two were broken."""
    found = torch.tensor([0, 1, 2, 3, 9])
    monkeypatch.setattr(_tokens_study, "predictions", lambda model, batches: found)
    monkeypatch.setattr(_tokens_study, "reduce_tokens", lambda model, schedule: model)
    labels, plain = torch.tensor([0, 1, 5, 7, 8]), torch.tensor([4, 1, 5, 7, 9])
    row = _tokens_study.lost(nn.Identity(), None, [], labels, plain)
    assert row == pytest.approx({"top1": 0.4, "lost": 0.2, "mended": 1, "broken": 2, "agreement": 0.4})


def test_found_schedules_are_the_least_divergent_of_their_step():
    def point(macs: float, divergence: float, r: int) -> dict:
        schedule = {"method": "tome", "arguments": {"r": r}}
        return {"macs": macs, "divergence": divergence, "schedule": schedule}

    curve = [point(0.69, 0.3, 1), point(0.66, 0.2, 2), point(0.64, 0.4, 3), point(0.95, 0.0, 4)]
    assert [s.arguments["r"] for _, s in _tokens_study.found_schedules(curve)] == [2, 3]


@pytest.mark.parametrize("schedule", [
    TokenSchedule("tome", {"r": 4}), TokenSchedule("evit", {"rate": 0.5, "layers": [1]}),
    TokenSchedule("diffrate", {"prune": [17, 12], "merge": [14, 9]}),
], ids=lambda schedule: schedule.method)  # fmt: skip
def test_timing_leaves_the_model_as_it_was(schedule):
    images = pixels(2)
    fast, _ = accelerate(vit(), recipes.W8A8, [images])
    reduce_tokens(fast, schedule)
    before = [dict(m.step.__dict__) for m in fast.modules() if isinstance(m, ReducingBlock) and m.step is not None]
    with torch.inference_mode():
        y = fast(images)
        assert _tokens_time.plan_ms(fast, images, 3) > 0
        _tokens_time.move_ms(fast, images, 2)
        assert torch.equal(fast(images), y)
    after = [dict(m.step.__dict__) for m in fast.modules() if isinstance(m, ReducingBlock) and m.step is not None]
    assert [step.keys() for step in before] == [step.keys() for step in after]


def test_moves_are_seen(monkeypatch):
    """Every projection that moves rows is timed beside one on as many rows that lie ready: here 5 s beside 3 s."""
    images, clock, moving = pixels(2), [0.0], []
    fast, _ = accelerate(vit(), recipes.W8A8, [images])
    reduce_tokens(fast, TokenSchedule("evit", {"rate": 0.5, "layers": [0]}))
    project = ops.quant_project

    def slow(x, residual, *args, col=None, **options):
        clock[0] += 3 if col is None else 5
        y = project(x, residual, *args, col=col, **options)
        moving.append(col)
        assert y.shape[1] == x.shape[1]
        return y

    monkeypatch.setattr(ops, "quant_project", slow)
    monkeypatch.setattr(_tokens_time.time, "perf_counter", lambda: clock[0])
    with torch.inference_mode():
        fast(images)
        count = sum(col is not None for col in moving)
        assert count > 0 and _tokens_time.move_ms(fast, images, 3) == pytest.approx(2e3 * count)
