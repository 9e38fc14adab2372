"""Fewer tokens on real models: what W8A8 with a schedule loses, and on ViT-B how fast it is.

    PYVIT_ACCEL_DATA=data python bench/tokens_cpu.py search --json search.json
    PYVIT_ACCEL_DATA=data python bench/tokens_cpu.py accuracy --found search.json --json tokens.json --chart tokens.png
    python bench/tokens_cpu.py latency --json tokens_latency.json
    python bench/tokens_cpu.py memory --json tokens_memory.json

search: find_schedule on the 224 training images that calibration did not see, at most 1 point lost there.

accuracy: one W8A8 model, calibrated on 32 training images, is given every schedule in turn; 650 validation images. Rows
that the JSON file has already are kept, and it is written after each one. Of those that the search tried, the least
divergent of each twentieth of the multiply-adds is measured.

latency: ViT-B, random weights; W8A8 alone and with each schedule in turn, and how much of it plan and move take.

memory: what four blocks need beside weights and input for 4097 tokens, of which one map of attention is 192 MiB.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from _tokens_chart import write_tokens_chart
from _tokens_memory import HEADS, TOKENS, measure_memory
from _tokens_study import found_schedules, lost, macs_part, predictions, schedules
from _tokens_time import measure_latency
from recipes_cpu import BATCH, CALIBRATION, MODELS
from torch import Tensor, nn

from pyvit_accel import TokenSchedule, accelerate, find_schedule, recipes
from pyvit_accel.commands import float_model
from pyvit_accel.images import ImageFolder
from pyvit_accel.measure import machine
from pyvit_accel.output import percent, table, write_json

FAMILIES = ("tome, late", "diffrate", "diffrate, ending", "diffrate, merging")
HEADER = ("model", "family", "schedule", "MACs", "top-1", "lost", "broken", "mended", "same")
LATENCY_HEADER = ("batch", "schedule", "MACs", "ms an image", "speed-up", "plan and move, of the forward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(required=True)
    commands = (("search", run_search), ("accuracy", run_accuracy), ("latency", run_latency), ("memory", run_memory))
    for name, run in commands:
        command = sub.add_parser(name)
        command.add_argument("--json", type=Path, required=True)
        command.add_argument("--threads", type=int)
        command.set_defaults(run=run)
        if name == "accuracy":
            command.add_argument("--chart", type=Path)
            command.add_argument("--found", type=Path)
        else:
            command.add_argument("--rounds", type=int, default=15)
        if name == "latency":
            command.add_argument("--batches", type=int, nargs="+", default=(1, 8))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.run(args)


def accelerated(name: str, data: Path) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """The float model, W8A8, and training images that calibration did not see, with labels."""
    model = float_model(name, str(data / "weights" / f"{name}.fp16.safetensors"), {})
    images, labels = read_images(data, "imagenet_train_256")
    images, labels = torch.cat(images), torch.cat(labels)
    fast, _ = accelerate(model, recipes.W8A8, [images[:CALIBRATION]])
    return model, fast, images[CALIBRATION:], labels[CALIBRATION:]


def read_images(data: Path, folder: str) -> tuple[list[Tensor], list[Tensor]]:
    """Batches, and their labels."""
    read = list(ImageFolder.open(data / folder, data / "labels.json", 1000).batches(224, 3, BATCH))
    return [pixels for pixels, _ in read], [labels for _, labels in read]


def run_search(args: argparse.Namespace) -> None:
    data, found = Path(os.environ["PYVIT_ACCEL_DATA"]), {}
    for name in MODELS:
        _, fast, images, labels = accelerated(name, data)
        result = find_schedule(fast, images, labels, methods=FAMILIES, rounds=args.rounds)
        print(f"{name}: {result}")
        found[name] = result.to_dict()
        write_json(args.json, {"machine": machine(), "models": found})


def run_accuracy(args: argparse.Namespace) -> None:
    data = Path(os.environ["PYVIT_ACCEL_DATA"])
    rows = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    found = json.loads(args.found.read_text())["models"] if args.found else {}
    for name in MODELS:
        chosen = list(found_schedules(found[name]["curve"])) if name in found else []
        measure_accuracy(name, data, [*chosen, *schedules()], rows, args.json)
    print(table(HEADER, [cells(row) for row in rows]))
    if args.chart:
        write_tokens_chart(args.chart, rows)


def measure_accuracy(
    name: str, data: Path, chosen: list[tuple[str, TokenSchedule]], rows: list[dict], path: Path
) -> None:
    model, fast, *_ = accelerated(name, data)
    batches, labels = read_images(data, "imagenet_val_227")
    labels = torch.cat(labels)
    plain = predictions(fast, batches)
    float_top1 = float((predictions(model, batches) == labels).double().mean())
    done = {(row["model"], row["family"], row["schedule"]) for row in rows}
    for family, schedule in chosen:
        if (name, family, schedule.name) in done:
            continue
        row = {"model": name, "family": family, "schedule": schedule.name, "macs": macs_part(schedule, 192)}
        row |= lost(fast, schedule, batches, labels, plain)
        row["lost_of_float"] = float_top1 - row["top1"]
        rows.append(row)
        write_json(path, {"machine": machine(), "images": len(labels), "rows": rows})


def cells(row: dict) -> tuple[str, ...]:
    return (
        row["model"],
        row["family"],
        row["schedule"],
        percent(row["macs"]),
        percent(row["top1"]),
        f"{100 * row['lost']:.2f}",
        str(row["broken"]),
        str(row["mended"]),
        percent(row["agreement"]),
    )


def run_latency(args: argparse.Namespace) -> None:
    rows = [row for batch in args.batches for row in measure_latency(batch, args.rounds)]
    print(table(LATENCY_HEADER, [latency_cells(row) for row in rows]))
    write_json(args.json, {"machine": machine(), "rounds": args.rounds, "rows": rows})


def run_memory(args: argparse.Namespace) -> None:
    found, head = measure_memory(), 4 * TOKENS**2 / 2**20
    print(table(("schedule", "MiB"), [(name, f"{mib:.1f}") for name, mib in found.items()]))
    write_json(args.json, {"tokens": TOKENS, "heads": HEADS, "map_of_a_head_mib": head, "mib": found})


def latency_cells(row: dict) -> tuple[str, ...]:
    part = row["plan_and_move"]
    return (
        str(row["batch"]),
        row["schedule"],
        percent(row["macs"]),
        f"{row['ms']:.2f}",
        f"{row['speedup']:.2f}x",
        "" if part is None else percent(part),
    )


if __name__ == "__main__":
    main()
