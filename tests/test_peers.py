"""bench/peers_cpu.py as a process: its rows, its files, and what it does when an engine cannot run."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

SCRIPT = Path(__file__).parents[1] / "bench" / "peers_cpu.py"
RUN = ("--models", "vit_tiny_patch16_224", "--batches", "1", "--rounds", "1", "--threads", "1")
pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="pins processes to CPUs, as Linux can")


def peers_cpu(folder: Path, *args, path: Path | None = None) -> subprocess.CompletedProcess:
    """Run the script in folder, without real weights; modules in `path` hide the installed ones."""
    environment = {name: value for name, value in os.environ.items() if name != "PYVIT_ACCEL_DATA"}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One run with two engines that are always there and two of packages that are not."""
    folder = tmp_path_factory.mktemp("peers")
    (folder / "absent").mkdir()
    for name in ("openvino", "onnx"):
        text = f"raise ModuleNotFoundError({name!r}, name={name!r})"
        (folder / "absent" / f"{name}.py").write_text(text)
    engines = "torch_fp32,openvino_int8,ort_fp32,pyvit_accel_W8A8"
    files = ("--json", folder / "p.json", "--chart", folder / "p.png")
    result = peers_cpu(folder, *RUN, "--engines", engines, *files, path=folder / "absent")
    assert result.returncode == 0, result.stderr
    found = json.loads((folder / "p.json").read_text())
    return result.stdout, found, {row["engine"]: row for row in found["rows"]}, folder


def test_rows(done):
    out, found, rows, folder = done
    assert list(rows) == ["torch_fp32", "openvino_int8", "ort_fp32", "pyvit_accel_W8A8"]
    assert {"cpu", "threads", "torch"} <= set(found["machine"]) and "nncf" in found["versions"]
    for name in ("torch_fp32", "pyvit_accel_W8A8"):
        row = rows[name]
        assert 0 < row["min_ms_per_image"] <= row["ms_per_image"] and row["calls"] >= 1
        assert 0 < row["model_mib"] < row["peak_mib"] and row["reason"] is None
        assert (row["weights"], row["batch"], row["images"], row["top1"]) == ("random", 1, 8, None)
        assert name in out
    assert rows["torch_fp32"]["logit_error"] < 1e-5 and rows["torch_fp32"]["speedup_over_torch_fp32"] == 1
    assert 0 < rows["pyvit_accel_W8A8"]["logit_error"] < 0.05
    assert rows["pyvit_accel_W8A8"]["speedup_over_openvino_int8"] is None
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(path.name for path in folder.iterdir()) == ["absent", "p.json", "p.png"]


def test_missing_package_is_a_row(done):
    out, _, rows, _ = done
    for name in ("openvino_int8", "ort_fp32"):
        assert rows[name]["reason"].startswith("conversion: ") and rows[name]["reason"].endswith("is not installed")
        assert rows[name]["ms_per_image"] is None
        assert rows[name]["reason"] in out


def test_out_of_time_is_a_row(tmp_path):
    """Importing torch and loading a model takes longer than that."""
    result = peers_cpu(tmp_path, *RUN, "--engines", "torch_fp32", "--timeout", "0.1")
    assert result.returncode == 0 and "took longer than 0.1 s" in result.stdout


@pytest.mark.parametrize("args, message", [
    (("--models", "vit_tyni_patch16_224"), "unknown model 'vit_tyni_patch16_224'; did you mean vit_tiny_patch16_224?"),
    (("--engines", "torch_fp32,openvino_int4"), "unknown engine 'openvino_int4'; did you mean openvino_int8?"),
    (("--batches", "0"), "'0' is not a positive whole number"),
    (("--timeout", "0"), "'0' is not a positive number of seconds"),
    (("--threads", "100000"), "this process may use"),
    (("--json", "absent/p.json"), "absent does not exist; create it first"),
])  # fmt: skip
def test_wrong_usage(monkeypatch, tmp_path, capsys, args, message):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.chdir(tmp_path)
    parse = importlib.import_module("peers_cpu").parse
    with pytest.raises(SystemExit) as exit:
        parse(args)
    assert exit.value.code == 2 and message in capsys.readouterr().err
