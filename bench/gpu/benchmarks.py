"""A part of microbenchmarks: pytest on bench_<name>.py of this folder, timed by pytest-benchmark."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from bench.gpu.task import Task


def main() -> int:
    task, here = Task.current(), Path(__file__).parent
    target = Path(task.work) / f"benchmark_{sys.argv[1]}_{os.getpid()}.json"
    return pytest.main([
        str(here / f"bench_{sys.argv[1]}.py"), "-q", "-p", "bench.gpu.plugin", "-p", "no:cacheprovider",
        "-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", f"--rootdir={task.root}",
        f"--benchmark-json={target}", "--benchmark-columns=median,min,rounds", "--benchmark-sort=fullname",
    ])  # fmt: skip


if __name__ == "__main__":
    code = main()
    sys.exit(0 if code == pytest.ExitCode.TESTS_FAILED else code)  # failures are in the rows
