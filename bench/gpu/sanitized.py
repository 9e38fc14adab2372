"""What runs under compute-sanitizer: calls named "tool: implementation: call", each between two lines that say so."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bench.gpu import launchers, ops
from bench.gpu.task import Task, lost, reason


def say(**what: str) -> None:
    print(json.dumps(what), flush=True)


def main(names: list[str]) -> int:
    task = Task.current()
    found = ops.calls(Path(task.root), "cpu")
    with torch.inference_mode():
        for item in names:
            _, backend, name = item.split(": ", 2)
            say(begin=item)
            try:
                call = ops.moved(found[name], lambda t: t.to(task.device), task.device)
                with launchers.Using(backend, task.device):
                    results = tree_map_only(Tensor, lambda t: t.cpu(), call())
                del results
            except Exception as error:
                say(failed=reason(error))
                if lost(error, task.device):
                    return 1
            say(end=item)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
