"""What a process of the comparison is asked to do. Imports nothing heavy: memory is measured from here on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """One step of one engine on one model at one batch size.

    step                          "prepare" converts the model into `folder`, "run" loads it and answers commands
    weights, images, calibration  files: float32 safetensors, and .npy (count, 3, H, W) of the engine's pixel type
    """

    engine: str
    step: str
    model: str
    batch: int
    threads: int
    weights: str
    images: str
    calibration: str
    folder: str

    def file(self, name: str) -> str:
        return str(Path(self.folder, name))


def peak_mib() -> float:
    """MiB this process had resident at most."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) / 1024
