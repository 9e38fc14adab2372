"""Microbenchmarks on a GPU: collected only as a part of the suite, `python -m bench.gpu`."""

from __future__ import annotations

import os

import pytest
import torch

if "PYVIT_ACCEL_GPU_TASK" not in os.environ:  # and `bench` is on no path then
    collect_ignore_glob = ["bench_*.py"]
else:
    from bench.gpu.task import Task
    from bench.gpu.timing import CLOCK, Rounds, clock_mhz, graph_of, settle

    TASK = Task.current()
    ROUNDS = 20

    @pytest.fixture(scope="session", autouse=True)
    def settled() -> None:
        if TASK.device == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
            settle()

    @pytest.fixture
    def timed(benchmark, request):
        """timed(job): check its result, then time it; all that a row needs goes into the row and beside the times."""

        def run(made) -> None:
            request.node.row = made.about
            made.check()
            rounds = Rounds(made.calls, TASK.device)
            rounds.warm_up(0.2 if TASK.device == "cuda" else 0.0)
            benchmark.pedantic(rounds, rounds=ROUNDS if TASK.device == "cuda" else 2)
            seconds = benchmark.stats.stats.median
            row = made.about | {"ms": 1e3 * seconds, "clock_mhz": clock_mhz(rounds), "copies": len(made.calls)}
            request.node.row = row | graph_of(rounds)
            benchmark.extra_info |= request.node.row

        return run

    @pytest.fixture(autouse=True)
    def clocked(request):
        """Every benchmark is timed by the device's clock."""
        request.node.add_marker(pytest.mark.benchmark(timer=CLOCK))
