"""What the process of a part knows: its task, handed over in the environment, and how it reports items."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.gpu import rows

VARIABLE = "PYVIT_ACCEL_GPU_TASK"
BROKEN = 77  # exit code of a process whose GPU context is lost; another one takes the items that are left
STICKY = ("illegal memory access", "illegal instruction", "launch failure", "device-side assert", "misaligned address",
          "uncorrectable", "captur", "cudaErrorLaunch", "CUDA_ERROR_ILLEGAL", "hardware stack error")  # fmt: skip


@dataclass
class Task:
    """One process of a part.

    file             where rows go; part, shard of shards: which rows are its own
    root, lib, work  the source tree, the folder with the built package, a folder for what need not be kept
    device           cuda, or cpu in a rehearsal
    deadline         in seconds since the epoch: nothing is begun after it
    done             items of an earlier process
    """

    file: str
    part: str
    root: str
    lib: str
    work: str
    deadline: float
    device: str = "cuda"
    quick: bool = False
    shard: int = 0
    shards: int = 1
    done: list[str] = field(default_factory=list)

    @classmethod
    def current(cls) -> Task:
        return cls(**json.loads(os.environ[VARIABLE]))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def row(self, item: str, status: str, **values) -> None:
        rows.append(Path(self.file), part=self.part, item=item, status=status, shard=self.shard, **values)

    def plan(self, items: list[str]) -> list[str]:
        """Say which items there are; returns those that are left."""
        rows.append(Path(self.file), part=self.part, item="", status="planned", shard=self.shard, items=items)
        return [name for name in items if name not in self.done]

    def late(self) -> bool:
        return time.time() > self.deadline

    @contextmanager
    def item(self, name: str) -> Iterator[dict]:
        """The block's row: what it puts in the dictionary, or what it raised. A lost GPU context ends the process."""
        self.row(name, "begun", time=time.time())
        values: dict = {}
        try:
            yield values
            synchronize(self.device)
        except Exception as error:
            traceback.print_exc()
            self.row(name, "failed", why=reason(error), **values)
            if lost(error, self.device):
                sys.stdout.flush()
                os._exit(BROKEN)
        else:
            self.row(name, **({"status": "ok"} | values))
        if spoiled():
            os._exit(BROKEN)

    def run(self, work: dict[str, Callable[[], dict]]) -> None:
        """Every item in turn, its values in its row; what time does not reach is left to the supervisor."""
        for name in self.plan(list(work)):
            if self.late():
                return
            with self.item(name) as values:
                values |= work[name]() or {}


def spoil() -> None:
    """A capture failed: the allocator may still believe in it, so this process should end after its item."""
    _SPOILED.append(True)


def spoiled() -> bool:
    return bool(_SPOILED)


_SPOILED: list[bool] = []


def reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:400]


def synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def lost(error: BaseException, device: str) -> bool:
    """Whether the GPU context is gone, so that nothing else can run in this process."""
    if any(text in str(error) for text in STICKY):
        return True
    try:
        synchronize(device)
    except Exception:
        return True
    return False
