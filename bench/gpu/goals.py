"""The goals on an H200, as data, and what measurements say about them: met, missed or not run.

Baselines that are no part of torch, FlashAttention-3 and SageAttention-2, are not measured here.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.gpu.shapes import SPARSE24, B, H, L

SDPA = ("flash", "cudnn", "efficient", "math")
BLOCKS, BLOCKS_24 = "our blocks", "W8A8_DYNAMIC 2:4"  # the first: all but the second, which is another model
SPARSE = ("w8a8 2:4", "fp16 2:4")  # each "from registers" or "from rows", and one of them "planned"


@dataclass(frozen=True)
class Goal:
    """One of ours beside the best of some baselines that were measured, or beside a number.

    at_least   baseline ms / our ms; without baselines the value of `unit`
    backend    of the baseline where that is ours too; None otherwise
    unit       "x", or a value of our row: "TOP/s", "img/s", "share of the copy ceiling"
    """

    what: str
    job: str
    ours: tuple[str, ...]
    against: tuple[str, ...]
    at_least: float
    unit: str = "x"


@dataclass(frozen=True)
class Verdict:
    """value is of the best implementation of ours; beside: the row it was compared with."""

    goal: Goal
    verdict: str
    value: float | None = None
    ours: str = ""
    beside: str = ""


def _linear(job: str, *pairs: tuple[tuple[str, ...], float], ours: str = "w8a8") -> list[Goal]:
    return [Goal(f"{job}: {ours} / {', '.join(names)}", job, (ours,), names, least) for names, least in pairs]


BF16, INT_MM, SCALED = ("bf16",), ("int_mm",), ("scaled_mm",)
GOALS = (
    *_linear(f"{B} qkv x64", (BF16, 1.7), (INT_MM, 2.5), (SCALED, 1.3)),
    *_linear(f"{B} fc1 x64", (BF16, 1.7), (SCALED, 1.3)),
    *_linear(f"{B} fc2 x64", (BF16, 1.9), (SCALED, 1.15)),
    Goal(f"{B} fc2 x64: rate", f"{B} fc2 x64", ("w8a8",), (), 1250.0, "TOP/s"),
    *(goal for job in (f"{L} fc1 x64", f"{H} fc1 x64", f"{L} fc2 x64", f"{H} fc2 x64")
      for goal in _linear(job, (BF16, 1.9))),
    *(goal for layer in ("qkv", "proj", "fc1", "fc2") for goal in _linear(f"{B} {layer} x8", (BF16, 2.2))),
    *_linear(f"{B} qkv x64", (("w8a8",), 0.97), ours="w4a8"),
    *_linear(f"{B} qkv x64", (("w8a8",), 0.97), ours="w4a4"),
    *_linear(f"{B} fc2 x64", (("w8a8",), 1.2), (("cusparselt",), 1.3), ours=f"{SPARSE[0]} planned"),
    *(goal for layer in ("qkv", "fc1", "fc2") for goal in _linear(f"{B} {layer} x1", (BF16, 2.5), ours="w4a8")),
    # Questions: met where a plan should choose shared memory, and where its choice is a good one.
    *(Goal(f"{job}: {name}, from rows / from registers", str(job), (f"{name} from rows",),
           (f"{name} from registers",), 1.0) for job in SPARSE24 for name in SPARSE),
    *(Goal(f"{job}: {name}, planned / the fastest", str(job), (f"{name} planned",),
           (f"{name} from rows", f"{name} from registers"), 0.97) for job in SPARSE24 for name in SPARSE),
    *(Goal(f"{job} / best of SDPA", job, ("bytes", "linear mantissa"), SDPA, least) for job, least in (
        ("attention 197 tokens d64 h12 x64", 3.0), ("attention 257 tokens d64 h16 x64", 3.5),
        ("attention 257 tokens d80 h16 x64", 3.5), ("attention 577 tokens d64 h12 x16", 3.0),
        ("attention 1024 tokens d64 h16 x8", 2.3), ("attention 4096 tokens d64 h12 x2", 1.6),
    )),
    *(Goal(f"{job} / torch.compile", job, ("static", "by row"), ("compiled",), 1.5)
      for job in (f"{B} norm x64", f"{L} norm x64", f"{H} norm x64")),
    Goal(f"{B} norm x64: bytes", f"{B} norm x64", ("static", "by row"), (), 0.85, "share of the copy ceiling"),
    *(Goal(f"{job} / index_select + norm", job, ("static", "by row"), ("gather",), 2.0)
      for job in (f"{B} norm x64 keep 0.5", f"{H} norm x64 keep 0.5")),
    *(Goal(f"{B} model x{batch} / compiled bf16", f"{B} model x{batch}", (BLOCKS,), ("compiled bf16",), least)
      for batch, least in ((1, 3.0), (8, 2.5), (64, 2.0))),
    Goal(f"{B} model x1: images", f"{B} model x1", (BLOCKS,), (), 5000.0, "img/s"),
    Goal(f"{B} model x8: images", f"{B} model x8", (BLOCKS,), (), 20000.0, "img/s"),
    Goal(f"{B} model x64: images", f"{B} model x64", (BLOCKS,), (), 26000.0, "img/s"),
    *(Goal(f"{m} model x64 / compiled bf16", f"{m} model x64", (BLOCKS,), ("compiled bf16",), 2.0) for m in (L, H)),
    *(Goal(f"{m} model x64: 2:4 / dense", f"{m} model x64", (BLOCKS_24,), ("W8A8_DYNAMIC",), 1.0) for m in (B, L)),
    Goal(f"{L} model x64: images", f"{L} model x64", (BLOCKS,), (), 8300.0, "img/s"),
    Goal(f"{H} model x64: images", f"{H} model x64", (BLOCKS,), (), 3300.0, "img/s"),
)  # fmt: skip


def judge(goal: Goal, rows: list[dict], ceilings: dict[str, float]) -> Verdict:
    """rows: all that were timed, with a job, an implementation and ms."""
    timed = [row for row in rows if row.get("job") == goal.job and row["status"] == "ok" and row.get("ms")]
    ours = min((r for r in timed if _is_ours(r, goal.ours)), key=lambda r: r["ms"], default=None)
    if ours is None:
        return Verdict(goal, "not run")
    name = called(ours)
    if not goal.against:
        value = _value(goal.unit, ours, ceilings)
        return Verdict(goal, _verdict(value, goal.at_least), value, name)
    others = [r for r in timed if r["implementation"] in goal.against]
    beside = min(others, key=lambda r: r["ms"], default=None)
    if beside is None:
        return Verdict(goal, "not run", None, name)
    value = beside["ms"] / ours["ms"]
    return Verdict(goal, _verdict(value, goal.at_least), value, name, called(beside))


def _is_ours(row: dict, names: tuple[str, ...]) -> bool:
    if row["implementation"] in names or row.get("planned") in names:
        return True
    return BLOCKS in names and row.get("backend") is not None and row["implementation"] != BLOCKS_24


def _value(unit: str, row: dict, ceilings: dict[str, float]) -> float | None:
    seconds = row["ms"] / 1e3
    if unit == "TOP/s":
        return row["ops"] / seconds / 1e12
    if unit == "img/s":
        return row["images"] / seconds
    return row["bytes"] / seconds / 1e9 / ceilings["copy"] if "copy" in ceilings else None


def _verdict(value: float | None, least: float) -> str:
    return "not run" if value is None else "met" if value >= least else "missed"


def called(row: dict) -> str:
    return f"{row['implementation']} ({row['backend']})" if row.get("backend") else row["implementation"]
