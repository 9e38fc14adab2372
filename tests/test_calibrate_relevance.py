"""relevance: gradient x activation per linear layer, by hand and over batches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyvit_accel.calibrate.relevance import relevance
from pyvit_accel.errors import Unsupported


class Classifier(nn.Module):
    """Two linears over tokens, a mean, a head; and one that is never called."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 4)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.fc2(F.gelu(self.fc1(x)))).mean(1))


@pytest.fixture
def model() -> Classifier:
    return Classifier().eval()


def test_by_hand():
    """y = 3 (2 x0 - x1) against 0: a chain, so gradients are the weights that follow."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False)).eval()
    model[0].weight.data.copy_(torch.tensor([[2.0, -1.0]]))
    model[1].weight.data.copy_(torch.tensor([[3.0], [0.0]]))
    found = relevance(model, torch.tensor([[1.0, 0.0], [5.0, 2.0]]))
    assert found == {"0": pytest.approx(0.5), "1": pytest.approx(0.5)}  # |y dL/dy| is the logit in every cut


def test_it_is_the_definition(model):
    x = torch.randn(3, 5, 6)
    shares = []
    for image in x:
        hidden = model.fc1(image[None])
        out = model.fc2(F.gelu(hidden))
        logits = model.head((image[None] + out).mean(1))
        cuts = [hidden, out, logits]
        grads = torch.autograd.grad(logits.max(), cuts)
        amounts = torch.stack([(y * g).abs().sum() for y, g in zip(cuts, grads, strict=True)])
        shares.append(amounts / amounts.sum())
    truth = torch.stack(shares).mean(0).tolist()
    found = relevance(model, x)
    assert list(found) == ["fc1", "fc2", "head"]
    assert list(found.values()) == pytest.approx(truth, rel=1e-4)
    assert sum(found.values()) == pytest.approx(1)


def test_batches_and_frozen_weights_change_nothing(model):
    x = torch.randn(6, 5, 6)
    whole = relevance(model, x)
    assert relevance(model, [x[:1], (x[1:4], "labels"), x[4:]]) == pytest.approx(whole, rel=1e-5)
    with torch.no_grad():
        assert relevance(model.requires_grad_(False), x) == pytest.approx(whole, rel=1e-5)
    assert relevance(model, x) == relevance(model, x)


def test_the_model_is_left_alone(model):
    x = torch.randn(2, 5, 6)
    before = model(x)
    relevance(model, x)
    assert torch.equal(model(x), before)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("frozen", [False, True])
def test_what_follows_may_work_in_place(frozen):
    layers = [nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)]
    plain = nn.Sequential(layers[0], nn.ReLU(), layers[2]).eval().requires_grad_(not frozen)
    x = torch.randn(4, 6)
    assert relevance(nn.Sequential(*layers).eval(), x) == relevance(plain, x)


def test_a_louder_layer_weighs_more(model):
    x = torch.randn(8, 5, 6)
    before = relevance(model, x)
    model.fc2.weight.data *= 10
    model.fc2.bias.data *= 10
    assert relevance(model, x)["fc2"] > before["fc2"]


@pytest.mark.parametrize("wrap", [lambda y: SimpleNamespace(logits=y), lambda y: (y, None)], ids=["object", "tuple"])
def test_logits_are_found(model, wrap):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return wrap(self.inner(x))

    x = torch.randn(2, 5, 6)
    found = relevance(Wrapped().eval(), x)
    assert list(found.values()) == pytest.approx(list(relevance(model, x).values()))


def test_arguments_are_checked(model):
    x = torch.randn(2, 5, 6)
    with pytest.raises(ValueError, match=r"in training mode.*call model.eval\(\)"):
        relevance(model.train(), x)
    model.eval()
    with pytest.raises(Unsupported, match="unused does not influence the logits"):
        relevance(model, x, [model.fc1, model.unused])
    with pytest.raises(ValueError, match="a Linear in modules is not part of the model"):
        relevance(model, x, [nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="no calibration batches"):
        relevance(model, [])
    with pytest.raises(Unsupported, match="no calibration batch reached a layer"):
        relevance(nn.Sequential(nn.ReLU()).eval(), torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"gave \(2, 5, 6\); expected logits"):
        relevance(nn.Sequential(nn.Linear(6, 6)).eval(), x)
    assert not any(module._forward_hooks for module in model.modules())
