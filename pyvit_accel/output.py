"""What the commands show: notes and progress on stderr, tables, JSON and charts."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from pyvit_accel.convert import Layer
from pyvit_accel.files import write_whole

DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}
PALETTE = ("#1f6fb4", "#e08e2b", "#4d9a55", "#b3507a", "#7a6bb3", "#5fa8dc")
GREY, BLUES = "#8c8c8c", ("#1f6fb4", "#5fa8dc", "#a9d1ee")


def require(module: str) -> ModuleType:
    """A module of the optional extra pyvit_accel[cli]; ImportError names the extra when it is not installed."""
    top = module.split(".")[0]
    try:
        import_module(top)
    except ImportError as error:
        if error.name != top:
            raise
        name = DISTRIBUTIONS.get(top, top)
        raise ImportError(f'this needs {name}; run pip install "pyvit_accel[cli]"') from error
    return import_module(module)


def note(text: str) -> None:
    print(f"pyvit-accel: {text}", file=sys.stderr)


def progress(items: Iterable, label: str, total: int | None = None) -> Iterable:
    """items, behind a progress bar when stderr is a terminal."""
    return require("tqdm").tqdm(items, desc=label, total=total, leave=False, disable=None)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned columns: the first ones, while they hold text, to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(row[i][:1].isdigit() or row[i][:1] in ("", "-") for row in cells[1:]) for i in range(len(header))]
    lines = [
        "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def write_json(path: str | Path, value: dict) -> None:
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


@dataclass(frozen=True)
class Bar:
    """One variant of a model: its latency, and its accuracy (0..1) when it was measured."""

    name: str
    ms: float
    accuracy: float | None = None


def write_chart(path: str | Path, title: str, groups: dict[str, list[Bar]], metric: str = "top-1 accuracy") -> None:
    """A PNG: per group a panel of latency bars, the first the one that speed-ups refer to, accuracy beside them."""
    with_accuracy = any(bar.accuracy is not None for bars in groups.values() for bar in bars)
    heights = [len(bars) + 1.2 for bars in groups.values()]
    figure = require("matplotlib.figure").Figure(figsize=(10, 1.1 + 0.36 * sum(heights)), layout="constrained")
    columns = 2 if with_accuracy else 1
    axes = figure.subplots(len(groups), columns, squeeze=False, height_ratios=heights, width_ratios=(3, 1)[:columns])
    for row, (name, bars) in zip(axes, groups.items(), strict=True):
        _latency_panel(row[0], name, bars)
        if with_accuracy:
            _accuracy_panel(row[1], bars, metric)
    axes[-1][0].set_xlabel("latency, ms per image (lower is better)")
    figure.suptitle(title, fontsize=11)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def write_layer_chart(path: str | Path, title: str, layers: Sequence[Layer]) -> None:
    """A PNG: for every matmul the error of its output, where measured, and the bytes of its weight."""
    figure = require("matplotlib.figure").Figure(figsize=(10, 1.4 + 0.2 * len(layers)), layout="constrained")
    errors, sizes = figure.subplots(1, 2, width_ratios=(3, 2))
    places, formats = range(len(layers)), [f"{layer.weight} x {layer.activation}" for layer in layers]
    colour = dict(zip(dict.fromkeys(formats), itertools.cycle(PALETTE), strict=False))
    known = [100 * (layer.error or 0) for layer in layers]
    drawn = errors.barh(places, known, color=[colour[name] for name in formats], height=0.75)
    errors.bar_label(drawn, [f" {percent:.2g} %" if percent else "" for percent in known], fontsize=6)
    errors.set_title("error of the output on calibration data, %", fontsize=9, loc="left")
    errors.set_xlim(0, 1.2 * max(known, default=1) or 1)
    floats = [layer.float_bytes / 2**10 for layer in layers]
    sizes.barh(places, floats, color="#e3e3e3", height=0.75, label="16-bit float")
    for name in colour:
        rows = [i for i in places if formats[i] == name]
        sizes.barh(rows, [layers[i].bytes / 2**10 for i in rows], color=colour[name], height=0.75, label=name)
    sizes.set_title("weight, KiB", fontsize=9, loc="left")
    figure.legend(fontsize=7, loc="outside lower right", ncols=4)
    for axis, labels in ((errors, [layer.name for layer in layers]), (sizes, [""] * len(layers))):
        axis.set_yticks(places, labels, fontsize=6)
        axis.set_ylim(len(layers) - 0.4, -0.6)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def _latency_panel(axis, name: str, bars: list[Bar]) -> None:
    places = range(len(bars))
    colours = [GREY, *(BLUES[i % len(BLUES)] for i in range(len(bars) - 1))]
    drawn = axis.barh(places, [bar.ms for bar in bars], color=colours, height=0.7)
    texts = [f" {bar.ms:.3g} ms" + (f"  ({bars[0].ms / bar.ms:.2f}x)" if i else "") for i, bar in enumerate(bars)]
    axis.bar_label(drawn, texts, fontsize=8)
    axis.set_title(name, fontsize=9, loc="left")
    axis.set_xlim(0, 1.3 * max(bar.ms for bar in bars))
    _style(axis, bars)


def _accuracy_panel(axis, bars: list[Bar], metric: str) -> None:
    known = [(i, bar.accuracy) for i, bar in enumerate(bars) if bar.accuracy is not None]
    if not known:
        axis.set_axis_off()
        return
    colours = [GREY if i == 0 else BLUES[(i - 1) % len(BLUES)] for i, _ in known]
    drawn = axis.barh([i for i, _ in known], [100 * a for _, a in known], color=colours, height=0.7)
    axis.bar_label(drawn, [f" {percent(a)}" for _, a in known], fontsize=8)
    axis.set_title(f"{metric}, %", fontsize=9, loc="left")
    axis.set_xlim(0, 140)
    axis.set_xticks([0, 50, 100])
    _style(axis, bars)
    axis.tick_params(labelleft=False)


def _style(axis, bars: list[Bar]) -> None:
    axis.set_yticks(range(len(bars)), [bar.name for bar in bars], fontsize=8)
    axis.set_ylim(len(bars) - 0.4, -0.6)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
