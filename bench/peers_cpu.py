"""ViTs on a CPU with torch, ONNX Runtime, OpenVINO and pyvit_accel, side by side.

    python bench/peers_cpu.py --models vit_tiny_patch16_224 --batches 1,8 --json peers.json --chart peers.png

bench/requirements-peers.txt names the peers; peers/engines.py has the form each is compared in. An engine that cannot
run is a row with its reason.

Every engine has a process of its own per model and batch size. All are pinned to the same CPUs, with as many threads,
and alive at once; they take turns, in alternating order, and sleep between. A model is converted before, in another
process. Times are of the call alone, on images that are in memory: normalised float32 for the peers, uint8 for
pyvit_accel, which normalises in the call. Real weights and labelled images are used for the models PYVIT_ACCEL_DATA has
(weights/NAME.fp16.safetensors, imagenet_val_227, imagenet_train_256, labels.json), seeded random ones for the others.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from peers.engines import ENGINES, FP32, OPENVINO_INT8
from peers.inputs import LABELLED, Inputs, write_inputs
from peers.job import Job
from peers.process import Failed, Worker

from pyvit_accel.cli import _list, _one_of, _positive
from pyvit_accel.files import check_writable
from pyvit_accel.measure import machine
from pyvit_accel.models import ARCHITECTURES
from pyvit_accel.output import Bar, note, percent, require, table, write_chart, write_json

DATA = "PYVIT_ACCEL_DATA"
MODELS = [f"{size}_patch16_224" for size in ("vit_tiny", "vit_small", "vit_base", "vit_large", "deit_base")]
PEERS = ("torch", "torchao", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf")
PAUSE_S = 0.3  # before a turn: the threads of the engine before spin for a while when they have nothing to do
REASON_WIDTH = 90
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "ms_per_image": ("ms/image", "{:.2f}".format),
    "min_ms_per_image": ("fastest", "{:.2f}".format),
    "speedup_over_openvino_int8": ("vs OV int8", "{:.2f}x".format),
    "speedup_over_torch_fp32": ("vs fp32", "{:.2f}x".format),
    "peak_mib": ("peak MiB", "{:.0f}".format),
    "model_mib": ("model MiB", "{:.0f}".format),
    "ready_s": ("ready s", "{:.1f}".format),
    "logit_error": ("logit error", "{:.4f}".format),
    "top1": ("top-1", percent),
    "agreement": ("same prediction", percent),
}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # the workers inherit it
    torch.set_num_threads(args.threads)
    data = Path(os.environ[DATA]) if DATA in os.environ else None
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        cache = (args.cache or Path(temporary)).resolve()
        for name in args.models:
            inputs = write_inputs(name, data, args.images, cache)
            ready = prepare_all(name, inputs, args)
            for batch in args.batches:
                rows += with_speedups(measure(name, batch, inputs, ready, args))
    print(show(rows, args))
    if args.json:
        write_json(args.json, {
            "machine": machine(), "versions": versions(PEERS), "rounds": args.rounds,
            "forms": {name: ENGINES[name].form for name in args.engines}, "rows": rows,
        })  # fmt: skip
    groups = bars(rows)
    if args.chart and groups:
        write_chart(args.chart, headline(), groups)
    return 0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    if not hasattr(os, "sched_setaffinity"):
        parser.error("processes can be pinned to CPUs on Linux only")
    cpus = len(os.sched_getaffinity(0))
    names = {"model": MODELS, "engine": list(ENGINES)}
    known = {"model": list(ARCHITECTURES), "engine": list(ENGINES)}
    for kind in names:
        item = _list(lambda text, kind=kind: _one_of(kind, text, known[kind]))
        text = f"default: {','.join(names[kind])}"
        parser.add_argument(f"--{kind}s", type=item, default=names[kind], metavar="A,B", help=text)
    add = parser.add_argument
    add("--batches", type=_list(_positive), default=[1, 8, 32], metavar="1,8", help="batch sizes (default: 1,8,32)")
    add("--rounds", type=_positive, default=7, help="turns of every engine (default: %(default)s)")
    add("--threads", type=_positive, default=cpus, help=f"CPUs, and threads on them (default: {cpus}, all usable ones)")
    add("--images", type=_positive, default=650, metavar="N", help="labelled images at most (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the results as JSON")
    add("--chart", type=Path, metavar="FILE", help="write the results as a PNG chart")
    add("--cache", type=Path, metavar="FOLDER", help="keep converted models and logs, and use those that are there")
    add("--timeout", type=_seconds, default=600, metavar="SECONDS", help="for one step (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.threads > cpus:
        parser.error(f"--threads {args.threads}: this process may use {cpus} CPUs")
    try:
        for path in filter(None, (args.json, args.chart)):
            check_writable(path)
        if args.chart:
            require("matplotlib.figure")
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    return args


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return seconds


def prepare_all(model: str, inputs: Inputs, args: argparse.Namespace) -> dict[str, dict]:
    """Convert the model for every engine: {"prepare_s"}, or why that was not possible, {"reason"}."""
    found = {}
    for name in args.engines:
        note(f"{model}: preparing {name}")
        start = time.perf_counter()
        try:
            used = prepare(job(name, "prepare", model, 1, inputs, args), args)
            found[name] = {"prepare_s": time.perf_counter() - start if used else None}
        except Failed as failed:
            found[name] = {"reason": f"conversion: {failed}"}
    return found


def prepare(job: Job, args: argparse.Namespace) -> bool:
    """Whether there was something to do: not for an engine that converts nothing, or has converted it before."""
    engine, folder = ENGINES[job.engine], Path(job.folder)
    folder.mkdir(exist_ok=True)
    if engine.prepare is None:
        return False
    made_with, record = versions(engine.packages), folder / "versions.json"
    if made_with and record.exists() and json.loads(record.read_text()) == made_with:
        return False
    shutil.rmtree(folder)
    folder.mkdir()
    worker = Worker(job, args.timeout, folder / "prepare.log")
    try:
        worker.answer()
    finally:
        worker.close()
    write_json(record, made_with)
    return True


def job(engine: str, step: str, model: str, batch: int, inputs: Inputs, args: argparse.Namespace) -> Job:
    pixels, folder = ENGINES[engine].pixels, inputs.folder / engine
    return Job(
        engine, step, model, batch, args.threads,
        inputs.weights, inputs.images(pixels), inputs.calibration(pixels), str(folder),
    )  # fmt: skip


def measure(model: str, batch: int, inputs: Inputs, ready: dict[str, dict], args: argparse.Namespace) -> list[dict]:
    """A row for every engine, those that failed among them."""
    rows = {
        name: {
            "model": model, "weights": "random" if inputs.labels is None else "real", "batch": batch, "engine": name,
            **dict.fromkeys(COLUMNS), "reason": None, **ready[name],
        }
        for name in args.engines
    }  # fmt: skip
    workers: dict[str, Worker] = {}

    def attempt(name: str, step: Callable[[], dict]) -> dict:
        """What the step answers; the end of the engine when it fails."""
        try:
            return step()
        except Failed as failed:
            rows[name] |= {**dict.fromkeys(COLUMNS), "reason": str(failed)}
            workers.pop(name).close()
            return {}

    try:
        for name in args.engines:
            if rows[name]["reason"] is None:
                note(f"{model}, batch {batch}: starting {name}")
                task = job(name, "run", model, batch, inputs, args)
                workers[name] = Worker(task, args.timeout, Path(task.folder, f"run{batch}.log"))
                rows[name] |= with_memory(attempt(name, workers[name].answer))
        note(f"{model}, batch {batch}: {args.rounds} rounds of {len(workers)} engines")
        times: dict[str, list[float]] = {name: [] for name in workers}
        for i in range(args.rounds):
            for name in list(workers)[:: 1 if i % 2 else -1]:
                time.sleep(PAUSE_S)
                times[name] += attempt(name, lambda name=name: workers[name].ask(do="turn")).get("ms", [])
        for name in list(workers):
            ms = times[name]
            rows[name] |= {"ms_per_image": median(ms) / batch, "min_ms_per_image": min(ms) / batch, "calls": len(ms)}
            rows[name] |= attempt(name, lambda name=name: fidelity(workers[name], inputs))
    finally:
        for worker in workers.values():
            worker.close()
    return list(rows.values())


def with_memory(answer: dict) -> dict:
    return answer and {**answer, "model_mib": answer["peak_mib"] - answer["imports_mib"]}


def fidelity(worker: Worker, inputs: Inputs) -> dict:
    """The logits of a worker beside those of torch in float32."""
    path, truth = inputs.folder / "logits.npy", inputs.logits
    worker.ask(do="outputs", to=str(path))
    logits = np.load(path).astype(np.float64)
    if not np.isfinite(logits).all():
        raise Failed("gave NaN or infinite logits")
    found = {"images": len(logits), "logit_error": float(np.linalg.norm(logits - truth) / np.linalg.norm(truth))}
    if inputs.labels is None:
        return found
    predicted = logits.argmax(1)
    return {
        **found,
        "top1": float((predicted == inputs.labels).mean()),
        "agreement": float((predicted == truth.argmax(1)).mean()),
    }


def with_speedups(rows: list[dict]) -> list[dict]:
    ms = {row["engine"]: row["ms_per_image"] for row in rows}
    for row in rows:
        for key, other in (("speedup_over_openvino_int8", OPENVINO_INT8), ("speedup_over_torch_fp32", FP32)):
            known = ms.get(other) is not None and row["ms_per_image"] is not None
            row[key] = ms[other] / row["ms_per_image"] if known else None
    return rows


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Of each distribution; None where it is not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def show(rows: list[dict], args: argparse.Namespace) -> str:
    header = ("model", "batch", "engine", *(title for title, _ in COLUMNS.values()), "not measured because")
    cells = [
        (row["model"], row["batch"], row["engine"],
         *("" if row[key] is None else text(row[key]) for key, (_, text) in COLUMNS.items()),
         shorten(row["reason"] or ""))
        for row in rows
    ]  # fmt: skip
    real = list(dict.fromkeys(row["model"] for row in rows if row["weights"] == "real"))
    lines = [
        headline(),
        ", ".join(f"{name} {version or 'absent'}" for name, version in versions(PEERS).items()),
        "",
        table(header, cells),
        "",
        *(f"{name}: {ENGINES[name].form}" for name in args.engines),
        "",
        f"real weights and images of {LABELLED}: {', '.join(real) or 'none'}; all others random",
        "ms/image: median of all calls; images are in memory, float32 and normalised but for pyvit_accel",
        "peak MiB: of the process that ran, up to its first call; model MiB: the part of it after importing libraries",
        "ready s: to load, compile and call once; logit error: relative, to torch in float32",
    ]
    return "\n".join(lines)


def shorten(text: str) -> str:
    return text if len(text) <= REASON_WIDTH else f"{text[:REASON_WIDTH]}..."


def headline() -> str:
    facts = machine()
    return f"{facts['cpu']}, {facts['threads']} threads, kernels {facts['isa']}, {facts['date'][:10]}"


def bars(rows: list[dict]) -> dict[str, list[Bar]]:
    """The chart's panels; torch in float32 is the first of each where it was measured."""
    groups: dict[str, list[Bar]] = {}
    for row in sorted(rows, key=lambda row: row["engine"] != FP32):
        if row["ms_per_image"] is not None:
            bar = Bar(row["engine"], row["ms_per_image"], row["top1"])
            groups.setdefault(f"{row['model']}, batch {row['batch']}", []).append(bar)
    return groups


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"peers_cpu: error: {error}")
