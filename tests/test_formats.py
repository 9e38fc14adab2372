"""Affine codes and packed weights against their definitions."""

from __future__ import annotations

import math
import re

import pytest
import torch
from _problems import CODES, codes

from pyvit_accel.formats import affine, packed


def test_rounds_half_to_even():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5, 300.0, -128.5, -300.0])
    expected = torch.tensor([-2, -2, 0, 0, 2, 2, 126, 127, 127, -128, -128], dtype=torch.int8)
    assert torch.equal(affine.quantize(x, torch.ones(1)), expected)
    assert torch.equal(affine.quantize(x, torch.ones(1), q_min=-127)[-2:], expected[-2:] + 1)


def test_multiplies_by_the_reciprocal():
    """91.5 / 61 is 1.5, which rounds to 2; 91.5 * (1 / 61) is less. The contract is the product, on every device."""
    assert affine.quantize(torch.tensor([91.5]), torch.tensor([61.0])) == 1


@pytest.mark.parametrize("zero_point", [0, -128, 31])
def test_error_bound_holds_and_is_reached(zero_point):
    x, scale = torch.randn(100_000) * 60, torch.tensor([0.37])
    error = (affine.dequantize(affine.quantize(x, scale, zero_point), scale, zero_point) - x).abs()
    bound = affine.error_bound(x, scale, zero_point)
    assert (error <= bound).all()
    inside = bound < scale
    assert inside.any() and not inside.all()
    assert error[inside].max() > 0.49 * scale and (error[~inside] > 0.9 * (bound[~inside] - scale)).all()


GRANULARITIES = {  # of x (4, 3, 20, 16): the shape of scale and zero point
    "tensor": (1,),
    "channel": (16,),
    "head": (3, 1, 1),
    "token": (4, 1, 20, 1),
    "group": (4, 3, 20, 2, 1),  # of x (4, 3, 20, 2, 8)
}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_granularity_is_within_its_bound(granularity, symmetric, bits):
    """And reaches it: half a step in range, the rest of the way to the end of the range beyond."""
    shape = GRANULARITIES[granularity]
    x = torch.randn(4, 3, 20, 2, 8) * 3 if granularity == "group" else torch.randn(4, 3, 20, 16) * 3
    scale = (torch.rand(shape) + 0.5) * 8 / 2**bits
    zero_point = 0 if symmetric else torch.randint(-2, 3, shape)
    codes = affine.quantize(x, scale, zero_point, bits)
    lo, hi = affine.q_range(bits)
    assert codes.min() >= lo and codes.max() <= hi and codes.dtype == torch.int8
    error = (affine.dequantize(codes, scale, zero_point) - x).abs()
    bound = affine.error_bound(x, scale, zero_point, bits)
    assert (error <= bound).all()
    kept = (codes > lo) & (codes < hi)
    assert (error / bound)[kept].max() > 0.9 and (~kept).any()
    assert ((bound - error)[~kept] <= scale.expand(x.shape)[~kept] * 1.001).all()


def test_zero_point_shifts_codes():
    x, scale = torch.randn(1000), torch.tensor([0.5])
    assert torch.equal(affine.quantize(x, scale, 9), affine.quantize(x, scale) + 9)


def test_every_code_survives_dequantize():
    q, scale = torch.arange(-128, 128).to(torch.int8), torch.tensor([0.0123])
    assert torch.equal(affine.quantize(affine.dequantize(q, scale, 5), scale, 5), q)


def test_weight_scale_is_the_row_maximum_over_127():
    w = torch.randn(5, 40)
    w[3] = 0
    q, scale = affine.quantize_weight(w)
    assert torch.equal(scale[:3], w[:3].abs().amax(1) / 127) and scale[3] > 0
    assert (q[[0, 1, 2, 4]].abs().amax(1) == 127).all() and not q[3].any()
    assert ((affine.dequantize(q, scale[:, None]) - w).abs() <= affine.error_bound(w, scale[:, None], q_min=-127)).all()


def test_negative_extreme_of_a_weight_is_minus_127():
    q, _ = affine.quantize_weight(torch.tensor([[-3.0, 1.0]]))
    assert q.tolist() == [[-127, 42]]


def low_bit_codes(bits, N, K, kind="random"):
    return codes(kind, N, K) >> (8 - bits)


@pytest.mark.parametrize("bits", packed.PLANES)
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (16, 4), (17, 5), (33, 63), (48, 64), (5, 130)])
def test_packed_round_trip(bits, kind, N, K):
    q = low_bit_codes(bits, N, K, kind)
    w_packed = packed.pack(q, bits)
    assert w_packed.dtype == torch.uint8 and tuple(w_packed.shape) == packed.packed_shape(N, K, bits)
    assert packed.bits_of(w_packed, N, K) == bits
    assert torch.equal(packed.unpack(w_packed, N, K), q)


@pytest.mark.parametrize(("bits", "planes"), [(2, [2]), (3, [2, 1]), (4, [4]), (5, [4, 1]), (6, [4, 2]), (8, [8])])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (17, 37), (33, 70)])
def test_packed_bytes(bits, planes, N, K):
    """Every bit where the layout says: sums first, then chunks of 32 inputs, plane by plane."""
    q = low_bit_codes(bits, N, K)
    expected = torch.zeros(packed.packed_shape(N, K, bits), dtype=torch.uint8)
    padded = torch.zeros(expected.shape[0] * 16, -(-K // 32) * 32, dtype=torch.int64)
    padded[:N, :K] = q.long()
    for n in range(padded.shape[0]):
        tile, feature = divmod(n, 16)
        total = padded[n].sum().to(torch.int32).reshape(1).view(torch.uint8)
        expected[tile, 4 * feature : 4 * feature + 4] = total
        for k in range(padded.shape[1]):
            chunk, group, i = k // 32, k % 32 // 4, k % 4
            u = int(padded[n, k]) + (0 if bits == 8 else 2 ** (bits - 1))
            start, left = 64 + chunk * 64 * bits, bits
            for p in planes:
                left -= p
                field, register = divmod(group, p)
                part = (u >> left) % 2**p
                expected[tile, start + 64 * register + 4 * feature + i] |= part << (0 if p == 8 else field * p)
                start += 64 * p
    assert torch.equal(packed.pack(q, bits), expected)


def test_bits_of_vit_base_weights():
    """W4 in at most 0.27 of fp16's bytes, scales included."""
    linears = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    held = sum(math.prod(packed.packed_shape(N, K, 4)) + 4 * N for N, K in linears)
    assert held <= 0.27 * sum(2 * N * K for N, K in linears)


def test_packs_strided_codes():
    q = codes("random", 9, 20).T
    assert torch.equal(packed.pack(q), packed.pack(q.contiguous()))


def test_pack_errors():
    with pytest.raises(TypeError, match=r"^pack: expected int8 codes \(N, K\), got torch.float32 \(2, 3\)$"):
        packed.pack(torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"^pack: expected int8 codes \(N, K\), got torch.int8 \(3,\)$"):
        packed.pack(torch.zeros(3, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"^pack: bits=7; use one of 2, 3, 4, 5, 6, 8$"):
        packed.pack(torch.zeros(3, 4, dtype=torch.int8), 7)
    with pytest.raises(ValueError, match=r"^pack: codes reach from -9 to 2, but 4 bits hold -8 to 7$"):
        packed.pack(torch.tensor([[2, -9]], dtype=torch.int8), 4)
    w_packed = packed.pack(codes("random", 16, 8))
    message = "w_packed of N=17, K=8 has shape (2, 192) for 2 bits, (2, 320) for 4 bits, (2, 576) for 8 bits ...; "
    with pytest.raises(ValueError, match="^" + re.escape(message + "got (1, 576)") + "$"):
        packed.unpack(w_packed, 17, 8)
    with pytest.raises(TypeError, match=r"^unpack: packed weights are uint8, got torch.int8$"):
        packed.unpack(w_packed.view(torch.int8), 16, 8)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_weight_scale_beats_the_whole_range(bits):
    """The search includes the range that clips nothing, and its codes stay in the format."""
    w = torch.randn(20, 192)
    w[:, 3] *= 4
    w[7] = 0
    q, scale = affine.quantize_weight(w, bits)
    lo, hi = affine.weight_range(bits)
    assert q.min() >= lo and q.max() <= hi and (scale > 0).all() and not q[7].any()
    full = affine.scale_of(w.abs().amax(1), hi)
    whole = affine.dequantize(affine.quantize(w, full[:, None], bits=bits, q_min=lo), full[:, None])
    error, most = ((affine.dequantize(q, scale[:, None]) - w).square().sum(1), (whole - w).square().sum(1))
    assert (error <= most * (1 + 1e-5)).all()
    assert bits > 4 or error.sum() < 0.9 * most.sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_are_within_their_bound(bits, symmetric):
    w = torch.randn(6, 96) + 3
    w[2, 32:64] = 0
    w[3, :32] = 5
    q, scale, zero_point = affine.quantize_groups(w, bits, 32, symmetric)
    assert q.shape == w.shape and scale.shape == zero_point.shape == (6, 3)
    assert torch.equal(zero_point, zero_point.round()) and (scale > 0).all()
    runs, held = w.view(6, 3, 32), q.view(6, 3, 32)
    error = (affine.dequantize(held, scale[..., None], zero_point[..., None]) - runs).abs()
    assert (error <= affine.error_bound(runs, scale[..., None], zero_point[..., None], bits)).all()
    assert symmetric or (error <= scale[..., None] * 0.5001).all()  # nothing is clipped


def test_affine_errors():
    with pytest.raises(ValueError, match=r"^affine: bits=9 is outside 2..8$"):
        affine.quantize(torch.zeros(3), torch.ones(1), bits=9)
    message = "quantize_groups: K=96 is not a multiple of group_size=36; use 32"
    with pytest.raises(ValueError, match=f"^{message}$"):
        affine.quantize_groups(torch.zeros(2, 96), 4, 36)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"^affine: scale\[1\] is .*; every scale must be positive and finite$"):
            affine.check_scale(torch.tensor([1.0, bad]))
