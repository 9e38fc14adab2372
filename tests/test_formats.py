"""Affine codes and packed weights against their definitions."""

from __future__ import annotations

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


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (16, 4), (17, 5), (33, 63), (48, 64), (5, 130)])
def test_packed_bytes(kind, N, K):
    """Every byte where the layout says: sums first, then byte 4 n + i of group g is feature n, input 4 g + i."""
    q = codes(kind, N, K)
    w_packed = packed.pack_w8(q)
    assert w_packed.dtype == torch.uint8 and tuple(w_packed.shape) == packed.packed_shape(N, K)
    assert torch.equal(packed.unpack_w8(w_packed, N, K), q)
    expected = torch.zeros(w_packed.shape, dtype=torch.int8)
    for n in range(N):
        tile, feature = divmod(n, 16)
        expected[tile, 4 * feature : 4 * feature + 4] = q[n].sum(dtype=torch.int32).reshape(1).view(torch.int8)
        for k in range(K):
            expected[tile, 64 + k // 4 * 64 + 4 * feature + k % 4] = q[n, k]
    assert torch.equal(w_packed.view(torch.int8), expected)


def test_packs_strided_codes():
    q = codes("random", 9, 20).T
    assert torch.equal(packed.pack_w8(q), packed.pack_w8(q.contiguous()))


def test_pack_errors():
    with pytest.raises(TypeError, match=r"^pack_w8: expected int8 codes \(N, K\), got torch.float32 \(2, 3\)$"):
        packed.pack_w8(torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"^pack_w8: expected int8 codes \(N, K\), got torch.int8 \(3,\)$"):
        packed.pack_w8(torch.zeros(3, dtype=torch.int8))
    w_packed = packed.pack_w8(codes("random", 16, 8))
    message = "unpack_w8: W8 v1 of N=17, K=8 is uint8 (2, 192), got torch.uint8 (1, 192)"
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        packed.unpack_w8(w_packed, 17, 8)
    message = "unpack_w8: W8 v1 of N=16, K=8 is uint8 (1, 192), got torch.int8 (1, 192)"
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        packed.unpack_w8(w_packed.view(torch.int8), 16, 8)
