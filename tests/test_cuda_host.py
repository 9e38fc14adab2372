"""What the CUDA kernels share with the host, compiled for it: structures, division, scalar functions, and the maps of
memory to registers."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from ctypes import c_float, c_int64, c_uint32
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from _cuda import built, launcher

from pyvit_accel.formats import affine
from pyvit_accel.formats.packed import pack
from pyvit_accel.reference import scalar


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    path = tmp_path_factory.mktemp("host") / "cuda_host.so"
    source = Path(__file__).with_name("cuda_host.cpp")
    flags = ("-O2", "-march=native", "-std=c++20", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Werror")
    subprocess.run(["g++", *flags, str(source), "-o", str(path)], check=True)
    loaded = ctypes.CDLL(str(path))
    loaded.layouts.restype = ctypes.c_char_p
    loaded.wrong_divisions.argtypes, loaded.wrong_divisions.restype = (c_float, c_float), c_int64
    loaded.wrong_quotients.restype = c_int64
    return loaded


def floats(t):
    return ctypes.c_void_p(t.data_ptr()), c_int64(t.numel())


def test_structures_are_those_of_the_headers(host):
    sparse24 = import_module("pyvit_accel.cuda.sparse24_linear").Sparse24Linear
    ours = (built.TensorMap, built.Launch, built.Epilogue, launcher.LowbitLinear, sparse24)
    ours = {structure.__name__: structure for structure in ours}
    assert len(ours) == len(host.layouts().splitlines()) - 1
    for line in host.layouts().decode().splitlines()[1:]:
        head, *fields = line.split(",")
        name, size = head.split()
        assert ctypes.sizeof(ours[name]) == int(size), name
        named = [f for f, *_ in ours[name]._fields_ if not f.startswith("_")]
        assert named == [f.split()[0] for f in fields]
        for field in fields:
            f, offset, size = field.split()
            assert (getattr(ours[name], f).offset, getattr(ours[name], f).size) == (int(offset), int(size)), f


@pytest.fixture(params=[-1, 0, 1], ids=lambda ulp: f"reciprocal{ulp:+d}ulp")
def reciprocal(request, host):
    """The approximate reciprocal errs as much as the instruction may."""
    host.set_reciprocal_error(request.param)
    yield host
    host.set_reciprocal_error(0)


def test_division_is_exactly_rounded(reciprocal):
    """Every mantissa of b for a = 1, which the sigmoid and the scales divide; and random ones of the whole range."""
    for first in (1.0, 2.0**-100, 2.0**100):  # floats from a power of two to the next
        assert reciprocal.wrong_divisions(1.0, first) == 0
    n = 2**21
    a = torch.ldexp(1 + torch.rand(n), torch.randint(-20, 20, (n,)))
    b = torch.ldexp(1 + torch.rand(n), torch.randint(-100, 101, (n,)))
    assert reciprocal.wrong_quotients(floats(a)[0], *floats(b)) == 0


def test_scalar_functions_are_the_references(reciprocal):
    x = torch.cat([torch.linspace(-9, 9, 2**18), torch.randn(2**16) * 100, torch.tensor([0.0, -0.0, 5.5, -5.5, 1e-30])])
    for name in ("exp2", "gelu", "gelu_tanh", "quick_gelu"):
        of = x.clamp(-100, 100) if name == "exp2" else x
        y = torch.empty_like(of)
        reciprocal.apply(name.encode(), floats(of)[0], *floats(y))
        assert torch.equal(y.view(torch.int32), getattr(scalar, name)(of).view(torch.int32)), name


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_the_references(host, bits):
    """Ties and ends included: multiples of half a step, and what is far outside."""
    far = torch.tensor([3e38, -3e38, 1e9, -0.0])
    y = torch.cat([torch.arange(-1200, 1200) * 0.125, torch.randn(4096) * 2**bits, far])
    for zero_point in (0, -3, 2 ** (bits - 1) - 1, -(2 ** (bits - 1))):
        for scale in (0.25, 1.0, 0.37):
            q = torch.empty(y.shape, dtype=torch.int8)
            inv_scale = c_float((1 / torch.tensor(scale)).item())
            host.to_codes(floats(y)[0], inv_scale, zero_point, bits, *floats(q))
            assert torch.equal(q, affine.quantize(y[None], torch.tensor([scale]), zero_point, bits)[0])


def test_steps_of_swizzled_bytes(host):
    """The place of a byte of the next chunks follows from that of the first."""
    for at in range(0, 256, 16):
        for step in range(0, 4096, 256):
            place = host.ahead(c_uint32(host.swizzle(c_uint32(at))), c_uint32(step))
            assert place == host.swizzle(c_uint32(at + step))


def distinct_banks(host, offsets):
    """Whether eight 16-byte accesses, swizzled, meet in no bank."""
    return len({host.swizzle(c_uint32(at)) // 16 % 8 for at in offsets}) == 8


def test_swizzle(host):
    """TMA's: a permutation of the units of each 1024 bytes, by the line; without conflicts where the kernels read."""
    units = np.array([host.swizzle(c_uint32(at)) for at in range(0, 4096, 16)]) // 16
    assert sorted(units) == list(range(256))
    for u, at in enumerate(units):
        assert at // 8 == u // 8 and at % 8 == (u % 8) ^ (u // 8 % 8)
    assert host.swizzle(c_uint32(1027)) == 1027 and host.swizzle(c_uint32(128 + 5)) == 128 + 16 + 5
    for row in (64, 128):  # ldmatrix: eight tokens, the same unit of each
        for first in range(0, 64 * row, 8 * row):
            for unit in range(0, row, 16):
                assert distinct_banks(host, [first + i * row + unit for i in range(8)])
    for tile_bytes in (512, 1024, 2048):  # weights: eight lanes in turn
        for first in range(0, tile_bytes, 256):
            for lanes in np.arange(32).reshape(4, 8):
                assert distinct_banks(host, [first + host.weight_at(int(lane), tile_bytes) for lane in lanes])


@pytest.mark.parametrize("w_bits", [4, 8])
def test_fragments(host, w_bits):
    """Register r of a lane: row g + 8 (r & 1), inputs 4t + 16 (r >> 1) .. + 3; rows are its four features, in order."""
    q = torch.randint(-(2 ** (w_bits - 1)), 2 ** (w_bits - 1), (32, 32), dtype=torch.int8)
    words = pack(q, w_bits)[:, 64:].contiguous()
    held, features, tokens = [], [], []
    for lane in range(32):
        g, t, first = lane // 4, lane % 4, host.feature_of(lane)
        features.append(first)
        tokens.append(host.token_of(lane))
        a = np.zeros((2, 4, 4), np.int8)
        host.registers_of(w_bits, *floats(words)[:1], c_uint32(words.shape[1]), lane, a.ctypes.data_as(ctypes.c_void_p))
        for tile in range(2):
            for r in range(4):
                feature, inputs = first + 2 * tile + (r & 1), 4 * t + 16 * (r >> 1)
                held += [(tile, g + 8 * (r & 1), feature)]
                expected = q[feature, inputs : inputs + 4].numpy() << (8 - w_bits)
                assert (a[tile, r] == expected).all(), (lane, tile, r)
    assert sorted(set(features)) == list(range(0, 32, 4)) and sorted(set(tokens)) == [0, 2, 4, 6]
    rows = {(tile, row): feature for tile, row, feature in held}
    assert len(rows) == 32 == len(set(rows.values())) and len(set(held)) == 32, "every row is one feature"


def test_every_tile_is_computed_once(host):
    at = (c_uint32 * 2)()
    for tiles_m, tiles_n, group in ((1, 1, 8), (7, 3, 8), (8, 5, 8), (9, 4, 8), (99, 24, 8), (33, 7, 16)):
        seen = set()
        for block in range(tiles_m * tiles_n):
            host.tile_at(c_uint32(block), c_uint32(group), c_uint32(tiles_m), c_uint32(tiles_n), at)
            seen.add((at[0], at[1]))
        assert seen == {(m, n) for m in range(tiles_m) for n in range(tiles_n)}
    host.tile_at(*(c_uint32(n) for n in (3, 8, 99, 24)), at)
    assert tuple(at) == (3, 0), "rows of tiles first: they share the weights"
