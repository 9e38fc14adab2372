"""The Triton launcher mix_tokens against its reference: sums and means bit for bit."""

from __future__ import annotations

import pytest
import torch
from _problems import U32, padded, transposed
from _triton import assert_equal, kernel, run

from pyvit_accel import reference

DTYPES = (torch.float32, torch.float16)  # the interpreter gets bfloat16 wrong


def lists(B, N, M):
    """Lists of no, one and many rows: col, ptr, weight."""
    assign = torch.randint(-1, M, (B, N)).int()
    ptr, col, weight, _ = reference.group_tokens(assign, M, torch.rand(B, N) + 0.1)
    return col, ptr, weight


def check_equals(N, C, M, reduce, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, N, C).to(dtype)
    col, ptr, weight = lists(2, N, M)
    assert_equal("mix_tokens", x, col, ptr, weight, None, 1, reduce)
    assert_equal("mix_tokens", transposed(x), col, ptr, None, None, 1, reduce)
    for width in (1, 3):
        col, weight = torch.randint(-1, N, (2, 12)).int(), torch.randn(2, 12)
        base = torch.randn(2, 12 // width, C).to(dtype) if reduce == "sum" else None
        assert_equal("mix_tokens", padded(x), col, None, weight, base, width, reduce)


def check_mlerp(N, C, M, dtype):
    """mlerp takes two norms of C squares in another order than the reference, which takes the same mean."""
    torch.manual_seed(0)
    x = torch.randn(2, N, C).to(dtype)
    args = (x, *lists(2, N, M), None, 1, "mlerp")
    y, truth = kernel("mix_tokens", *args), reference.mix_tokens(*args)
    assert y.dtype == dtype
    u = {torch.float32: U32, torch.float16: 2.0**-11}[dtype]
    error = ((2 * C + 8) * U32 + 2 * u) * truth.double().abs() + torch.finfo(dtype).smallest_normal
    assert ((y.double() - truth.double()).abs() <= error).all()


def check_nothing():
    x, col = torch.randn(1, 4, 5), torch.tensor([[-1, -1, 0, 1]]).int()
    ptr, weight = torch.tensor([[0, 0, 2, 4, 4]]).int(), torch.tensor([[1.0, 1.0, 0.5, -0.5]])
    for reduce in ("sum", "mean", "mlerp"):
        assert_equal("mix_tokens", x, col, ptr, weight, None, 1, reduce)
    assert_equal("mix_tokens", x, col, ptr, weight, torch.randn(1, 4, 5), 1, "sum")
    for B, N, C, L in ((0, 4, 5, 2), (2, 4, 0, 2), (2, 4, 5, 0)):
        assert_equal("mix_tokens", torch.ones(B, N, C), torch.zeros(B, L).int(), None, None, None, 1, "sum")


def check_long_list():
    """More rows than are in flight at once, of more channels than a block."""
    torch.manual_seed(0)
    x, col = torch.randn(1, 9, 1100), torch.randint(-1, 9, (1, 23)).int()
    assert_equal("mix_tokens", x, col, None, torch.randn(1, 23), None, 23, "mean")
    args = (x, col, None, torch.rand(1, 23), None, 23, "mlerp")
    torch.testing.assert_close(kernel("mix_tokens", *args), reference.mix_tokens(*args), rtol=2208 * U32, atol=0)
    assert torch.equal(kernel("mix_tokens", *args), kernel("mix_tokens", *args))


def check_published():
    merge = (torch.tensor([[0, 4, 1, 3, 6, 2, 5, 7]]).int(), torch.tensor([[0, 1, 2, 3, 5, 7, 8]]).int(), None, None, 1)
    x = torch.tensor([10.0, 1, 2, 3, 4, 5, 6, 7]).view(1, 8, 1)
    assert kernel("mix_tokens", x, *merge, "mean").flatten().tolist() == [10, 4, 1, 4.5, 3.5, 7]
    x = torch.tensor([[[3.0, 0], [0, 4]]])
    y = kernel("mix_tokens", x, torch.tensor([[0, 1]]).int(), None, None, None, 2, "mlerp")
    torch.testing.assert_close(y[0, 0], torch.tensor([2.4, 3.2]), rtol=4 * U32, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize(("N", "C", "M"), [(1, 1, 1), (5, 3, 4), (20, 192, 9)])
def test_equals_reference(N, C, M, reduce, dtype):
    run(check_equals, N, C, M, reduce, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "C", "M"), [(5, 3, 4), (20, 192, 9)])
def test_mlerp(N, C, M, dtype):
    run(check_mlerp, N, C, M, dtype)


def test_nothing_to_add():
    run(check_nothing)


def test_long_list():
    run(check_long_list)


def test_published_merges():
    run(check_published)
