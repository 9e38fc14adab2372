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
    """What a model may lose, points of top-1, and how much of fp32 it must predict the same, percent.

    images: of the first so many. The recipes whose matmul is the reference's take half a minute for 200.
    """

    loss: float
    agreement: float
    images: int = 650


# 650 images are steps of 0.15, their standard error is 1.5. Measured once, on all 650:
#                     W8A8   W6A6   W4A8   W4A4   W3A3  W8A16  W4A16    FP8   POW2
# DeiT-Ti  loss       0.15   0.15   2.15   3.69   36.3   0.00   1.08  -0.46   4.62
#          agreement  99.1   97.7   90.0   87.2   47.1   99.1   92.8   96.5   83.7
# ViT-Ti   loss       0.31   1.08   3.23   7.54   60.0   0.62   3.08   0.77  12.46
#          agreement  99.1   96.5   89.1   82.9   24.2   99.1   92.8   97.1   76.8
# Minus: better than fp32. EXP_FREE_ATTENTION 0.00, 99.1 and 0.15, 99.7.
BARS = {
    "deit_tiny_patch16_224": {
        "W8A8": Bar(0.5, 98.0),
        "W8A8_DYNAMIC": Bar(0.5, 98.0),
        "W6A6": Bar(1.0, 95.0),
        "W4A8": Bar(2.5, 87.0),
        "W4A4": Bar(7.5, 83.0),
        "W3A3": Bar(45, 38.0),
        "W8A16": Bar(0.5, 98.0),
        "W4A16": Bar(2.5, 90.0),
        "FP8": Bar(2.0, 94.0, images=200),
        "POW2": Bar(9.0, 77.0, images=200),
        "EXP_FREE_ATTENTION": Bar(0.3, 98.5),
    },
    "vit_tiny_patch16_224": {
        "W8A8": Bar(0.8, 96.0),
        "W8A8_DYNAMIC": Bar(0.8, 96.0),
        "W6A6": Bar(2.0, 94.0),
        "W4A8": Bar(5.0, 86.0),
        "W4A4": Bar(25, 78.0),
        "W3A3": Bar(70, 15.0),
        "W8A16": Bar(0.8, 96.0),
        "W4A16": Bar(5.0, 90.0),
        "FP8": Bar(2.5, 94.0, images=200),
        "POW2": Bar(18, 70.0, images=200),
        "EXP_FREE_ATTENTION": Bar(0.3, 98.5),
    },
}

MEASURED = tuple(next(iter(BARS.values())))  # not SPARSE24: untrained it costs these models 25 and 44 points


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


@pytest.mark.parametrize("recipe", [recipes.RECIPES[name] for name in MEASURED], ids=MEASURED)
@pytest.mark.parametrize("name", BARS)
def test_imagenet(name, recipe):
    data()
    bar, (calibration, _) = BARS[name][recipe.name], images("imagenet_train_256", CALIBRATION)
    pixels, labels = (t[: bar.images] for t in images("imagenet_val_227", 650))
    model, report = accelerate(float_model(name), recipe, [calibration])
    integers = recipe.name.startswith("W") and not recipe.name.endswith("A16")
    assert len(report.replaced) == (14 if integers else 12 if "ATTENTION" in recipe.name else 49)
    predictions, truth = predict(model, pixels), float_predictions(name)[: bar.images]
    loss = 100 * ((truth == labels).double().mean() - (predictions == labels).double().mean()).item()
    agreement = 100 * (predictions == truth).double().mean().item()
    assert loss <= bar.loss
    assert agreement >= bar.agreement


@every_recipe
def test_digits(recipe):
    pytest.importorskip("sklearn")
    model, (pixels, labels) = digits_model(), digits_data("test")
    new, _ = accelerate(model, recipe, [digits_data("train")[0][:CALIBRATION]])
    predictions, truth = predict(new, pixels), predict(model, pixels)
    # Of 599 images: one is 0.0017. Measured agreement: W4A4, SPARSE24 0.988, W3A3 0.982, the others 0.992 to 1.
    bars = {"W4A4": (0.98, 0.005), "W3A3": (0.965, 0.015), "SPARSE24": (0.98, 0.01)}
    agreement, loss = bars.get(recipe.name, (0.99, 0.005))
    assert (predictions == truth).double().mean() >= agreement
    assert (predictions == labels).double().mean() >= (truth == labels).double().mean() - loss
