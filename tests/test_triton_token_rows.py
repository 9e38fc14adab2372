"""Rows by an index in the Triton launchers, sums into rows, packed attention with room to spare.

Against the references, bit for bit but attention. Rows that are left out would show: what they could read is not a
number, and scales are infinite.
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from _triton import DEVICE, assert_equal, run, uniform
from test_triton_lowbit_linear import TILES, arguments, use
from test_triton_quant_attention import check as check_attention

from pyvit_accel import reference

R = 41
PACKED = [*range(0, R, 2), *[-1] * 60]
INDICES = {
    "some": [5, 0, 40, 7, 1],
    "packed": PACKED,  # whole programs of rows that are left out
    "none first": PACKED[::-1],
    "repeats, none between": [3, -1, 3, 0, -9, 40, -1, 0, 3] * 9,
    "none at all": [-1] * 70,
    "empty": [],
}
by_index = pytest.mark.parametrize("name", list(INDICES))


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def poisoned(x, index):
    """x (R, ...) with what no row is computed from not a number."""
    x = x.clone()
    unused = torch.ones(R, dtype=torch.bool)
    unused[index[index >= 0].long()] = False
    x[unused] = torch.nan
    return x


def check_rows(name):
    torch.manual_seed(0)
    index = ints(INDICES[name])
    for K, bits in ((5, 8), (300, 4)):
        x = poisoned(torch.randn(R, K + 3), index)[:, :K]
        weight, bias, table = torch.randn(K), torch.randn(K), torch.randint(-128, 128, (256,), dtype=torch.int8)
        spread = torch.stack([index, index], dim=1)[:, 0]  # of any stride
        for columns in (1, K):
            assert_equal("quantize", x, uniform(columns) * 20, -3, bits, index)
            assert_equal("norm_quant", x, weight, bias, uniform(columns) * 20, 1e-6, bits, spread)
        assert_equal("quantize_dynamic", x, None, bits, 0.8, None, spread)
        assert_equal("norm_quant_dynamic", x, weight, bias, 1e-6, bits, 0.8, index)
        assert_equal("quantize_dynamic", x + 9, 1.5, 8, 1.0, table, index)


@by_index
def test_quantize_and_norm_quant(name):
    run(check_rows, name)


def check_gather(name, tile, parts, out_columns, w_bits, fp8):
    torch.manual_seed(0)
    index = ints(INDICES[name])
    args = list(arguments(R, 70, 150, w_bits, 8, "gelu", 3, parts, out_columns, 4))
    if "r" in parts:
        args[1] = poisoned(args[1], index)
    if "+" in parts:
        args[8] = torch.randn(len(index), 73)[:, :70]
        args[8][index < 0] = torch.nan
    with use(tile, fp8):
        assert_equal("lowbit_linear", *args, index)


@by_index
@pytest.mark.parametrize(
    "tile, parts, out_columns, w_bits, fp8",
    [("small", "rbl+", None, 4, False), ("middle", "r", 70, 8, False), ("large", "b+", 1, 4, False)],
)
def test_lowbit_linear(name, tile, parts, out_columns, w_bits, fp8):
    run(check_gather, name, tile, parts, out_columns, w_bits, fp8)


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no fp8 unit")
def test_lowbit_linear_in_fp8():
    run(check_gather, "packed", "small", "rbl+", None, 4, True)


def check_scatter(name, tile, parts, w_bits, indexed):
    torch.manual_seed(0)
    index = ints(INDICES[name]) if indexed else None
    M = len(index) if indexed else R
    args = arguments(R, 70, 150, w_bits, 8, "gelu", 3, parts)[:8]
    places = torch.randperm(M + 30)[:M].int() - 20
    places[max(0, M - 33) :] = -1
    out = torch.randn(M + 10, 70)
    expected = out.clone()
    reference.lowbit_linear_scatter(expected, places, *args, index)
    from pyvit_accel import kernels

    with use(tile):
        for layout in (lambda t: t, lambda t: t.mT.contiguous().mT):
            result = layout(out.clone()).to(DEVICE)
            moved = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in (places, *args, index)]
            assert kernels.lowbit_linear_scatter(result, *moved) is None
            assert torch.equal(result.cpu(), expected)


@by_index
@pytest.mark.parametrize("tile, parts, w_bits", [("small", "rbl", 8), ("large", "r", 4)])
def test_lowbit_linear_scatter(name, tile, parts, w_bits):
    run(check_scatter, name, tile, parts, w_bits, True)


@pytest.mark.parametrize("tile", TILES)
def test_scatter_of_all_rows(tile):
    run(check_scatter, None, tile, "bl", 4, False)


def check_capacity(form, parts):
    """What lies beyond the last sequence has scales that would drown the others, had they a part in it."""
    room = {"q_scale": (40, 29), "k_scale": (100, 71), "v_scale": (100, 71), "key_bias": (100, 71)}
    ends = {"cu_seqlens_q": ints([0, 5, 5, 27, 29]), "cu_seqlens_k": ints([0, 17, 20, 20, 71])}
    module = import_module("test_triton_quant_attention")
    make = module.problem

    def roomy(*args, **kwargs):
        new = make(*args, **kwargs)
        for name, (n, used) in room.items():
            if new[name] is not None and new[name].shape[-1] == n and new[name].stride(-1):
                new[name] = new[name].clone()
                new[name][..., used:] = 1e30
        if new["v"].is_floating_point():
            new["v"][:, :, 71:] = 400.0
        return new

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "problem", roomy)
        check_attention(form, Nq=40, Nk=100, parts=parts, BLOCK_N=32, max_seqlen=33, **ends)


@pytest.mark.parametrize("form", [None, "linear mantissa 3", "log2 5, lse"])
@pytest.mark.parametrize("parts", ["e", "tsko"])
def test_attention_on_fewer_tokens_than_there_is_room_for(form, parts):
    run(check_capacity, form, parts)


def check_float_capacity():
    values = import_module("pyvit_accel.kernels._values")
    v, scale = torch.randn(1, 2, 50, 8), torch.rand(1, 2, 50)
    ends = ints([0, 20, 32])
    planes, of = values.prepare(v.to(DEVICE), scale.to(DEVICE), 8, torch.float16, ends.to(DEVICE))
    v[:, :, 32:], scale[..., 32:] = torch.inf, torch.nan
    roomy, of_roomy = values.prepare(v.to(DEVICE), scale.to(DEVICE), 8, torch.float16, ends.to(DEVICE))
    assert torch.equal(of, of_roomy) and of.isfinite().all()
    for at in (slice(0, 32), slice(48, 64)):  # 20 keys, then 12
        assert torch.equal(planes[..., at], roomy[..., at])


def test_what_lies_beyond_is_no_value_of_a_head():
    run(check_float_capacity)
