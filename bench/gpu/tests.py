"""The part `tests`: tests/test_triton_*.py, whose launchers run on a GPU where there is one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.gpu.task import Task

CODES = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)


def main() -> int:
    task = Task.current()
    folder = Path(task.root) / "tests"
    files = [str(path) for path in sorted(folder.glob("test_triton_*.py")) if "emulated" not in path.name]
    files = [path for path in files if path.endswith("_rows.py")] if task.quick else files
    options = ["-q", "-p", "bench.gpu.plugin", "-p", "no:cacheprovider", "-p", "no:benchmark", f"--rootdir={task.root}"]
    code = pytest.main([*files, *options, "--tb=short", "--continue-on-collection-errors"])
    return 0 if code in CODES else int(code)  # failures are in the rows


if __name__ == "__main__":
    sys.exit(main())
