"""One-shot 2:4 pruning of real models: top-1, agreement and logit error, paired with float32.

    PYVIT_ACCEL_DATA=data python bench/sparsity_accuracy.py --json sparsity.json --chart sparsity.png

qkv, proj, fc1 and fc2 of every block, pruned at once. The weights stay dense with zeros in them, in
float32: what sparse24_linear computes, but for its rounding. Calibrated on training images, measured on validation
images; "lost" and its standard error are of the same images in float32. The curve prunes the layers with the smallest
output errors first, as the last full row reports them. One row is fine-tuned on the 256 training images. --models
digits takes the model and data that ship with the package, and needs no PYVIT_ACCEL_DATA.
"""

from __future__ import annotations

import argparse
import os
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from _sparsity_chart import write_sparsity_chart
from _sparsity_finetune import finetuned
from torch import Tensor, nn

from pyvit_accel.commands import float_model
from pyvit_accel.images import ImageFolder
from pyvit_accel.measure import DIGITS, build_model, machine
from pyvit_accel.models import digits_data
from pyvit_accel.output import percent, progress, table, write_json
from pyvit_accel.sparsity import Pruned, prune

MODELS = ("deit_tiny_patch16_224", "vit_tiny_patch16_224")
LAYERS = ("blocks.*.attn.qkv", "blocks.*.attn.proj", "blocks.*.mlp.fc1", "blocks.*.mlp.fc2")
BATCH = 10
BEST = "SparseGPT, permutation, refit"  # and a bias corrected, tokens weighed: all that prune does
BAR = 0.5  # of what magnitude loses, that SparseGPT with permutation may lose
TUNED, TUNING = f"{BEST}, fine-tuned", 256  # images
SHARES = (0.25, 0.5, 0.75)  # of the layers, on the curve
HEADER = ("model", "method", "layers", "images", "top-1", "lost", "+-", "same", "logit error", "kept", "output error")


@dataclass(frozen=True)
class Method:
    """A row: arguments of prune. Without `calibrated` the weights alone decide."""

    name: str
    method: str
    calibrated: bool = True
    permute: bool = False
    correct_bias: bool = False
    weigh_tokens: bool = False
    refits: bool = False


METHODS = (
    Method("magnitude", "magnitude", calibrated=False),
    Method("Wanda", "wanda"),
    Method("SparseGPT", "sparsegpt"),
    Method("SparseGPT, permutation", "sparsegpt", permute=True),
    Method(BEST, "sparsegpt", permute=True, correct_bias=True, weigh_tokens=True, refits=True),
)
CURVE = (METHODS[0], METHODS[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=MODELS)
    parser.add_argument("--calibration", type=int, default=128, help="images")
    parser.add_argument("--images", type=int, help="only the first so many")
    parser.add_argument("--curve", type=int, default=325, help="images of the points of the curve")
    parser.add_argument("--epochs", type=int, default=3, help="of the fine-tune; 0: no such row")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chart", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows: list[dict] = []
    for name in args.models:
        for row in measure(name, args.calibration, args.images, args.curve, args.epochs):
            rows.append(row)
            if args.json:  # after each row: the run is long
                write_json(args.json, {"machine": machine(), "said": verdicts(rows), "rows": rows})
    print(table(HEADER, map(cells, rows)), *verdicts(rows), sep="\n")
    if args.chart:
        write_sparsity_chart(args.chart, rows)


def measure(name: str, calibration: int, count: int | None, curve: int, epochs: int):
    """The rows of one model, as they come."""
    model, training, pixels, labels = problem(name)
    batches, training = list(training[:calibration].split(BATCH)), training[:TUNING]
    pixels, labels = pixels[:count], labels[:count]
    exact = predict(model, pixels)
    yield {"model": name, "method": "float32", "seconds": 0.0} | summary(exact, exact, labels, [])
    for method in METHODS:
        row, found, sparse = pruned(model, method, LAYERS, batches, pixels, labels, exact)
        yield {"model": name, "method": method.name} | row
    if epochs:
        start = time.perf_counter()
        tuned = finetuned(sparse, model, training, [one.name for one in found], epochs)
        row = summary(predict(tuned, pixels), exact, labels, found) | {"output_error": None}
        yield {"model": name, "method": TUNED} | row | {"seconds": time.perf_counter() - start, "epochs": epochs}
    by_error = [one.name for one in sorted(found, key=lambda one: one.output_error)]
    few = slice(min(curve, len(pixels)))
    for share in SHARES:
        for method in CURVE:
            some = by_error[: round(share * len(by_error))]
            row, *_ = pruned(model, method, some, batches, pixels[few], labels[few], exact[few])
            yield {"model": name, "method": method.name} | row


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Model, images to calibrate on, images to measure on, their labels."""
    if name == DIGITS:
        return (build_model(name), digits_data("train")[0], *digits_data("test"))
    data = Path(os.environ["PYVIT_ACCEL_DATA"])
    model = float_model(name, str(data / "weights" / f"{name}.fp16.safetensors"), {})
    images = ImageFolder.open(data / "imagenet_train_256").batches(224, 3, TUNING)
    folder = ImageFolder.open(data / "imagenet_val_227", data / "labels.json", 1000)
    pixels, labels = zip(*folder.batches(224, 3, 50), strict=True)
    return model, next(images)[0], torch.cat(pixels), torch.cat(labels)


def pruned(
    model: nn.Module, method: Method, layers, batches: list[Tensor], pixels: Tensor, labels: Tensor, exact: Tensor
) -> tuple[dict, list[Pruned], nn.Module]:
    sparse, start = deepcopy(model), time.perf_counter()
    found = prune(
        sparse, layers, batches if method.calibrated else (), method.method,
        permute=method.permute, correct_bias=method.correct_bias, weigh_tokens=method.weigh_tokens,
        refits=method.refits, progress=progress,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    row = summary(predict(sparse, pixels), exact, labels, found)
    return row | {"seconds": seconds, "report": [asdict(one) for one in found]}, found, sparse


@torch.inference_mode()
def predict(model: nn.Module, pixels: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in progress(pixels.split(BATCH), "images")])


def summary(logits: Tensor, exact: Tensor, labels: Tensor, found: list[Pruned]) -> dict:
    right, lost = (logits.argmax(1) == labels).double(), (exact.argmax(1) == labels).double()
    lost = lost - right
    errors = [one.output_error for one in found if one.output_error is not None]
    return {
        "layers": len(found), "images": len(labels), "top1": right.mean().item(), "lost": lost.mean().item(),
        "lost_error": (lost.std(correction=0) / len(labels) ** 0.5).item(),
        "agreement": (logits.argmax(1) == exact.argmax(1)).double().mean().item(),
        "logit_error": ((logits - exact).double().norm() / exact.double().norm()).item(),
        "kept_energy": sum(one.kept_energy for one in found) / len(found) if found else 1.0,
        "output_error": sum(errors) / len(errors) if errors else None,
    }  # fmt: skip


def cells(row: dict) -> tuple[str, ...]:
    return (
        row["model"], row["method"], str(row["layers"]), str(row["images"]), percent(row["top1"]),
        f"{100 * row['lost']:.2f}", f"{100 * row['lost_error']:.2f}", percent(row["agreement"]),
        f"{row['logit_error']:.4f}", percent(row["kept_energy"]), percent(row["output_error"]),
    )  # fmt: skip


def verdicts(rows: list[dict]) -> list[str]:
    """Whether SparseGPT with permutation loses less than half of what magnitude loses, all layers pruned."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        whole = {row["method"]: 100 * row["lost"] for row in mine if row["layers"] == max(r["layers"] for r in mine)}
        simple = whole.get(METHODS[0].name)
        for name in (method.name for method in METHODS if method.permute and method.name in whole):
            said = "less" if whole[name] < BAR * simple else "NOT less"
            lines.append(f"{model}, {name}: {whole[name]:.2f} points lost, magnitude {simple:.2f}: {said} than half")
    return lines


if __name__ == "__main__":
    main()
