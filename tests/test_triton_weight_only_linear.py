"""The Triton launcher weight_only_linear: decoded weights bit for bit, products within a bound."""

from __future__ import annotations

import pytest
import torch
from _problems import U32
from _triton import DEVICE, kernel, random_codes, run, uniform

from pyvit_accel.formats.packed import pack

BITS = (2, 3, 4, 5, 6, 8)
UNIT_ROUNDOFF = {torch.float32: U32, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # the interpreter gets bfloat16 wrong
FORMS = ("column", "scale", "zero_point")  # one scale per feature; per group; per group with zero points


def weight(form, bits, N, K, groups):
    """Packed codes, scale and zero point, and the decoded weight float32 (N, K)."""
    q = random_codes(bits, N, K)
    if form == "column":
        scale = uniform(N)
        return (pack(q, bits), scale, None), q.float() * scale[:, None]
    scale = uniform(N, groups)
    zero_point = torch.randint(-20, 20, (N, groups)).float() if form == "zero_point" else None
    runs = q.view(N, groups, -1).float() - (0 if zero_point is None else zero_point[..., None])
    return (pack(q, bits), scale, zero_point), (runs * scale[..., None]).flatten(1)


def check_identity(form, bits, dtype, K, groups):
    torch.manual_seed(0)
    packed, w = weight(form, bits, 45, K, groups)
    decoded = kernel("weight_only_linear", torch.eye(K, dtype=dtype), *packed, None)
    assert decoded.dtype == dtype
    if dtype == torch.float32:  # tf32x3: two numbers of 11 bits each for one of 24
        assert ((decoded.T - w).abs() <= 2.0**-22 * w.abs()).all()
    else:
        assert torch.equal(decoded.T, w.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", BITS)
def test_identity_returns_the_weight(bits, form, dtype):
    """Groups of 32 inputs, of which one block of inputs holds none, one or two; and a tail."""
    run(check_identity, form, bits, dtype, 96, 3)


@pytest.mark.parametrize("K, groups", [(150, 10), (37, 37), (66, 1), (128, 1), (192, 3), (1, 1)])
def test_groups_of_any_size(K, groups):
    run(check_identity, "zero_point", 4, torch.float16, K, groups)


def check_product(form, bits, dtype, M, N, K, groups, bias):
    """w rounded once to dtype where groups scale it, a float32 sum over K, scale and bias after it, y once to dtype.

    float32 operands are three tf32 products on a GPU: 2^-22 of each is left out.
    """
    torch.manual_seed(0)
    packed, w = weight(form, bits, N, K, groups)
    x, b = torch.randn(M, K + 3).to(dtype)[:, :K], torch.randn(N) if bias else None
    y = kernel("weight_only_linear", x, *packed, b)
    truth, u = x.double() @ w.double().T, UNIT_ROUNDOFF[dtype]
    rounding = (K + 3) * U32 + (0 if form == "column" else u) + (2.0**-22 if dtype == torch.float32 else 0)
    bound = rounding * (x.double().abs() @ w.double().abs().T)
    bound += x.double().abs().sum(dim=1, keepdim=True) * SMALLEST[dtype]
    if bias:
        truth = truth + b
        bound += U32 * truth.abs()
    bound = 1.01 * bound + u * truth.abs() + SMALLEST[dtype]
    assert y.dtype == dtype and y.shape == (M, N)
    assert ((y.double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form, bits", [("column", 8), ("scale", 3), ("zero_point", 4)])
@pytest.mark.parametrize("M, N, K, groups", [(1, 1, 1, 1), (33, 70, 130, 10), (70, 33, 192, 3), (0, 8, 8, 1)])
def test_within_bound_of_float64(form, bits, dtype, M, N, K, groups):
    run(check_product, form, bits, dtype, M, N, K, groups, M > 1)


def check_gaps(K):
    """x lies between values that must not be read, copied into aligned rows (K=5) or read where it is."""
    packed, _ = weight("zero_point", 4, 17, K, 1)
    x = torch.full((3, K + 48), torch.nan, dtype=torch.float16)
    x[:, 16:-32] = 1
    assert kernel("weight_only_linear", x[:, 16:-32], *packed, None).isfinite().all()


@pytest.mark.parametrize("K", [5, 48, 80])
def test_reads_nothing_beyond_its_rows(K):
    run(check_gaps, K)
