"""The chart of sparsity_accuracy.py: points of top-1 lost, by method and by how many layers are sparse."""

from __future__ import annotations

from pathlib import Path

from pyvit_accel.files import write_whole
from pyvit_accel.output import GREY, PALETTE, require


def write_sparsity_chart(path: str | Path, rows: list[dict]) -> None:
    """A PNG: per model the methods with all layers pruned, and beside them the curve."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = require("matplotlib.figure").Figure(figsize=(11, 3.6 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), 2, squeeze=False)
    for (bars, curve), model in zip(axes, models, strict=True):
        mine = [row for row in rows if row["model"] == model and row["layers"]]
        every = max(row["layers"] for row in mine)
        whole = [row for row in mine if row["layers"] == every]
        colours = dict(zip((row["method"] for row in whole), (GREY, *PALETTE), strict=False))
        drawn = bars.barh(
            range(len(whole)), [100 * row["lost"] for row in whole], xerr=[100 * row["lost_error"] for row in whole],
            color=[colours[row["method"]] for row in whole], height=0.7,
        )  # fmt: skip
        bars.bar_label(drawn, [f" {100 * row['lost']:.1f}" for row in whole], fontsize=8)
        bars.set_yticks(range(len(whole)), [row["method"] for row in whole], fontsize=8)
        bars.invert_yaxis()
        bars.set_title(f"{model}: points of top-1 lost, {every} layers sparse", fontsize=9, loc="left")
        for method in dict.fromkeys(row["method"] for row in mine if row["layers"] < every):
            chosen = [row for row in mine if row["method"] == method]
            points = sorted((row["layers"], 100 * row["lost"], 100 * row["lost_error"]) for row in chosen)
            counts, lost, errors = zip((0, 0.0, 0.0), *points, strict=True)
            curve.errorbar(counts, lost, errors, marker="o", color=colours[method], label=method, capsize=2)
        curve.set_title("points lost against sparse layers, least output error first", fontsize=9, loc="left")
        curve.set_xlabel("2:4 layers", fontsize=8)
        curve.grid(True, color="#e3e3e3", linewidth=0.6)
        curve.legend(fontsize=8)
        for axis in (bars, curve):
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("One-shot 2:4 pruning of qkv, proj, fc1 and fc2; trained: the fine-tuned row alone", fontsize=11)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
