"""The part `sanitizer`: small calls of every launcher under compute-sanitizer: memcheck, racecheck, synccheck.

What it reports between the beginning and the end of a call is that call's failure. Memory is not cached, so that a
tensor's end is an allocation's.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.gpu.stream import run_all
from bench.gpu.task import Task

TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = ("Invalid", "Race reported", "hazard", "Barrier error", "Error:", "out of bounds", "Uninitialized")
SHARING = ("lowbit_linear", "sparse24_linear", "quant_attention", "codebook_linear", "weight_only_linear")
TOOLKIT = Path("/usr/local/cuda/bin/compute-sanitizer")


def find() -> str | None:
    return shutil.which("compute-sanitizer") or (str(TOOLKIT) if TOOLKIT.exists() else None)


def row_of(name: str, said: dict, lines: list[str]) -> dict:
    reports = [line.lstrip("= ") for line in lines if line.startswith("=========")]
    errors = [line for line in reports if any(text in line for text in FOUND)]
    if errors:
        where = next((line for line in reports if line.startswith(("at ", "by "))), "")
        return {"status": "failed", "why": f"{errors[0]} {where}"[:300], "reports": len(errors)}
    if "failed" in said:
        return {"status": "failed", "why": said["failed"]}
    return {"status": "ok"}


def planned(task: Task) -> Iterator[str]:
    """tool: implementation: call, the implementations that are kernels of the CUDA library with two calls each."""
    from bench.gpu import launchers, ops

    pairs = ops.items(ops.calls(Path(task.root), "cpu"), "cuda")
    single = {*launchers.configs(), *launchers.sparse24_configs()}
    count: dict[str, int] = {}
    chosen = []
    for backend, name in pairs:
        count[backend] = count.get(backend, 0) + 1
        few = 2 if backend in single else len(pairs)
        if backend != "owner" and count[backend] <= few:
            chosen.append((backend, name))
    for tool in TOOLS:
        wanted = [pair for pair in chosen if tool != "racecheck" or pair[1].startswith(SHARING)]
        wanted = [pair for pair in wanted if tool != "synccheck" or pair[0] != "triton"]
        yield from (f"{tool}: {backend}: {name}" for backend, name in wanted)


def main() -> None:
    task, program = Task.current(), find()
    if program is None or task.device != "cuda":
        task.row("sanitizer", "not run", why="there is no compute-sanitizer" if program is None else "there is no GPU")
        return
    left = task.plan(list(planned(task)))
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in TOOLS:

        def command(names: list[str], tool=tool) -> list[str]:
            options = ["--report-api-errors", "no"] if tool == "memcheck" else []  # torch asks for what may be missing
            command = [program, "--tool", tool, "--print-limit", "3", *options]
            return [*command, sys.executable, "-m", "bench.gpu.sanitized", *names]

        run_all(command, [name for name in left if name.startswith(f"{tool}:")], task, row_of, env)


if __name__ == "__main__":
    main()
