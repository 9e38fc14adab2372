"""ExpFreeAttention: what F.scaled_dot_product_attention gives, to the steps of its formats."""

from __future__ import annotations

import copy
import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from _attention import FINEST, FORMATS, exact
from _problems import U32, padded, transposed
from torch import nn

from pyvit_accel import ExpFreeAttention, exp_free_attention
from pyvit_accel.backends import use_reference
from pyvit_accel.formats.softmax import from_description, linear_mantissa, log2

every_format = pytest.mark.parametrize("form", FORMATS.values(), ids=list(FORMATS))
# B, H, Nq, Nk, D: one token, tails, head dims between multiples of 16, cross lengths, more keys than one row holds.
SHAPES = [(2, 3, 17, 17, 32), (1, 2, 1, 1, 40), (1, 1, 5, 1100, 64), (1, 2, 49, 49, 80), (2, 1, 9, 33, 128)]


def heads(B, H, Nq, Nk, D, Dv=None):
    """q, k, v; k with a part that all tokens share, and v with channels of several sizes."""
    q, k, v = torch.randn(B, H, Nq, D), torch.randn(B, H, Nk, D), torch.randn(B, H, Nk, D if Dv is None else Dv)
    return 1.5 * q, k + 3 * torch.randn(H, 1, D), v * torch.rand(v.shape[-1])


def masks(B, H, Nq, Nk):
    seen = torch.rand(B, 1, Nq, Nk) > 0.4
    seen[..., 0] = True  # rows that see nothing have their own test
    added = 2 * torch.randn(H, Nq, Nk)
    return [None, seen, added, added.masked_fill(~seen, -torch.inf), torch.randn(1, Nk)]


def as_bias(mask):
    boolean = mask is not None and mask.dtype == torch.bool
    return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if boolean else mask


def sdpa(q, k, v, mask=None, **kwargs):
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask, **kwargs)


@every_format
@pytest.mark.parametrize("shape", SHAPES)
def test_within_bound_of_float64(impl, form, shape):
    q, k, v = heads(*shape)
    for mask in masks(*shape[:4]):
        truth = exact(q, k, v, as_bias(mask), 0.1, form)
        assert (truth.y - sdpa(q, k, v, mask, scale=0.1)).abs().max() < 1e-12  # of the bound's own centre
        error = (impl(exp_free_attention, q, k, v, mask, scale=0.1, softmax=form).double() - truth.y).abs()
        assert (error <= truth.error).all()
        # The bound is not idle; over many keys errors average out.
        assert not 1 < shape[3] < 100 or error.max() > truth.error.max() / 20


@pytest.mark.parametrize(
    ("bits", "relative_error"), [(3, 0.033), (2, 0.050), (1, 0.089), (0, 0.169)], ids="linear mantissa {}".format
)
def test_error_that_is_documented(bits, relative_error):
    q, k, v = torch.randn(3, 4, 3, 197, 64)
    y, truth = exp_free_attention(q, k, v, softmax=linear_mantissa(bits)), sdpa(q, k, v)
    assert (y - truth).norm() / truth.norm() == pytest.approx(relative_error, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(impl, dtype):
    q, k, v = (t.to(dtype) for t in heads(2, 2, 21, 21, 64))
    y = impl(exp_free_attention, q, k, v)
    assert y.dtype == dtype and y.shape == q.shape
    u = {torch.float32: U32, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    truth = exact(q, k, v, None, 1 / 8, linear_mantissa(3), u)
    assert ((y.double() - truth.y).abs() <= truth.error).all()


@pytest.mark.parametrize("leading", [(), (4,), (2, 4), (3, 1, 4), (2, 0, 4), (0,)])
def test_leading_dimensions(leading):
    """Up to four are the arguments of float attention; more are batches."""
    q, k, v = torch.randn(*leading, 9, 32), torch.randn(*leading, 11, 32), torch.randn(*leading, 11, 32)
    y = exp_free_attention(q, k, v)
    assert y.shape == F.scaled_dot_product_attention(q, k, v).shape
    flat = (t.reshape(-1 if t.numel() else 0, 1, *t.shape[-2:]) for t in (q, k, v))
    assert torch.equal(y.reshape(-1), exp_free_attention(*flat).reshape(-1))
    mask = torch.randn(*leading[-1:], 9, 11)
    assert torch.equal(exp_free_attention(q, k, v, mask), exp_free_attention(q, k, v, mask.expand(*leading, 9, 11)))


def test_result_is_laid_out_for_the_projection():
    q, k, v = heads(2, 3, 9, 9, 32)
    y = exp_free_attention(q, k, v).transpose(1, 2)
    assert y.is_contiguous() and y.flatten(2).data_ptr() == y.data_ptr()


@pytest.mark.parametrize("D, Dv", [(32, 48), (48, 32), (64, 1)])
def test_values_of_another_width(impl, D, Dv):
    q, k, v = heads(2, 2, 9, 21, D, Dv)
    y, truth = impl(exp_free_attention, q, k, v), exact(q, k, v, None, D**-0.5, linear_mantissa(3))
    assert y.shape == (2, 2, 9, Dv) and ((y.double() - truth.y).abs() <= truth.error).all()


@pytest.mark.parametrize("Nq, Nk", [(9, 9), (5, 9), (9, 5)])
def test_causal(Nq, Nk):
    q, k, v = heads(2, 2, Nq, Nk, 32)
    y = exp_free_attention(q, k, v, is_causal=True)
    mask = torch.ones(Nq, Nk, dtype=torch.bool).tril()
    assert torch.equal(y, exp_free_attention(q, k, v, mask))
    truth = exact(q, k, v, as_bias(mask), 32**-0.5, linear_mantissa(3))
    assert ((y.double() - sdpa(q, k, v, is_causal=True)).abs() <= truth.error).all()


def test_grouped_queries():
    q, (_, k, v) = torch.randn(2, 6, 9, 32), heads(2, 2, 9, 15, 32)
    y = exp_free_attention(q, k, v, enable_gqa=True)
    assert torch.equal(y, exp_free_attention(q, *(t.repeat_interleave(3, dim=1) for t in (k, v))))
    assert (y - sdpa(q, k, v, enable_gqa=True)).abs().max() < 0.2


def test_grid_bias():
    """As the mask that it stands for; for every batch of more leading dimensions its own."""
    q, k, v = (torch.randn(2, 2, 3, n, 32) for n in (9, 20, 20))
    h, w = torch.randn(2, 1, 3, 9, 4), torch.randn(3, 9, 5)
    mask = (h[..., :, None] + w[..., None, :]).flatten(-2)
    y = exp_free_attention(q, k, v, grid_bias=(h, w))
    assert torch.equal(y, exp_free_attention(q, k, v, mask))
    assert not torch.equal(y[0], exp_free_attention(q, k, v, mask.flip(0))[0])
    with pytest.raises(
        ValueError, match=r"^exp_free_attention: grid_bias \(8, 4\) does not broadcast to \(2, 2, 3, 9, 4\)"
    ):
        exp_free_attention(q, k, v, grid_bias=(torch.zeros(8, 4), w))


def test_scale():
    q, k, v = heads(1, 2, 9, 9, 64)
    assert torch.equal(exp_free_attention(q, k, v), exp_free_attention(q, k, v, scale=1 / 8))
    assert not torch.equal(exp_free_attention(q, k, v), exp_free_attention(q, k, v, scale=1 / 4))


@pytest.mark.parametrize("masked", [False, True])
def test_what_keys_share_costs_no_precision(masked):
    """Sums are exact here, so the mean takes away just what was added; without it codes would hold little else."""
    q, k, v = heads(2, 2, 9, 16, 32)
    k = torch.round(k * 64) / 64
    mask = torch.ones(9, 16, dtype=torch.bool).tril(3) if masked else None
    shared = torch.round(512 * torch.randn(2, 1, 32))
    assert torch.equal(exp_free_attention(q, k + shared, v, mask), exp_free_attention(q, k, v, mask))


@every_format
def test_query_that_sees_no_key_gives_zeros(impl, form):
    q, k, v = heads(2, 2, 15, 20, 32)
    mask = torch.rand(2, 2, 15, 20) > 0.5
    mask[..., 0] = True
    mask[:, :, 4] = False
    mask[1] = False
    y = impl(exp_free_attention, q, k, v, mask, softmax=form)
    assert not y[:, :, 4].any() and not y[1].any() and y[0].any() and not y.isnan().any()
    assert torch.equal(impl(exp_free_attention, q, k, v, as_bias(mask), softmax=form), y)


def test_boolean_masks_are_minus_infinity():
    q, k, v = heads(2, 3, 9, 9, 32)
    for mask in (torch.rand(9, 9) > 0.3, torch.rand(2, 1, 1, 9) > 0.3, torch.rand(3, 9, 9) > 0.3):
        assert torch.equal(exp_free_attention(q, k, v, mask), exp_free_attention(q, k, v, as_bias(mask)))


@pytest.mark.parametrize("B, Nq, Nk", [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
def test_empty(B, Nq, Nk):
    q, k, v = (t.requires_grad_() for t in (torch.randn(B, 3, n, 32) for n in (Nq, Nk, Nk)))
    y = exp_free_attention(q, k, v)
    assert y.shape == (B, 3, Nq, 32) and not y.any()
    y.sum().backward()
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in (q, k, v))


@pytest.mark.parametrize("layout", [padded, transposed, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)])
def test_layouts_change_no_bit(layout):
    q, k, v = (torch.round(t * 32) / 32 for t in heads(2, 3, 14, 14, 40))  # sums of which, the mean, are exact
    mask = torch.randn(2, 3, 14, 14)
    same = (layout(t) for t in (q, k, v, mask))
    assert torch.equal(exp_free_attention(*same), exp_free_attention(q, k, v, mask))
    fused = torch.cat([t.transpose(1, 2).flatten(2) for t in (q, k, v)], dim=-1)  # as a projection writes them
    views = fused.view(2, 14, 3, 3, 40).permute(2, 0, 3, 1, 4).unbind(0)
    assert torch.equal(exp_free_attention(*views, mask), exp_free_attention(q, k, v, mask))


@every_format
def test_same_bits_as_the_reference(kernel, form):
    if form.values.is_floating_point():
        pytest.skip("sums floats, in an order of its own")
    q, k, v = heads(2, 2, 21, 37, 48)
    for mask in masks(2, 2, 21, 37):
        with use_reference():
            truth = exp_free_attention(q, k, v, mask, softmax=form)
        assert torch.equal(kernel(exp_free_attention, q, k, v, mask, softmax=form), truth)


@every_format
def test_formats_are_described(form):
    """By a record that JSON keeps, wherever it is read: modules are loaded onto no device."""
    record = json.loads(json.dumps(form.describe(), allow_nan=False))
    with torch.device("meta"):
        again = from_description(record)
    assert again.equals(form) and again.describe() == record


def test_named_formats_are_described_by_name():
    assert linear_mantissa(2).describe() == {"kind": "linear_mantissa", "bits": 2, "anchor": "max", "normalize": True}
    assert log2(5, "lse").describe() == {"kind": "log2", "bits": 5, "anchor": "lse", "normalize": False}
    assert not linear_mantissa(2).equals(linear_mantissa(2, "lse")) and not log2(3).equals(log2(4))
    assert isinstance(FINEST.describe()["values"], list)


@every_format
def test_module(form):
    module, (q, k, v) = ExpFreeAttention(form), heads(2, 2, 9, 9, 32)
    y = exp_free_attention(q, k, v, softmax=form)
    again = ExpFreeAttention.from_config(module.config())
    again.load_state_dict(module.state_dict())
    for same in (
        module,
        again,
        copy.deepcopy(module),
        module.half().float().train(),
        nn.Sequential(module).double()[0],
    ):
        assert torch.equal(same(q, k, v), y) and same.softmax.equals(form)
    assert repr(again) == repr(module) and form.label in repr(module)
    called = q, k, v, None, 0.0, True, 0.2, True
    assert torch.equal(module(*called), exp_free_attention(*called, softmax=form))
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(result, y) for result in pool.map(lambda _: module(q, k, v), range(8)))


def test_format_moves_with_the_module():
    module = nn.Sequential(ExpFreeAttention(FINEST)).to("meta")[0]
    assert module.softmax.values.is_meta and module.softmax.thresholds.is_meta
    assert ExpFreeAttention().softmax.values.device.type == "cpu"


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("form", [linear_mantissa(3), FORMATS["sulq, published"]], ids=lambda form: form.name)
def test_compiles_and_exports(form, gradient):
    module, (q, k, v) = ExpFreeAttention(form), heads(2, 2, 9, 9, 32)
    mask, mode = torch.rand(9, 9) > 0.3, torch.enable_grad if gradient else torch.inference_mode
    q.requires_grad_(gradient)

    def run(call):
        y = call(q, k, v, mask)
        return (y, *torch.autograd.grad(y.square().sum(), q)) if gradient else (y,)

    with mode():
        truth = run(module)
        for backend in ("eager", "aot_eager"):
            torch._dynamo.reset()
            compiled = run(torch.compile(module, fullgraph=True, backend=backend))
            assert all(torch.equal(a, b) for a, b in zip(compiled, truth, strict=True))
    exported = torch.export.export(module, (q.detach(), k, v, mask)).module()
    assert torch.equal(exported(q.detach(), k, v, mask), truth[0])


def test_error_texts():
    q, k, v = heads(2, 4, 9, 11, 32)

    def refuses(error, text, *args, **kwargs):
        with pytest.raises(error, match="^exp_free_attention: " + re.escape(text) + "$"):
            exp_free_attention(*args, **kwargs)

    for dtypes in ((torch.float64,) * 3, (torch.float32, torch.float16, torch.float32)):
        text = f"query, key, value are {', '.join(map(str, dtypes))}; use float32, float16 or bfloat16 for all"
        refuses(TypeError, text, *(t.to(d) for t, d in zip((q, k, v), dtypes, strict=True)))
    shapes = "query (2, 4, 9, 32), key {}, value {}"
    wrong = [(k[..., :8], v), (k, v[:, :, :5]), (k[:1], v[:1]), (k[:, :3], v[:, :3]), (k, v[:, :2])]
    for a, b in [*wrong, (k[:, :0], v[:, :0])]:
        refuses(ValueError, shapes.format(tuple(a.shape), tuple(b.shape)) + " do not fit together", q, a, b)
    refuses(ValueError, shapes.format((4, 11, 32), (4, 11, 32)) + " must all be (..., H, N, D)", q, k[0], v[0])
    text = "4 heads of the query, 2 of the key; pass enable_gqa=True"
    refuses(ValueError, text, q, k[:, :2], v[:, :2])
    refuses(ValueError, "attn_mask (9, 9) does not broadcast to (2, 4, 9, 11)", q, k, v, torch.zeros(9, 9))
    text = "dropout_p=0.1: no probabilities are formed to drop; pass 0.0"
    refuses(ValueError, text, q, k, v, dropout_p=0.1)
    text = "is_causal=True came with an attn_mask; pass one mask of both"
    refuses(ValueError, text, q, k, v, torch.zeros(9, 11), is_causal=True)
