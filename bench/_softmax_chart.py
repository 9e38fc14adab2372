"""The chart of softmax_formats.py: logit error against the number of values, a panel for each model."""

from __future__ import annotations

from pathlib import Path

from pyvit_accel.files import write_whole
from pyvit_accel.output import GREY, PALETTE, require

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h", "p", "<")
ANCHORS = {  # the line, and the filling of the marker
    "max": ("-", "full"), "max, both rounded": ("-.", "top"), "lse": ("--", "none"), "lse, divided": (":", "left"),
}  # fmt: skip
COLOURS = (*PALETTE, GREY, "#222222", "#a05a2c", "#2c7f7f", "#c23b3b")


def write_softmax_chart(path: str | Path, rows: list[dict], published: str) -> None:
    """A PNG. published: the name of the row to point at. Families differ in marker, anchors in filling and line."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    shown = [row for row in rows if row["group"] == "P" and row["logit_error"] > 0]
    families = list(dict.fromkeys(row["family"] for row in shown))
    figure = require("matplotlib.figure").Figure(figsize=(6 * len(models) + 1, 6.4), layout="constrained")
    for axis, model in zip(figure.subplots(1, len(models), sharey=True, squeeze=False)[0], models, strict=True):
        for place, family in enumerate(families):
            for anchor, (line, filling) in ANCHORS.items():
                chosen = [r for r in shown if (r["model"], r["family"], r["anchor"]) == (model, family, anchor)]
                parts = dict.fromkeys(name_without_bits(row) for row in chosen)
                for part in parts:
                    points = sorted((r["values"], r["logit_error"]) for r in chosen if name_without_bits(r) == part)
                    axis.plot(
                        *zip(*points, strict=True), line, marker=MARKERS[place % len(MARKERS)], fillstyle=filling,
                        color=COLOURS[place % len(COLOURS)], linewidth=1, markersize=7,
                    )  # fmt: skip
        for row in shown:
            if (row["model"], row["name"]) == (model, published):
                axis.annotate(
                    "published\n4-bit log2", (row["values"], row["logit_error"]), (-60, -74),
                    textcoords="offset points", fontsize=8, ha="center", arrowprops={"arrowstyle": "->"},
                )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="values of P, the zero included")
        ticks = (5, 9, 17, 33, 65, 105, 256)
        axis.set_xticks(ticks, map(str, ticks), fontsize=8)
        axis.minorticks_off()
        axis.set_title(model, fontsize=10, loc="left")
        axis.grid(True, color="#e3e3e3", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("relative error of the logits")
    lines = require("matplotlib.lines").Line2D
    keys = [
        lines([], [], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], linewidth=0, label=family)
        for i, family in enumerate(families)
    ]
    keys += [
        lines([], [], color="#222222", linestyle=line, marker="o", fillstyle=filling, label=anchor)
        for anchor, (line, filling) in ANCHORS.items()
    ]
    figure.legend(handles=keys, loc="outside right center", fontsize=8)
    figure.suptitle("Attention probabilities in few values, everything else float32", fontsize=11)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def name_without_bits(row: dict) -> str:
    """What the points of one line share: 'tan, 4 bits, max, one side' and 'two sides' are two lines."""
    return ",".join(part for part in row["name"].split(",") if not part.endswith((" bits", " bit")))
