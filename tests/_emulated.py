"""Triton launchers whose kernels are compiled for a GPU and run in the PTX emulator."""

from __future__ import annotations

import ctypes
import struct
from contextlib import contextmanager
from importlib import import_module
from pkgutil import iter_modules

import numpy as np
import pytest
import torch
from _triton import Recorder
from ptx_emulator import Memory, load, run
from torch import Tensor

from pyvit_accel import kernels

SIZES = {"i32": "<i", "fp32": "<f"}


def bytes_of(t: Tensor) -> np.ndarray:
    """All bytes of the storage of t."""
    storage = t.untyped_storage()
    return np.frombuffer((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()), np.uint8)


class _Emulated(Recorder):
    """Stands where a kernel stands: compiles what is launched and runs it in the emulator.

    Storages that torch.empty made since the context was entered may be read only where a kernel has written; all others
    may only be read, but for those in `changed`.
    """

    def __init__(self, kernel, architecture: int, fresh: dict, changed: set):
        super().__init__(kernel)
        self.architecture, self.fresh, self.changed, self.count = architecture, fresh, changed, 0

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.record(*args, **kwargs)
            source, options = self.launches.pop()
            values = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            self.count += 1
            self._run(source, options, grid, values)

        return launch

    def _run(self, source, options, grid, values) -> None:
        import triton
        from triton.backends.compiler import GPUTarget

        compiled = triton.compile(source, target=GPUTarget("cuda", self.architecture, 32), options=options)
        memory, storages, params = Memory(), {}, b""
        for name, kind in source.signature.items():
            if kind == "constexpr":
                continue
            value = values[name]
            if isinstance(value, Tensor):
                value, kind = self._address(memory, storages, name, value), "<Q"
            else:
                kind = SIZES[kind]
            params = params.ljust(-(-len(params) // struct.calcsize(kind)) * struct.calcsize(kind), b"\0")
            params += struct.pack(kind, value)
        program = load(compiled.asm["ptx"], compiled.metadata.name)
        params = params.ljust(program.param_bytes, b"\0")  # scratch memory that no kernel of ours asks for
        threads = compiled.metadata.num_warps * 32
        options = {"shared": compiled.metadata.shared, "complete": False, "held_operands": False}
        run(program, tuple(grid), threads, params, memory, **options)
        for name, storage in storages.values():
            allocation = memory.allocation(name)
            if allocation.mode == "read":
                continue
            bytes_of(storage)[:] = allocation.data
            if name in self.fresh:
                self.fresh[name] |= allocation.writer >= 0

    def _address(self, memory: Memory, storages: dict, name: str, t: Tensor) -> int:
        start = t.untyped_storage().data_ptr()
        if start not in storages:
            data, label = bytes_of(t), start
            if start in self.fresh:
                memory.allocate(label, data, "write")
                allocation = memory.allocation(label)
                allocation.data[:], allocation.writer[self.fresh[start]] = data, memory.BEFORE
            else:
                memory.allocate(label, data, "update" if start in self.changed else "read")
            storages[start] = (label, t)
        return memory.allocation(start).address + t.data_ptr() - start


@contextmanager
def emulated(architecture: int, *changed: Tensor):
    """Launchers of pyvit_accel.kernels run on the emulator's GPU. changed: arguments a launcher may write to.

    Yields {"file.kernel": what stands in its place}, whose `count` says how often it was launched.
    """
    fresh, kept, kernels_of = {}, [], {}
    empty, new_empty, empty_like = torch.empty, Tensor.new_empty, torch.empty_like

    def remember(make):
        def made(*args, **kwargs):
            t = make(*args, **kwargs)
            bytes_of(t)[:] = 0xCD
            fresh[t.untyped_storage().data_ptr()] = np.zeros(t.untyped_storage().nbytes(), bool)
            kept.append(t)  # so that no other storage comes to lie there
            return t

        return made

    with pytest.MonkeyPatch.context() as patch:
        for info in iter_modules(kernels.__path__):
            module = import_module(f"pyvit_accel.kernels.{info.name}")
            for name, value in list(vars(module).items()):
                if name.endswith("_kernel") and hasattr(value, "arg_names"):
                    written = {t.untyped_storage().data_ptr() for t in changed}
                    kernels_of[f"{info.name}.{name}"] = _Emulated(value, architecture, fresh, written)
                    patch.setattr(module, name, kernels_of[f"{info.name}.{name}"])
            if hasattr(module, "_capability"):
                patch.setattr(module, "_capability", lambda x: divmod(architecture, 10))
        patch.setattr(torch, "empty", remember(empty))
        patch.setattr(Tensor, "new_empty", remember(new_empty))
        patch.setattr(torch, "empty_like", remember(empty_like))
        yield kernels_of
