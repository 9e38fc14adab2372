"""The Triton launcher lowbit_linear against its reference, bit for bit.

Nothing here has a tolerance: sums are exact integers, and the epilogue performs the reference's float32 operations in
its order, uncontracted.
"""

from __future__ import annotations

from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from _triton import DEVICE, assert_equal, kernel, random_codes, run, uniform

from pyvit_accel.formats.packed import pack

BITS = (2, 3, 4, 5, 6, 8)
TILES = {"small": (8, 768), "middle": (197, 768), "large": (12608, 768)}  # M, N that choose each tile of the launcher


@contextmanager
def use(tile, fp8=False):
    """The launcher takes this tile at any shape, so that shapes of a few tiles reach every tail; and the fp8 dot."""
    module = import_module("pyvit_accel.kernels.lowbit_linear")
    blocks = module._blocks(*TILES[tile], fp8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_blocks", lambda M, N, fp8: blocks)
        patch.setattr(module, "_use_fp8", lambda x, bits: fp8)
        yield


def arguments(
    M, N, K, w_bits=8, x_bits=8, activation="none", x_zero_point=0, parts="", out_columns=None, out_bits=8, gap=3
):
    """Arguments with the named parts: r x_scale per row, b bias, l layer scale, + residual; rows lie a gap apart."""
    return (
        random_codes(x_bits, M, K + gap)[:, :K], uniform(M if "r" in parts else 1),
        pack(random_codes(w_bits, N, K), w_bits), uniform(N), torch.randn(N) if "b" in parts else None,
        x_zero_point, activation, torch.randn(N) if "l" in parts else None,
        torch.randn(M, N + gap)[:, :N] if "+" in parts else None,
        None if out_columns is None else uniform(out_columns) * 2 ** (8 - out_bits),
        0 if out_columns is None else -3, out_bits,
    )  # fmt: skip


def check(tile, *args, fp8=False):
    torch.manual_seed(0)
    with use(tile, fp8):
        assert_equal("lowbit_linear", *arguments(*args))


def sums(x, w, bits=8, x_zero_point=0):
    """The launcher's result with nothing in the epilogue: the integer sums."""
    ones = torch.ones(w.shape[0])
    return kernel("lowbit_linear", x, ones[:1], pack(w, bits), ones, None, x_zero_point, "none", None, None, None, 0, 8)


def check_pair(w_bits, x_bits, fp8):
    """Two blocks of inputs and a tail, more than one block of features, everything of the format at its ends."""
    torch.manual_seed(0)
    for M, N, K in ((1, 1, 1), (5, 70, 33), (35, 37, 159)):
        w, x = random_codes(w_bits, N, K), random_codes(x_bits, M, K)
        w[::2, ::2], x[::2, ::3] = -(2 ** (w_bits - 1)), 2 ** (x_bits - 1) - 1
        truth = (x.double() - 3) @ w.double().T
        assert truth.abs().max() < 2**24  # so float32 holds it
        with use("small", fp8):
            assert torch.equal(sums(x, w, w_bits, 3).double(), truth)


@pytest.mark.parametrize("x_bits", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("w_bits", BITS)
def test_every_pair_of_bits_is_exact(w_bits, x_bits):
    run(check_pair, w_bits, x_bits, False)


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no fp8 unit")
@pytest.mark.parametrize("x_bits", [3, 4, 5, 8])
@pytest.mark.parametrize("w_bits", [2, 3, 4, 5])
def test_fp8_dots_are_exact(w_bits, x_bits):
    run(check_pair, w_bits, x_bits, True)


def check_extremes(tile, w_bits, x_zero_point):
    """Every product at one end."""
    M, N, K = 35, 37, 259
    w = torch.full((N, K), 2 ** (w_bits - 1) - 1, dtype=torch.int8)
    w[1::2] = -(2 ** (w_bits - 1))
    for code in (-128, 127):
        x = torch.full((M, K), code, dtype=torch.int8)
        truth = (x.double() - x_zero_point) @ w.double().T
        assert truth.abs().max() < 2**24
        for fp8 in (False, True)[: 1 + (w_bits <= 5 and DEVICE == "cpu")]:
            with use(tile, fp8):
                assert torch.equal(sums(x, w, w_bits, x_zero_point).double(), truth)


@pytest.mark.parametrize("x_zero_point", [0, 1, -128])
@pytest.mark.parametrize("w_bits", [2, 4, 5, 8])
@pytest.mark.parametrize("tile", TILES)
def test_sums_are_exact(tile, w_bits, x_zero_point):
    run(check_extremes, tile, w_bits, x_zero_point)


def check_long(w_bits, fp8):
    """The longest K that the fp8 dot takes, at its largest products; float32 of the sum is exact, as it is even."""
    K, q, code = 2**16, -(2 ** (w_bits - 1)), 127
    x, w = torch.full((1, K), code, dtype=torch.int8), torch.full((1, K), q, dtype=torch.int8)
    with use("small", fp8):
        assert sums(x, w, w_bits).item() == K * q * code


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no fp8 unit")
@pytest.mark.parametrize("w_bits, fp8", [(5, True), (4, False)])
def test_long_sums_are_exact(w_bits, fp8):
    run(check_long, w_bits, fp8)


def check_identity(w_bits):
    """x = I returns the decoded weight, K longer than one block and N not a multiple of 16."""
    torch.manual_seed(0)
    w = random_codes(w_bits, 45, 150)
    assert torch.equal(sums(torch.eye(150, dtype=torch.int8), w, w_bits).T, w.float())


@pytest.mark.parametrize("w_bits", BITS)
def test_identity_returns_the_weight(w_bits):
    run(check_identity, w_bits)


@pytest.mark.parametrize("tile, w_bits", [("small", 3), ("middle", 6), ("large", 4), ("large", 8)])
@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (65, 79, 130), (130, 130, 256), (7, 33, 0), (0, 16, 8)])
def test_tails(tile, w_bits, M, N, K):
    run(check, tile, M, N, K, w_bits if K else 8, 8, "none", -37, "rb+")


@pytest.mark.parametrize("out_columns, out_bits", [(None, 8), (1, 8), (33, 4)])
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize("parts", ["", "rbl+", "b", "l", "r+"])
def test_epilogue(parts, activation, out_columns, out_bits):
    run(check, "small", 37, 33, 40, 4, 8, activation, 3, parts, out_columns, out_bits)


@pytest.mark.parametrize("out_bits", range(2, 9))
def test_codes_of_all_bits(out_bits):
    run(check, "small", 37, 33, 40, 4, 8, "gelu", 3, "rb", 33, out_bits)


def test_every_block_is_visited():
    """More row blocks than one group of GROUP_M, and a last group that is not full."""
    run(check, "small", 32 * 10 + 1, 130, 8)


def test_sm_100_multiplies_up_to_5_bits_as_fp8(monkeypatch):
    module = import_module("pyvit_accel.kernels.lowbit_linear")

    class OnGPU:
        is_cuda, device, shape = True, "cuda", (1, 768)

    for capability, expected in (((8, 0), ()), ((9, 0), ()), ((10, 0), (2, 3, 4, 5))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert tuple(bits for bits in BITS if module._use_fp8(OnGPU, bits)) == expected
    OnGPU.shape = (1, 2**16 + 1)
    assert not module._use_fp8(OnGPU, 4)
