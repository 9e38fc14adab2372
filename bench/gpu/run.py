"""The command: which parts run, for how long, and where results go."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from bench.gpu import report, rows
from bench.gpu.parts import choose
from bench.gpu.supervise import Part, divide, run_part
from bench.gpu.task import Task

ROOT = Path(__file__).resolve().parents[2]
RESERVED_S = 12.0  # of the time, for the table and the chart


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--only", help="parts, by a prefix each: linear,probes; the build comes with them")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything; parts divide it (default: 9)")
    parser.add_argument("--quick", action="store_true", help="the first of every kind only")
    parser.add_argument("--output", type=Path, help="default: bench/results/<gpu>_<date>")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="only make table and chart of its rows anew")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU: numbers mean nothing")
    args = parser.parse_args(argv)
    if not 0 < args.minutes < 1000:
        parser.error(f"--minutes {args.minutes}: use a positive number")
    if args.rehearse and args.output is None:
        parser.error("--rehearse needs an --output: what it writes are no results")
    try:
        args.parts = choose(args.only)
    except ValueError as error:
        parser.error(str(error))
    return args


def gpu_name() -> str | None:
    """The first GPU's name, or None, and then a line says why."""
    try:
        import torch
    except ImportError:
        print(f"GPU suite: skipped, {sys.executable} has no torch")
        return None
    if not torch.cuda.is_available():
        print(f"GPU suite: skipped, torch {torch.__version__} finds no GPU here")
        return None
    return torch.cuda.get_device_name(0)


def folder_name(gpu: str, now: datetime) -> str:
    short = re.sub(r"nvidia|geforce|tesla", "", gpu.lower())
    return f"{re.sub(r'[^a-z0-9]+', '_', short).strip('_')}_{now:%Y-%m-%d}"


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if args.report:
        print(report.write(args.report))
        return 0
    gpu = "rehearsal" if args.rehearse else gpu_name()
    if gpu is None:
        return 0
    start = time.time()
    now = datetime.now(timezone.utc)
    output = (args.output or ROOT / "bench" / "results" / folder_name(gpu, now)).resolve()
    run(args.parts, task(output, gpu, args), start + 60 * args.minutes, output)
    print(report.write(output, ROOT / "build" / "gpu"))
    return 0


def task(output: Path, gpu: str, args: argparse.Namespace) -> Task:
    """A fresh output folder, and the package as an install would lay it out, for a checkout that is not installed."""
    work = ROOT / "build" / "gpu"
    lib = work / "lib"
    shutil.rmtree(lib, ignore_errors=True)
    skip = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "pyvit_accel", lib / "pyvit_accel", ignore=skip)
    shutil.copytree(ROOT / "kernels", lib / "pyvit_accel" / "kernels", ignore=skip)
    output.mkdir(parents=True, exist_ok=True)
    for old in ("rows.jsonl", "log.txt"):
        (output / old).unlink(missing_ok=True)
    file = output / "rows.jsonl"
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    asked = {"minutes": args.minutes, "quick": args.quick, "only": args.only}
    rows.append(file, part="suite", item=gpu, status="ok", date=date, **asked)
    device = "cpu" if args.rehearse else "cuda"
    return Task(str(file), "suite", str(ROOT), str(lib), str(work), 0.0, device, args.quick or args.rehearse)


def run(parts: list[Part], task: Task, end: float, output: Path) -> None:
    """Every part in turn; a part's time is its share of what is left."""
    for place, part in enumerate(parts):
        left = end - RESERVED_S - time.time()
        limit = divide([p.share for p in parts[place:]], left)
        begun = time.time()
        if limit < 1:
            rows.append(Path(task.file), part=part.name, item=part.name, status="not run", why="no time was left")
            continue
        print(f"GPU suite: {part.name} (at most {limit:.0f} s): {part.what}", flush=True)
        task.deadline = begun + limit
        run_part(part, task, output / "log.txt")
        of_part = [row for row in rows.final(rows.read(Path(task.file))) if row["part"] == part.name]
        counts = ", ".join(f"{n} {status}" for status in rows.FINAL
                           if (n := sum(row["status"] == status for row in of_part)))  # fmt: skip
        print(f"GPU suite: {part.name}: {counts or 'nothing'} in {time.time() - begun:.1f} s", flush=True)
