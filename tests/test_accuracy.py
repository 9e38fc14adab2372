"""Accelerated models on real images, each paired with its own fp32 predictions.

DeiT-Ti and ViT-Ti (arXiv:2012.12877, 2106.10270) on 650 ImageNet validation images, scales from 32 training images; and
the digits model that ships with the package, on the third that did not train it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pyvit_accel import accelerate, recipes
from pyvit_accel.models import digits_data, digits_model, load_weights

every_recipe = pytest.mark.parametrize("recipe", recipes.RECIPES.values(), ids=list(recipes.RECIPES))
CALIBRATION, BATCH = 32, 50


@dataclass(frozen=True)
class Bar:
    """What a model may lose, points of top-1, and how much of fp32 it must predict the same, percent."""

    loss: float
    agreement: float


# 650 images are steps of 0.15. Measured (loss, agreement): DeiT-Ti W8A8 0.00, 98.3; W8A8_DYNAMIC -0.15, 98.6.
# ViT-Ti W8A8 -0.31, 99.2; W8A8_DYNAMIC -0.77, 98.6. Minus: better than fp32.
BARS = {"deit_tiny_patch16_224": Bar(0.5, 98.0), "vit_tiny_patch16_224": Bar(0.8, 96.0)}


def data() -> Path:
    if "PYVIT_ACCEL_DATA" not in os.environ:
        pytest.skip("PYVIT_ACCEL_DATA is not set: no real weights and images")
    return Path(os.environ["PYVIT_ACCEL_DATA"])


@cache
def images(folder: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images of a folder, centre-cropped, (count, 3, 224, 224) uint8, and their labels."""
    image, numpy = pytest.importorskip("PIL.Image"), pytest.importorskip("numpy")
    records = json.loads((data() / "labels.json").read_text())[folder][:count]
    pixels = []
    for record in records:
        picture = image.open(data() / folder / record["file"]).convert("RGB")
        left, top = (round((side - 224) / 2) for side in picture.size)  # 227: 1.5 becomes 2, as torchvision crops
        picture = picture.crop((left, top, left + 224, top + 224))
        pixels.append(torch.from_numpy(numpy.array(picture)).permute(2, 0, 1))
    return torch.stack(pixels), torch.tensor([record["label"] for record in records])


@torch.inference_mode()
def predict(model: nn.Module, pixels: Tensor) -> Tensor:
    return torch.cat([model(batch).argmax(1) for batch in pixels.split(BATCH)])


def float_model(name: str) -> nn.Module:
    return load_weights(name, data() / "weights" / f"{name}.fp16.safetensors").eval()


@cache
def float_predictions(name: str) -> Tensor:
    return predict(float_model(name), images("imagenet_val_227", 650)[0])


@pytest.mark.parametrize("name", BARS)
def test_fp32(name):
    """The numbers that the others are compared with are the recorded ones."""
    data()
    expected = {"deit_tiny_patch16_224": 521, "vit_tiny_patch16_224": 539}[name]
    assert int((float_predictions(name) == images("imagenet_val_227", 650)[1]).sum()) == expected


@every_recipe
@pytest.mark.parametrize("name", BARS)
def test_imagenet(name, recipe):
    data()
    calibration, _ = images("imagenet_train_256", CALIBRATION)
    pixels, labels = images("imagenet_val_227", 650)
    model, report = accelerate(float_model(name), recipe, [calibration])
    assert len(report.replaced) == (49 if recipe.name.endswith("A16") else 14)
    predictions, truth = predict(model, pixels), float_predictions(name)
    loss = 100 * ((truth == labels).double().mean() - (predictions == labels).double().mean()).item()
    agreement = 100 * (predictions == truth).double().mean().item()
    assert loss <= BARS[name].loss
    assert agreement >= BARS[name].agreement


@every_recipe
def test_digits(recipe):
    pytest.importorskip("sklearn")
    model, (pixels, labels) = digits_model(), digits_data("test")
    new, _ = accelerate(model, recipe, [digits_data("train")[0][:CALIBRATION]])
    predictions, truth = predict(new, pixels), predict(model, pixels)
    assert (predictions == truth).double().mean() >= 0.99
    assert (predictions == labels).double().mean() >= (truth == labels).double().mean() - 0.005
