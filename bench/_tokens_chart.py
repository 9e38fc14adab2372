"""The chart of tokens_cpu.py: top-1 lost against the multiply-adds left, a panel for each model."""

from __future__ import annotations

from pathlib import Path

from pyvit_accel.files import write_whole
from pyvit_accel.output import GREY, PALETTE, require

MARKERS = "osD^vP*Xhp<>8d"
COLOURS = (*PALETTE, "#222222", "#a05a2c", "#2c7f7f", "#c23b3b", "#7f7f1f", "#d17fb0", "#3f3f9f")
BASELINE = "random"
BAR = (70, 1.0)  # per cent of the multiply-adds, points


def write_tokens_chart(path: str | Path, rows: list[dict]) -> None:
    """A PNG."""
    models, families = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "family"))
    figure = require("matplotlib.figure").Figure(figsize=(6 * len(models) + 1.6, 6), layout="constrained")
    for axis, model in zip(figure.subplots(1, len(models), sharey=True, squeeze=False)[0], models, strict=True):
        for place, family in enumerate(families):
            points = sorted(
                (100 * r["macs"], 100 * r["lost"]) for r in rows if (r["model"], r["family"]) == (model, family)
            )
            if points:
                axis.plot(
                    *zip(*points, strict=True), marker=MARKERS[place % len(MARKERS)], markersize=6, linewidth=1.2,
                    color=GREY if family == BASELINE else COLOURS[place % len(COLOURS)], label=family,
                    linestyle="--" if family == BASELINE else "-",
                )  # fmt: skip
        axis.axhline(0, color="black", linewidth=0.8)
        axis.plot((0, BAR[0]), (BAR[1], BAR[1]), color="black", linewidth=0.8, linestyle=":")
        axis.plot((BAR[0], BAR[0]), (-9, BAR[1]), color="black", linewidth=0.8, linestyle=":")
        axis.set(xlim=(40, 100), ylim=(8, -1), xlabel="multiply-adds of the blocks left, %")
        axis.set_title(model, fontsize=10, loc="left")
        axis.grid(True, color="#e3e3e3", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("top-1 lost, points, paired with W8A8 that keeps all tokens")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.suptitle("W8A8 with fewer tokens, no retraining; dotted: at most 1.0 point lost at 70 %", fontsize=11)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
