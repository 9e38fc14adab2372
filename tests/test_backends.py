"""What this install has, and what an install without extension and without Triton still does."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap

import pytest
from _problems import one_call_of_each

from pyvit_accel import backends

needs_cpu_kernels = pytest.mark.skipif(not backends.HAS_CPU_KERNELS, reason="the CPU kernels were not built")


def run_python(code: str) -> str:
    """What the code prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("error", [None, "CUDA driver version is insufficient for CUDA runtime version"])
def test_show_backends_names_the_owner_of_every_op(monkeypatch, error):
    """Of ops with CUDA C++ kernels their other owner, where the driver is too old for them."""
    monkeypatch.setattr(backends.cuda, "device_error", lambda: error)
    lines = backends.show_backends().splitlines()
    assert lines[0].split() == ["op", "CPU", "CUDA"]
    assert [line.split()[0] for line in lines[1:]] == list(backends.OPS)
    cpp = rf"C\+\+ \({backends.isa()}\)" if backends.HAS_CPU_KERNELS else "reference"
    for op, line in zip(backends.OPS, lines[1:], strict=True):
        cpu, gpu = ("dense matmul",) * 2 if op == "sparse24_linear" else (cpp, "(Triton|reference)")
        if backends.HAS_CUDA_LIBRARY and op in backends.CUDA_LIBRARY:
            own = re.escape(backends.CUDA_LIBRARY[op])
            gpu = f"{own}, else {gpu}" if error is None else f"{gpu}; no driver for {own}"
        assert re.fullmatch(rf"{op} +{cpu} +{gpu}", line)


@needs_cpu_kernels
def test_use_isa_changes_it_and_restores_it():
    before = backends.isa()
    with backends.use_isa("portable"):
        assert backends.isa() == "portable"
        assert "C++ (portable)" in backends.show_backends()
    assert backends.isa() == before
    with pytest.raises(KeyError), backends.use_isa("portable"):
        raise KeyError
    assert backends.isa() == before


@needs_cpu_kernels
def test_use_isa_error():
    message = "select_isa: this CPU cannot run 'sse9'; use 'best', 'avx512_vnni', 'avx2' or 'portable'"
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"), backends.use_isa("sse9"):
        pass


def test_use_isa_error_without_kernels(monkeypatch):
    monkeypatch.setattr(backends, "HAS_CPU_KERNELS", False)
    message = "use_isa('avx2'): the CPU kernels were not built; reinstall with a C++ compiler present"
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"), backends.use_isa("avx2"):
        pass
    assert backends.isa() == "none"


def test_use_reference_runs_the_reference(monkeypatch):
    """Every op goes to the function of its name, with its arguments, and only inside."""
    seen = []

    def spy(op, truth):
        return lambda *args: seen.append(op) or truth(*args)

    for op in backends.OPS:
        monkeypatch.setattr(backends.reference, op, spy(op, getattr(backends.reference, op)))
    for name, call in one_call_of_each().items():
        seen.clear()
        call()
        assert seen == []
        with backends.use_reference():
            call()
        assert seen == [name.split()[0]]


def test_importing_needs_neither_extension_nor_triton():
    """The ops then run on the reference, compile, and a backward through them raises."""
    printed = run_python("""
        import sys
        sys.modules["pyvit_accel._C"] = sys.modules["triton"] = None
        import torch
        import pyvit_accel
        from pyvit_accel import backends, ops
        from pyvit_accel.formats import packed

        assert not backends.HAS_CPU_KERNELS and not backends.HAS_TRITON and backends.isa() == "none"
        owners = {op: row for op, *row in backends.owners()}
        assert "reference" in owners.pop("lowbit_linear")[1]
        assert all("dense matmul" in owner for owner in owners.pop("sparse24_linear"))
        assert all(row == ["reference", "reference"] for row in owners.values())

        torch.manual_seed(0)
        w = torch.randint(-127, 128, (20, 37), dtype=torch.int8)
        args = packed.pack(w), torch.rand(20), torch.randn(20)
        x = torch.randn(5, 37)
        y = ops.weight_only_linear(x, *args)
        torch.testing.assert_close(y, x @ (w * args[1][:, None]).T + args[2], rtol=1e-4, atol=1e-3)

        def layer(x):
            return ops.lowbit_linear(*ops.quantize(x), *args)

        assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
        q = torch.ops.pyvit_accel.quantize.default
        torch.library.opcheck(q, (x, torch.rand(1), 0, 8))

        x.requires_grad_()
        for result in (ops.weight_only_linear(x, *args), ops.quantize(x)[1], ops.quantize(x)[0]):
            try:
                result.sum().backward()
            except RuntimeError as error:
                print(error)
    """)
    assert printed.splitlines() == [
        "derivative for pyvit_accel::weight_only_linear is not implemented: integer codes have no gradient",
        "derivative for pyvit_accel::quantize_dynamic is not implemented: integer codes have no gradient",
        "element 0 of tensors does not require grad and does not have a grad_fn",
    ]


def test_importing_does_not_touch_the_gpu():
    """Nor does running on the CPU: CUDA stays uninitialised, whatever it would have answered."""
    run_python("""
        import importlib, pkgutil
        import torch

        def touched(*args, **kwargs):
            raise AssertionError("CUDA was initialised")

        torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = touched
        import pyvit_accel
        from pyvit_accel import backends, ops
        for layer in ("formats", "reference", "modules", "adapters", "models"):
            package = importlib.import_module(f"pyvit_accel.{layer}")
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"pyvit_accel.{layer}.{module.name}")
        backends.show_backends()
        ops.quantize(torch.zeros(2, 8))
        assert not torch.cuda.is_initialized()
    """)
