"""What is made of the rows: results.json, a table, a chart, and one file of benchmarks for pytest-benchmark compare."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from bench.gpu import goals, rows
from bench.gpu.floors import ceilings, floor_ms

NAMES = 16  # of failures and losses that the summary shows
ASSUMED = "assumed"
MARKS = ("planned", "eager")  # of rows: by the kernel that the plan chooses; not in a graph


def write(output: Path, work: Path | None = None) -> str:
    """results.json, table.md and chart.png into the folder, of its rows.jsonl; returns the summary."""
    found = rows.final(rows.read(output / "rows.jsonl"))
    measured = ceilings(found)
    for row in found:
        if row["status"] == "ok" and row.get("ms") and row.get("ops"):
            row["floor_ms"] = floor_ms(row, measured)
    verdicts = [goals.judge(goal, found, measured) for goal in goals.GOALS]
    result = {"ceilings": measured, "goals": [asdict(v) for v in verdicts], "rows": found}
    (output / "results.json").write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    _merge_benchmarks(output, work)
    text = "\n\n".join([_head(found), _counts(found), _goals(verdicts), _losses(found), *_tables(found), _rates(found)])
    (output / "table.md").write_text(text + "\n", encoding="utf-8")
    drawn = _chart(output, found, verdicts)
    return "\n\n".join([_head(found), _counts(found), _goals(verdicts, False), _losses(found, NAMES), _rates(found),
                        f"GPU suite: {output}: rows.jsonl, results.json, table.md{drawn}"])  # fmt: skip


def _chart(output: Path, found: list[dict], verdicts: list[goals.Verdict]) -> str:
    try:
        from bench.gpu.chart import draw
    except ImportError as error:
        return f"; no chart: {error}"
    draw(output / "chart.png", found, verdicts)
    return ", chart.png"


def _merge_benchmarks(output: Path, work: Path | None) -> None:
    """pytest-benchmark wrote a file for every process; a user compares one."""
    files = sorted(work.glob("benchmark_*.json")) if work else []
    saved = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.stat().st_size]
    if saved:
        whole = saved[0] | {"benchmarks": [b for one in saved for b in one["benchmarks"]]}
        (output / "benchmarks.json").write_text(json.dumps(whole) + "\n", encoding="utf-8")


def markdown(header: tuple[str, ...], cells: list[tuple]) -> str:
    lines = [header, tuple("---" for _ in header), *cells]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _head(found: list[dict]) -> str:
    suite = next((row for row in found if row["part"] == "suite"), {})
    about = next((row for row in found if row["item"] == "about"), {})
    keys = ("gpu", "sms", "memory_gib", "l2_mib", "driver", "torch", "triton", "nvcc", "python")
    facts = ", ".join(f"{key} {about[key]}" for key in keys if about.get(key))
    measured = ", ".join(f"{kind} {value:.0f}" for kind, value in ceilings(found).items())
    title = f"# {suite.get('item', 'GPU suite')}, {suite.get('date', '')}"
    return f"{title}\n\n{facts}\n\nCeilings (GB/s, TOP/s): {measured}"


def _counts(found: list[dict]) -> str:
    parts = list(dict.fromkeys(row["part"] for row in found if row["part"] != "suite"))
    counts = {part: Counter(row["status"] for row in found if row["part"] == part) for part in parts}
    table = markdown(("part", *rows.FINAL), [(p, *(counts[p][status] for status in rows.FINAL)) for p in parts])
    failed: dict[tuple, list[dict]] = {}
    for row in found:
        if row["status"] == "failed":
            failed.setdefault((row["part"], str(row.get("why", ""))[:60]), []).append(row)
    lines = [
        f"- {part}: {alike[0]['item']}{f' and {len(alike) - 1} more' if alike[1:] else ''}: {alike[0].get('why')}"[:300]
        for (part, _), alike in failed.items()
    ]
    more = [f"- and {len(lines) - NAMES} other kinds, in rows.jsonl"] if len(lines) > NAMES else []
    count = sum(map(len, failed.values()))
    return "\n".join(["## What ran", "", table, "", f"{count} failed", *lines[:NAMES], *more])


def _goals(verdicts: list[goals.Verdict], missing: bool = True) -> str:
    order = {"met": 0, "missed": 1, "not run": 2}
    cells = [
        (v.goal.what, f">= {v.goal.at_least:g} {v.goal.unit}", "" if v.value is None else f"{v.value:.3g}",
         f"{v.ours} / {v.beside}" if v.beside else v.ours, f"**{v.verdict}**" if v.verdict == "met" else v.verdict)
        for v in sorted(verdicts, key=lambda v: order[v.verdict])
    ]  # fmt: skip
    count = Counter(v.verdict for v in verdicts)
    heading = ", ".join(f"{count[name]} {name}" for name in order)
    ran = [cell for cell in cells if cell[4] != "not run"]
    unmeasured = [cell[0] for cell in cells if cell[4] == "not run"] if missing else []
    tail = ["", f"Not run: {'; '.join(unmeasured)}"] if unmeasured else []
    return "\n".join([f"## Goals: {heading}", "", markdown(("goal", "wanted", "measured", "of", ""), ran), *tail])


def _losses(found: list[dict], most: int | None = None) -> str:
    """Ours that are slower than some baseline, the worst first: when not to use them."""
    lines = []
    for job, of_job in _by_job(found).items():
        baselines = [row for row in of_job if not row.get("backend")]
        best = min(baselines, key=lambda row: row["ms"], default=None)
        for row in of_job:
            if row.get("backend") and best is not None and row["ms"] > best["ms"]:
                both = f"{row['ms']:.4g} ms, {best['implementation']} {best['ms']:.4g} ms"
                ratio = best["ms"] / row["ms"]
                lines.append((ratio, f"- {job}: {goals.called(row)} {both}: {ratio:.2f}x"))
    shown = [line for _, line in sorted(lines)[:most]]
    return "\n".join([f"## Losses: {len(lines)}", "", *(shown or ["none"])])


def _by_job(found: list[dict]) -> dict[str, list[dict]]:
    jobs: dict[str, list[dict]] = {}
    for row in found:
        if row["status"] == "ok" and row.get("job") and row.get("ms"):
            jobs.setdefault(row["job"], []).append(row)
    return jobs


def _tables(found: list[dict]) -> list[str]:
    """One table for each part that timed jobs."""
    header = ("job", "of", "ms", "floor", "of floor", "TOP/s", "GB/s", "MHz", "img/s", "beside the best baseline")
    sections: dict[str, list[tuple]] = {}
    for job, of_job in _by_job(found).items():
        best = min((row["ms"] for row in of_job if not row.get("backend")), default=None)
        for row in sorted(of_job, key=lambda row: row["ms"]):
            seconds, floor = row["ms"] / 1e3, row.get("floor_ms")
            sections.setdefault(row["part"], []).append((
                job, goals.called(row) + "".join(f" ({mark})" for mark in MARKS if row.get(mark)), f"{row['ms']:.4g}",
                f"{floor:.3g}" if floor else "", f"{floor / row['ms']:.0%}" if floor else "",
                f"{row['ops'] / seconds / 1e12:.0f}" if row.get("ops") else "",
                f"{row['bytes'] / seconds / 1e9:.0f}" if row.get("bytes") else "", row.get("clock_mhz") or "",
                f"{row['images'] / seconds:.0f}" if row.get("images") else "",
                f"{best / row['ms']:.2f}x" if best and row.get("backend") else "",
            ))  # fmt: skip
    return [f"## {part}\n\n{markdown(header, cells)}" for part, cells in sections.items()]


def _rates(found: list[dict]) -> str:
    """Measured rates beside those that the design assumes."""
    cells = [
        (row["item"], f"{row['value']:.4g}", row["unit"], f"{row[ASSUMED]:g}" if row.get(ASSUMED) else "",
         f"{row['value'] / row[ASSUMED]:.2f}" if row.get(ASSUMED) else "", row.get("note", ""))
        for row in found if row["part"] == "probes" and row["status"] == "ok" and row.get("value") is not None
    ]  # fmt: skip
    header = ("probe", "measured", "unit", "assumed", "ratio", "")
    return f"## Rates\n\n{markdown(header, cells)}" if cells else "## Rates: not measured"
