"""A process with one engine on one model: `python -m peers.worker JOB`, JSON both ways, one line a message.

Every answer is an object; {"error": reason} when something went wrong. A "prepare" job answers once. A "run" job
answers when it is ready, {"ready_s", "imports_mib", "peak_mib"}, and then to each line of stdin:

    {"do": "turn"}                  one untimed call, then timed ones: {"ms": [...]}
    {"do": "outputs", "to": path}   the logits of all images, written as .npy: {}
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from importlib import import_module

import numpy as np

from peers.engines import ENGINES, Run
from peers.job import Job, peak_mib

TURN_S, TURN_CALLS = 0.5, 3  # of timed calls, at least
SLOW_S = 2.0  # a call that takes longer is timed once a turn: it warms its caches itself


def turn(run: Run, images: np.ndarray) -> list[float]:
    """Milliseconds of each timed call."""
    first = seconds(run, images)
    calls = 1 if first > SLOW_S else max(TURN_CALLS, math.ceil(TURN_S / first))
    return [1e3 * seconds(run, images) for _ in range(calls)]


def seconds(run: Run, images: np.ndarray) -> float:
    start = time.perf_counter()
    run(images)
    return time.perf_counter() - start


def outputs(run: Run, images: np.ndarray, batch: int) -> np.ndarray:
    """The logits of all images; the last batch is filled up with the first images."""
    found = []
    for start in range(0, len(images), batch):
        part = take(images[start : start + batch], batch)
        found.append(np.array(run(part)))  # an engine may write the next result over this one
    return np.concatenate(found)[: len(images)]


def take(images: np.ndarray, batch: int) -> np.ndarray:
    """A batch in memory, of images repeated as often as it needs."""
    return np.ascontiguousarray(images[np.arange(batch) % len(images)])


def serve(job: Job, reply) -> None:
    engine = ENGINES[job.engine]
    if job.step == "prepare":
        engine.prepare(job)
        reply({})
        return
    for module in engine.imports:
        import_module(module)
    imports, start = peak_mib(), time.perf_counter()
    run, every = engine.load(job), np.load(job.images, mmap_mode="r")
    images = take(every, job.batch)
    run(images)
    reply({"ready_s": time.perf_counter() - start, "imports_mib": imports, "peak_mib": peak_mib()})
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "turn":
            reply({"ms": turn(run, images)})
        else:
            np.save(command["to"], outputs(run, every, job.batch))
            reply({})


def reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what engines print must not come between the answers
    try:
        serve(Job(**json.loads(sys.argv[1])), lambda answer: print(json.dumps(answer), file=answers))
    except Exception as error:  # whatever a peer raises is a row of the table
        print(json.dumps({"error": reason(error)}), file=answers)
        raise


if __name__ == "__main__":
    main()
