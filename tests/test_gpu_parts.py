"""Parts of the GPU suite, bench/gpu, without a GPU: what they build, which tests they run, which kernels they time."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from _problems import one_call_of_each
from test_gpu_suite import ROOT, goals, launchers, report, rows, task_in, timed

from bench.gpu import attention, build, linear, models, norms, shapes, sparse24
from bench.gpu import ops as ops_part
from pyvit_accel import reference
from pyvit_accel.formats.sparse24 import rows_of

# ---- building

FAKE_SETUP = """
import os, pathlib
assert "NVCC_APPEND_FLAGS" not in os.environ, "setup.py passes all that nvcc needs"
pathlib.Path("pyvit_accel/libpyvit_accel_cuda.so").write_text("built")
"""
FAKE_NVCC = """#!/bin/sh
for last; do :; done
echo "$0" > "$last"
"""


def test_builds_use_the_nvcc_of_cuda_home(tmp_path, monkeypatch):
    """As setup.py does; there is none on the PATH."""
    for folder in ("home/bin", "lib/pyvit_accel", "pyvit_accel", "csrc/cuda/probes"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "setup.py").write_text(FAKE_SETUP)
    (tmp_path / "csrc/cuda/probes/pipes.cu").touch()
    nvcc = tmp_path / "home/bin/nvcc"
    nvcc.write_text(FAKE_NVCC)
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    task = replace(task_in(tmp_path), root=str(tmp_path), lib=str(tmp_path / "lib"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert build.cuda(task)["status"] == build.probes(task)["status"] == "not run"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build.cuda(task)["files"] == ["libpyvit_accel_cuda.so, 5 bytes"]
    assert build.compile_probes(tmp_path, tmp_path / "work").read_text() == f"{nvcc}\n"


# ---- the launchers' tests


def test_all_tests_of_launchers_are_chosen(monkeypatch, tmp_path):
    """Whatever their arguments are called; but what runs in the emulator, which needs no GPU."""
    task = replace(task_in(tmp_path), root=str(ROOT), shard=1, shards=2)
    monkeypatch.setenv("PYVIT_ACCEL_GPU_TASK", task.to_json())
    part, plugin = (importlib.import_module(f"bench.gpu.{name}") for name in ("tests", "plugin"))
    ran = []
    monkeypatch.setattr(pytest, "main", lambda args: ran.extend(args) or 0)
    assert part.main() == 0
    files = {path for path in ran if path.endswith(".py")}
    assert files == {str(path) for path in (ROOT / "tests").glob("test_triton_*.py")} - {
        str(ROOT / "tests" / "test_triton_emulated.py")
    }
    names = [f"test_triton_a.py::test_{test}[{case}]" for test in "ab" for case in range(3)]
    items = [SimpleNamespace(nodeid=name, fixturenames=("architecture", "tmp_path")) for name in names]
    monkeypatch.setattr(plugin, "TASK", task)
    plugin.pytest_collection_modifyitems(None, items)
    assert [item.nodeid for item in items] == [names[3], names[4], names[5]]


# ---- 2:4: weights from registers or from shared memory


def need_kernels():
    if not launchers.kernels("sparse24_linear", 90):
        pytest.skip("the CUDA library was not built")


def test_every_kernel_of_hopper_is_timed_beside_dense_ones():
    need_kernels()
    of = {kind: [n for n in sparse24.names(90, "cuda") if n.startswith(kind)] for kind in sparse24.KINDS}
    for kind, dtype in (("w8a8 2:4", "s8"), ("fp16 2:4", "f16")):
        kernels = [n for n in launchers.kernels("sparse24_linear", 90) if n.startswith(f"sm90_{dtype}_")]
        assert any("_rows_" in n for n in kernels) and any("_rows_" not in n for n in kernels)
        assert of[kind] == [f"{kind} {'from rows' if '_rows_' in n else 'from registers'} {n}" for n in kernels]
    assert {"fp16", "w8a8 owner"} < set(sparse24.names(90, "cuda"))
    assert all("sm80_" in n for n in sparse24.names(89, "cuda") if "2:4" in n)


@pytest.fixture
def launched(monkeypatch):
    """The calls of sparse24_linear's launcher, which the reference stands in for, and the fault that it then has."""
    seen, fault = [], []

    def launch(x, values, *args, config, rows):
        seen.append((config, values, rows))
        return reference.sparse24_linear(x, values, *args[:13]) + (1 if fault else 0)

    monkeypatch.setattr(launchers.launcher("sparse24_linear"), "sparse24_linear", launch)
    return seen, fault


@pytest.mark.parametrize("name", ["w8a8 2:4 from rows sm90_s8_rows_128x128", "fp16 2:4 from registers sm90_f16_128x32",
                                  "fp16 2:4 from rows sm90_f16_rows_256x128"])  # fmt: skip
def test_kernels_get_rows_where_they_read_them(launched, name):
    seen, fault = launched
    made = sparse24.make(shapes.TINY["sparse24"][0], name, "cpu")
    made.check()
    made.calls[0]()
    config = name.rpartition(" ")[2]
    for used, values, given in seen:
        assert used == f"sparse24_linear_{config}"
        assert torch.equal(given, rows_of(values)) if "_rows_" in config else given is None
    assert len(seen) == 2 and seen[0][2] is seen[1][2], "rows are made before the clock runs"
    assert (made.about["backend"], made.about["implementation"]) == (config, name.rpartition(" ")[0])
    fault.append("off by one")
    with pytest.raises(AssertionError):
        made.check()


def test_the_kernel_that_the_plan_chooses_is_known():
    """By more tokens larger tiles, of the type of the weights."""
    need_kernels()
    for kind, dtype in (("w8a8 2:4", "s8"), ("fp16 2:4", "f16")):
        found = []
        for tokens in (8, 1024):
            sets, _ = sparse24.buffers(shapes.Linear(shapes.B, "proj", tokens=tokens), kind, "cpu")
            found.append(sparse24.planned(sets[0], 90, 132))
        few, many = found
        assert few == f"sm90_{dtype}_128x32" and many.startswith(f"sm90_{dtype}_") and many != few


def test_rows_or_registers_is_decided_by_shape(tmp_path):
    """By the fastest of each; and the choice of the plan is judged beside the fastest of all."""
    job, kind = "ViT-L/16 fc1 64 tokens", "fp16 2:4"
    found = [
        timed(job, f"{kind} from registers", 0.010, "sm90_f16_128x32", planned=f"{kind} planned", kind=kind),
        timed(job, f"{kind} from registers", 0.012, "sm90_f16_128x64", kind=kind),
        timed(job, f"{kind} from rows", 0.008, "sm90_f16_rows_128x128", kind=kind),
        timed(job, f"{kind} from rows", 0.020, "sm90_f16_rows_256x128", kind=kind),
        timed(job, "w8a8 2:4 from rows", 0.001, "sm90_s8_rows_128x128", kind="int8 2:4"),
    ]

    def judged(text):
        (goal,) = (g for g in goals.GOALS if g.what == f"{job}: {kind}, {text}")
        return goals.judge(goal, found, {})

    rows_first = judged("from rows / from registers")
    assert rows_first.verdict == "met" and rows_first.value == pytest.approx(10 / 8)
    assert "sm90_f16_rows_128x128" in rows_first.ours and "sm90_f16_128x32" in rows_first.beside
    planned = judged("planned / the fastest")
    assert planned.verdict == "missed" and planned.value == pytest.approx(8 / 10)
    assert "sm90_f16_128x32" in planned.ours and "sm90_f16_rows_128x128" in planned.beside
    for row in found:
        rows.append(tmp_path / "rows.jsonl", **row)
    report.write(tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "| fp16 2:4 from registers (sm90_f16_128x32) (planned) |" in table and table.count(" (planned) |") == 1


def test_goals_name_what_is_measured():
    """Every job of a goal is timed, and so are the implementations that it compares."""
    pytest.importorskip("triton")
    need_kernels()
    names = {str(job): linear.names(job, place, "cuda") for place, job in enumerate(shapes.LINEARS)}
    for job in shapes.SPARSE24:
        planned = [f"{kind} planned" for kind in sparse24.KINDS]
        names.setdefault(str(job), []).extend([*sparse24.names(90, "cuda"), *planned])
    names |= {str(job): attention.names(job, "cuda") for job in shapes.ATTENTIONS}
    names |= {str(job): norms.names(job, "cuda") for job in shapes.ROWS}
    for model, batch, name in models.CASES:
        names.setdefault(f"{model} model x{batch}", []).append(name)
    for goal in goals.GOALS:
        assert goal.job in names, goal.job
        timed = {name for each in names[goal.job] for name in (each, each.rpartition(" ")[0])}
        ours = () if goal.ours == (goals.BLOCKS,) else goal.ours
        assert {*ours, *goal.against} - {"math"} <= timed, goal.what


def test_every_kernel_of_sparse24_is_checked(monkeypatch):
    """On the calls of its type."""
    need_kernels()
    monkeypatch.setattr(launchers, "capability", lambda: 90)
    pairs = ops_part.items({n: c for n, c in one_call_of_each().items() if n.startswith("sparse24")}, "cpu")
    kernels = {c for c, _ in pairs} - {"owner"}
    assert kernels == {n for n in launchers.kernels("sparse24_linear", 90) if "_bf16_" not in n}
    of = {name: {c.split("_")[1] for c, n in pairs if n == name and c != "owner"} for _, name in pairs}
    assert of == {"sparse24_linear of floats": {"f16"}, "sparse24_linear": {"s8"}, "sparse24_linear to codes": {"s8"}}


def test_a_kernel_by_its_name_is_given_what_it_reads(launched, monkeypatch):
    call = one_call_of_each()["sparse24_linear"]
    truth = call()
    for config in ("sm90_s8_rows_128x128", "sm90_s8_128x32"):
        by_name = {"sparse24_linear": partial(launchers.by_config, config)}
        monkeypatch.setitem(launchers.available("cpu"), config, by_name)
        with launchers.Using(config, "cpu"):
            assert torch.equal(call(), truth)
    (_, values, given), (_, _, nothing) = launched[0]
    assert torch.equal(given, rows_of(values)) and nothing is None
