"""Measuring a model beside another: latency, what it predicts, and the memory a process needs for it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import pyvit_accel
from pyvit_accel.backends import isa
from pyvit_accel.models import create_vit, digits_model
from pyvit_accel.output import progress
from pyvit_accel.serialize import load

DIGITS = "digits"


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call over all rounds."""

    median: float
    min: float


def compare_latency(
    fns: dict[str, Callable[[], object]], rounds: int = 20, warmup: int = 3, label: str = "latency"
) -> dict[str, Latency]:
    """Time every function once per round, in turn and in alternating order, so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in fns}
    with torch.inference_mode():
        for i in progress(range(warmup + rounds), label):
            for name in list(fns)[:: 1 if i % 2 else -1]:
                start = time.perf_counter()
                fns[name]()
                if i >= warmup:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: Latency(median(ts), min(ts)) for name, ts in times.items()}


@dataclass(frozen=True)
class Fidelity:
    """What a model says on some images, beside the first model.

    top1         share of images whose label it predicts; None without labels
    agreement    share of images on which it predicts what the first model predicts; None without classes
    logit_error  |logits - logits of the first| / |logits of the first|, over all images
    """

    images: int
    top1: float | None
    agreement: float | None
    logit_error: float

    def to_dict(self) -> dict:
        return asdict(self)


def compare_outputs(
    models: dict[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor | None]],
    total: int | None = None,
    label: str = "images",
    classifies: bool = True,
) -> dict[str, Fidelity]:
    """Run every model on every batch of (images, labels or None); the first model is the one compared with.

    Raises ValueError when a model's output is NaN or infinite.
    """
    images, labelled = 0, classifies
    correct, agreed, error = dict.fromkeys(models, 0), dict.fromkeys(models, 0), dict.fromkeys(models, 0.0)
    norm = 0.0
    with torch.inference_mode():
        for pixels, labels in progress(batches, label, total):
            images += len(pixels)
            labelled = labelled and labels is not None
            first = None
            for name, model in models.items():
                logits = model(pixels).double()
                if not logits.isfinite().all():
                    raise ValueError(f"the {name} model gave NaN or infinite outputs; check its weights")
                if first is None:
                    first = logits
                    norm += float(first.square().sum())
                error[name] += float((logits - first).square().sum())
                agreed[name] += int((logits.argmax(1) == first.argmax(1)).sum())
                correct[name] += int((logits.argmax(1) == labels).sum()) if labelled else 0
    return {
        name: Fidelity(
            images,
            correct[name] / images if labelled else None,
            agreed[name] / images if classifies else None,
            (error[name] / norm) ** 0.5 if norm else 0.0,
        )
        for name in models
    }


def build_model(name: str) -> nn.Module:
    """The model that ships with the package, or an architecture with random weights."""
    return digits_model() if name == DIGITS else create_vit(name).eval().requires_grad_(False)


def random_images(model: nn.Module, batch: int) -> Tensor:
    config = model.config
    shape = (batch, config.in_channels, config.image_size, config.image_size)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Peak:
    """MiB resident at most: with the libraries imported only, and with the model built and run."""

    imports: float
    total: float


def peak_memory(name: str, batch: int, saved: Path | None = None) -> Peak:
    """The peak of a fresh process that runs one batch on the float model `name`, or the accelerated one in `saved`."""
    file, threads = saved and str(saved.resolve()), torch.get_num_threads()
    request = {"name": name, "batch": batch, "saved": file, "threads": threads}
    code = "from pyvit_accel.measure import _report_peak; _report_peak()"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(request)],
        capture_output=True, text=True, check=False,
        cwd=tempfile.gettempdir(),  # -c puts it first on the path: a checkout there would hide the install
    )
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"the process that measures memory failed: {reason}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def _report_peak() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    imports = peak_mib()
    model = load(request["saved"]) if request["saved"] else build_model(request["name"])
    with torch.inference_mode():
        model(random_images(model, request["batch"]))
    print(json.dumps({"imports": imports, "total": peak_mib()}))


def peak_mib() -> float:
    """The most memory this process has held so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: ru_maxrss would count the parent's memory too, it survives exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)


def machine() -> dict:
    """What a number was measured on, and when."""
    return {
        "device": "cpu",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": isa(),
        "torch": torch.__version__,
        "pyvit_accel": pyvit_accel.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
