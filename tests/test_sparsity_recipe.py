"""SPARSE24 where only some layers are replaced, what its gate is told, and what a layer by itself is pruned with."""

from __future__ import annotations

import copy

import pytest
import torch
from _vits import pixels, relative_error, vit
from torch import nn

from pyvit_accel import Unsupported, accelerate, recipes, sparsity
from pyvit_accel.modules import Sparse24Linear
from pyvit_accel.sparsity import Moments

SPARSE24 = recipes.SPARSE24


@pytest.mark.parametrize("layers", ["*.fc2", "*.proj"])
def test_inputs_stay_where_the_layer_that_makes_them_stays(layers):
    """Else they would come in another order than the weights are in."""
    model, images = vit(), pixels()
    for mask in ("wanda", "sparsegpt"):
        moved, stayed = (
            accelerate(model, SPARSE24(mask, layers=layers, permute=permute), [images])[0] for permute in (True, False)
        )
        assert torch.equal(moved(images), stayed(images)) and relative_error(moved(images), model(images)) < 0.5


def test_inputs_move_where_both_are_replaced():
    model, images = vit(), pixels()
    moved, stayed = (
        accelerate(model, SPARSE24("wanda", layers="*.fc?", permute=permute), [images])[0] for permute in (True, False)
    )
    mask, other = (new.blocks[0].mlp.fc2.codes() != 0 for new in (moved, stayed))
    assert not torch.equal(mask, other) and relative_error(moved(images), model(images)) < 0.5


def test_each_layer_moves_or_stays_by_itself():
    model, images = vit(), pixels()
    layers = ["*.qkv", "*.proj", "*.fc2"]  # fc1, which makes the inputs of fc2, stays as it is
    moved, stayed = (
        accelerate(model, SPARSE24("wanda", layers=layers, permute=permute), [images])[0] for permute in (True, False)
    )
    proj, fc2 = ([new.get_submodule(f"blocks.0.{name}").codes() != 0 for new in (moved, stayed)]
                 for name in ("attn.proj", "mlp.fc2"))  # fmt: skip
    assert not torch.equal(*proj) and torch.equal(*fc2)
    assert relative_error(moved(images), model(images)) < 0.5


def test_the_gate_knows_what_is_multiplied():
    """proj of ViT-B on Hopper, a large batch: 16 bits gain, int8 is bound by what it writes."""
    proj = nn.Linear(768, 768)
    wide = SPARSE24(target=90, rows=256 * 197)
    wide.spec.check(proj)
    with pytest.raises(Unsupported, match="768 inputs, int8: 2:4 is modelled at"):
        wide(dtype="int8").spec.check(proj)


@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_takes_up_the_mean(bias):
    """So that SparseGPT of a layer that has one minds the covariance alone."""
    x = torch.randn(300, 16) @ torch.randn(16, 16) + 3
    linear, seen = nn.Linear(16, 8, bias).requires_grad_(False), Moments.of(x)
    gram = seen.centred if bias else seen.gram
    found = sparsity.sparsegpt(linear.weight, gram)
    expected = sparsity.refit(linear.weight, found != 0, gram, found)
    new = Sparse24Linear.from_linear(linear, "sparsegpt", x, "bfloat16")
    assert torch.equal(new.weight, expected.bfloat16().float())


def test_the_dense_form_follows_the_weight():
    """On a CPU it is what is multiplied: made anew after a load, and kept, not made in every call."""
    one, other = (Sparse24Linear.from_linear(nn.Linear(16, 8).requires_grad_(False)) for _ in range(2))
    x = torch.randn(3, 16)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))
    for module in (one, other, other.half(), copy.deepcopy(other), other.to("cpu")):
        assert torch.equal(getattr(module, module.dense), one.codes().float())
