"""Runs Triton launchers without a GPU, and records what they launch, to be compiled for any.

Results come from the GPU where there is one, otherwise from a process of its own under Triton's interpreter, which has
to be chosen before triton is imported.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import import_module

import pytest
import torch

from pyvit_accel import reference

triton = pytest.importorskip("triton", reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = {
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
}


@cache
def interpreter() -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool.submit(torch.set_num_threads, 1).result()  # the process starts here and keeps the variable
    return pool


def run(check, *args):
    """check(*args) where the kernels can run."""
    return check(*args) if DEVICE == "cuda" else interpreter().submit(check, *args).result()


def kernel(op, *args):
    """The launcher's result, on the CPU."""
    from pyvit_accel import kernels

    moved = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args]
    result = getattr(kernels, op)(*moved)
    return result.cpu() if isinstance(result, torch.Tensor) else tuple(r.cpu() for r in result)


def assert_equal(op, *args):
    """The launcher's results are the reference's, bit for bit and in dtype."""
    results, truths = kernel(op, *args), getattr(reference, op)(*args)
    if isinstance(truths, torch.Tensor):
        results, truths = [results], [truths]
    for result, truth in zip(results, truths, strict=True):
        assert result.dtype == truth.dtype
        assert torch.equal(result, truth), f"{(result != truth).sum()} of {truth.numel()} differ"


def uniform(*shape):
    return torch.rand(*shape) * 0.02 + 1e-3


def random_codes(bits, *shape):
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)


class Recorder:
    """Stands where a kernel stands and keeps what its launcher would have launched."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return self.record

    def record(self, *args, **kwargs):
        """The source specialised as Triton does: None and 1 are constants, multiples of 16 are known to be."""
        from triton.compiler import ASTSource

        params = self.kernel.params
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, attrs = {}, {}, {}
        for i, p in enumerate(params):
            value, fixed = values.pop(p.name), p.do_not_specialize
            if p.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not fixed):
                signature[p.name], constants[p.name] = "constexpr", value
                continue
            tensor = isinstance(value, torch.Tensor)
            signature[p.name] = TYPES[value.dtype] if tensor else "fp32" if isinstance(value, float) else "i32"
            if not isinstance(value, float) and not fixed and (value.data_ptr() if tensor else value) % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
        self.launches.append((ASTSource(self.kernel, signature, constants, attrs), values))


def launches(module, call, *names):
    """What `call` would launch of the kernels named. The compiler is wanted, so this runs outside the interpreter."""
    module = import_module(f"pyvit_accel.kernels.{module}")
    recorders = [Recorder(getattr(module, name)) for name in names]
    with pytest.MonkeyPatch.context() as patch:
        for name, recorder in zip(names, recorders, strict=True):
            patch.setattr(module, name, recorder)
        call(module)
    return [launch for recorder in recorders for launch in recorder.launches]
