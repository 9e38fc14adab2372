"""The GPU suite, bench/gpu, without a GPU: what it does with parts that fail, crash and hang, and with measurements."""

from __future__ import annotations

import json
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch

from pyvit_accel import ops

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # last: bench is there, and pyvit_accel, which must come from where it is installed

from bench.gpu import (  # noqa: E402
    floors,
    goals,
    guarded,
    launchers,
    machine_code,
    parts,
    probes,
    report,
    rows,
    run,
    stream,
)  # fmt: skip
from bench.gpu.supervise import Part, divide, run_part  # noqa: E402
from bench.gpu.task import Task, lost  # noqa: E402

ITEMS = """
import os, time
from bench.gpu.task import Task
task = Task.current()
def crash(): os.abort()
def fail(): raise ValueError("no such layout\\nmore")
def hang(): time.sleep(60)
task.run({"good": lambda: {"value": 1}, "bad": fail, "crash": crash, "hang": hang, "last": dict})
"""


def task_in(folder: Path, seconds: float = 30.0) -> Task:
    made = {"root": str(ROOT), "lib": str(folder), "work": str(folder)}
    return Task(str(folder / "rows.jsonl"), "part", **made, deadline=time.time() + seconds, device="cpu")


def run_items(folder: Path, code: str, seconds: float = 30.0, **kwargs) -> dict[str, dict]:
    """The final row of every item of a part."""
    run_part(Part("part", "", ("-c", code), 1.0, **kwargs), task_in(folder, seconds), folder / "log.txt")
    return {row["item"]: row for row in rows.final(rows.read(folder / "rows.jsonl"))}


def test_what_fails_crashes_or_hangs_is_a_row_and_the_rest_runs(tmp_path):
    found = run_items(tmp_path, ITEMS, item_s=2.0)
    assert list(found) == ["good", "bad", "crash", "hang", "last"]
    assert [row["status"] for row in found.values()] == ["ok", "failed", "failed", "failed", "ok"]
    assert found["good"]["value"] == 1
    assert found["bad"]["why"] == "ValueError: no such layout"
    assert found["crash"]["why"].startswith("signal SIGABRT")
    assert found["hang"]["why"] == "hung: more than 2 s"
    assert b"no such layout" in (tmp_path / "log.txt").read_bytes()


def test_what_time_does_not_reach_was_not_run(tmp_path):
    code = "import time\nfrom bench.gpu.task import Task\nsleep = lambda: time.sleep(0.3)\n"
    found = run_items(tmp_path, f"{code}Task.current().run(dict.fromkeys('abcdef', sleep))", seconds=0.7)
    status = [found[name]["status"] for name in "abcdef"]
    assert status == ["ok"] * status.count("ok") + ["not run"] * status.count("not run")
    assert found["f"]["why"] == "no time was left"


def test_a_part_that_cannot_begin_is_a_row(tmp_path):
    found = run_items(tmp_path, "import no_such_module")
    assert found["part"]["status"] == "failed"
    assert "No module named 'no_such_module'" in found["part"]["why"]


def test_shards_share_the_items(tmp_path):
    code = """
from bench.gpu.task import Task
task = Task.current()
task.run({name: dict for name in list("abcde")[task.shard::task.shards]})
"""
    assert sorted(run_items(tmp_path, code, shards=2)) == list("abcde")


def test_a_lost_gpu_is_told_from_an_error():
    assert lost(RuntimeError("CUDA error: an illegal memory access was encountered"), "cpu")
    assert not lost(ValueError("x has K=3"), "cpu")


PROGRAM = """
import json, os, sys
for name in sys.argv[1:]:
    print(json.dumps({"begin": name}), flush=True)
    if name == "dies": os._exit(9)
    print("some line")
    print(json.dumps({"value": len(name), "unit": "lanes/clk/SM"}))
    print(json.dumps({"end": name}), flush=True)
"""


def test_a_program_that_dies_goes_on_after_the_item(tmp_path):
    command = lambda names: [sys.executable, "-c", PROGRAM, *names]  # noqa: E731
    stream.run_all(command, ["pipe ex2", "dies", "int8 ss n256"], task_in(tmp_path), probes.row_of)
    first, dies, last = rows.final(rows.read(tmp_path / "rows.jsonl"))
    assert (first["value"], first["assumed"], first["status"]) == (8, 16, "ok")
    assert (dies["status"], dies["why"]) == ("failed", "the program ended with code 9")
    assert (last["ceiling"], last["assumed"]) == ("int8", 4096)


def test_wrong_sums_are_a_failure():
    assert probes.row_of("int8 rs is exact", {"value": 3, "unit": "wrong sums"}, [])["status"] == "failed"
    assert probes.row_of("int8 rs is exact", {"value": 0, "unit": "wrong sums"}, [])["status"] == "ok"
    assert probes.row_of("pipe ex2", {"absent": "needs sm_90"}, [])["status"] == "not run"


def test_reports_of_the_sanitizer_are_failures():
    from bench.gpu.sanitizer import row_of

    lines = ["========= COMPUTE-SANITIZER", "========= Invalid __global__ read of size 4 bytes",
             "=========     at _lowbit_linear_kernel+0x120"]  # fmt: skip
    row = row_of("memcheck: triton: lowbit_linear", {}, lines)
    assert row["status"] == "failed" and "Invalid __global__ read" in row["why"] and "_lowbit_linear" in row["why"]
    assert row_of("memcheck: triton: quantize", {}, lines[:1]) == {"status": "ok"}


# ---- the command


def test_is_skipped_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("GPU suite: skipped") and out.count("\n") == 1


def test_parts_are_chosen_by_prefixes():
    assert [part.name for part in parts.choose("lin,probe")] == ["build", "linear", "probes"]
    assert parts.choose(None)[0].name == "build"
    with pytest.raises(ValueError, match="nosuch is no part; the parts are build, device"):
        parts.choose("linear,nosuch")


@pytest.mark.parametrize("argv", [["--minutes", "0"], ["--only", "nosuch"], ["--rehearse"]])
def test_arguments_that_make_no_sense_are_refused(argv, capsys):
    with pytest.raises(SystemExit):
        run.arguments(argv)
    assert "error" in capsys.readouterr().err


def test_time_that_a_part_leaves_goes_to_the_others():
    assert divide([1, 1, 2], 40.0) == 10.0
    assert divide([2], 7.0) == 7.0


def test_a_folder_is_named_after_gpu_and_day():
    assert run.folder_name("NVIDIA H200", datetime(2026, 11, 21)) == "h200_2026-11-21"
    assert run.folder_name("NVIDIA GeForce RTX 4090", datetime(2026, 1, 2)) == "rtx_4090_2026-01-02"


# ---- measurements


def timed(job: str, implementation: str, ms: float, backend: str | None = None, **more) -> dict:
    row = {"part": "linear", "item": f"{job} {implementation} {backend}", "status": "ok", "job": job, "ms": ms}
    return row | {"implementation": implementation, "backend": backend, "kind": "int8", "ops": 4e9, "bytes": 2e6} | more


JOB = "ViT-B/16 qkv x64"
MEASURED = [
    {"part": "device", "item": "copy", "status": "ok", "value": 4000.0},
    {"part": "device", "item": "matmul int8", "status": "ok", "value": 1000.0},
    {"part": "probes", "item": "int8 ss n256", "status": "ok", "value": 3900.0, "tops": 1600.0, "ceiling": "int8",
     "unit": "MAC/clk/SM", "assumed": 4096},
    timed(JOB, "w8a8", 0.010, "cuda"), timed(JOB, "w8a8", 0.012, "triton"), timed(JOB, "bf16", 0.018, kind="bf16"),
    timed(JOB, "scaled_mm", 0.012, kind="fp8"), timed(JOB, "w4a8", 0.011, "triton"),
    {"part": "linear", "item": "x", "status": "failed", "why": "ValueError: planted"},
]  # fmt: skip


def verdict(text: str) -> goals.Verdict:
    (goal,) = (g for g in goals.GOALS if g.what == text)
    return goals.judge(goal, MEASURED, floors.ceilings(MEASURED))


def test_floors_are_of_measured_ceilings():
    ceilings = floors.ceilings(MEASURED)
    assert ceilings == {"copy": 4000.0, "int8": 1600.0}
    assert floors.floor_ms(MEASURED[3], ceilings) == pytest.approx(4e9 / 1600e12 * 1e3)
    assert floors.floor_ms({"kind": "int8", "ops": 1, "bytes": 4e6}, ceilings) == pytest.approx(1e-3)
    assert floors.floor_ms({"kind": "int8 2:4", "ops": 32e8, "bytes": 1}, ceilings) == pytest.approx(1e-3)


def test_verdicts():
    met = verdict(f"{JOB}: w8a8 / bf16")
    assert (met.verdict, met.ours, met.beside) == ("met", "w8a8 (cuda)", "bf16")
    assert met.value == pytest.approx(1.8)
    assert verdict(f"{JOB}: w8a8 / scaled_mm").verdict == "missed"
    assert verdict(f"{JOB}: w8a8 / int_mm").verdict == "not run"
    assert verdict("ViT-L/16 fc1 x64: w8a8 / bf16").verdict == "not run"
    assert verdict(f"{JOB}: w4a8 / w8a8").value == pytest.approx(0.010 / 0.011)


def test_values_of_goals_without_a_baseline():
    row = timed("j", "w8a8", 2.0, "cuda", images=64, bytes=6e9)
    of = lambda unit: goals.judge(goals.Goal("g", "j", ("w8a8",), (), 1.0, unit), [row], {"copy": 4000.0})  # noqa: E731
    assert of("TOP/s").value == pytest.approx(2.0)
    assert of("img/s").value == pytest.approx(32000.0)
    assert of("share of the copy ceiling").value == pytest.approx(0.75)


def test_report(tmp_path):
    for row in MEASURED:
        rows.append(tmp_path / "rows.jsonl", **row)
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"part": "linear", "item": "cut off by a cra')
    summary = report.write(tmp_path)
    assert "ValueError: planted" in summary and "1 failed" in summary
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "table.md").read_text()
    assert "| **met** |" in table and "| missed |" in table and "Not run: " in table
    assert f"- {JOB}: w8a8 (triton)" not in table.split("## Losses")[0]
    assert "## Losses: 0" in table  # 0.012 ms beside scaled_mm's 0.012
    assert "| int8 ss n256 | 3900 | MAC/clk/SM | 4096 | 0.95 |" in table
    saved = json.loads((tmp_path / "results.json").read_text())
    assert [row["floor_ms"] for row in saved["rows"] if row["item"].endswith("w8a8 cuda")] == [pytest.approx(0.0025)]


def test_a_loss_is_printed(tmp_path):
    for row in (*MEASURED, timed(JOB, "w4a4", 0.03, "cuda")):
        rows.append(tmp_path / "rows.jsonl", **row)
    assert f"- {JOB}: w4a4 (cuda) 0.03 ms, scaled_mm 0.012 ms: 0.40x" in report.write(tmp_path)


def test_an_empty_folder_has_a_report(tmp_path):
    assert "## Rates: not measured" in report.write(tmp_path)
    assert (tmp_path / "chart.png").exists()


# ---- correctness


def doubled(x):
    y = torch.empty_like(x)
    y[:8] = 2 * x
    return y


def doubled_but_the_last(x):
    y = torch.empty_like(x)
    y[:7] = 2 * x[:7]
    return y


def doubled_and_one_beyond(x):
    y = doubled(x)
    y.as_strided((9,), (1,))[8] = 1.0
    return y


def doubled_and_one_before(x):
    y = doubled(x)
    y.as_strided((1,), (1,), y.storage_offset() - 3)[0] = 1.0
    return y


def doubled_in_place(x):
    y = doubled(x)
    x[3] += 1.0
    return y


@pytest.mark.parametrize("op, message", [(doubled_and_one_beyond, "wrote outside"), (doubled_and_one_before, "wrote")])
def test_guards_catch_writes_outside(op, message):
    guard = guarded.Guarded(guarded.NAN)
    with guard:
        assert torch.equal(doubled(torch.arange(8.0)), 2 * torch.arange(8.0))
    guard.check()
    with guard:
        op(torch.arange(8.0))
    with pytest.raises(AssertionError, match=message):
        guard.check()


def test_guarded_memory_is_poisoned():
    with guarded.Guarded(guarded.NAN):
        assert torch.empty(3).isnan().all() and (torch.empty(3, dtype=torch.int8) == -1).all()


def test_what_is_left_unwritten_or_written_to_is_found():
    from _problems import Call

    from bench.gpu.ops import check

    check(Call(doubled, (torch.arange(8.0),)), "owner", "cpu", exact=True)
    with pytest.raises(AssertionError, match=r"differ|other bits"):
        check(Call(doubled_but_the_last, (torch.arange(8.0),)), "owner", "cpu", exact=True)
    with pytest.raises(AssertionError, match="an input was written to"):
        check(Call(doubled_in_place, (torch.arange(8.0),)), "owner", "cpu", exact=True)


def test_an_op_is_checked_and_a_wrong_one_found(monkeypatch):
    from _problems import one_call_of_each

    from bench.gpu.ops import check

    call = one_call_of_each()["quantize"]
    assert check(call, "owner", "cpu", exact=True)["exact"]
    launcher = {"quantize": lambda x, *rest: torch.ops.pyvit_accel.quantize(x * 1.5, *rest)}
    monkeypatch.setitem(launchers.available("cpu"), "wrong", launcher)
    with pytest.raises(AssertionError, match="differ, first at"):
        check(call, "wrong", "cpu", exact=True)


def test_steps_of_a_composed_op_run_on_the_launchers_chosen(monkeypatch):
    from _problems import one_call_of_each

    used = []
    launcher = {"lowbit_linear": lambda *args: used.append(1) or torch.ops.pyvit_accel.lowbit_linear(*args)}
    monkeypatch.setitem(launchers.available("cpu"), "counted", launcher)
    call = one_call_of_each()["quant_mlp"]
    with launchers.Using("counted", "cpu"):
        result = call()
    assert len(used) == 2 and torch.equal(result, ops.quant_mlp(**call.kwargs))


def test_comparisons():
    from bench.gpu.ops import compare

    codes = torch.arange(-50, 50, dtype=torch.int8)
    off = codes.clone()
    off[7] += 1
    compare([off], [codes], exact=False)
    with pytest.raises(AssertionError, match="1 of 100 differ, first at"):
        compare([off], [codes], exact=True)
    off[7] += 1
    with pytest.raises(AssertionError, match="by up to 2"):
        compare([off], [codes], exact=False)
    with pytest.raises(AssertionError, match="of the norm"):
        compare([torch.full((4,), torch.nan)], [torch.ones(4)], exact=False)


# ---- machine code

SASS = """
\t\tFunction : _ZN6probes4_GLOBAL_4pipeINS0_3ExpEEEviPjPx
        /*0000*/                   MOV R1, R2 ;      /* 0x0 */
        /*0010*/                   MUFU.EX2 R3, R3 ; /* 0x0 */
        /*0020*/              @!P0 MUFU.EX2 R4, R4 ; /* 0x0 */
        /*0030*/                   {more}
        /*0040*/              @P0  BRA 0x10 ;        /* 0x0 */
"""


def test_machine_code_of_probes(monkeypatch):
    monkeypatch.setattr(machine_code, "LEAST_SHARE", 0.7)
    assert machine_code.faults(SASS.replace("{more}", "MUFU.EX2 R5, R5 ;")) == []
    (fault,) = machine_code.faults(SASS.replace("{more}", "STL [R1], R5 ;"))[1:]
    assert fault.endswith("spills")
    (fault,) = machine_code.faults(SASS.replace("{more}", "FADD R5, R5, R4 ;"))
    assert "2 MUFU.EX2 in a loop of" in fault
    assert machine_code.faults("") == ["there is no probe in it"]
    assert machine_code.expected("_GLOBAL_13int8_sparse_rs_128EiPjPx") == ("IGMMA.SP.64x128x64", False)
