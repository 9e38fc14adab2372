"""Every kernel of the CUDA library that multiplies: which tile is the fastest for which layer."""

import pytest

from bench.gpu import launchers, linear
from bench.gpu.shapes import chosen
from bench.gpu.task import Task

TASK = Task.current()
JOBS = chosen("linear", TASK.device, TASK.quick)[:10]
CASES = [
    (job, f"w{bits}a8 {config}")
    for place, job in enumerate(JOBS) for bits in (8, 4) for config in launchers.configs(bits)
    if place < 1 or not config.startswith("sm80_")
]  # fmt: skip


@pytest.mark.parametrize("job, implementation", CASES, ids=[f"{job}, {name}" for job, name in CASES])
def bench_configs(timed, job, implementation):
    timed(linear.make(job, implementation, TASK.device))
