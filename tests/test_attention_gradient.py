"""The straight-through gradient of exp_free_attention: against autograd, against differences, and at work."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from _attention import FINEST, FORMATS, LN2, exact, rounded
from _problems import U32
from torch.utils._python_dispatch import TorchDispatchMode

from pyvit_accel import accelerate, exp_free_attention, recipes
from pyvit_accel.formats.softmax import linear_mantissa, log2
from pyvit_accel.models import digits_data, digits_model

SCALE = 0.2
every_format = pytest.mark.parametrize("form", FORMATS.values(), ids=list(FORMATS))
# B, H, Hk, Nq, Nk, D, Dv: keys in one piece and in several with a tail, both widths, grouped queries, one token.
SHAPES = [(2, 3, 3, 17, 19, 32, 32), (1, 2, 2, 9, 40, 16, 16), (2, 4, 2, 6, 25, 8, 12), (1, 1, 1, 7, 5, 12, 8)]
SHAPES += [(1, 2, 2, 1, 1, 8, 8)]


def problem(B, H, Hk, Nq, Nk, D, Dv, masked=True):
    """q, k, v, a float mask that has a gradient, and dy."""
    q, k, v = (
        torch.randn(B, H, Nq, D),
        torch.randn(B, Hk, Nk, D) + 2 * torch.randn(Hk, 1, D),
        torch.randn(B, Hk, Nk, Dv),
    )
    seen = torch.rand(H, Nq, Nk) > 0.3
    seen[..., 0] = True
    bias = torch.randn(H, Nq, Nk).masked_fill(~seen, -torch.inf) if masked else torch.randn(H, 1, Nk)
    return [t.requires_grad_() for t in (q, k, v, bias)], torch.randn(B, H, Nq, Dv)


def gradients(form, leaves, dy, impl=None):
    """Of q, k, v and the mask."""

    def run(q, k, v, bias, dy):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k, v, bias)]
            y = exp_free_attention(*leaves, scale=SCALE, enable_gqa=True, softmax=form)
            return y.detach(), *torch.autograd.grad(y, leaves, dy)

    arguments = (*(t.detach() for t in leaves), dy)
    return run(*arguments) if impl is None else impl(run, *arguments)


def values(form, s):
    """P of scores s, float64, and where it is not zero."""
    anchor = s.amax(dim=-1, keepdim=True)
    if form.anchor == "lse":  # of 16-bit codes
        anchor = anchor + ((s - anchor).exp() * 65280).round().sum(dim=-1, keepdim=True).div(65280).log()
    p = form.dequantize(form.codes((s - anchor) / LN2))
    return p / p.sum(dim=-1, keepdim=True) if form.normalize else p


class Model:
    """x + (rounded(x) - x).detach() for q, k, v and the scores, in float64; its residuals may be frozen.

    Scores get what they lack to the logarithms of the values that P has: their softmax, then, is P. Where P is not
    divided by its sum, or not positive, its derivative is that of a softmax at P all the same, and is written out.
    """

    def __init__(self, form, q, k, v, bias):
        self.form, self.groups = form, q.shape[1] // k.shape[1]
        self.mean = k.mean(dim=2, keepdim=True).double()
        k_less = k - k.mean(dim=2, keepdim=True)
        self.residuals = rounded(q, -1) - q, rounded(k_less, -1) - (k.double() - self.mean), rounded(v, 2) - v
        s, _ = self.scores(q.double(), k.double(), v.double(), bias.double())
        self.s, self.p = s, values(form, s)

    def scores(self, q, k, v, bias):
        q, k, v = (t + r for t, r in zip((q, k - self.mean, v), self.residuals, strict=True))
        k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        return q @ k.mT * SCALE + bias, v

    def __call__(self, q, k, v, bias):
        s, v = self.scores(q, k, v, bias)
        seen = self.p != 0
        moved = torch.where(seen, s - self.s, 0)  # by nothing, but it has a derivative
        if self.form.normalize:
            return (moved + self.p.log()).masked_fill(~seen, -torch.inf).softmax(dim=-1) @ v
        change = self.p * moved
        return (self.p + change - self.p * change.sum(dim=-1, keepdim=True)) @ v

    def rounding(self, leaves, dy):
        """Of the gradients in float32: sums of N + D terms of such magnitudes."""
        q, k, v, bias = (t.detach().double() for t in leaves)
        q, k, v = (t + r for t, r in zip((q, k - self.mean, v), self.residuals, strict=True))
        k_all, v_all = (t.repeat_interleave(self.groups, dim=1).abs() for t in (k, v))
        p, dy = self.p.abs(), dy.double().abs()
        ds = p * (dy @ v_all.mT + (dy * (p @ v_all)).sum(dim=-1, keepdim=True))
        sums = [ds @ k_all * SCALE, ds.mT @ q.abs() * SCALE, p.mT @ dy]
        sums[1:] = [t.unflatten(1, (-1, self.groups)).sum(dim=2) for t in sums[1:]]
        terms = sum(q.shape) + sum(k.shape) + 16
        return [terms * U32 * t for t in (*sums, ds.sum_to_size(bias.shape))]


@every_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_equals_autograd_through_the_straight_through_model(impl, form, shape, masked):
    leaves, dy = problem(*shape, masked)
    model = Model(form, *(t.detach() for t in leaves))
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    y_model = model(*doubles)
    truth = torch.autograd.grad(y_model, doubles, dy.double())
    y, *actual = gradients(form, leaves, dy, impl)
    assert (y - y_model).abs().max() < 1e-4  # the codes of P are those of the model
    for g, t, error, leaf in zip(actual, truth, model.rounding(leaves, dy), leaves, strict=True):
        assert g.shape == leaf.shape and g.dtype == leaf.dtype
        assert ((g.double() - t).abs() <= error).all()


def test_grid_bias():
    """Its gradient is that of the mask it stands for, summed."""
    (q, k, v, _), dy = problem(2, 4, 2, 6, 28, 8, 12)
    h, w = (torch.randn(*shape).requires_grad_() for shape in ((2, 1, 6, 4), (4, 6, 7)))
    mask = (h[..., :, None] + w[..., None, :]).flatten(-2)
    truth = torch.autograd.grad(exp_free_attention(q, k, v, mask, enable_gqa=True), (q, k, v, h, w), dy)
    y = exp_free_attention(q, k, v, enable_gqa=True, grid_bias=(h, w))
    for g, t in zip(torch.autograd.grad(y, (q, k, v, h, w), dy), truth, strict=True):
        assert ((g - t).abs() <= 64 * U32 * t.abs().max()).all()
    for leaf, t in ((h, truth[3]), (w, truth[4])):
        only = [x.detach().requires_grad_(x is leaf) for x in (h, w)]
        y = exp_free_attention(q.detach(), k.detach(), v.detach(), enable_gqa=True, grid_bias=only)
        (g,) = torch.autograd.grad(y, [x for x in only if x.requires_grad], dy)
        assert ((g - t).abs() <= 64 * U32 * t.abs().max()).all()


def differences(f, inputs, dy, h):
    """Central differences of sum(f dy) by each element of each input, float64."""
    results = []
    for i, x in enumerate(inputs):
        slopes = torch.zeros_like(x).flatten()
        for at in range(x.numel()):
            if x.flatten()[at].isfinite():
                step = torch.zeros_like(slopes).index_fill_(0, torch.tensor(at), h).view(x.shape)
                ends = (f(*inputs[:i], x + sign * step, *inputs[i + 1 :]) for sign in (1, -1))
                slopes[at] = ((next(ends) - next(ends)) * dy).sum() / (2 * h)
        results.append(slopes.view(x.shape))
    return results


@pytest.mark.parametrize(
    "form", [linear_mantissa(3), log2(3), FORMATS["linear mantissa 3, lse, divided"]], ids=lambda f: f.label
)
@pytest.mark.parametrize("shape", [(1, 2, 1, 3, 5, 4, 4), (1, 1, 1, 3, 7, 2, 3)], ids=str)
def test_equals_differences_of_the_frozen_model(form, shape):
    """With the roundings held fast the model is smooth, and what autograd makes of it is not asked."""
    leaves, dy = problem(*shape)
    _, *actual = gradients(form, leaves, dy)
    model = Model(form, *(t.detach() for t in leaves))
    h = 1e-4
    truth = differences(model, [t.detach().double() for t in leaves], dy.double(), h)
    for g, t, error in zip(actual, truth, model.rounding(leaves, dy), strict=True):
        assert ((g.double() - t).abs() <= error + h * h * (1 + t.abs())).all()


@pytest.mark.parametrize("form", [FINEST, linear_mantissa(3), linear_mantissa(1)], ids=lambda f: f.label)
def test_differences_of_float_attention_are_within_the_steps(form):
    """dS of P, v and y that are off by what their formats allow, times q and k that are off by half a step."""
    (q, k, v, _), dy = problem(1, 2, 2, 4, 6, 8, 8)
    truth = exact(q.detach(), k.detach(), v.detach(), None, SCALE, form)
    with torch.enable_grad():
        y = exp_free_attention(q, k, v, scale=SCALE, softmax=form)
        actual = torch.autograd.grad(y, (q, k, v), dy)
    smooth = partial(F.scaled_dot_product_attention, scale=SCALE)
    slopes = differences(smooth, [t.detach().double() for t in (q, k, v)], dy.double(), 1e-4)
    dy = dy.double()
    far = torch.maximum(truth.p_high - truth.p, truth.p - truth.p_low)
    row, row_error = (dy * truth.y).sum(-1, keepdim=True), (dy.abs() * truth.error).sum(-1, keepdim=True)
    ds = truth.p * (dy @ truth.v.mT - row)
    v_error = (dy @ (truth.v_hat - truth.v).mT).abs()
    ds_error = far * ((dy @ truth.v_hat.mT - row).abs() + row_error) + truth.p * (v_error + row_error)
    bounds = (
        SCALE * (ds_error @ truth.k_hat.abs() + (ds @ (truth.k_hat - truth.k)).abs()),
        SCALE * (ds_error.mT @ truth.q_hat.abs() + (ds.mT @ (truth.q_hat - truth.q)).abs()),
        far.mT @ dy.abs(),
    )
    for g, t, bound in zip(actual, slopes, bounds, strict=True):
        error = (g.double() - t).abs()
        assert (error <= bound + 1e-6).all()
        assert error.max() > bound.max() / 50  # the bound is not idle


def test_keys_as_they_were_and_queries_do_not_move_what_softmax_ignores():
    """A step of all keys together, or of a score's whole row, has no slope."""
    (q, k, v, bias), dy = problem(2, 2, 2, 9, 21, 16, 16)
    _, _, dk, _, dbias = gradients(linear_mantissa(3), (q, k, v, bias), dy)
    assert dk.sum(dim=2).abs().max() < 1e-4 * dk.abs().sum(dim=2).max()
    assert dbias.sum(dim=-1).abs().max() < 1e-4 * dbias.abs().sum(dim=-1).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    leaves, dy = problem(2, 3, 3, 17, 19, 32, 32)
    leaves, dy = [t.detach().to(dtype).requires_grad_() for t in leaves], dy.to(dtype)
    y = exp_free_attention(*leaves, scale=SCALE)
    actual = torch.autograd.grad(y, leaves, dy)
    _, *truth = gradients(linear_mantissa(3), [t.float() for t in leaves], dy.float())
    u = torch.finfo(dtype).eps / 2
    for g, t in zip(actual, truth, strict=True):
        assert g.dtype == dtype and ((g.float() - t).abs() <= u * t.abs() + 1e-6).all()


def test_only_what_is_asked():
    (q, k, v, bias), dy = problem(2, 3, 3, 17, 19, 32, 32)
    everything = gradients(linear_mantissa(3), (q, k, v, bias), dy)[1:]
    for i in range(4):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate((q, k, v, bias))]
        y = exp_free_attention(*leaves, scale=SCALE)
        assert torch.equal(torch.autograd.grad(y, leaves[i], dy)[0], everything[i])
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet():
            assert exp_free_attention(q, k, v, bias).grad_fn is None
    assert exp_free_attention(q.detach(), k.detach(), v.detach()).grad_fn is None
    with pytest.raises(
        RuntimeError, match="exp_free_attention: its gradient has no derivative; leave create_graph out"
    ):
        torch.autograd.grad(exp_free_attention(q, k, v).sum(), q, create_graph=True)


def test_query_that_sees_no_key_has_no_gradient():
    (q, k, v, _), dy = problem(1, 2, 2, 6, 9, 16, 16)
    mask = torch.ones(6, 9, dtype=torch.bool)
    mask[3] = False
    dq, dk, dv = torch.autograd.grad(exp_free_attention(q, k, v, mask), (q, k, v), dy)
    assert not dq[:, :, 3].any() and all(t.isfinite().all() and t.any() for t in (dq, dk, dv))


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            self.numel = max(self.numel, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


def test_memory_is_linear_in_tokens():
    B, H, N, D = 1, 2, 600, 16
    (q, k, v, _), dy = problem(B, H, H, N, N, D, D)
    with Largest() as largest:
        torch.autograd.grad(exp_free_attention(q, k, v), (q, k, v), dy)
    assert 0 < largest.numel <= B * H * (2 * N + D) * D  # of the rows of an identity among zeros


def test_fine_tuning():
    """A softmax of 2 bits costs the digits model a fifth of its loss; qkv, which it learns through, win it back."""
    pytest.importorskip("sklearn")
    images, labels = (t[:128] for t in digits_data("train"))
    model, _ = accelerate(digits_model(), recipes.exp_free_attention("log2, 2 bits", log2(2)))
    model = copy.deepcopy(model).train()  # what accelerate returns shares memory with the float model
    qkv = [block.attn.qkv.weight for block in model.blocks]
    optimizer, losses = torch.optim.SGD(qkv, lr=0.05), []
    for _ in range(5):
        losses.append(F.cross_entropy(model(images), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        assert all(part.any() for weight in qkv for part in weight.grad.chunk(3))
        optimizer.step()
    with torch.no_grad():
        truth = F.cross_entropy(digits_model()(images), labels)
    assert losses[0] > 1.05 * truth and losses[-1] < (losses[0] + truth) / 2
