"""What this install has: the only file that probes for anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyvit_accel import cuda, reference

HAS_CPU_KERNELS = find_spec("pyvit_accel._C") is not None
HAS_TRITON = find_spec("triton") is not None and find_spec("pyvit_accel.kernels") is not None
HAS_CUDA_LIBRARY = cuda.library() is not None
CUDA_LIBRARY = {  # what of an op the CUDA library owns
    "lowbit_linear": "CUDA C++ on sm_90 (4, 8 bits, no index)",
    "sparse24_linear": "CUDA C++ from sm_80 on",
}

OPS = (
    "quantize",
    "quantize_dynamic",
    "norm_quant",
    "norm_quant_dynamic",
    "lowbit_linear",
    "lowbit_linear_scatter",
    "weight_only_linear",
    "sparse24_linear",
    "codebook_linear",
    "quant_attention",
    "quant_patch_embed",
    "quant_block",
    "quant_mlp",
    "quant_project",
    "select_tokens",
    "split_tokens",
    "group_tokens",
    "match_tokens",
    "merge_pairs",
    "mean_heads",
    "mix_tokens",
    "propagate",
    "local_assign",
    "class_row",
)


def owners() -> list[tuple[str, str, str]]:
    """(op, owner on CPU, owner on CUDA) for every op of this install: what runs here. Asks the driver."""
    has_driver = HAS_CUDA_LIBRARY and cuda.device_error() is None
    rows = []
    for op in OPS:
        has_cpu, has_cuda = (
            torch._C._dispatch_has_kernel_for_dispatch_key(f"pyvit_accel::{op}", key) for key in ("CPU", "CUDA")
        )
        plain = "dense matmul" if op == "sparse24_linear" else "reference"  # of the unpacked weight
        on_cuda = "Triton" if has_cuda and HAS_TRITON and op != "sparse24_linear" else plain
        if HAS_CUDA_LIBRARY and op in CUDA_LIBRARY:
            own = CUDA_LIBRARY[op]
            on_cuda = f"{own}, else {on_cuda}" if has_driver else f"{on_cuda}; no driver for {own}"
        rows.append((op, f"C++ ({isa()})" if has_cpu else plain, on_cuda))
    return rows


def show_backends() -> str:
    """A table of who owns which op here. Asks the driver."""
    rows = [("op", "CPU", "CUDA"), *owners()]
    widths = [max(len(r[i]) for r in rows) for i in range(3)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def isa() -> str:
    """The instruction set of the CPU kernels: avx512_vnni, avx2, portable, or none when they were not built."""
    if not HAS_CPU_KERNELS:
        return "none"
    from pyvit_accel import _C

    return _C.isa()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the CPU kernels of another instruction set this CPU has, in the whole process: for tests and measurements.

    Raises ValueError when this CPU, or this install, does not have it.
    """
    if not HAS_CPU_KERNELS:
        raise ValueError(f"use_isa({name!r}): the CPU kernels were not built; reinstall with a C++ compiler present")
    from pyvit_accel import _C

    before = _C.isa()
    _C.select_isa(name)
    try:
        yield
    finally:
        _C.select_isa(before)


class use_reference(TorchDispatchMode):  # lower case: used as `with use_reference():`
    """Rerun a model on the reference implementations, when a number looks odd."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func.name().partition("::")
        return (getattr(reference, name) if namespace == "pyvit_accel" else func)(*args, **(kwargs or {}))
