"""Low-bit matmuls beside cuBLAS, torch._int_mm, torch._scaled_mm and cuSPARSELt; packed weights beside float16."""

import pytest

from bench.gpu import linear, weight_only
from bench.gpu.shapes import chosen
from bench.gpu.task import Task

TASK = Task.current()
JOBS, WEIGHT_ONLY = (chosen(kind, TASK.device, TASK.quick) for kind in ("linear", "weight_only"))
CASES = [(job, name) for place, job in enumerate(JOBS) for name in linear.names(job, place, TASK.device)]
SMALL = [(job, name) for job in WEIGHT_ONLY for name in weight_only.names(job, TASK.device)]


@pytest.mark.parametrize("job, implementation", CASES, ids=[f"{job}, {name}" for job, name in CASES])
def bench_linear(timed, job, implementation):
    timed(linear.make(job, implementation, TASK.device))


@pytest.mark.parametrize("job, implementation", SMALL, ids=[f"{job}, {name}" for job, name in SMALL])
def bench_weight_only(timed, job, implementation):
    timed(weight_only.make(job, implementation, TASK.device))
