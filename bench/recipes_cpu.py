"""Every recipe on real models: top-1 paired with float32, bytes of the weights, latency, time to convert.

    PYVIT_ACCEL_DATA=data python bench/recipes_cpu.py --json recipes.json --chart recipes.png

Calibrated on 32 training images, measured on 650 validation images. Mixed precision gets the bytes of W4; "learned" is
block reconstruction on 128 training images. Latencies are of all recipes in turn, in one process. ViT-B, whose weights
are random, has latency and bytes alone.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from torch import nn

from pyvit_accel import accelerate, recipes, search
from pyvit_accel.calibrate import Reconstruction
from pyvit_accel.commands import FP32, float_model
from pyvit_accel.convert import Recipe, Report
from pyvit_accel.images import ImageFolder
from pyvit_accel.measure import build_model, compare_latency, compare_outputs, machine, random_images
from pyvit_accel.output import Bar, percent, table, write_chart, write_json

MODELS = ("deit_tiny_patch16_224", "vit_tiny_patch16_224")
RANDOM = "vit_base_patch16_224"
CALIBRATION, LEARNING, BATCH = 32, 128, 50
HEADER = ("model", "recipe", "weights MiB", "of fp16", "ms, batch 1", "batch 8", "top-1", "lost", "same", "made in s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chart", type=Path)
    args = parser.parse_args()
    data = Path(os.environ["PYVIT_ACCEL_DATA"])
    rows = [row for name in MODELS for row in measure(name, data, args.rounds)]
    rows += latencies_of_random_weights(args.rounds)
    print(table(HEADER, [cells(row) for row in rows]))
    if args.json:
        write_json(args.json, {"machine": machine(), "rounds": args.rounds, "rows": rows})
    if args.chart:
        groups = {
            name: [Bar(row["recipe"], row["ms_batch_1"], row["top1"]) for row in rows if row["model"] == name]
            for name in (*MODELS, RANDOM)
        }
        write_chart(args.chart, "pyvit_accel on a CPU, batch 1", groups)


def measure(name: str, data: Path, rounds: int) -> list[dict]:
    model = float_model(name, str(data / "weights" / f"{name}.fp16.safetensors"), {})
    images = first_images(data, "imagenet_train_256", LEARNING)
    variants = {
        recipe.name: lambda recipe=recipe: accelerate(model, recipe, [images[:CALIBRATION]])
        for recipe in recipes.RECIPES.values()
    }
    variants["W4A8, mixed"] = lambda: accelerate(model, mixed(model, images), [images[:CALIBRATION]])
    learned = recipes.integer(4, 4, reconstruction=Reconstruction())
    variants["W4A4, learned"] = lambda: accelerate(model, learned, [images])
    models, reports, seconds = {FP32: model}, {}, {}
    for variant, make in variants.items():
        start = time.perf_counter()
        models[variant], reports[variant] = make()
        seconds[variant] = time.perf_counter() - start
    folder = ImageFolder.open(data / "imagenet_val_227", data / "labels.json", 1000)
    found = compare_outputs(models, folder.batches(224, 3, BATCH))
    rows = timed(name, models, reports, rounds)
    for row in rows:
        fidelity = found[row["recipe"]]
        row |= {"top1": fidelity.top1, "lost": found[FP32].top1 - fidelity.top1, "agreement": fidelity.agreement}
        row |= {"logit_error": fidelity.logit_error, "seconds": seconds.get(row["recipe"])}
    return rows


def mixed(model: nn.Module, images: torch.Tensor) -> Recipe:
    """As many bytes as W4A8, spent where they matter."""
    uniform = accelerate(model, recipes.integer(4, 8, search=False), [images[:BATCH]])[1]
    bytes_of_w4 = sum(layer.bytes for layer in uniform.layers if layer.name.startswith("blocks"))
    return search(model, images[:CALIBRATION], max_mib=bytes_of_w4 / 2**20).recipe


def first_images(data: Path, folder: str, count: int) -> torch.Tensor:
    read = ImageFolder.open(data / folder).batches(224, 3, BATCH)
    return torch.cat([pixels for pixels, _ in read])[:count]


def latencies_of_random_weights(rounds: int) -> list[dict]:
    model = build_model(RANDOM)
    images = random_images(model, 8)
    bits = ((8, 8), (6, 6), (4, 8), (4, 4), (3, 3))
    chosen = [*(recipes.integer(w, x, search=False) for w, x in bits), recipes.W8A16, recipes.W4A16]
    made = {recipe.name: accelerate(model, recipe, [images]) for recipe in chosen}
    models = {FP32: model} | {name: fast for name, (fast, _) in made.items()}
    return timed(RANDOM, models, {name: report for name, (_, report) in made.items()}, rounds)


def timed(name: str, models: dict[str, nn.Module], reports: dict[str, Report], rounds: int) -> list[dict]:
    rows = [{"model": name, "recipe": variant} for variant in models]
    for batch in (1, 8):
        images = random_images(models[FP32], batch)
        fns = {variant: lambda fast=fast, images=images: fast(images) for variant, fast in models.items()}
        latency = compare_latency(fns, rounds, label=f"{name}, batch {batch}")
        for row in rows:
            row[f"ms_batch_{batch}"] = latency[row["recipe"]].median / batch
    for row in rows:
        layers = reports[row["recipe"]].layers if row["recipe"] in reports else []
        row["weight_bytes"], row["fp16_bytes"] = (sum(getattr(x, n) for x in layers) for n in ("bytes", "float_bytes"))
        row |= {"top1": None, "lost": None, "agreement": None, "seconds": None}
    return rows


def cells(row: dict) -> tuple[str, ...]:
    size = row["weight_bytes"]
    return (
        row["model"],
        row["recipe"],
        f"{size / 2**20:.2f}" if size else "",
        f"{size / row['fp16_bytes']:.3f}" if size else "",
        f"{row['ms_batch_1']:.2f}",
        f"{row['ms_batch_8']:.2f}",
        percent(row["top1"]),
        "" if row["lost"] is None else f"{100 * row['lost']:.2f}",
        percent(row["agreement"]),
        "" if row["seconds"] is None else f"{row['seconds']:.1f}",
    )


if __name__ == "__main__":
    main()
