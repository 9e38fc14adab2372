"""The time map: multiply-adds counted against a run of the float model, floors by hand, and what the command writes."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from _vits import SMALL, vit

import pyvit_accel
from pyvit_accel import accelerate, backends, recipes, timemap
from pyvit_accel.cli import main
from pyvit_accel.measure import random_images
from pyvit_accel.models import ARCHITECTURES, VisionTransformer, ViTConfig
from pyvit_accel.timemap import MATMULS, PHASES, PhaseTime, Roofs, TimeMap, Work, count_work, full_macs, work_of
from pyvit_accel.timemap_chart import write_timemap_chart

KIB, MIB = 2**10, 2**20
RATES = {16 * KIB: 800e9, 256 * KIB: 400e9, 4 * MIB: 100e9, 128 * MIB: 20e9}
ROOFS = Roofs(dot_peak=1e12, read_rates=RATES, threads=2)
CONFIGS = {
    "vit_tiny": ARCHITECTURES["vit_tiny_patch16_224"],
    "distilled": ARCHITECTURES["deit_tiny_distilled_patch16_224"],
    "average pool": replace(ARCHITECTURES["vit_tiny_patch16_224"], pool="avg", depth=3),
    "registers": replace(ARCHITECTURES["vit_small_patch14_reg4_dinov2"], depth=2),
}
built = pytest.mark.skipif(not backends.HAS_CPU_KERNELS, reason="the CPU kernels were not built")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_all_macs_are_those_of_the_float_model(config):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        VisionTransformer(config).eval()(torch.empty(1, config.in_channels, config.image_size, config.image_size))
    assert 2 * full_macs(config) == counter.get_total_flops()


@pytest.mark.parametrize("overrides, tokens", [({}, 1), ({"distilled": True}, 2), ({"pool": "avg"}, None)])
def test_last_block_computes_what_the_head_reads(overrides, tokens):
    """One block, counted in Python integers: 16 patches of 8 x 8 x 3, C = 64, F = 256."""
    fast, _ = accelerate(vit(depth=1, **overrides), recipes.W8A8_DYNAMIC)
    work = work_of(fast)
    N = 18 if tokens == 2 else 17
    T = tokens or N
    assert {phase: work[phase].macs for phase in MATMULS} == {
        "patch_embed": 16 * 192 * 64, "qkv": N * 64 * 192, "attention": 2 * T * N * 64, "proj": T * 64 * 64,
        "fc1": T * 64 * 256, "fc2": T * 256 * 64,
    }  # fmt: skip
    assert all(work[phase].macs == 0 for phase in set(PHASES) - set(MATMULS))


def test_bytes():
    """Codes take one byte, floats four; what is static leaves its matmul as codes."""
    config = ViTConfig(**(SMALL | {"depth": 1}))
    N, C, F = 17, 64, 256
    work = count_work(config, 1, static_qkv=True, static_hidden=False)
    assert work["norm"].activations == (N + 1) * C * 5 and work["quantize"].activations == C * 5
    assert work["qkv"] == Work(N * 3 * C * C, 3 * C * C, N * 4 * C)
    assert work["attention"].activations == C + 2 * N * C + 4 * C
    assert work["fc1"].activations == C + 4 * F and work["activation"].activations == 5 * F
    assert work["fc2"].activations == F + 8 * C and work["fc2"].bytes(8) == F * C / 8 + F + 8 * C
    work = count_work(config, 1, static_qkv=False, static_hidden=True)
    assert work["qkv"].activations == N * C * 13 and work["quantize"].activations == (1 + 3 * N) * C * 5
    assert work["fc1"].activations == C + F and work["activation"].activations == 0


def test_read_rate_is_of_the_nearest_size():
    for size, expected in ((1, 800e9), (2 * 63 * KIB, 800e9), (2 * 65 * KIB, 400e9), (2 * 1000 * KIB, 400e9),
                           (2 * 2 * MIB, 100e9), (2 * 22 * MIB, 100e9), (2 * 23 * MIB, 20e9), (2**40, 20e9)):
        assert ROOFS.read_rate(size) == expected


def test_floor():
    """Of dot products, or of bytes: those of the weights from where the whole model lies."""
    assert ROOFS.floor(Work(10**9, 1000, 1000), 1, 10**8) == 1e-3
    assert ROOFS.floor(Work(1, 8 * 10**6, 2 * 20 * KIB), 4, 10**8) == 2e6 / 20e9 + 40 * KIB / 800e9
    assert ROOFS.floor(Work(1, 8 * 10**6, 0), 1, 8 * 10**6) == 8e6 / 100e9


def test_map_adds_up(tmp_path):
    work = {"norm": Work(activations=4000), "fc1": Work(10**9, 1000, 1000)}
    phases = timemap.phase_times({"norm": 0.008, "fc1": 0.016}, work, 2, ROOFS)
    assert [(p.ms, p.bytes) for p in phases] == [(2.0, 4000), (4.0, 1500)]  # two threads, two images
    found = TimeMap("vit", "W8A8", 2, 7.5, 7.8, 0.5, phases)
    assert found.other_ms == 1.5 and found.floor_ms == pytest.approx(1 + 4000 / 800e6)
    assert phases[1].gmacs == 250 and phases[1].intensity == 10**9 / 1500
    assert found.profiling_cost == pytest.approx(0.04)
    lines = str(found).splitlines()
    assert lines[0] == "vit, W8A8, batch 2" and lines[4].split()[:5] == ["fc1", "4.000", "53.3", "%", "1.0000"]
    assert lines[5].split() == ["other", "1.500", "20.0", "%"] and "15.00 times" in lines[-1]
    write_timemap_chart(tmp_path / "c.png", "title", [found], ROOFS)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_idle_phase_has_no_rate():
    assert (PhaseTime("fc1", 0.0, 1.0, 5, 0).gmacs, PhaseTime("norm", 1.0, 0.0, 0, 0).intensity) == (0, 0)


def test_rounds_take_turns(monkeypatch):
    """A fake extension: profiling is on in every other run, and each image gets its part of every thread's second."""
    calls = []

    def profile(on):
        calls.append("on" if on else "off")
        return dict.fromkeys(PHASES, 1.0)

    monkeypatch.setattr(pyvit_accel, "_C", SimpleNamespace(profile=profile), raising=False)
    fast, _ = accelerate(vit(depth=1), recipes.W8A8_DYNAMIC)
    found = timemap.map_time("vit", "W8A8_DYNAMIC", fast, random_images(fast, 4), ROOFS, rounds=2, warmup=1)
    assert " ".join(calls[::2]) == "on off off on on off" and set(calls[1::2]) == {"off"}
    assert {phase.ms for phase in found.phases} == {1e3 / (2 * 4)} and found.batch == 4 and found.ms > 0


def run(*args) -> int:
    return main([str(arg) for arg in ("bench", "--breakdown", "--threads", 1, "--rounds", 2, *args)])


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@built
def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timemap, "READ_SIZES", (16 * KIB, 256 * KIB))
    result, chart = tmp_path / "map.json", tmp_path / "map.png"
    assert run("--models", "digits", "--batches", "1,2", "--json", result, "--chart", chart) == 0
    out = capsys.readouterr().out
    assert "int8 dot product" in out and "digits, W8A8, batch 2" in out and "full model at peak" in out
    found = json.loads(result.read_text())
    assert {"cpu", "threads", "isa"} <= set(found["machine"]) and found["roofs"]["dot_peak_gmacs"] > 0
    assert [(of["model"], of["recipe"], of["batch"]) for of in found["maps"]] == [("digits", "W8A8", b) for b in (1, 2)]
    for of in found["maps"]:
        assert [phase["name"] for phase in of["phases"]] == list(PHASES)
        assert all(phase["ms"] > 0 and phase["floor_ms"] > 0 for phase in of["phases"])
        total = sum(phase["ms"] for phase in of["phases"])
        assert total + of["other_ms"] == pytest.approx(of["ms"])
        assert total <= of["profiled_ms"]  # one thread cannot spend more than the wall time; medians of two are means
    assert chart.read_bytes().startswith(b"\x89PNG")


@built
def test_float_blocks_have_no_phases(capsys, monkeypatch):
    monkeypatch.setattr(timemap, "READ_SIZES", (16 * KIB,))
    assert run("--models", "digits", "--recipes", "W8A16") == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("use recipe W8A8 or W8A8_DYNAMIC")


def test_needs_the_cpu_kernels(capsys, monkeypatch):
    monkeypatch.setattr(timemap, "HAS_CPU_KERNELS", False)
    assert run() == 1
    assert "the CPU kernels, which were not built; reinstall" in capsys.readouterr().err.splitlines()[-1]
