"""The parts of the suite, the most important ones first."""

from __future__ import annotations

import os

from bench.gpu.supervise import Part

CPUS = os.cpu_count() or 1
OPS_SHARDS, TEST_SHARDS = max(1, min(8, CPUS // 2)), max(1, min(14, CPUS - 2))  # compiling takes the most time


def _benchmark(name: str) -> tuple[str, ...]:
    return ("-m", "bench.gpu.benchmarks", name)


PARTS = (
    Part("build", "the C++ extension, the CUDA library and the probes", ("-m", "bench.gpu.build"), 45, 240, 3),
    Part("device", "the card, its clocks, and the ceilings of copies and matmuls", ("-m", "bench.gpu.device"), 4, 20),
    Part("ops", "every op and backend against the reference", ("-m", "bench.gpu.ops"), 12, 60, OPS_SHARDS),
    Part("linear", "low-bit matmuls beside cuBLAS", _benchmark("linear"), 18, 60),
    Part("probes", "rates of the pipes", ("-m", "bench.gpu.probes"), 6, 15),
    Part("attention", "attention beside SDPA", _benchmark("attention"), 8, 60),
    Part("rows", "norms and gathers beside torch.compile", _benchmark("rows"), 6, 60),
    Part("configs", "the kernels of the CUDA library, one by one", _benchmark("configs"), 8, 30),
    Part("sparse24", "2:4 weights from registers and from shared memory", _benchmark("sparse24"), 14, 30),
    Part("models", "ViT-B, L and H beside torch.compile in bf16", ("-m", "bench.gpu.models"), 30, 90),
    Part("tests", "the launchers' tests, on this GPU", ("-m", "bench.gpu.tests"), 18, 120, TEST_SHARDS),
    Part("sanitizer", "compute-sanitizer memcheck, racecheck and synccheck", ("-m", "bench.gpu.sanitizer"), 14, 120),
)


def choose(only: str | None) -> list[Part]:
    """The parts named, by a prefix each, in their order, and the build. ValueError for a prefix that none has."""
    if only is None:
        return list(PARTS)
    prefixes = [p.strip() for p in only.split(",") if p.strip()]
    unknown = [p for p in prefixes if not any(part.name.startswith(p) for part in PARTS)]
    if unknown or not prefixes:
        names = ", ".join(part.name for part in PARTS)
        raise ValueError(f"--only {only}: {', '.join(unknown) or 'nothing'} is no part; the parts are {names}")
    return [part for part in PARTS if part.name == "build" or any(part.name.startswith(p) for p in prefixes)]
