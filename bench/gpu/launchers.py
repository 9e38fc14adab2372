"""The implementations of the ops that this machine has, by name, each able to stand in for the op's owner.

owner     whatever the dispatcher picks
triton    the launchers of pyvit_accel.kernels
cuda      those of the CUDA library; what a call asks that they lack goes to the others
sm90_...  lowbit_linear by the kernel of the CUDA library that has this name
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyvit_accel import backends, cuda, reference

COMPOSED = ("quant_block", "quant_mlp", "quant_project")  # of other ops, on a device without a kernel for the whole
PREFIX = "lowbit_linear_"


@cache
def available(device: str) -> dict[str, dict[str, Callable]]:
    """Per implementation its launchers by op; "owner" has none of its own."""
    found: dict[str, dict[str, Callable]] = {"owner": {}}
    if device != "cuda":
        return found
    if backends.HAS_TRITON:
        kernels = import_module("pyvit_accel.kernels")
        found["triton"] = {op: getattr(kernels, op) for op in kernels.__all__}
    if cuda.library() is not None and cuda.device_error() is None:
        launch = import_module("pyvit_accel.cuda.lowbit_linear").lowbit_linear
        found["cuda"] = {"lowbit_linear": partial(_without_index, launch)}
        for name in configs():
            found[name] = {"lowbit_linear": partial(launch, config=PREFIX + name)}
    return found


def _without_index(launch: Callable, *args):
    if len(args) > 12 and args[12] is not None:
        return import_module("pyvit_accel.kernels").lowbit_linear(*args)
    return launch(*args)


def configs(bits: int | None = None) -> list[str]:
    """Kernels of lowbit_linear in the CUDA library that this GPU runs, of all numbers of bits or of one."""
    if cuda.library() is None or not torch.cuda.is_available():
        return []
    major, minor = torch.cuda.get_device_capability()
    names = [name.removeprefix(PREFIX) for name in import_module("pyvit_accel.cuda.lowbit_linear").OP.configs()]
    names = [name for name in names if name.startswith("sm80_") or name.startswith(f"sm{major}{minor}_")]
    return [name for name in names if bits is None or f"_w{bits}_" in name]


def of(op: str, device: str) -> list[str]:
    """Who has a launcher of its own for an op, single kernels left out; on a CPU the owner."""
    names = [name for name in ("triton", "cuda") if op in available(device).get(name, {})]
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
            with self:  # its steps too run on these launchers
                return getattr(reference, op)(*args, **(kwargs or {}), ops=torch.ops.pyvit_accel)
        return func(*args, **(kwargs or {}))
