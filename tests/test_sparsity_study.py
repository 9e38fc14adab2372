"""bench/sparsity_accuracy.py: its statistics, and a run on digits."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import sparsity_accuracy as study

from pyvit_accel.sparsity import prune


def test_summary_is_paired():
    """Four images: one lost, one won, one right in both, one wrong in both."""
    exact = 5 * torch.eye(4)[[0, 1, 2, 3]]
    logits = 5 * torch.eye(4)[[1, 1, 3, 3]]
    found = study.summary(logits, exact, torch.tensor([0, 1, 3, 2]), [])
    assert found["top1"] == 0.5 and found["lost"] == 0 and found["agreement"] == 0.5 and found["images"] == 4
    assert found["lost_error"] == pytest.approx((0.5 / 4) ** 0.5)  # of +1, 0, -1, 0
    assert found["logit_error"] == pytest.approx(1.0) and found["kept_energy"] == 1 and found["output_error"] is None


def test_verdict_is_of_all_layers():
    def row(method, layers, lost):
        return {"model": "m", "method": method, "layers": layers, "lost": lost}

    rows = [row("float32", 0, 0), row("magnitude", 48, 0.5), row(study.BEST, 48, 0.3), row(study.BEST, 12, 0.1)]
    assert study.verdicts(rows) == [f"m, {study.BEST}: 30.00 points lost, magnitude 50.00: NOT less than half"]
    rows[2]["lost"] = 0.2
    assert study.verdicts(rows)[0].endswith(": less than half")
    assert not study.verdicts(rows[:2])


def test_fine_tune_keeps_zeros_and_nears_the_model():
    pytest.importorskip("sklearn")
    model, images, _, _ = study.problem("digits")
    sparse = deepcopy(model)
    names = [one.name for one in prune(sparse, study.LAYERS, method="magnitude")]
    before = [parameter.clone() for parameter in sparse.parameters()]
    tuned = study.finetuned(sparse, model, images[:64], names, 2)
    for name in names:
        was, now = (m.get_submodule(name).weight for m in (sparse, tuned))
        assert not now[was == 0].any() and not torch.equal(was, now)
    errors = [(study.predict(m, images[:64]) - study.predict(model, images[:64])).norm() for m in (sparse, tuned)]
    assert errors[1] < 0.8 * errors[0]
    assert all(torch.equal(a, b) for a, b in zip(sparse.parameters(), before, strict=True))


def test_digits(tmp_path, monkeypatch, capsys):
    """Few images and two points of the curve; magnitude loses more than the best on this model too."""
    pytest.importorskip("sklearn")
    monkeypatch.setattr(study, "SHARES", (0.5,))
    monkeypatch.setattr(study, "METHODS", study.METHODS[::2])
    names = tmp_path / "study.json", tmp_path / "study.png"
    counts = ["--calibration", "32", "--images", "120", "--curve", "60", "--epochs", "0"]
    written = ["--json", str(names[0]), "--chart", str(names[1])]
    monkeypatch.setattr(sys, "argv", ["", "--models", "digits", *counts, *written])
    study.main()
    written = json.loads(names[0].read_text())
    rows = {(row["method"], row["layers"]): row for row in written["rows"]}
    assert [row["layers"] for row in written["rows"]] == [0, *[16] * len(study.METHODS), 8, 8]
    assert rows["magnitude", 16]["lost"] > 2 * rows[study.BEST, 16]["lost"] and rows["magnitude", 8]["images"] == 60
    assert rows[study.BEST, 16]["logit_error"] < rows["SparseGPT", 16]["logit_error"]
    errors = {one["name"]: one["output_error"] for one in rows[study.BEST, 16]["report"]}
    first = {one["name"] for one in rows["magnitude", 8]["report"]}
    assert max(errors[name] for name in first) <= min(errors[name] for name in errors if name not in first)
    assert names[1].read_bytes()[:4] == b"\x89PNG" and "less than half" in capsys.readouterr().out
