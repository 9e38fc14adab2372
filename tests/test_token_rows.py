"""Rows by an index in quantize, norm_quant and lowbit_linear, sums into rows, packed attention with room to spare.

The truth is the reference on rows gathered before, put in their places after: no tolerance but the sign of zero.
"""

from __future__ import annotations

import re

import pytest
import torch
from _problems import assert_same_bits, codes, padded, reference, transposed, weights

from pyvit_accel import backends, ops
from pyvit_accel.formats import softmax

R = 23
PACKED = [*range(0, R, 2), *[-1] * 11]
INDICES = {
    "some": [5, 0, 22, 7, 1],
    "repeats": [3, 3, 0, 3, 22, 0, 3] * 5,
    "packed": PACKED,
    "none first": PACKED[::-1],
    "none between": [-1, 4, -1, -9, 4, 21, -1, 20, 3, 2, 1, 0, -1, 6, 8, -1],
    "none at all": [-1] * 30,
    "identity, then none": [*range(R), -1, -1],
    "empty": [],
}
by_index = pytest.mark.parametrize("name", list(INDICES))


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def put(index, result, value=0):
    """The rows of result, one for each that is not left out, in their places among rows of value."""
    whole = result.new_full((len(index), *result.shape[1:]), value)
    whole[index >= 0] = result
    return whole


def assert_gathers(impl, op, x, *args, name, **kwargs):
    index = ints(INDICES[name])
    found = impl(op, x, *args, **kwargs, index=index)
    result, scale = reference(op, x[index[index >= 0].long()], *args, **kwargs)
    static = scale is kwargs.get("scale")
    assert_same_bits(found, (put(index, result), scale if static else put(index, scale, 1)))


@by_index
@pytest.mark.parametrize("K", [5, 193])
def test_quantize(impl, name, K):
    x = torch.randn(R, K)
    for bits in (4, 8):
        for scale in (torch.rand(1) + 0.1, torch.rand(K) + 0.1):
            assert_gathers(impl, ops.quantize, x, name=name, scale=scale, zero_point=-3, bits=bits)
        assert_gathers(impl, ops.quantize, padded(x), name=name, bits=bits, clip=0.8)
        assert_gathers(impl, ops.quantize, transposed(x.abs()), name=name, minimum=-0.17, bits=bits)
    assert_gathers(impl, ops.quantize, x, name=name, table=codes("random", 256))


@by_index
@pytest.mark.parametrize("C", [5, 193])
def test_norm_quant(impl, name, C):
    x, weight, bias = torch.randn(R, C) * 3 + 1, torch.randn(C), torch.randn(C)
    for bits in (4, 8):
        for scale in (None, torch.rand(1) + 0.1, torch.rand(C) + 0.1):
            assert_gathers(impl, ops.norm_quant, padded(x), weight, bias, name=name, scale=scale, bits=bits)


def test_leading_dimensions_are_flattened(impl):
    """And the rows that are left out are not looked at: what is not a number would show."""
    x, one, index = torch.randn(2, 3, 4, 20), torch.ones(20), ints([23, -1, 4])
    taken = x.reshape(24, 20)[[23, 4]].clone()
    x.reshape(24, 20)[[n for n in range(24) if n not in (23, 4)]] = torch.nan
    for op, args in ((ops.quantize, ()), (ops.norm_quant, (one, one))):
        q, scale = impl(op, x, *args, index=index)
        expected, scales = reference(op, taken, *args)
        assert_same_bits((q, scale), (put(index, expected), put(index, scales, 1)))


def linear(K, N, rows=R, bits=8):
    _, w_packed, w_scale = weights(N, K, bits=bits)
    return codes("random", rows, K), torch.rand(rows) * 0.02 + 1e-4, w_packed, w_scale, torch.randn(N)


def gathered(args, index, residual=None, **kwargs):
    """lowbit_linear of rows gathered before."""
    x, x_scale, *rest = args
    live = index >= 0
    rows = index[live].long()
    residual = None if residual is None else residual[live]
    x_scale = x_scale if x_scale.numel() == 1 else x_scale[rows]
    return reference(ops.lowbit_linear, x[rows], x_scale, *rest, residual=residual, **kwargs)


@by_index
@pytest.mark.parametrize(("K", "N", "bits", "activation"), [(37, 33, 8, "gelu"), (64, 64, 4, "none")])
def test_lowbit_linear(impl, name, K, N, bits, activation):
    index, args = ints(INDICES[name]), linear(K, N, bits=bits)
    everything = {"layer_scale": torch.randn(N), "residual": torch.randn(len(index), N + 3)[:, :N]}
    everything["residual"][index < 0] = torch.nan  # read by nobody
    for extra, new in (({}, (args[0], args[1][:1], *args[2:])), (everything, args)):
        for out_scale, out_bits in ((None, 8), (torch.rand(N) * 0.1 + 0.01, 4)):
            kwargs = extra | {
                "x_zero_point": -5, "activation": activation, "out_scale": out_scale, "out_zero_point": 3,
                "out_bits": out_bits,
            }  # fmt: skip
            expected = put(index, gathered(new, index, **kwargs))
            assert_same_bits(impl(ops.lowbit_linear, *new, **kwargs, index=index), expected)


def test_one_row_for_all(impl):
    args, index = linear(40, 32, rows=1), ints([0, -1, 0, 0])
    assert_same_bits(impl(ops.lowbit_linear, *args, index=index), put(index, gathered(args, index)))


@pytest.mark.parametrize(("rows", "K", "N"), [(700, 2000, 40), (300, 130, 200)])
def test_more_rows_than_a_block_and_threads(kernel, rows, K, N):
    """Blocks of rows on their own, each with rows left out, and divided over threads in every way."""
    args, index = linear(K, N, rows), torch.randint(-rows // 2, rows, (rows + 9,)).int()
    places = torch.randperm(rows + 50)[: rows + 9].int() - 20
    out = torch.randn(rows + 30, N)
    expected = put(index, gathered(args, index, activation="gelu"))
    scattered = added(out, places, args, index)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same_bits(kernel(ops.lowbit_linear, *args, activation="gelu", index=index), expected)
            assert_same_bits(scatter(kernel, out, places, *args, index=index), scattered)
    finally:
        torch.set_num_threads(before)


def scatter(impl, out, *args, **kwargs):
    def op(out, *args, **kwargs):
        assert ops.lowbit_linear_scatter(out, *args, **kwargs) is None
        return out

    return impl(op, padded(out) if out.dim() == 2 else out.clone(), *args, **kwargs)


def added(out, places, args, index=None, **kwargs):
    """out and lowbit_linear of rows gathered before, added as its residual and put back."""
    source = torch.arange(len(args[0])) if index is None else index.clone()
    live = (source >= 0) & (places >= 0)
    to, out = places[live].long(), out.clone()
    out[to] = gathered(args, source[live], out[to], **kwargs)
    return out


PLACES = {
    "anywhere": [11, 3, 40, 7, 25, 8],
    "in order": [0, 1, 2, 3, 4, 5],
    "packed": [0, 2, 3, 9, -1, -1],
    "none first": [-1, -4, 3, 0, 10, 4],
    "none between": [5, -1, 4, -1, 3, 2],
    "none at all": [-1] * 6,
}


@pytest.mark.parametrize("name", list(PLACES))
@pytest.mark.parametrize(("K", "N", "bits"), [(37, 33, 8), (64, 64, 4)])
def test_lowbit_linear_scatter(impl, name, K, N, bits):
    places, args = ints(PLACES[name]), linear(K, N, bits=bits)
    out = torch.randn(41, N)
    out[20] = torch.inf  # no row goes here
    full = {"x_zero_point": 7, "activation": "gelu", "layer_scale": torch.randn(N)}
    for kwargs in ({}, full):
        first = [t[:6] if t.shape[0] == R else t for t in args]
        assert_same_bits(scatter(impl, out, places, *first, **kwargs), added(out, places, first, **kwargs))
        for index, scales in (([4, 0, 4, 22, 4, 9], args[1][:1]), ([-1, 3, -2, 3, 1, 1], args[1])):
            new = args[0], scales, *args[2:]
            expected = added(out, places, new, ints(index), **kwargs)
            assert_same_bits(scatter(impl, out, places, *new, **kwargs, index=ints(index)), expected)


def test_scatter_into_any_layout(impl):
    """Of tokens (B, N, C), or of a matrix whose rows are not contiguous."""
    args, places = linear(37, 20, 6), ints(PLACES["none between"])
    out = torch.randn(12, 20)
    expected = added(out, places, args)
    assert_same_bits(scatter(impl, out.reshape(3, 4, 20), places, *args), expected.reshape(3, 4, 20))
    for layout in (transposed, padded):
        laid_out = layout(out.clone())
        impl(ops.lowbit_linear_scatter, laid_out, places, *args)
        assert torch.equal(laid_out, expected)


def test_scatter_into_nothing(impl):
    args = linear(37, 20, 3)
    assert scatter(impl, torch.zeros(0, 20), ints([-1] * 3), *args).shape == (0, 20)
    out = torch.randn(4, 20)
    assert_same_bits(scatter(impl, out, ints([]), *linear(37, 20, 0)), out)
    assert_same_bits(scatter(impl, out, ints([0, 2]), *linear(37, 20, 0), index=ints([-1, -1])), out)


def test_a_routed_layer_needs_no_count(impl):
    """Kept tokens are gathered, normalised, multiplied and added to their own rows; the others pass through."""
    B, N, C, hidden = 2, 9, 24, 40
    x, mask = torch.randn(B, N, C), torch.rand(B, N) > 0.5
    up, down = linear(C, hidden), linear(hidden, C)
    one = torch.ones(C)

    def routed(x, mask):
        y, (_, _, _, rows) = x.clone(), ops.split_tokens(mask)
        q, scale = ops.norm_quant(x, one, one, index=rows)
        h, h_scale = ops.quantize(ops.lowbit_linear(q, scale, *up[2:], activation="gelu", index=_places(rows)))
        ops.lowbit_linear_scatter(y, rows, h, h_scale, *down[2:])
        return y

    def masked(x, mask):
        q, scale = ops.norm_quant(x, one, one)
        h, h_scale = ops.quantize(ops.lowbit_linear(q, scale, *up[2:], activation="gelu"))
        y = ops.lowbit_linear(h, h_scale, *down[2:], residual=x)
        return torch.where(mask[..., None], y, x)

    assert_same_bits(impl(routed, x, mask), reference(masked, x, mask))
    compiled = torch.compile(routed, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_same_bits(compiled(x, mask), reference(masked, x, mask))


def _places(rows):
    return torch.where(rows < 0, -1, torch.arange(len(rows), dtype=torch.int32, device=rows.device))


def refuses(error, text, op, *args, **kwargs):
    with pytest.raises(error, match="^" + re.escape(text) + "$"):
        op(*args, **kwargs)


def test_errors():
    x, one = torch.randn(R, 10), torch.ones(10)
    args, index = linear(10, 20), ints([1, 2, -1])
    for op, of in ((ops.quantize, (x,)), (ops.norm_quant, (x, one, one)), (ops.lowbit_linear, args)):
        name = op.__name__
        refuses(TypeError, f"{name}: index must be int32, got torch.int64", op, *of, index=index.long())
        text = f"{name}: index has shape (1, 3); use (M,), one for each row of the result"
        refuses(ValueError, text, op, *of, index=index[None])
    text = "lowbit_linear: residual is (23, 20), the output (3, 20)"
    refuses(ValueError, text, ops.lowbit_linear, *args, residual=torch.zeros(R, 20), index=index)
    text = "lowbit_linear: x_scale has shape (3,); use (1,) or (23,)"
    refuses(ValueError, text, ops.lowbit_linear, args[0], args[1][:3], *args[2:], index=index)
    op, out, places = ops.lowbit_linear_scatter, torch.zeros(4, 20), ints([1] * R)
    name = "lowbit_linear_scatter"
    refuses(TypeError, f"{name}: out must be float32, got torch.float16", op, out.half(), places, *args)
    refuses(TypeError, f"{name}: out_index must be int32, got torch.int64", op, out, places.long(), *args)
    refuses(ValueError, f"{name}: out_index has shape (3,); use (23,)", op, out, index, *args)
    refuses(ValueError, f"{name}: out_index has shape (23,); use (3,)", op, out, places, *args, index=index)
    for wrong in (torch.zeros(20), torch.zeros(4, 21), torch.zeros(3, 2, 20).transpose(0, 1)):
        text = f"{name}: out is {tuple(wrong.shape)} with strides {wrong.stride()}; "
        text += "use (..., 20), contiguous where it has more than two dimensions"
        refuses(ValueError, text, op, wrong, places, *args)
    text = f"{name}: x must be int8 codes, got torch.float32; quantize it with ops.quantize"
    refuses(TypeError, text, op, out, places, args[0].float(), *args[1:])


def test_rows_that_do_not_exist(impl):
    """Refused before anything is read or written; the reference has torch's own words for it."""
    x, one, args = torch.randn(R, 10), torch.ones(10), linear(10, 20)
    out = torch.zeros(4, 20)
    calls = (
        lambda: ops.quantize(x, index=ints([0, R])),
        lambda: ops.quantize(x, one, index=ints([0, R])),
        lambda: ops.norm_quant(x, one, one, index=ints([-1, 2**31 - 1])),
        lambda: ops.lowbit_linear(*args, index=ints([R, -1])),
        lambda: ops.lowbit_linear_scatter(out, ints([4, *[-1] * (R - 1)]), *args),
        lambda: ops.lowbit_linear_scatter(out, ints([0, 1]), *args, index=ints([1, R])),
    )
    for call in calls:
        with pytest.raises((ValueError, IndexError, RuntimeError), match=r"names row|out of (range|bounds)"):
            impl(call)
    assert not out.any()


def test_rows_that_do_not_exist_are_named():
    if not backends.HAS_CPU_KERNELS:
        pytest.skip("the CPU kernels were not built")
    with pytest.raises(ValueError, match="index names row 23, but there are 23; use -1 for none"):
        ops.quantize(torch.zeros(R, 3), index=ints([0, 23]))


def test_scatter_is_a_write():
    """Whoever saved out for a gradient notices, and whoever wants one through it is refused at once."""
    args, places = linear(10, 20, 3), ints([0, 2, -1])
    out = torch.randn(4, 20)
    before = out._version
    ops.lowbit_linear_scatter(out, places, *args)
    assert out._version > before
    wanted = out.clone().requires_grad_()
    for tensors in ((wanted * 1, places, *args), (out, places, args[0], args[1].requires_grad_(), *args[2:])):
        with pytest.raises(RuntimeError, match="lowbit_linear_scatter is not implemented: integer codes"):
            ops.lowbit_linear_scatter(*tensors)
        with torch.no_grad():
            ops.lowbit_linear_scatter(*tensors)


@pytest.mark.parametrize("p", [None, softmax.linear_mantissa(3), softmax.log2(4, "lse")])
def test_attention_on_fewer_tokens_than_there_is_room_for(impl, p):
    """Each image as alone, zeros beyond; what stands there is not read."""
    B, N, H, D = 3, 14, 2, 24
    mask = torch.rand(B, N) > 0.4
    mask[1] = False  # an image without tokens
    _, _, ends, rows = ops.split_tokens(mask)
    live = int(ends[-1])
    q, k, v = codes("random", 3, B * N, H, D)[:, rows.clamp(min=0).long()].transpose(1, 2)[:, None]
    scales = [torch.rand(1, H, B * N) * 0.1 + 0.01 for _ in range(3)]
    key_bias = torch.randn(1, B * N)
    for t in (*scales, key_bias):
        t[..., live:] = torch.nan
    kwargs = {"softmax": p, "emit": ("cls", "lse", "columns")}
    for out_scale in (None, torch.rand(H * D) * 0.1 + 0.01):
        packed = impl(
            ops.quant_attention, q, k, v, *scales, D**-0.5, key_bias=key_bias, cu_seqlens=ends, out_scale=out_scale,
            **kwargs,
        )  # fmt: skip
        for b in range(B):
            at = slice(int(ends[b]), int(ends[b + 1]))
            own = impl(
                ops.quant_attention, q[:, :, at], k[:, :, at], v[:, :, at], *(s[..., at] for s in scales), D**-0.5,
                key_bias=key_bias[:, at], out_scale=out_scale, **kwargs,
            )  # fmt: skip
            assert_same_bits((packed[0][:, at], packed[1][:, at], packed[2][..., at]), own[:3])
            assert torch.allclose(packed[3][..., at], own[3], rtol=1e-5, atol=1e-7)
        assert not packed[0][:, live:].any() and not packed[1][:, live:].any() and not packed[3][..., live:].any()
        assert (packed[2][..., live:] == -torch.inf).all()
    fewer = ints([0, 3, 5]), ints([0, 7, 9])  # of queries and of keys, each with room of its own
    found = impl(
        ops.quant_attention, q[:, :, :8], k, v, scales[0][..., :8], *scales[1:], D**-0.5, cu_seqlens=fewer[0],
        cu_seqlens_k=fewer[1], **kwargs,
    )  # fmt: skip
    assert found[0].shape == (1, 8, H * D) and not found[0][:, 5:].any()
    own = impl(
        ops.quant_attention, q[:, :, 3:5], k[:, :, 7:9], v[:, :, 7:9], scales[0][..., 3:5],
        *(s[..., 7:9] for s in scales[1:]), D**-0.5, **kwargs,
    )  # fmt: skip
    assert_same_bits((found[0][:, 3:5], found[1][:, 7:9]), own[:2])
