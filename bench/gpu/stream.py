"""Programs that run many items and say so: {"begin": name}, results as JSON objects, {"end": name}, a line each.

Where the program ends within an item, another process goes on with those after it.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence

from bench.gpu.task import Task

RowOf = Callable[[str, dict, list[str]], dict]


def run_all(
    command: Callable[[list[str]], Sequence[str]], wanted: list[str], task: Task, row_of: RowOf,
    env: dict[str, str] | None = None,
) -> None:  # fmt: skip
    """command(names): what runs these. row_of(name, what it said, lines that were no JSON): status and values."""
    while wanted and not task.late():
        wanted = wanted[_run_once(command(wanted), wanted, task, row_of, env) :]


def _run_once(command: Sequence[str], wanted: list[str], task: Task, row_of: RowOf, env: dict | None) -> int:
    """One process; how many of the items have a row now."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    name, said, lines, done = None, {}, [], 0
    for line in process.stdout:
        one = _parsed(line)
        if one is None:
            lines.append(line.rstrip())
            print(line, end="", flush=True)
        elif "begin" in one:
            name, said, lines = one["begin"], {}, []
            task.row(name, "begun", time=time.time())
        elif "end" in one:
            task.row(name, **row_of(name, said, lines))
            name, said, done = None, {}, done + 1
        else:
            said |= one
    process.wait()
    if name is None and (done or not process.returncode):
        return done if done else len(wanted)
    ended = f"the program ended with code {process.returncode}" + ("" if name else " before it began")
    row = row_of(name or wanted[0], said, lines) if said or lines else {}
    row = row if row.get("status") == "failed" else {"status": "failed", "why": said.get("failed", ended)}
    task.row(name or wanted[0], **row)
    return done + 1


def _parsed(line: str) -> dict | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
