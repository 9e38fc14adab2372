"""find_schedule: what it tries, what it finds, and what it says when it cannot."""

from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from _vits import pixels, vit
from torch import nn

from pyvit_accel import TokenSchedule, Unsupported, accelerate, find_schedule, recipes, reduce_tokens, schedule_search
from pyvit_accel.models import digits_model
from pyvit_accel.modules.token_step import Rows
from pyvit_accel.schedule_curve import FoundSchedule, Point, pareto
from pyvit_accel.schedule_families import FAMILIES

QUICK = {"rounds": 1, "batch": 2, "refine": 0}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def steady(monkeypatch):
    """Latency as the multiply-adds have it: what is found does not hang on what else runs."""
    monkeypatch.setattr(schedule_search._Search, "_latency", lambda self: (self._cost(self._rows(self.tried)), 1.0))
    add = schedule_search._Search.add

    def recorded(self, family, schedule):
        self.tried = schedule
        return add(self, family, schedule)

    def seconds(self):
        self.num_tokens, self.dim = 65, 96
        return {n: (n / 65 / 8, n / 65 / 8) for n in (2, 65)}  # 1 in all, over 4 blocks

    monkeypatch.setattr(schedule_search._Search, "add", recorded)
    monkeypatch.setattr(schedule_search._Search, "_block_seconds", seconds)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth, num_tokens, prefix", [(12, 197, 1), (2, 17, 2), (24, 261, 5), (3, 4, 1)])
def test_families_fit_any_model(family, depth, num_tokens, prefix):
    """From all tokens to few, never more with a higher part; lighter weights of some blocks keep more after them."""
    ones, make = [1.0] * depth, FAMILIES[family].make
    before = [num_tokens] * depth
    for part in (0.0, 0.2, 0.45, 0.8, 1.0):
        out = [r.out for r in make(part, ones, depth, num_tokens, prefix).rows(depth, num_tokens, prefix)]
        assert all(now <= was for now, was in zip(out, before, strict=True))
        before = out
    assert before[-1] < num_tokens
    assert make(0.0, ones, depth, num_tokens, prefix).rows(depth, num_tokens, prefix)[0].out == num_tokens
    if FAMILIES[family].weighted and num_tokens > 100:
        weights = [1.0, *[0.25] * (depth // 2), *ones[1 + depth // 2 :]]
        lighter = make(0.5, weights, depth, num_tokens, prefix).rows(depth, num_tokens, prefix)
        plain = make(0.5, ones, depth, num_tokens, prefix).rows(depth, num_tokens, prefix)
        assert lighter[0].out == plain[0].out and lighter[-1].out > plain[-1].out


def test_published_counts_are_the_family(steady):
    """With all it cuts, DiffRate's family has the proportions of the published counts."""
    published = TokenSchedule("diffrate", {"model": "mae-b", "budget": "11.5G"}).rows(12, 197)
    found = FAMILIES["diffrate"].make(148 / 196, [1.0] * 12, 12, 197, 1).rows(12, 197)
    assert max(abs(a.out - b.out) for a, b in zip(published, found, strict=True)) <= 1


def digits(count: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    pytest.importorskip("sklearn")
    from pyvit_accel.models import digits_data

    return tuple(x[:count] for x in digits_data("test"))


def test_finds_the_fastest_within_max_drop(steady):
    images, labels = digits()
    model = digits_model()
    names = [type(m).__name__ for m in model.modules()]
    found = find_schedule(model, images, labels, max_drop=0.05, methods=["tome", "evit"], **QUICK)
    assert [type(m).__name__ for m in model.modules()] == names and not hasattr(model, "pyvit_accel")
    allowed = [p for p in found.curve if p.lost <= 0.05]
    assert found.point == max(allowed, key=lambda p: p.speedup) and found.point.speedup > 1.2
    assert {p.family for p in found.curve} == {"tome", "evit"} and any(p.lost > 0.05 for p in found.curve)
    with torch.inference_mode():
        plain = model(images).argmax(1)
        for p in found.curve[::3]:
            y = reduce_tokens(digits_model(), p.schedule)(images).argmax(1)
            right = [(z == labels).double().mean().item() for z in (plain, y)]
            assert math.isclose(p.lost, right[0] - right[1], abs_tol=1e-9)
            assert math.isclose(p.agreement, (y == plain).double().mean().item(), abs_tol=1e-9)
    targets = [p.ms for p in found.curve if p.family == "tome"]  # of a whole of 1
    assert all(abs(ms - target) < 0.04 for ms, target in zip(targets, schedule_search.TARGETS, strict=False))


def test_without_labels_disagreement_counts(steady):
    images, _ = digits(32)
    found = find_schedule(digits_model(), images.split(20), max_drop=0.5, methods=["evit"], **QUICK)
    assert all(p.lost == 1 - p.agreement for p in found.curve) and found.images == 32


def test_refining_lowers_the_divergence_at_the_same_cost(steady):
    images, labels = digits()
    options = {"max_drop": 0.0, "methods": ["tome, falling"], "rounds": 1, "batch": 2}
    walked = find_schedule(digits_model(), images, labels, refine=0, **options)
    found = find_schedule(digits_model(), images, labels, refine=12, **options)
    start, more = walked.point, found.curve[len(walked.curve) :]
    assert start is not None and found.curve[: len(walked.curve)] == walked.curve
    better = [p for p in more if p.ms <= start.ms and p.divergence < start.divergence]
    assert better and min(p.ms for p in better) > start.ms - 0.02
    plain = [FAMILIES["tome, falling"].make(part / 2000, [1.0] * 4, 4, 65, 1) for part in range(2001)]
    assert more[-1].schedule not in plain and more[-1].ms < start.ms  # driven on with the better weights


def test_measured_latency_and_accelerated_models():
    """On a model that is accelerated, and has a schedule: it is compared with all tokens, and keeps its own."""
    images, labels = digits(32)
    fast, _ = accelerate(digits_model(), recipes.W8A8 + recipes.TOME(12), [images])
    given = [TokenSchedule("tome", {"r": 0}), TokenSchedule("evit", {"rate": 0.5, "layers": [1]})]
    found = find_schedule(fast, images, labels, max_drop=0.9, methods=[], candidates=given, **QUICK)
    none, point = found.curve
    assert [none.schedule, point.schedule] == given and point.ms > 0 and point.plain_ms > 0
    assert none.macs == 1 and abs(none.divergence) < 1e-9 < point.divergence and 0 < point.macs < 0.8
    assert fast.pyvit_accel["tokens"]["schedule"]["arguments"]["r"] == 12
    fastest = max(found.curve, key=lambda p: p.speedup)
    assert found.schedule == (fastest.schedule if fastest.speedup > 1 else None)


def test_the_time_of_a_block_grows_with_its_tokens(monkeypatch):
    """Whatever a clock that stumbles says, so that the search can halve."""
    ticks = itertools.accumulate(1 + (7 * i) % 11 + (13 * i) % 17 for i in itertools.count())
    monkeypatch.setattr(schedule_search, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    model = digits_model()
    search = schedule_search._Search(model, digits_model(), [digits(4)[0]], None, 0.1, 4, 1)
    counts, table = list(search.seconds), list(search.seconds.values())
    assert counts[0] == 2 and counts[-1] == search.num_tokens == 65 and len(counts) == schedule_search.COUNTS
    assert all(a[i] <= b[i] for a, b in itertools.pairwise(table) for i in (0, 1))
    low, high = counts[3:5]
    for n in (low, high):
        assert math.isclose(search._cost([Rows(n, n, n, n)]), sum(search.seconds[n]))
    middle = search._cost([Rows((low + high) // 2, 9, 9, low)])
    assert sum(table[3]) <= middle <= table[4][0] + table[3][1]


def test_says_that_other_work_runs(monkeypatch):
    search = schedule_search._Search(digits_model(), digits_model(), [digits(2)[0]], None, 0.1, 2, 4)
    for slow, told in ((1, False), (3, True)):
        ticks = itertools.accumulate(1 + (slow - 1) * (i > 10) for i in itertools.count())
        monkeypatch.setattr(schedule_search, "time", SimpleNamespace(perf_counter=lambda ticks=ticks: next(ticks)))
        search.stumbled = False
        search._latency()
        assert search.stumbled == told


def point(speedup: float, lost: float) -> Point:
    return Point("tome", TokenSchedule("tome", {"r": round(100 * speedup)}), 0.5, lost, 1 - lost, 0.0, 1 / speedup, 1.0)


def test_pareto():
    points = [point(1.1, 0.01), point(1.3, 0.02), point(1.2, 0.03), point(0.9, -0.1), point(1.5, 0.02)]
    assert pareto(points) == [points[0], points[4]]


def test_nothing_within_max_drop(tmp_path, steady):
    """No reduction is the answer, not an error; it says so, and is not saved."""
    images, labels = digits(32)
    schedule = TokenSchedule("evit", {"rate": 0.02, "layers": [0]})
    found = find_schedule(digits_model(), images, labels, max_drop=0.0, methods=[], candidates=[schedule], **QUICK)
    assert found.schedule is None and found.point is None and len(found.curve) == 1
    assert str(found).startswith("all tokens stay: of 1 schedules on 32 images")
    reduce_tokens(digits_model(), found.schedule)
    with pytest.raises(ValueError, match=r"all tokens stay.*raise max_drop"):
        found.save(tmp_path / "s.json")
    assert not list(tmp_path.iterdir())


def test_saves_schedule_and_chart(tmp_path):
    pytest.importorskip("matplotlib")
    points = (point(1.1, 0.01), point(1.3, 0.02))
    found = FoundSchedule(points[1].schedule, points, 0.02, 100, 8)
    found.save(tmp_path / "s.json")
    assert TokenSchedule.load(tmp_path / "s.json") == points[1].schedule
    assert "1.30x" in str(found) and "2.00 points lost" in str(found)
    found.save_chart(tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    FoundSchedule(None, (), 0.02, 100, 8).save_chart(tmp_path / "none.png")
    values = json.loads(json.dumps(found.to_dict()))
    assert values["schedule"] == {"method": "tome", "arguments": {"r": 130}} and len(values["curve"]) == 2


def test_heads_that_read_patches_get_merges_only(steady, monkeypatch):
    walked = []
    monkeypatch.setattr(schedule_search._Search, "walk", lambda self, family: walked.append(family))
    find_schedule(vit(pool="avg"), pixels(2), **QUICK)
    assert walked == ["tome", "tome, falling", "tome, late"]


@pytest.mark.parametrize("options, message", [
    ({"max_drop": -0.01}, "max_drop=-0.01; use a part of the images"),
    ({"max_drop": 1.0}, "max_drop=1.0; use a part of the images"),
    ({"max_drop": math.nan}, "max_drop=nan; use a part"),
    ({"batch": 0}, "batch=0 and rounds=9 must be positive"),
    ({"rounds": 0}, "rounds=0 must be positive"),
    ({"methods": ["tome", "tomme"]}, "methods tomme are not among tome; tome, falling;"),
    ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels \(3,\) of torch.int64 for 4 images"),
    ({"labels": torch.zeros(4)}, r"labels \(4,\) of torch.float32 for 4 images"),
    ({"labels": []}, r"labels \(0,\) of torch.int64 for 4 images"),
    ({"labels": [torch.zeros(3, dtype=torch.int), [1.5]]}, r"labels \(4,\) of torch.float32 for 4 images"),
    ({"labels": torch.full((4,), 999)}, "none of 4 labels is what the model says"),
    ({"candidates": [TokenSchedule("tome", {"r": [1, 2, 3]})]}, "r has 3 entries, the model 2 blocks"),
])  # fmt: skip
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        find_schedule(vit(), pixels(4), **options)


def test_images_that_are_none():
    with pytest.raises(ValueError, match="no images; pass a tensor"):
        find_schedule(vit(), [])
    with pytest.raises(ValueError, match=r"a batch that is a tuple.*labels apart"):
        find_schedule(vit(), [(pixels(2), torch.zeros(2))])


def test_models_that_do_not_fit():
    with pytest.raises(ValueError, match=r"training mode; call model.eval\(\)"):
        find_schedule(vit().train(), pixels(2))
    with pytest.raises(Unsupported, match="Linear has no block whose tokens can be reduced"):
        find_schedule(nn.Linear(2, 2).eval(), torch.zeros(2, 2))
    model = vit()
    nn.init.constant_(model.head.bias, math.nan)
    with pytest.raises(ValueError, match="NaN or infinite outputs"):
        find_schedule(model, pixels(2))
    model = vit()
    model.head = nn.Unflatten(1, (8, 8))
    with pytest.raises(ValueError, match=r"gives \(2, 8, 8\); it compares classes"):
        find_schedule(model, pixels(2))
