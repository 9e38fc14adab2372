"""quant_attention beside each backend of scaled_dot_product_attention."""

import pytest

from bench.gpu import attention
from bench.gpu.shapes import chosen
from bench.gpu.task import Task

TASK = Task.current()
JOBS = chosen("attention", TASK.device, TASK.quick)
CASES = [(job, name) for job in JOBS for name in attention.names(job, TASK.device)]


@pytest.mark.parametrize("job, implementation", CASES, ids=[f"{job}, {name}" for job, name in CASES])
def bench_attention(timed, job, implementation):
    timed(attention.make(job, implementation, TASK.device))
