"""The part `device`: what the numbers were measured on, and the ceilings that floors are computed from."""

from __future__ import annotations

import platform
import shutil
import subprocess

import torch
import torch.nn.functional as F

from bench.gpu import build
from bench.gpu.task import Task
from bench.gpu.timing import clocks, measure, settle
from pyvit_accel import backends, cuda, ops  # noqa: F401 - owners are asked of registered ops

SIZE = 8192  # of the square matmuls
COPY_BYTES = 2**31  # read, and as many written


def about(device: str) -> dict:
    """Card, driver, versions."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    found |= {"cuda_library": cuda.status(), "owners": {op: on_cuda for op, _, on_cuda in backends.owners()}}
    found["nvcc"] = _printed(build.nvcc() or "nvcc", "--version").partition("release ")[2].partition(",")[0]
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": card.name, "capability": f"{card.major}.{card.minor}", "sms": card.multi_processor_count,
            "memory_gib": round(card.total_memory / 2**30, 1), "l2_mib": round(card.L2_cache_size / 2**20, 1),
            "driver": _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").strip(),
        }  # fmt: skip
    return found


def _printed(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout


def copy(device: str, bytes: int) -> dict:
    """GB/s, reads and writes counted; the best of a few sizes, all beyond the cache."""
    best = {}
    for part in (1, 2, 4):
        n = bytes // part
        source = torch.randint(256, (n // 4,), dtype=torch.int32, device=device)
        target = torch.empty_like(source)
        found = measure([lambda s=source, t=target: t.copy_(s)], device, rounds=10)
        rate = 2 * n / found["seconds"] / 1e9
        if rate > best.get("value", 0):
            best = {"value": rate, "unit": "GB/s", "ms": 1e3 * found["seconds"], "clock_mhz": found["clock_mhz"]}
    return best


def matmul(device: str, kind: str, n: int) -> dict:
    """TOP/s of a square product of random data, by the library that is there."""
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    if kind in ("bf16", "fp16"):
        dtype = torch.bfloat16 if kind == "bf16" else torch.float16
        a, b = a.to(dtype), b.to(dtype)
        call = lambda: F.linear(a, b)  # noqa: E731
    elif kind == "int8":
        a, b = ((16 * t).clamp(-127, 127).to(torch.int8) for t in (a, b))
        call = lambda: torch._int_mm(a, b.T)  # noqa: E731
    else:
        a, b, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=device)
        call = lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16)  # noqa: E731
    found = measure([call], device, rounds=15)
    rate = 2 * n**3 / found["seconds"] / 1e12
    return {"value": rate, "unit": "TOP/s", "ms": 1e3 * found["seconds"], "clock_mhz": found["clock_mhz"]}


def main() -> None:
    task = Task.current()
    small = task.device == "cpu"
    n, bytes = (256, 2**20) if small else (SIZE, COPY_BYTES)
    work = {"about": lambda: about(task.device), "copy": lambda: copy(task.device, bytes)}
    for kind in ("bf16", "fp16", "int8", "fp8"):
        work[f"matmul {kind}"] = lambda kind=kind: matmul(task.device, kind, n)
    work["clocks"] = lambda: clocks() if task.device == "cuda" else {}
    with torch.inference_mode():
        if task.device == "cuda":
            settle()
        task.run(work)


if __name__ == "__main__":
    main()
