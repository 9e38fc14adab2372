"""The implementations of the ops that this machine has, by name, each able to stand in for the op's owner.

owner     whatever the dispatcher picks
triton    the launchers of pyvit_accel.kernels
cuda      those of the CUDA library; what a call asks that they lack goes to the others
sm90_...  lowbit_linear, or sparse24_linear, by the kernel of the CUDA library that has this name
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyvit_accel import backends, cuda, reference
from pyvit_accel.formats import sparse24

COMPOSED = ("quant_block", "quant_mlp", "quant_project")  # of other ops, on a device without a kernel for the whole
TYPES = {"s8": torch.int8, "f16": torch.float16, "bf16": torch.bfloat16}  # of sparse24_linear, as in kernels' names


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
        launch = launcher("lowbit_linear").lowbit_linear
        found["cuda"] = {"lowbit_linear": partial(_without_index, launch)}
        for name in configs():
            found[name] = {"lowbit_linear": partial(launch, config=f"lowbit_linear_{name}")}
        for name in sparse24_configs():
            found[name] = {"sparse24_linear": partial(by_config, name)}
    return found


def _without_index(launch: Callable, *args):
    if len(args) > 12 and args[12] is not None:
        return import_module("pyvit_accel.kernels").lowbit_linear(*args)
    return launch(*args)


def launcher(op: str):
    """The module of the op's CUDA C++ launcher."""
    return import_module(f"pyvit_accel.cuda.{op}")


def by_config(config: str, x: Tensor, values: Tensor, *args, rows: Tensor | None = None) -> Tensor:
    """sparse24_linear by the kernel of this name; rows are made where it reads them and none are given."""
    if rows is None and "_rows_" in config:
        rows = sparse24.rows_of(values)
    return launcher("sparse24_linear").sparse24_linear(x, values, *args, config=f"sparse24_linear_{config}", rows=rows)


def kernels(op: str, capability: int) -> list[str]:
    """Kernels of an op in the CUDA library that a GPU of this capability (10 major + minor) runs, without its name."""
    if cuda.library() is None or capability < 80:
        return []
    names = [name.removeprefix(f"{op}_") for name in launcher(op).OP.configs()]
    return [name for name in names if name.startswith("sm80_") or name.startswith(f"sm{capability}_")]


@cache
def capability() -> int:
    """Of this GPU, 10 major + minor; 0 where there is none, which runs no kernel."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    return 10 * major + minor


def configs(bits: int | None = None) -> list[str]:
    """Kernels of lowbit_linear in the CUDA library that this GPU runs, of all numbers of bits or of one."""
    return [name for name in kernels("lowbit_linear", capability()) if bits is None or f"_w{bits}_" in name]


def sparse24_configs(dtype: torch.dtype | None = None) -> list[str]:
    """Kernels of sparse24_linear in the CUDA library that this GPU runs, of all types of weights or of one."""
    of_gpu = kernels("sparse24_linear", capability())
    return [name for name in of_gpu if dtype is None or TYPES[name.split("_")[1]] == dtype]


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
