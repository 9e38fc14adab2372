"""norm_quant, of all tokens and of those an index names, beside torch.compile."""

import pytest

from bench.gpu import norms
from bench.gpu.shapes import chosen
from bench.gpu.task import Task

TASK = Task.current()
JOBS = chosen("rows", TASK.device, TASK.quick)
CASES = [(job, name) for job in JOBS for name in norms.names(job, TASK.device)]


@pytest.mark.parametrize("job, implementation", CASES, ids=[f"{job}, {name}" for job, name in CASES])
def bench_rows(timed, job, implementation):
    timed(norms.make(job, implementation, TASK.device))
