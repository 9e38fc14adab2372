"""The command demo: what acceleration gains and costs, on a trained model that ships and on ViT-B/16.

With PYVIT_ACCEL_DATA naming a folder that holds weights/*.safetensors, labels.json, imagenet_val_227 and
imagenet_train_256, also on pretrained ImageNet models.
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from pyvit_accel.commands import (
    FP32,
    LATENCY_HEADER,
    bars,
    convert,
    fidelity_table,
    latencies,
    latency_cells,
    latency_rows,
    machine_line,
    num_batches,
    prepare_outputs,
    recipe_variants,
)
from pyvit_accel.images import ImageFolder
from pyvit_accel.measure import Fidelity, Latency, compare_outputs
from pyvit_accel.models import create_vit, digits_data, digits_model, load_weights
from pyvit_accel.output import Bar, note, progress, table, write_chart
from pyvit_accel.recipes import W8A8, W8A8_DYNAMIC

DATA = "PYVIT_ACCEL_DATA"
RANDOM = "vit_base_patch16_224"
REAL = ("deit_tiny_patch16_224", "vit_tiny_patch16_224")
RECIPES = (W8A8, W8A8_DYNAMIC)
CALIBRATION_IMAGES = 32
SAMPLES = 8


@dataclass
class Results:
    """Filled part by part; printed and drawn at the end."""

    latency: list[tuple]
    charts: dict[str, list[Bar]]

    def add(self, model: str, batch: int, latency: dict[str, Latency], fidelity: dict[str, Fidelity] | None = None):
        self.latency += [(model, *latency_cells(row)) for row in latency_rows(latency, batch)]
        self.charts[f"{model}, batch {batch}"] = bars(latency, batch, fidelity)


def run_demo(args: argparse.Namespace) -> None:
    args.chart.parent.mkdir(parents=True, exist_ok=True)
    prepare_outputs(args)
    rounds = 7 if args.quick else 20
    results = Results([], {})
    _digits(results, 200 if args.quick else None, rounds)
    _random(results, RANDOM, rounds)
    for name in REAL if (folder := data_folder()) else ():
        _real(results, name, folder, 64 if args.quick else None, rounds)
    print(f"Latency, ms per image: median, and the fastest of {rounds} rounds taken in turn. {machine_line()}\n")
    print(table(("model", *LATENCY_HEADER), results.latency), end="\n\n")
    write_chart(args.chart, f"pyvit_accel: float32 and int8, before and after\n{machine_line()}", results.charts)
    print(f"chart: {args.chart}")


def _digits(results: Results, count: int | None, rounds: int) -> None:
    """The trained model that ships: 8x8 handwritten digits of scikit-learn, calibrated on training images."""
    model = digits_model()
    images, labels = (x[:count] for x in digits_data("test"))
    models = {FP32: model, **_accelerated(model, [digits_data("train")[0][:CALIBRATION_IMAGES]], "digits")}
    read = zip(images.split(64), labels.split(64), strict=True)
    fidelity = compare_outputs(models, read, math.ceil(len(images) / 64), "digits: accuracy")
    print(f"Digits model (trained, ships with the package), {len(images)} digits it was not trained on\n")
    print(fidelity_table(fidelity))
    with torch.inference_mode():
        predicted = models[W8A8.name](images[:SAMPLES]).argmax(1).tolist()
    print(f"\nW8A8 reads {predicted}\nlabels are {labels[:SAMPLES].tolist()}\n")
    for batch in (1, 64):
        results.add("digits", batch, latencies(models, batch, 5 * rounds, "digits"), fidelity)


def _random(results: Results, name: str, rounds: int) -> None:
    models = recipe_variants(name, [W8A8.name])
    results.add(f"{name} (random weights)", 1, latencies(models, 1, rounds, name))


def _real(results: Results, name: str, folder: Path, count: int | None, rounds: int) -> None:
    """Pretrained ImageNet weights: the same images for every variant, so compare the predictions, not only top-1."""
    model = load_weights(create_vit(name), folder / "weights" / f"{name}.fp16.safetensors").eval()
    size, channels = model.config.image_size, model.config.in_channels
    train = ImageFolder.open(folder / "imagenet_train_256").sample(CALIBRATION_IMAGES)[0]
    batches = [pixels for pixels, _ in train.batches(size, channels, 8)]
    models = {FP32: model, **_accelerated(model, batches, name)}
    images = ImageFolder.open(folder / "imagenet_val_227", folder / "labels.json", model.config.num_classes)
    images = images.sample(count)[0] if count else images
    read = images.batches(size, channels, 8)
    fidelity = compare_outputs(models, read, num_batches(images, 8), f"{name}: accuracy")
    print(f"{name} (pretrained), {fidelity[FP32].images} ImageNet validation images; not the accuracy on all 50,000\n")
    print(fidelity_table(fidelity), end="\n\n")
    results.add(name, 1, latencies(models, 1, rounds, name), fidelity)


def _accelerated(model, batches: list, name: str) -> dict:
    return {recipe.name: convert(model, recipe, batches) for recipe in progress(RECIPES, f"{name}: accelerating")}


def data_folder() -> Path | None:
    """The folder in PYVIT_ACCEL_DATA, when it is set and holds what the demo reads."""
    if not os.environ.get(DATA):
        note(f"{DATA} is not set: no pretrained ImageNet models in this demo")
        return None
    folder = Path(os.environ[DATA])
    needed = ["labels.json", "imagenet_val_227", "imagenet_train_256", *(f"weights/{n}.fp16.safetensors" for n in REAL)]
    missing = [name for name in needed if not (folder / name).exists()]
    if missing:
        note(f"{DATA}={folder} lacks {', '.join(missing)}: no pretrained ImageNet models in this demo")
    return None if missing else folder
