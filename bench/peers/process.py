"""The parent's end of a worker: start it, ask it, and know why it failed."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from peers.job import Job

BENCH = Path(__file__).parents[1]


class Failed(Exception):
    """Why an engine gave no answer."""


class Worker:
    """A process that does a job. Its stderr goes to `log`; an answer that takes longer than timeout seconds ends it."""

    def __init__(self, job: Job, timeout: float, log: Path) -> None:
        self.timeout = timeout
        threads, path = str(job.threads), os.environ.get("PYTHONPATH")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(BENCH), *([path] if path else [])]),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # more would be processes of their own, there all the time
            "TORCHINDUCTOR_CACHE_DIR": str(log.parent / "inductor"),
        }
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "peers.worker", json.dumps(asdict(job))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=environment, cwd=job.folder, start_new_session=True,
            )  # fmt: skip

    def ask(self, **command: str) -> dict:
        with suppress(BrokenPipeError):  # the answer, or its absence, says why
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict:
        """The next answer of the process; raises Failed."""
        if not select.select([self.process.stdout], [], [], self.timeout)[0]:
            self.close()
            raise Failed(f"took longer than {self.timeout:g} s")
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise Failed(f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def close(self) -> None:
        """End the process and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
