"""The time maps as a PNG: time beside floor by phase, and the matmuls under the roofs of this CPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from pyvit_accel.files import write_whole
from pyvit_accel.output import require
from pyvit_accel.timemap import MATMULS, PHASES, Roofs, TimeMap, size_text

OTHER = "other"
COLOURS = {
    "patch_embed": "#7b4fa3", "qkv": "#1f6fb4", "attention": "#d1495b", "proj": "#5fa8dc", "fc1": "#2a9d6f",
    "fc2": "#8ccf9b", "norm": "#edae49", "quantize": "#b5793b", "activation": "#f4d58d", OTHER: "#c9c9c9",
}  # fmt: skip
MARKERS = "osD^vP*X"
LINES = ("-", "--", "-.", ":")
LABELLED = 0.06  # a share narrower than this has no room for its number
MARGIN = 2.0  # factor between the outermost points and the roofline's frame


def write_timemap_chart(path: str | Path, title: str, maps: Sequence[TimeMap], roofs: Roofs) -> None:
    size = (14, max(6.5, 1.6 + 1.3 * len(maps)))
    figure = require("matplotlib.figure").Figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(len(maps), 2, width_ratios=(1.15, 1))
    for i, time_map in enumerate(maps):
        _time_panel(figure.add_subplot(grid[i, 0]), time_map, last=i == len(maps) - 1)
    _roofline_panel(figure.add_subplot(grid[:, 1]), maps, roofs)
    patch = require("matplotlib.patches").Patch
    patches = [patch(color=COLOURS[phase], label=phase) for phase in (*PHASES, OTHER)]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def _time_panel(axis, time_map: TimeMap, last: bool) -> None:
    times = {phase.name: phase.ms for phase in time_map.phases} | {OTHER: max(time_map.other_ms, 0)}
    floors = {phase.name: phase.floor_ms for phase in time_map.phases}
    for place, parts in enumerate((times, floors)):
        left = 0.0
        for name, ms in parts.items():
            axis.barh(place, ms, left=left, color=COLOURS[name], height=0.72, edgecolor="white", linewidth=0.5)
            if ms > LABELLED * time_map.ms:
                axis.text(left + ms / 2, place, f"{ms:.3g}", ha="center", va="center", fontsize=7)
            left += ms
        axis.text(left, place, f" {left:.3g} ms", va="center", fontsize=8)
    axis.set_yticks((0, 1), ("time", "floor"), fontsize=8)
    axis.set_ylim(1.5, -0.5)
    axis.set_xlim(0, 1.16 * time_map.ms)
    axis.set_title(time_map.name, fontsize=9, loc="left")
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    if last:
        axis.set_xlabel("ms per image (thread time / threads)", fontsize=8)


def _roofline_panel(axis, maps: Sequence[TimeMap], roofs: Roofs) -> None:
    points = [(i, p) for i, of in enumerate(maps) for p in of.phases if p.name in MATMULS and p.macs and p.ms]
    intensities = [p.intensity for _, p in points]
    ridges = [roofs.dot_peak / rate for rate in roofs.read_rates.values()]
    left, right = min(*intensities, *ridges) / MARGIN, max(*intensities, *ridges) * MARGIN
    peak = roofs.dot_peak / 1e9
    marks = []
    for (size, rate), line in zip(roofs.read_rates.items(), itertools.cycle(LINES), strict=False):
        label = f"{size_text(size)} per thread read at {rate / 1e9:.0f} GB/s"
        ends = (left, roofs.dot_peak / rate), (left * rate / 1e9, peak)
        marks += axis.plot(*ends, color="#6e6e6e", linewidth=1, linestyle=line, label=label)
    axis.plot((min(ridges), right), (peak, peak), color="black", linewidth=1.2)
    axis.text(right, peak, f"int8 dot product: {peak:.0f} GMAC/s ", fontsize=8, ha="right", va="bottom")
    for i, p in points:
        axis.scatter(p.intensity, p.gmacs, s=42, color=COLOURS[p.name], marker=MARKERS[i % len(MARKERS)],
                     edgecolors="black", linewidths=0.4, zorder=3)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(left, right)
    axis.set_ylim(min(p.gmacs for _, p in points) / MARGIN, peak * MARGIN)
    axis.set_xlabel("arithmetic intensity, MACs per byte", fontsize=8)
    axis.set_ylabel("GMAC/s", fontsize=8)
    axis.set_title("roofline of the matmuls", fontsize=9, loc="left")
    axis.tick_params(which="both", labelsize=8)
    axis.grid(which="major", color="#e6e6e6", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    mark = require("matplotlib.lines").Line2D
    marks += [
        mark([], [], marker=MARKERS[i % len(MARKERS)], color="black", linestyle="", markersize=5, label=of.name)
        for i, of in enumerate(maps)
    ]
    axis.legend(handles=marks, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False)
