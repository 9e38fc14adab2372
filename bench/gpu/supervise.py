"""Runs the processes of a part: restarts what crashed without what made it crash, ends what hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from bench.gpu import rows
from bench.gpu.task import BROKEN, VARIABLE, Task

TICK = 0.1  # seconds between looks
GRACE = 5.0  # seconds a process has after its deadline to end its item
MAX_CRASHES = 8
CUT = "cut off"
LOG_BYTES = 2**19  # that are kept of what a process prints


@dataclass(frozen=True)
class Part:
    """One part of the suite.

    what       for people
    command    arguments of the interpreter: ("-m", "bench.gpu.linear") or ("-c", "...")
    share      of the time left, beside the shares of the parts that follow
    item_s     seconds an item may take before it counts as hanging
    shards     processes at once
    """

    name: str
    what: str
    command: tuple[str, ...]
    share: float
    item_s: float = 60.0
    shards: int = 1


def run_part(part: Part, task: Task, log: Path) -> None:
    """All shards of a part, until task.deadline; what they print is added to the log."""
    shards = [replace(task, part=part.name, shard=i, shards=part.shards) for i in range(part.shards)]
    logs = [Path(task.work) / f"{part.name}.{shard.shard}.log" for shard in shards]
    for own in logs:
        own.unlink(missing_ok=True)
    with ThreadPoolExecutor(part.shards) as pool:
        list(pool.map(lambda shard, own: _supervise(part, shard, own), shards, logs))
    with open(log, "ab") as out:
        for own in logs:
            out.write(own.read_bytes()[-LOG_BYTES:])


def environment(task: Task) -> dict[str, str]:
    """The built package comes first, then the source tree, where this suite lies."""
    paths = [task.lib, task.root, os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1"}


def _supervise(part: Part, task: Task, log: Path) -> None:
    own = rows.Tail(Path(task.file), task.part, task.shard)
    why: str | None = None
    for _ in range(MAX_CRASHES):
        task = replace(task, done=[row["item"] for row in rows.final(own.all())])
        why = _run_once(part, task, own, log)
        begun, waiting = rows.unfinished(own.all())
        if begun is not None:
            cut = why is not None and why.startswith(CUT)
            task.row(begun, "not run" if cut else "failed", why=why or "its process ended without a result")
        elif why and not own.all():
            task.row(part.name, "failed", why=why)  # before it could say what its items are
        if not waiting or why is None or time.time() > task.deadline:
            break
    late = time.time() > task.deadline
    for name in rows.unfinished(own.all())[1]:
        task.row(name, "not run", why="no time was left" if late else f"the part was given up: {why}")


def _run_once(part: Part, task: Task, own: rows.Tail, log: Path) -> str | None:
    """One process of the part; why it did not end well, or None."""
    env = environment(task) | {VARIABLE: task.to_json()}
    with open(log, "ab") as out:
        out.write(f"\n==== {part.name} {task.shard}: {' '.join(part.command)[:200]}\n".encode())
        out.flush()
        start = out.tell()
        process = subprocess.Popen(
            [sys.executable, *part.command], stdout=out, stderr=subprocess.STDOUT, env=env, cwd=task.work,
            start_new_session=True,
        )  # fmt: skip
        why = _watch(process, part, task, own)
    if why is None and process.returncode not in (0, BROKEN):
        why = _died(process.returncode, log, start)
    elif process.returncode == BROKEN:
        why = "its process lost the GPU"
    return why


def _watch(process: subprocess.Popen, part: Part, task: Task, own: rows.Tail) -> str | None:
    """Wait for the end; kill the whole process group when an item hangs or the time is over."""
    while process.poll() is None:
        time.sleep(TICK)
        now = time.time()
        last = own.all()[-1:]
        since = now - last[0]["time"] if last and last[0]["status"] == "begun" else 0.0
        if since > part.item_s:
            return _kill(process, f"hung: more than {part.item_s:.0f} s")
        if now > task.deadline + GRACE:
            return _kill(process, f"{CUT}: the part's time was over")
    return None


def _kill(process: subprocess.Popen, why: str) -> str:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return why


def _died(code: int, log: Path, start: int) -> str:
    with open(log, "rb") as text:
        text.seek(start)
        lines = [line.strip() for line in text.read().decode(errors="replace").splitlines() if line.strip()]
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{how}: {lines[-1][:300]}" if lines else how


def divide(shares: Sequence[float], seconds: float) -> float:
    """What the first of the parts that are left may take: what others do not need is theirs."""
    return seconds * shares[0] / sum(shares)
