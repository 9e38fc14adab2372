"""mix_tokens: gather, merge, un-merge, reconstruct and scatter, as weighted sums of rows."""

from __future__ import annotations

import re

import pytest
import torch
from _problems import U32, assert_same_bits, padded, reference

from pyvit_accel import ops
from pyvit_accel import reference as references

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDOFF = {torch.float32: U32, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SIZES = [(1, 1, 1), (5, 3, 4), (197, 64, 184), (577, 3, 100), (50, 192, 20), (24, 768, 31)]  # N, C, M


def lists(B, N, M, weighted=True):
    """Groups of no, one and many rows, as (col, ptr, weight) for mix_tokens."""
    assign = torch.randint(-1, M, (B, N)).int()
    ptr, col, weight, _ = ops.group_tokens(assign, M, torch.rand(B, N) + 0.1 if weighted else None)
    return col, ptr, weight


def merge_of(value, index, N, merges, prefix, weight):
    """What a matching merges, as (col, ptr, weight) and the size of every new row."""
    rows = ops.merge_pairs(value, index, N, merges, prefix)
    ptr, col, weight, total = ops.group_tokens(rows, N - merges, weight)
    return (col, ptr, weight), total, rows


def floats(*values):
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize(("N", "C", "M"), SIZES)
def test_equals_reference(kernel, N, C, M, reduce, dtype):
    x = torch.randn(2, N, C).to(dtype)
    for weighted in (True, False):
        args = (x, *lists(2, N, M, weighted))
        assert_same_bits(kernel(ops.mix_tokens, *args, reduce=reduce), reference(ops.mix_tokens, *args, reduce=reduce))
    args, base = (x, *lists(2, N, M)), torch.randn(2, M, C).to(dtype)
    assert_same_bits(kernel(ops.mix_tokens, *args, base=base), reference(ops.mix_tokens, *args, base=base))
    args = (x, torch.randint(-1, N, (2, 7 * 3)).int(), None, torch.randn(2, 7 * 3))
    for width in (1, 3, 7, 21):
        options = {"width": width, "reduce": reduce}
        assert_same_bits(kernel(ops.mix_tokens, *args, **options), reference(ops.mix_tokens, *args, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", ["sum", "mean", "mlerp"])
@pytest.mark.parametrize(("N", "C", "M"), SIZES)
def test_within_rounding_of_float64(impl, N, C, M, reduce, dtype):
    """Of every product and sum in the longest list, of two norms of C squares, and of the result once."""
    x, (col, ptr, weight) = torch.randn(2, N, C).to(dtype), lists(2, N, M)
    result = impl(ops.mix_tokens, x, col, ptr, weight, reduce=reduce)
    assert result.dtype == dtype
    exact = references.mix_tokens
    truth = exact(x.double(), col, ptr, weight, None, 1, reduce)
    within = exact(x.double().abs(), col, ptr, weight, None, 1, "sum" if reduce == "sum" else "mean")
    error = (2 * int(ptr.diff().max()) + 1) * U32 * within
    if reduce == "mlerp":
        mean = exact(x.double(), col, ptr, weight, None, 1, "mean")
        length = mean.norm(dim=2, keepdim=True).clamp(min=1e-12)
        relative = (C + 5) * U32 + error.norm(dim=2, keepdim=True) / length
        error = truth.norm(dim=2, keepdim=True) / length * error + relative * truth.abs()
    error = 1.01 * error + ROUNDOFF[dtype] * truth.abs() + torch.finfo(dtype).tiny
    assert ((result.double() - truth).abs() <= error).all()


def test_every_float16(kernel):
    """In and out, subnormals and infinities among them, halved so that subnormals are rounded to even."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    x = x[~x.isnan()].view(1, 1, -1)
    for weight in (1.5, 0.5, 2.0**-12, 3.0):
        args = (x, torch.zeros(1, 1).int(), None, torch.tensor([[weight]]))
        assert_same_bits(kernel(ops.mix_tokens, *args), (x.float() * weight).half())


def test_nan_stays_in_its_lists(impl):
    for dtype in DTYPES:
        x = torch.randn(1, 3, 40).to(dtype)
        x[0, 1, 5] = torch.nan
        col, ptr = torch.tensor([[0, 2, 0, 1, 1]]).int(), torch.tensor([[0, 2, 4, 5]]).int()
        y = impl(ops.mix_tokens, x, col, ptr, torch.tensor([[0.5, 0.5, 1.0, 0.0, 1.0]]), reduce="mean")
        assert y.isnan().sum() == 2 and y[0, 1:, 5].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_and_scatter_copy(impl, dtype):
    x, base = torch.randn(2, 50, 33).to(dtype), torch.randn(2, 50, 33).to(dtype)
    index, dropped, inverse = ops.select_tokens(torch.randn(2, 50), 20, 1, "index")
    gathered = impl(ops.mix_tokens, x, index)
    assert_same_bits(gathered, x.gather(1, index.long()[..., None].expand(-1, -1, 33)))
    assert_same_bits(impl(ops.mix_tokens, x, index, reduce="mean"), gathered)
    scattered = impl(ops.mix_tokens, gathered, inverse, base=base)
    gone = dropped.long()[..., None].expand(-1, -1, 33)
    assert torch.equal(scattered.gather(1, gone), base.gather(1, gone))
    kept = index.long()[..., None].expand(-1, -1, 33)
    assert torch.equal(scattered.gather(1, kept), (base.float() + x.float()).to(dtype).gather(1, kept))


def test_nothing_to_add(impl):
    """Lists that are empty, that hold -1 only, or whose weights sum to zero."""
    x, base = torch.randn(1, 4, 5), torch.randn(1, 4, 5)
    col, ptr = torch.tensor([[-1, -1, 0, 1]]).int(), torch.tensor([[0, 0, 2, 4, 4]]).int()
    weight = floats([1.0, 1.0, 0.5, -0.5])
    y = impl(ops.mix_tokens, x, col, ptr, weight, base=base)
    assert torch.equal(y[0, [0, 1, 3]], base[0, [0, 1, 3]]) and (y[0, 2] != base[0, 2]).all()
    for reduce in ("sum", "mean", "mlerp"):
        y = impl(ops.mix_tokens, x, col, ptr, weight, reduce=reduce)
        assert not y[0, [0, 1, 3]].any() and bool(y[0, 2].any()) == (reduce == "sum")
    for B, N, C, L in ((0, 4, 5, 2), (2, 4, 0, 2), (2, 4, 5, 0)):
        y = impl(ops.mix_tokens, torch.ones(B, N, C), torch.zeros(B, L).int())
        assert y.shape == (B, L, C)


def test_strides(kernel):
    x, (col, ptr, weight) = torch.randn(2, 30, 40), lists(2, 30, 12)
    args = (x, col, ptr, weight)
    expected = reference(ops.mix_tokens, *args, reduce="mean")
    for view in (padded, lambda t: t.mT.contiguous().mT, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)):
        assert_same_bits(kernel(ops.mix_tokens, view(x), *args[1:], reduce="mean"), expected)
    apart = tuple(torch.stack([t, t], dim=-1)[..., 0] for t in args[1:])
    assert_same_bits(kernel(ops.mix_tokens, x, *apart, reduce="mean"), expected)


def test_images_do_not_meet(impl):
    args, order = (torch.randn(5, 20, 24), *lists(5, 20, 9)), torch.tensor([3, 0, 4, 1, 2])
    y = impl(ops.mix_tokens, *args, reduce="mlerp")
    assert torch.equal(impl(ops.mix_tokens, *args, reduce="mlerp"), y)
    assert torch.equal(impl(ops.mix_tokens, *(t[order] for t in args), reduce="mlerp"), y[order])


def test_number_of_threads_does_not_show(kernel):
    args, before = (torch.randn(3, 197, 192), *lists(3, 197, 150)), torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(kernel(ops.mix_tokens, *args, reduce="mlerp"))
    torch.set_num_threads(before)
    assert_same_bits(*results)


def test_merging_keeps_sums_and_is_idempotent(impl):
    N, merges = 197, 60
    x, size, metric = torch.randn(2, N, 48), torch.rand(2, N) * 3 + 1, torch.randn(2, N, 16)
    value, index = ops.match_tokens(metric[:, ::2], metric[:, 1::2])
    plan, total, rows = merge_of(value[..., 0], index[..., 0], N, merges, 1, size)

    def merge(x):
        return impl(ops.mix_tokens, x, *plan, reduce="mean")

    merged = merge(x)
    longest = int(plan[1].diff().max())
    assert ((total.double().sum(1) - size.double().sum(1)).abs() <= longest * U32 * size.double().sum(1)).all()
    before, after = (size.double()[..., None] * x).sum(1), (total.double()[..., None] * merged).sum(1)
    error = (2 * longest + 2) * U32 * (size.double()[..., None] * x.double().abs()).sum(1)
    assert ((after - before).abs() <= error).all()
    full = impl(ops.mix_tokens, merged, rows)  # un-merge
    again = impl(ops.mix_tokens, merge(full), rows)
    assert ((again - full).abs() <= (2 * longest + 2) * U32 * full.abs()).all()
    assert not torch.equal(full, x)


X2 = floats(10, 1, 2, 3, 4, 5, 6, 7).view(1, 8, 1)
METRIC2 = floats((1, 0), (1, 0), (3, 4), (0, 1), (4, 3), (6, 8), (0, 2), (1, 1))[None]


def tome(impl, metric, x, size, merges, prefix):
    a, b = metric[:, ::2], metric[:, 1::2]
    value, index = (t[..., 0] for t in ops.match_tokens(a, b))
    plan, total, _ = merge_of(value, index, x.shape[1], merges, prefix, size)
    return impl(ops.mix_tokens, x, *plan, reduce="mean").flatten(), total.flatten()


def test_published_tome(impl):
    y, size = tome(impl, METRIC2, X2, torch.ones(1, 8), 2, 1)
    assert y.tolist() == [10, 4, 1, 4.5, 3.5, 7] and size.tolist() == [1, 1, 1, 2, 2, 1]
    y, size = tome(impl, METRIC2, X2, torch.ones(1, 8), 3, 0)
    assert y.tolist() == [4, 5.5, 4.5, 3.5, 7] and size.tolist() == [1, 2, 2, 2, 1]


def test_published_tome_many_to_one(impl):
    metric = floats((1, 0), (1, 0), (2, 0), (0, 1), (5, 0), (0, 3), (0, 1), (-1, 0))[None]
    x, size = torch.arange(2.0, 17, 2).view(1, 8, 1), floats([1, 2, 3, 1, 1, 1, 2, 1])
    y, total = tome(impl, metric, x, size, 4, 0)
    torch.testing.assert_close(y, floats(5.428571, 12, 12, 16), rtol=0, atol=5e-7)
    assert total.tolist() == [7, 3, 1, 1]


def test_published_diffrate(impl):
    x = floats((9, 9), (0, 1), (2, 2), (0, 2), (1, 0))[None]
    ptr, col, _, _ = ops.group_tokens(torch.tensor([[0, 1, 2, 1, 2]]).int(), 3)
    assert impl(ops.mix_tokens, x, col, ptr, reduce="mean")[0].tolist() == [[9, 9], [0, 1.5], [1.5, 1]]


def test_published_evit(impl):
    """The fused token: one list of what was dropped."""
    scores = floats((0.10, 0.30, 0.20, 0.30, 0.05, 0.05), (0.02, 0.01, 0.40, 0.07, 0.40, 0.10))
    _, dropped, _ = ops.select_tokens(scores, 3)
    x = torch.arange(1.0, 7).view(1, 6, 1).repeat(2, 1, 1)
    y = impl(ops.mix_tokens, x, dropped, None, scores.gather(1, dropped.long()), width=3)
    torch.testing.assert_close(y.flatten(), floats(0.65, 0.32), rtol=4 * U32, atol=0)


def test_published_prumerge(impl):
    x = floats((1, 0), (0, 1), (2, 0), (0, 2), (3, 3), (1, 1))[None]
    a = floats(0.05, 0.10, 0.40, 0.25, 0.15, 0.05)
    col = torch.tensor([[2, 0, 4, 3, 1, 4, 0, 1, 4, 5]]).int()
    weight = a[col.long()]
    weight[0, [0, 3]] = 1
    y = impl(ops.mix_tokens, x, col, torch.tensor([[0, 3, 6, 10]]).int(), weight)
    torch.testing.assert_close(y[0], floats((2.5, 0.45), (0.45, 2.55), (0.55, 0.60)), rtol=4 * U32, atol=0)


def test_published_mlerp(impl):
    x = floats((3, 0), (0, 4))[None]
    y = impl(ops.mix_tokens, x, torch.tensor([[0, 1]]).int(), width=2, reduce="mlerp")
    torch.testing.assert_close(y[0, 0], floats(2.4, 3.2), rtol=4 * U32, atol=0)


@pytest.mark.parametrize(("col", "ptr", "message"), [
    ([[0, 4], [0, 1]], None, "mix_tokens: col of image 0 has 4, but x has the rows 0..3; -1 adds nothing"),
    ([[0, 1], [3, -2]], None, "mix_tokens: col of image 1 has -2, but x has the rows 0..3; -1 adds nothing"),
    ([[0, 1], [0, 1]], [[0, 1, 2], [0, 2, 1]], "mix_tokens: ptr of image 1 does not ascend within 0..2"),
    ([[0, 1], [0, 1]], [[0, 1, 3], [0, 1, 2]], "mix_tokens: ptr of image 0 does not ascend within 0..2"),
    ([[0, 1], [0, 1]], [[-1, 1, 2], [0, 1, 2]], "mix_tokens: ptr of image 0 does not ascend within 0..2"),
])  # fmt: skip
def test_indices_are_checked(kernel, col, ptr, message):
    ptr = None if ptr is None else torch.tensor(ptr).int()
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        kernel(ops.mix_tokens, torch.ones(2, 4, 3), torch.tensor(col).int(), ptr)


def test_errors():
    x, col = torch.ones(2, 4, 3), torch.zeros(2, 6).int()

    def refuses(error, message, *args, **kwargs):
        with pytest.raises(error, match="^" + re.escape(message)):
            ops.mix_tokens(*args, **kwargs)

    refuses(TypeError, "mix_tokens: x must be torch.float32 or torch.float16 or torch.bfloat16, got", x.double(), col)
    refuses(TypeError, "mix_tokens: col must be torch.int32, got torch.int64", x, col.long())
    refuses(ValueError, "mix_tokens: x has shape (4, 3), expected 3 dimensions", x[0], col)
    refuses(ValueError, "mix_tokens: col has 6 entries, which are not lists of width=4", x, col, width=4)
    ptr = torch.zeros(2, 3).int()
    refuses(ValueError, "mix_tokens: ptr (2, 3) with width=2; pass ptr (B, M + 1) or width", x, col, ptr, width=2)
    refuses(ValueError, "mix_tokens: x (2, 4, 3) and col (1, 6) differ in their number of images", x, col[:1])
    refuses(ValueError, "mix_tokens: weight (2, 5) must be like col (2, 6)", x, col, None, torch.ones(2, 5))
    refuses(ValueError, "mix_tokens: reduce='max' is not one of sum, mean, mlerp", x, col, reduce="max")
    message = "mix_tokens: base torch.float32 (2, 5, 3) with reduce='sum'; expected torch.float32 (2, 6, 3) and 'sum'"
    refuses(ValueError, message, x, col, base=torch.ones(2, 5, 3))
    message = "mix_tokens: base torch.float32 (2, 6, 3) with reduce='mean'; expected torch.float32 (2, 6, 3) and 'sum'"
    refuses(ValueError, message, x, col, base=torch.ones(2, 6, 3), reduce="mean")
