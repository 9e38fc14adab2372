"""Sparse24Training among what training does: checkpoints, torch.compile, layers of several names, blank models."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from pyvit_accel import sparsity
from pyvit_accel.modules import Sparse24Training, train_sparse24
from pyvit_accel.modules.sparse24_training import BACKWARDS


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_see_one_mask(reentrant):
    """What a checkpoint runs again is no further step, or the backward would be of another mask."""
    plain = Sparse24Training.from_linear(nn.Linear(16, 8), every=2)
    again = copy.deepcopy(plain)
    for steps in range(1, 6):
        x, grads = torch.randn(4, 16, requires_grad=True), []
        for module in (plain, again):
            y = module(x) if module is plain else checkpoint(module, x, use_reentrant=reentrant)
            y.square().sum().backward()
            grads.append((x.grad, module.weight.grad))
            x.grad, module.weight.grad = None, None
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(plain.mask, again.mask) and plain.steps == again.steps == steps
        with torch.no_grad():  # the next mask is another one
            plain.weight.copy_(torch.randn(8, 16))
            again.weight.copy_(plain.weight)


@pytest.mark.parametrize("backward", BACKWARDS)
def test_autocast_has_all_gradients(backward):
    module = Sparse24Training.from_linear(nn.Linear(16, 8), backward=backward)
    x = torch.randn(2, 3, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    y.backward(dy := torch.randn(2, 3, 8).bfloat16())
    back = module.weight.detach() * getattr(module, "back_mask", module.mask)
    torch.testing.assert_close(x.grad, dy.float() @ back, atol=0.05, rtol=0.02)
    assert y.dtype == torch.bfloat16 and x.grad.dtype == module.weight.grad.dtype == torch.float32


def test_compiles_once():
    """Not anew for each number of steps."""
    counter = CompileCounter()
    module = Sparse24Training.from_linear(nn.Linear(16, 8), every=2)
    twin, x = copy.deepcopy(module), torch.randn(4, 16)
    compiled = torch.compile(nn.Sequential(module), backend=counter)
    frames = []
    for _ in range(5):
        assert torch.equal(compiled(x), twin(x)) and torch.equal(module.mask, twin.mask)
        frames.append(counter.frame_count)
        with torch.no_grad():
            module.weight.neg_().add_(0.01)
            twin.weight.neg_().add_(0.01)
    assert module.steps == 5 and frames[0] == frames[-1]


@pytest.mark.parametrize("backward", BACKWARDS)
def test_blank_models_choose_masks_when_they_get_weights(backward):
    module = Sparse24Training(16, 8, backward=backward, device="meta").to_empty(device="cpu")
    module.reset_parameters()
    found = Sparse24Training.from_linear(module, backward=backward)
    for name in ("mask", "back_mask", "order"):
        assert torch.equal(getattr(module, name, torch.ones(1)), getattr(found, name, torch.ones(1)))
    assert (module.mask.view(8, 4, 4).sum(-1) == 2).all()


@pytest.mark.parametrize("backward", BACKWARDS)
def test_state_and_mode(backward):
    """A copy goes on where the first one was; NaN is not packed."""
    linear = nn.Linear(16, 8).eval()
    module = Sparse24Training.from_linear(linear, backward=backward, every=2)
    assert module.weight is linear.weight and not module.training and module.train() is module
    for _ in range(5):
        module(torch.randn(2, 16))
    other = Sparse24Training(16, 8, backward=backward, every=2)
    other.load_state_dict(module.state_dict())
    assert (module.steps, module.updates) == (other.steps, other.updates) == (5, 3)
    with torch.no_grad():
        module.weight[3, 9] = torch.nan
    with pytest.raises(ValueError, match="row 3, chunk 2 holds nan; weights must be finite"):
        module.sparse_weight()


def test_a_layer_of_two_names():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["c"] = model["a"]
    assert train_sparse24(model, ["b", "c"]) == ["a", "b", "c"]
    assert type(model["a"]) is Sparse24Training is not nn.Linear and model["c"] is model["a"] is not model["b"]


def test_an_order_of_rows_lasts(monkeypatch):
    """The search is for the first masks and then for every so many; in between the order stays, the masks do not."""
    monkeypatch.setattr("pyvit_accel.modules.sparse24_training.ORDER_STEPS", 3)
    module = Sparse24Training.from_linear(nn.Linear(16, 24), backward="bimask")
    orders = [module.order]
    for _ in range(4):
        with torch.no_grad():
            module.weight.copy_(torch.randn(24, 16))
        module.update_masks()
        orders.append(module.order)
        expected = sparsity.bimask(module.weight, module.order)
        assert torch.equal(module.mask, expected.forward) and torch.equal(module.back_mask, expected.backward)
    assert [torch.equal(a, b) for a, b in pairwise(orders)] == [True, True, False, True]
