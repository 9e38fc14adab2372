"""SPARSE24 where only some layers are replaced: what is permuted, and what is not."""

from __future__ import annotations

import pytest
import torch
from _vits import pixels, relative_error, vit

from pyvit_accel import accelerate, recipes

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
