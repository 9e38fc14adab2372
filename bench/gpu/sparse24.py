"""Matmuls with 2:4 weights by each kernel that computes them, and dense ones beside them.

w8a8 2:4 from registers, from rows   sparse24_linear from int8 codes, to codes or to floats; its weights come from
fp16 2:4 from registers, from rows   registers, or row by row from shared memory; in fp16, to fp16
fp16, w8a8                           dense

A row of the kernel that the plan chooses says so: planned.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from bench.gpu import launchers, linear
from bench.gpu.made import Made, about, assert_close, assert_equal, sample
from bench.gpu.shapes import Linear
from bench.gpu.timing import copies
from pyvit_accel import reference
from pyvit_accel.formats import sparse24

KINDS = {"w8a8 2:4": torch.int8, "fp16 2:4": torch.float16}
BASELINES = ("fp16", "w8a8 owner")


def names(capability: int, device: str) -> list[str]:
    """Implementations worth timing on a GPU of this capability: its own kernels, those of sm_80 where it has none."""
    if device != "cuda":
        return [*(f"{kind} owner" for kind in KINDS), *BASELINES]
    found = launchers.kernels("sparse24_linear", capability)
    own = [name for name in found if name.startswith(f"sm{capability}_")] or found
    ours = [f"{kind} {source(name)} {name}" for kind, dtype in KINDS.items() for name in own
            if launchers.TYPES[name.split("_")[1]] == dtype]  # fmt: skip
    return [*ours, *BASELINES]


def source(config: str) -> str:
    return "from rows" if "_rows_" in config else "from registers"


def make(job: Linear, name: str, device: str) -> Made:
    if name in BASELINES:
        return linear.make(job, name, device)
    implementation, _, config = name.rpartition(" ")
    kind = next(kind for kind in KINDS if name.startswith(kind))
    sets, bytes = buffers(job, kind, device)
    rows = [sparse24.rows_of(args[1]) if "_rows_" in config else None for args in sets]

    def call(args: tuple, rows: Tensor | None) -> Tensor:
        if config == "owner":
            return torch.ops.pyvit_accel.sparse24_linear(*args)
        return launchers.by_config(config, *args, rows=rows)

    def check() -> None:
        chosen = sample(job.M)
        args = [t.cpu() if isinstance(t, Tensor) else t for t in sets[0]]
        truth = reference.sparse24_linear(args[0][chosen], *args[1:])
        result = call(sets[0], rows[0])[chosen.to(device)]
        if KINDS[kind] == torch.int8:
            assert_equal(result, truth)
        else:
            assert_close(result, truth, 2e-3)

    calls = [lambda args=args, own=own: call(args, own) for args, own in zip(sets, rows, strict=True)]
    known = about(job, implementation, config, kind.replace("w8a8", "int8"), 2 * job.M * job.N * job.K, bytes)
    if device == "cuda" and config == planned(sets[0]):
        known["planned"] = f"{kind} planned"
    return Made(calls, check, known)


@lru_cache(maxsize=1)  # kernels of a job come one after the other
def buffers(job: Linear, kind: str, device: str) -> tuple[list[tuple], int]:
    """Arguments of the reference, several sets of them, and the bytes that a call moves."""
    dtype, (M, K, N) = KINDS[kind], (job.M, job.K, job.N)
    integer = dtype == torch.int8
    to_codes = job.to_codes and integer
    w_bytes = sum(torch.Size(shape).numel() * size for shape, size in zip(
        sparse24.packed_shapes(N, K, dtype), (dtype.itemsize, 4), strict=True
    ))  # fmt: skip
    bytes = M * K * dtype.itemsize + w_bytes + M * N * (1 if to_codes else 4 if integer else 2)
    x_scale, out_scale = (torch.tensor([scale], device=device) for scale in (linear.X_SCALE, linear.OUT_SCALE))
    sets = []
    for _ in range(copies(bytes, device)):
        x, w = (linear.random_codes(8, n, K, device=device) for n in (M, N))
        w = w * linear.kept(w)
        x, w = (x, w) if integer else (x / 64, w / (64 * K**0.5))
        w_scale = (torch.rand(N, device=device) + 0.5) / (128 * K**0.5)
        sets.append((
            x.to(dtype), *sparse24.pack(w.to(dtype)), torch.randn(N, device=device), N, x_scale if integer else None,
            w_scale if integer else None, None, 0, job.activation, None, None, out_scale if to_codes else None, 0, 8,
        ))  # fmt: skip
    return sets, bytes


def planned(args: tuple, capability: int | None = None, sm_count: int | None = None) -> str:
    """The kernel that the plan chooses for these arguments, on this GPU or on one of those that are named."""
    launcher = launchers.launcher("sparse24_linear")
    if capability is None:
        capability, sm_count = launchers.capability(), torch.cuda.get_device_properties(0).multi_processor_count
    y = launcher.empty_result(args[0], args[4], args[12])
    problem = launcher.problem(y, *launcher.arguments(*args))
    return launcher.OP.plan(problem, capability, sm_count).kernel.decode().removeprefix("sparse24_linear_")
