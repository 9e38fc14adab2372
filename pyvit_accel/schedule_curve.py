"""What find_schedule gives: every schedule it tried, the one to use, and a chart of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pyvit_accel.files import write_whole
from pyvit_accel.output import GREY, PALETTE, require
from pyvit_accel.tokens import TokenSchedule


@dataclass(frozen=True)
class Point:
    """A schedule that was tried.

    ms, plain_ms  an image, medians, with the schedule and, beside it, with all tokens
    macs          part of the blocks' multiply-adds that is left
    lost          part of the images by which top-1 is lower; without labels, 1 - agreement
    agreement     part of the images that are classified as with all tokens
    divergence    mean over images of KL(probabilities with all tokens || with the schedule), in nats
    """

    family: str
    schedule: TokenSchedule
    macs: float
    lost: float
    agreement: float
    divergence: float
    ms: float
    plain_ms: float

    @property
    def speedup(self) -> float:
        return self.plain_ms / self.ms


@dataclass(frozen=True)
class FoundSchedule:
    """schedule: the fastest of the curve within max_drop; None, all tokens stay, when none of these is faster."""

    schedule: TokenSchedule | None
    curve: tuple[Point, ...]
    max_drop: float
    images: int
    batch: int

    @property
    def point(self) -> Point | None:
        return next((p for p in self.curve if p.schedule == self.schedule), None)

    def __str__(self) -> str:
        tried = f"{len(self.curve)} schedules on {self.images} images, batch {self.batch}"
        if self.point is None:
            return f"all tokens stay: of {tried}, none is faster and loses at most {100 * self.max_drop:.2f} points"
        p = self.point
        return (
            f"{p.schedule.name}: {100 * p.macs:.1f} % of the multiply-adds of the blocks, {p.ms:.3f} ms an image "
            f"instead of {p.plain_ms:.3f} ({p.speedup:.2f}x), {100 * p.lost:.2f} points lost, of {tried}"
        )

    def to_dict(self) -> dict:
        """What json can write."""
        curve = [asdict(p) | {"schedule": asdict(p.schedule)} for p in self.curve]
        schedule = None if self.schedule is None else asdict(self.schedule)
        return {"schedule": schedule, "curve": curve} | {k: getattr(self, k) for k in ("max_drop", "images", "batch")}

    def save(self, path: str | Path) -> None:
        """The schedule as JSON, for TokenSchedule.load and --tokens. Raises ValueError when there is none."""
        if self.schedule is None:
            raise ValueError(f"FoundSchedule: {self}; raise max_drop, nothing is saved")
        text = self.schedule.to_json() + "\n"
        write_whole(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))

    def save_chart(self, path: str | Path) -> None:
        """A PNG: speed-up against what is lost, the Pareto curve through the best, the chosen one ringed."""
        figure = require("matplotlib.figure").Figure(figsize=(8, 5.2), layout="constrained")
        axis = figure.subplots()
        for place, family in enumerate(dict.fromkeys(p.family for p in self.curve)):
            points = [(p.speedup, 100 * p.lost) for p in self.curve if p.family == family]
            axis.scatter(*zip(*points, strict=True), s=26, color=PALETTE[place % len(PALETTE)], label=family, zorder=3)
        best = [(1.0, 0.0), *((p.speedup, 100 * p.lost) for p in pareto(self.curve))]
        axis.plot(*zip(*best, strict=True), color=GREY, linewidth=1, zorder=2)
        axis.axhline(100 * self.max_drop, color="black", linewidth=0.8, linestyle=":")
        if self.point is not None:
            chosen = (self.point.speedup, 100 * self.point.lost)
            axis.scatter(*chosen, s=130, facecolors="none", edgecolors="black", linewidths=1.4, zorder=4)
            axis.annotate(f"{chosen[0]:.2f}x", chosen, (8, 8), textcoords="offset points", fontsize=9)
        axis.set(xlabel=f"speed-up over all tokens, batch {self.batch}", ylabel=f"lost, % of {self.images} images")
        axis.invert_yaxis()
        axis.grid(True, color="#e3e3e3", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if self.curve:
            axis.legend(fontsize=8)
        axis.set_title("dotted: max_drop; ringed: the schedule found", fontsize=10, loc="left")
        write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def pareto(points: Iterable[Point]) -> list[Point]:
    """Those that no other beats in speed-up and loss, slower to faster."""
    best: list[Point] = []
    for p in sorted(points, key=lambda p: (-p.speedup, p.lost)):
        if p.speedup > 1 and (not best or p.lost < best[-1].lost):
            best.append(p)
    return best[::-1]
