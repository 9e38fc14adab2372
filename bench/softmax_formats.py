"""Formats of attention probabilities on real models: top-1, agreement and logit error, paired with float32.

    PYVIT_ACCEL_DATA=data python bench/softmax_formats.py --json softmax.json --chart softmax.png

P is in the format, everything else float32; then q, k and v are rounded too. What is searched for is found block by
block on 4 training images, scales of q, k and v on 32; measured on 650 validation images, rows of less interest on
the first ones. "max": P of the row's maximum, divided by the row's sum; "lse": the probability itself, as published.
--models digits takes the model and data that ship with the package, and needs no PYVIT_ACCEL_DATA.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from _softmax_chart import write_softmax_chart
from _softmax_study import Sample, Variant, sample_blocks, studied
from torch import Tensor, nn

from pyvit_accel.calibrate import adalog_softmax, log_sqrt2_scale, sulq_search, twin_softmax
from pyvit_accel.calibrate.adalog import BASES
from pyvit_accel.calibrate.sulq import ETAS
from pyvit_accel.calibrate.twin import SPLITS
from pyvit_accel.commands import FP32, float_model
from pyvit_accel.formats import log, tan, twin
from pyvit_accel.formats.softmax import SoftmaxFormat, linear_mantissa, log2, of_codebook
from pyvit_accel.images import ImageFolder
from pyvit_accel.measure import DIGITS, build_model, machine
from pyvit_accel.models import digits_data
from pyvit_accel.output import percent, progress, table, write_json

MODELS = ("deit_tiny_patch16_224", "vit_tiny_patch16_224")
CALIBRATION, BATCH = 32, 5  # the scores of more images leave the cache: a quarter slower
LM3, LOG2_4, LOG2_4_LSE = "linear mantissa, 3 bits, max", "log2, 4 bits, max", "log2, 4 bits, lse"
BOTH = ", both rounded"  # the score and the maximum, and not their distance
BARS = {LM3: 0.3, LOG2_4: 0.8}  # points of top-1 that a default may lose
HEADER = ("model", "P, operands", "values", "images", "top-1", "lost", "+-", "same", "logit error")
EARLIER = {  # measured before this script, on the same images: top-1, agreement, logit error of DeiT-Ti and ViT-Ti
    FP32: ((79.4, 100, 0), (80.5, 100, 0)),
    LOG2_4_LSE: ((78.9, 96.3, 0.167), (80.5, 94.6, 0.131)),
    f"{LOG2_4_LSE}, divided by the sum": ((79.4, 97.1, 0.121), (80.6, 97.9, 0.076)),
    "log-sqrt2, 4 bits, lse": ((78.5, 90.6, 0.342), (79.2, 90.8, 0.275)),
    LOG2_4: ((79.2, 97.7, 0.075), (81.5, 98.5, 0.055)),
    "log2, 3 bits, max": ((79.4, 97.2, 0.147), (81.2, 96.3, 0.088)),
    "linear mantissa, 1 bit, max": ((79.4, 99.9, 0.040), (80.6, 98.9, 0.029)),
    LM3: ((79.4, 99.5, 0.019), (80.6, 99.7, 0.014)),
    f"{LM3}; q k int8 per head, v e4m3": ((79.4, 99.2, 0.029), (80.6, 99.7, 0.023)),
}
MAIN = (*EARLIER, *(name + BOTH for name in BARS))  # measured on all images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=MODELS)
    parser.add_argument("--images", type=int, help="only the first so many")
    parser.add_argument("--others", type=int, default=325, help="images of the rows of less interest")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chart", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows: list[dict] = []
    for name in args.models:
        rows += measure(name, args.images, args.others)
        said = [*verdicts(rows), *reproduced(rows)]
        if args.json:  # after each model: the run is long
            write_json(args.json, {"machine": machine(), "said": said, "rows": rows})
    print(table(HEADER, map(cells, rows)), *said, sep="\n")
    if args.chart:
        write_softmax_chart(args.chart, rows, LOG2_4_LSE)


def measure(name: str, count: int | None, others: int) -> list[dict]:
    model, calibration, pixels, labels = problem(name)
    samples = sample_blocks(model, calibration)
    variants = list(study())
    models = [studied(model, variant, samples) for variant in progress(variants, f"{name}: searches")]
    found = [{"model": name} | row for row in paired(model, models, variants, pixels[:count], labels[:count], others)]
    for row, other in zip(found[1:], models, strict=True):
        forms = [block.attn.form for block in other.blocks]
        row["values"] = 256 if forms[0] is None else max(form.values.numel() for form in forms) + 1
        row["searched"] = [parameters(form) for form in forms] if len({str(parameters(f)) for f in forms}) > 1 else None
    return found


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Model, images to calibrate on, images to measure on, their labels."""
    if name == DIGITS:
        return (build_model(name), digits_data("train")[0][:CALIBRATION], *digits_data("test"))
    data = Path(os.environ["PYVIT_ACCEL_DATA"])
    model = float_model(name, str(data / "weights" / f"{name}.fp16.safetensors"), {})
    calibration, _ = next(ImageFolder.open(data / "imagenet_train_256").batches(224, 3, CALIBRATION))
    folder = ImageFolder.open(data / "imagenet_val_227", data / "labels.json", 1000)
    pixels, labels = zip(*folder.batches(224, 3, CALIBRATION), strict=True)
    return model, calibration, torch.cat(pixels), torch.cat(labels)


def study() -> Iterator[Variant]:
    """Every row but float32, in the order of the table."""
    yield from formats()
    values = [{"v": v} for v in ("int8", "e4m3", "int4")]
    keys = [{"qk": qk, "centre": centre} for qk in ("tensor", "head", "token") for centre in (False, True)]
    for form, chosen in ((linear_mantissa(3), keys), (log2(4), [{"qk": "head"}])):
        yield from (rounded(form, **operands) for operands in (*chosen, *values))
        yield rounded(form, qk="head", v="e4m3")
    for bits in (3, 4):
        for anchor in ("max", "lse"):
            form = of_codebook(log.log2(bits, zero="last"), anchor)
            yield fixed(form, "zero", suffix=", the last code is the zero")
    for form in (linear_mantissa(1), linear_mantissa(3), log2(3), log2(4)):
        yield fixed(form, "anchor", suffix=", rounded up to an octave", top="octave")


def formats() -> Iterator[Variant]:
    for bits in (1, 2, 3):
        for anchor in ("max", "lse"):
            yield fixed(linear_mantissa(bits, anchor, normalize=anchor == "max"))
    yield fixed(linear_mantissa(3, "lse"))
    for bits in (2, 3, 4, 5):
        yield fixed(log2(bits))
        for normalize in (False, True):
            yield fixed(log2(bits, "lse", normalize))
    for form in (linear_mantissa(1), linear_mantissa(3), log2(3), log2(4), of_codebook(log.log_sqrt2(4), "max")):
        yield replace(fixed(form, suffix=BOTH, top="step"), anchor="max" + BOTH)
    for bits in (3, 4):
        for anchor in ("lse", "max"):
            yield fixed(of_codebook(log.log_sqrt2(bits), anchor))
        yield found("log-sqrt2", bits, "lse", log_sqrt2_published, ", scale searched")
    for bits in (3, 4, 5, 6):
        yield found("AdaLog", bits, "lse", adalog_published)
        yield found("AdaLog", bits, "max", adalog_max)
    for bits in (3, 4):
        yield found("SULQ", bits, "lse", sulq_published)
        yield found("SULQ", bits, "max", sulq_max)
    for anchor in ("lse", "max"):
        for a, two_sided in ((math.pi / 4, False), (1.4, True)):
            name = f"TanQ-style {'two' if two_sided else 'one'}-sided, 4 bits"
            yield fixed(replace(of_codebook(tan.tan(4, a, two_sided), anchor), name=name))
    for bits in (4, 6, 8):
        yield found("twin", bits, "lse", twin_published)
        yield found("twin", bits, "max", twin_max)
        for anchor in ("lse", "max"):
            yield fixed(of_codebook(twin.uniform(bits, 1 / (2**bits - 1)), anchor))
    yield Variant("bytes, what they drop handed on, max", "P", "bytes", "max", lambda sample: None)


def fixed(form: SoftmaxFormat, group: str = "P", suffix: str = "", **rest) -> Variant:
    """A format that is the same in every block."""
    anchor = "lse, divided" if form.anchor == "lse" and form.normalize else form.anchor
    return Variant(form.label + suffix, group, form.name.split(",")[0], anchor, lambda sample: form, **rest)


def found(family: str, bits: int, anchor: str, search, suffix: str = "") -> Variant:
    """A format that is searched for on the sample of each block."""
    name = f"{family}, {bits} bits, {anchor}{suffix}"
    return Variant(name, "P", family + suffix, anchor, partial(search, bits=bits))


def rounded(form: SoftmaxFormat, qk: str = "", centre: bool = False, v: str = "") -> Variant:
    keys = f"q k int8 per {qk}" + (", k less its mean" if centre else "") if qk else ""
    told = ", ".join(filter(None, (keys, f"v {v}" if v else "")))
    return replace(fixed(form, "operands", f"; {told}"), qk=qk, centre=centre, v=v)


def log_sqrt2_published(sample: Sample, bits: int) -> SoftmaxFormat:
    return of_codebook(log.log_sqrt2(bits, log_sqrt2_scale(sample.p, bits)), "lse")


def adalog_published(sample: Sample, bits: int) -> SoftmaxFormat:
    return of_codebook(log.adalog(bits, adalog_softmax(sample.p, sample.v[: len(sample.p)], bits)), "lse")


def adalog_max(sample: Sample, bits: int) -> SoftmaxFormat:
    return sample.best(of_codebook(log.adalog(bits, q), "max") for q in BASES[::2])


def sulq_published(sample: Sample, bits: int) -> SoftmaxFormat:
    return of_codebook(log.sulq(bits, *sulq_search(sample.p, bits)), "lse")


def sulq_max(sample: Sample, bits: int) -> SoftmaxFormat:
    """The smallest p is nearly zero, so log2(p + eta) begins at log2(eta)."""
    return sample.best(of_codebook(log.sulq(bits, eta, math.log2(eta), math.log2(1 + eta)), "max") for eta in ETAS)


def twin_published(sample: Sample, bits: int) -> SoftmaxFormat:
    split = twin_softmax(sample.p, sample.v[: len(sample.p)], bits)
    return of_codebook(twin.softmax(bits, split, released=False), "lse")


def twin_max(sample: Sample, bits: int) -> SoftmaxFormat:
    return sample.best(of_codebook(twin.softmax(bits, split, released=False), "max") for split in SPLITS)


def parameters(form: SoftmaxFormat | None) -> dict | None:
    """What a search has chosen, as far as the format shows it."""
    if form is None:
        return None
    return {"steps": form.steps, "shift": form.shift, "unit": form.unit, "offset": form.offset * form.unit}


@torch.inference_mode()
def paired(
    model: nn.Module,
    models: Iterable[nn.Module],
    variants: list[Variant],
    pixels: Tensor,
    labels: Tensor,
    count: int,
) -> list[dict]:
    """The row of float32 and of each variant; "lost" and its standard error are of the same images in float32.

    count: of the variants not in MAIN, the first so many images.
    """
    exact, others = [], [[] for _ in variants]
    for i, batch in enumerate(progress(pixels.split(BATCH), "images")):
        exact.append(model(batch))
        for logits, other, variant in zip(others, models, variants, strict=True):
            if variant.name in MAIN or i * BATCH < count:
                logits.append(other(batch))
    exact = torch.cat(exact)
    plain = Variant(FP32, "", FP32, "", lambda sample: None)
    rows = [summary(plain, exact, exact, labels) | {"values": None, "searched": None}]
    for variant, logits in zip(variants, others, strict=True):
        logits = torch.cat(logits)
        rows.append(summary(variant, logits, exact[: len(logits)], labels[: len(logits)]))
    return rows


def summary(variant: Variant, logits: Tensor, exact: Tensor, labels: Tensor) -> dict:
    right, lost = (logits.argmax(1) == labels).double(), (exact.argmax(1) == labels).double()
    lost = lost - right
    return {
        "name": variant.name, "group": variant.group, "family": variant.family, "anchor": variant.anchor,
        "images": len(labels), "top1": right.mean().item(), "lost": lost.mean().item(),
        "lost_error": (lost.std(correction=0) / len(labels) ** 0.5).item(),
        "agreement": (logits.argmax(1) == exact.argmax(1)).double().mean().item(),
        "logit_error": ((logits - exact).double().norm() / exact.double().norm()).item(),
    }  # fmt: skip


def cells(row: dict) -> tuple[str, ...]:
    return (
        row["model"], row["name"], str(row["values"] or ""), str(row["images"]), percent(row["top1"]),
        f"{100 * row['lost']:.2f}", f"{100 * row['lost_error']:.2f}", percent(row["agreement"]),
        f"{row['logit_error']:.4f}",
    )  # fmt: skip


def verdicts(rows: list[dict]) -> list[str]:
    """Whether the defaults lose no more than their bars."""
    lines = []
    for row in rows:
        if row["name"] in BARS:
            bar, lost = BARS[row["name"]], 100 * row["lost"]
            said = "within" if lost <= bar else "NOT within"
            lines.append(f"{row['model']}, {row['name']}: {lost:.2f} points lost, {said} {bar}")
    return lines


def reproduced(rows: list[dict]) -> list[str]:
    """Beside what was measured before: "the same" is logit errors within 10 %, agreement within 3 standard errors."""
    lines = []
    for row in rows:
        if row["model"] not in MODELS or row["name"] not in EARLIER:
            continue
        top1, agreement, error = EARLIER[row["name"]][MODELS.index(row["model"])]
        share = (row["agreement"] + agreement / 100) / 2
        noise = 300 * math.sqrt(2 * share * (1 - share) / row["images"])
        same = abs(row["logit_error"] - error) <= 0.1 * error and abs(100 * row["agreement"] - agreement) <= noise
        now = f"{100 * row['top1']:.1f} / {100 * row['agreement']:.1f} / {row['logit_error']:.3f}"
        before = f"{top1} / {agreement} / {error}"
        lines.append(f"{row['model']}, {row['name']}: {now}, before {before}: {'the same' if same else 'NOT the same'}")
    return lines


if __name__ == "__main__":
    main()
