"""The chart: speed-ups beside the best baseline of each job, and goals met or missed."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from bench.gpu import goals

COLOURS = {"met": "#4d9a55", "missed": "#b3507a", "loss": "#b3507a", "win": "#1f6fb4"}


def draw(path: Path, found: list[dict], verdicts: list[goals.Verdict]) -> None:
    """A PNG, of whatever there is."""
    speedups, judged = _speedups(found), [v for v in verdicts if v.value is not None]
    sizes = [max(len(speedups), 1), max(len(judged), 1)]
    figure = Figure(figsize=(11, 1.5 + 0.2 * sum(sizes)), layout="constrained")
    ours, wanted = figure.subplots(2, 1, height_ratios=sizes)
    _bars(ours, [name for name, _ in speedups], [x for _, x in speedups],
          [COLOURS["win" if x >= 1 else "loss"] for _, x in speedups], "speed-up beside the best baseline of the job")
    _bars(wanted, [v.goal.what for v in judged], [v.value / v.goal.at_least for v in judged],
          [COLOURS[v.verdict] for v in judged], "measured / goal")
    figure.savefig(path, format="png", dpi=130)


def _speedups(found: list[dict]) -> list[tuple[str, float]]:
    timed = [row for row in found if row["status"] == "ok" and row.get("job") and row.get("ms")]
    best: dict[str, float] = {}
    for row in timed:
        if not row.get("backend"):
            best[row["job"]] = min(best.get(row["job"], row["ms"]), row["ms"])
    return [(f"{row['job']}: {goals.called(row)}", best[row["job"]] / row["ms"])
            for row in timed if row.get("backend") and row["job"] in best]  # fmt: skip


def _bars(axis, names: list[str], values: list[float], colours: list[str], title: str) -> None:
    axis.set_title(title if values else f"{title}: nothing was measured", fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    if not values:
        axis.set_axis_off()
        return
    drawn = axis.barh(range(len(values)), values, color=colours, height=0.75)
    axis.bar_label(drawn, [f" {value:.2f}" for value in values], fontsize=6)
    axis.set_yticks(range(len(values)), names, fontsize=6)
    axis.set_ylim(len(values) - 0.4, -0.6)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.tick_params(axis="x", labelsize=7)
