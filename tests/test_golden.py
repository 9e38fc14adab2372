"""A trained W3A3 DeiT-Ti replayed with its 98 matmuls in the low-bit matmul: every traced integer, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from _golden import BLOCKS, FILE, Network, load

from pyvit_accel import ops

LOGITS = 1000


@pytest.fixture(scope="module")
def folder() -> Path:
    if "PYVIT_ACCEL_DATA" not in os.environ:
        pytest.skip("PYVIT_ACCEL_DATA is not set: no golden network")
    folder = Path(os.environ["PYVIT_ACCEL_DATA"])
    if not (folder / FILE).is_file():
        pytest.skip(f"PYVIT_ACCEL_DATA holds no {FILE}")
    return folder


@cache
def replayed(impl, folder) -> Network:
    """The whole network, its matmuls in the public op."""

    def linear(x, x_scale, w_packed, w_scale, bias, x_zero_point, residual):
        more = {"x_zero_point": x_zero_point, "residual": residual}
        return impl(ops.lowbit_linear, x, x_scale, w_packed, w_scale, bias, **more)

    network = Network(load(folder), linear)
    network.logits()
    return network


def assert_traced(network: Network, traced: set[str]) -> None:
    """What the network saw is what the trace holds, under every one of these names."""
    for name in sorted(traced):
        seen, truth = network.seen[name], network.arrays[name]
        assert torch.equal(seen, truth), f"{name}: {(seen != truth).sum()} of {truth.numel()} differ"


def traced_in(network: Network, *prefixes: str) -> set[str]:
    """Names of what the trace holds of inputs and outputs, and of the operands of attention."""
    ends = ("_input", "_output", "_gen_r_matmul_weight", "_gen_a_matmul_weight")
    return {name for name in network.arrays if name.startswith(prefixes) and name.endswith(ends)}


def test_replays_the_logits(impl, folder):
    network = replayed(impl, folder)
    logits = network.seen["head_matmul_output"][0]
    assert logits.shape == (LOGITS,) and torch.equal(logits, network.arrays["network_output"])


def test_replays_every_block(impl, folder):
    network = replayed(impl, folder)
    halves = [f"{half}_{n}_{end}" for half in ("attn", "mlp") for n in range(BLOCKS) for end in ("input", "output")]
    assert_traced(network, {"patch_embed_output", *halves})


def test_replays_everything_inside_block_0(impl, folder):
    network = replayed(impl, folder)
    traced = traced_in(network, "attn_0_", "mlp_0_", "head_lnq", "patch_embed_matmul")
    assert len(traced) == 42
    assert_traced(network, traced)


def test_98_matmuls_at_their_bits(impl, folder):
    """Eight in each block, the patch embedding and the head; the weights need the bits they are packed in."""
    network = replayed(impl, folder)
    assert len(network.matmuls) == len(set(network.matmuls)) == 98
    for name in network.matmuls:
        lo, hi = (int(end) for end in network.seen[f"{name}_weight"].aminmax())
        assert (lo, hi) == ((-128, 127) if name in ("patch_embed_matmul", "head_matmul") else (-4, 3)), name


def check_triton_block(folder: Path, device: str) -> None:
    """Block 0, its eight matmuls in the Triton launcher."""
    from pyvit_accel import kernels

    def linear(x, x_scale, w_packed, w_scale, bias, x_zero_point, residual):
        x, x_scale, w_packed, w_scale, bias = (
            None if t is None else t.to(device) for t in (x, x_scale, w_packed, w_scale, bias)
        )
        return kernels.lowbit_linear(
            x, x_scale, w_packed, w_scale, bias, x_zero_point, "none", None, residual, None, 0, 8
        ).cpu()

    network = Network(load(folder), linear)
    network.block(0, network.arrays["attn_0_input"])
    assert len(network.matmuls) == 8
    assert_traced(network, traced_in(network, "attn_0_", "mlp_0_"))


def test_triton_replays_block_0(folder, monkeypatch):
    """On the GPU where there is one, else under Triton's interpreter, which is chosen before triton is imported."""
    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available():
        check_triton_block(folder, "cuda")
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(torch.set_num_threads, 1).result()
        pool.submit(check_triton_block, folder, "cpu").result()
