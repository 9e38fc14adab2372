"""The implementations of the ops that this machine has, by name, each able to stand in for the op's owner."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch.utils._python_dispatch import TorchDispatchMode

COMPOSED = ("quant_block", "quant_mlp", "quant_project")  # of other ops, on a device without a kernel for the whole
MODULES = {"triton": "pyvit_accel.kernels", "cuda": "pyvit_accel.cuda"}


@cache
def available(device: str) -> dict[str, dict[str, Callable]]:
    """Per implementation its launchers by op; "owner", which has none, is whatever the dispatcher picks."""
    found: dict[str, dict[str, Callable]] = {"owner": {}}
    if device == "cuda":
        for name, path in MODULES.items():
            if find_spec(path) is not None and (launchers := _launchers(import_module(path))):
                found[name] = launchers
    return found


def _launchers(module) -> dict[str, Callable]:
    from pyvit_accel.backends import OPS

    return {op: getattr(module, op) for op in getattr(module, "__all__", ()) if op in OPS}


def of(op: str, device: str) -> list[str]:
    """The implementations that have a launcher of their own for an op; on a CPU the owner."""
    names = [name for name, launchers in available(device).items() if op in launchers]
    return names or ["owner"]


class Using(TorchDispatchMode):
    """Within it ops run on one implementation's launchers, where it has them, else on their owners."""

    def __init__(self, name: str, device: str) -> None:
        super().__init__()
        self.launchers = available(device)[name]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, op = func.name().partition("::")
        if namespace == "pyvit_accel" and op in self.launchers:
            return self.launchers[op](*args, **(kwargs or {}))
        if namespace == "pyvit_accel" and op in COMPOSED and self.launchers:
            from pyvit_accel import reference

            with self:  # its steps too run on these launchers
                return getattr(reference, op)(*args, **(kwargs or {}), ops=torch.ops.pyvit_accel)
        return func(*args, **(kwargs or {}))
