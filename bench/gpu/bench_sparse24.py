"""Every kernel of sparse24_linear: weights from registers or from shared memory, which tile, and does 2:4 pay."""

import pytest

from bench.gpu import launchers, sparse24
from bench.gpu.shapes import chosen
from bench.gpu.task import Task

TASK = Task.current()
JOBS = chosen("sparse24", TASK.device, TASK.quick)
CASES = [(job, name) for job in JOBS for name in sparse24.names(launchers.capability(), TASK.device)]


@pytest.mark.parametrize("job, implementation", CASES, ids=[f"{job}, {name}" for job, name in CASES])
def bench_sparse24(timed, job, implementation):
    timed(sparse24.make(job, implementation, TASK.device))
