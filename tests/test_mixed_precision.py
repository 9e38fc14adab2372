"""search: bits per layer within a budget of bytes or of time, from losses measured on the model."""

from __future__ import annotations

import itertools

import pytest
import torch
from _vits import SMALL, pixels, spread, vit

from pyvit_accel import Unsupported, accelerate, mixed_precision, search
from pyvit_accel.formats import affine, packed

BITS = (3, 4, 8)
DEPTH = 2


@pytest.fixture(scope="module")
def model():
    return vit(depth=DEPTH)


def blocks_mib(bits_of) -> float:
    """Of the packed weights of the blocks, with their scales."""
    C = SMALL["dim"]
    shapes = {"qkv": (3 * C, C), "proj": (C, C), "fc1": (4 * C, C), "fc2": (C, 4 * C)}
    total = 0
    for i, (layer, (N, K)) in itertools.product(range(DEPTH), shapes.items()):
        rows, width = packed.packed_shape(N, K, bits_of(i, layer))
        total += rows * width + 4 * N
    return total / 2**20


@pytest.mark.parametrize("method", ["least_loss", "greedy", "relevance"])
def test_stays_within_the_bytes_and_is_what_it_says(model, method):
    low, high = (blocks_mib(lambda i, layer, b=b: b) for b in (3, 8))
    images = pixels(4)
    found = search(model, images, max_mib=0.6 * low + 0.4 * high, bits=BITS, method=method, search=False)
    assert len(found.bits) == 4 * DEPTH and set(found.bits.values()) <= set(BITS)
    assert low < found.cost <= found.budget == pytest.approx(0.6 * low + 0.4 * high)
    assert (found.loss == found.loss) == (method != "relevance")
    fast, report = accelerate(model, found.recipe, images)
    of_blocks = [layer for layer in report.layers if layer.name.startswith("blocks")]
    assert sum(layer.bytes for layer in of_blocks) / 2**20 == pytest.approx(found.cost)
    assert {layer.name: int(layer.weight.removeprefix("int")) for layer in of_blocks} == {
        name.replace("attn", "attention"): bits for name, bits in found.bits.items()
    }
    assert "of 0." in str(found) and "MiB" in str(found)
    assert fast(images).isfinite().all()


@torch.no_grad()
def test_losses_are_those_of_the_model_with_one_layer_quantized(model):
    """And the model is as before. Half of the images that calibrate are enough."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    images = pixels(4)
    layers = mixed_precision._layers(model)
    losses = mixed_precision._losses(model, layers, BITS, [images[:3], images[3:]], 2)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    truth = model(images[:2]).double()
    weight = model.blocks[1].mlp.fc2.weight
    for bits in BITS:
        codes, scale = affine.quantize_weight(before["blocks.1.mlp.fc2.weight"], bits)
        weight.copy_(affine.dequantize(codes, scale[:, None]))
        loss = (model(images[:2]).double() - truth).square().sum() / truth.square().sum()
        assert losses["blocks.1.mlp.fc2"][bits] == pytest.approx(float(loss), rel=1e-6)
    weight.copy_(before["blocks.1.mlp.fc2.weight"])
    assert all(of[3] > of[4] > of[8] > 0 for of in losses.values())


def test_time_budget(model, monkeypatch):
    """8 bits where their matmul is no slower; the budget holds for the measured times."""
    times = {3: 3e-3, 4: 1e-3, 8: 2e-3}

    def seconds(_, layers, bits, __):
        return {layer: {b: times[b] for b in bits} for layer in layers}

    monkeypatch.setattr(mixed_precision, "_seconds", seconds)
    found = search(model, [pixels(2)], max_ms=8 * 2.0 - 3.5, bits=BITS)
    assert sorted(found.bits.values()) == [4, 4, 4, 4, 8, 8, 8, 8] and found.cost == pytest.approx(12)
    assert found.unit == "ms an image"


def test_times_are_measured(model):
    layers = mixed_precision._layers(model)
    seconds = mixed_precision._seconds(model, layers, (4, 8), [pixels(2)])
    assert seconds.keys() == layers.keys()
    assert all(0 < of[b] < 0.1 for of in seconds.values() for b in (4, 8))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "give one of max_mib and max_ms, got max_mib=None and max_ms=None"),
        ({"max_mib": 1.0, "max_ms": 1.0}, "give one of"),
        ({"max_mib": 1.0, "method": "best"}, "method 'best' is not one of least_loss, greedy, relevance"),
        ({"max_mib": 1.0, "bits": (4, 7)}, "7"),
        ({"max_mib": 1e-4}, r"max_mib=0.0001 is below 0\.0\d+, the least that bits"),
    ],
)
def test_refuses(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        search(model, pixels(2), **kwargs)


def test_refuses_a_model_without_blocks():
    with pytest.raises(Unsupported, match="no block of this Linear can be replaced"):
        search(spread(torch.nn.Linear(8, 8)), torch.randn(2, 8), max_mib=1.0)
