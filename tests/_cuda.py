"""Launches of the CUDA library, planned as on a GPU and run in the PTX emulator."""

from __future__ import annotations

import re
import subprocess
from ctypes import string_at
from functools import cache
from importlib import import_module

import numpy as np
import pytest
import torch
from ptx_emulator import Memory, Program, TensorMap, load, run
from torch import Tensor

from pyvit_accel import reference

built = import_module("pyvit_accel.cuda.library")
launcher = import_module("pyvit_accel.cuda.lowbit_linear")
SM_COUNT = 2  # of the GPU that is planned for: a persistent grid of a few blocks, so that each takes several tiles
TARGETS = {80: "sm_80", 89: "sm_89", 90: "sm_90a"}
NAMES = ("x", "x_scale", "w_packed", "w_scale", "bias", "layer_scale", "residual", "out_scale")


def need_library() -> None:
    """Skip without the library, or what takes it apart."""
    pytest.importorskip("triton", reason="triton, whose wheel has the disassembler, is not installed")
    if built.library() is None:
        pytest.skip(f"the CUDA library: {built.status()}")


@cache
def ptx(capability: int) -> str:
    """The PTX of a target that the library carries, every module of it."""
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, "-ptx", "-arch", TARGETS[capability], str(built.PATH)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def module_with(text: str, kernel: str) -> str:
    """The module of cuobjdump's output that has the entry."""
    for part in re.split(r"\nFatbin (?:ptx|elf) code:", text):
        if f".entry {kernel}(" in part:
            return part[part.index(".version") :]
    raise ValueError(f"there is no entry {kernel}")


@cache
def program(kernel: str, capability: int) -> Program:
    return load(module_with(ptx(capability), kernel), kernel)


def emulate(launch, tensors: dict[str, Tensor], y: Tensor, loaded: Program | None = None, capability: int = 0) -> None:
    """Runs a planned launch. Pointers of the problem are those of the tensors; y is what the kernel writes, whole."""
    kernel = launch.kernel.decode()
    capability = capability or (90 if "_sm90_" in kernel else 80)
    memory = Memory()
    for name, t in tensors.items():
        start, n = t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
        memory.map(name, start, np.frombuffer(string_at(start, n), np.uint8))
    memory.map("y", y.data_ptr(), np.frombuffer(string_at(y.data_ptr(), y.nbytes), np.uint8), "write")
    params = bytearray(bytes(launch.params)[: launch.param_bytes])
    for m in launch.maps[: launch.num_maps]:
        rank = m.rank
        shape = tuple(m.dims[:rank]), tuple(m.strides[: rank - 1]), tuple(m.box[:rank])
        params[m.offset : m.offset + 128] = TensorMap(m.base, *shape, m.swizzle, m.element_bytes).encode()
    loaded = loaded or program(kernel, capability)
    options = {"shared": launch.shared_bytes, "cluster": launch.cluster, "dependent": launch.dependent == 1}
    run(loaded, launch.grid, launch.block, bytes(params), memory, **options)
    y.untyped_storage().copy_(torch.from_numpy(memory["y"]).untyped_storage())


def lowbit_linear(config: str, *args, loaded: Program | None = None, capability: int = 0) -> Tensor:
    """The CUDA launcher's result of the reference's arguments, by the kernel named."""
    kept = launcher.arguments(*args[:12])
    y = torch.empty(args[0].shape[0], args[3].shape[0], dtype=torch.float32 if args[9] is None else torch.int8)
    given = dict(zip(("x", "x_scale", "w_packed", "w_scale", "bias"), kept[:5], strict=True))
    given |= dict(zip(("layer_scale", "residual", "out_scale"), kept[7:10], strict=True))
    sm = 90 if "_sm90_" in config else 80
    launch = launcher.OP.plan(launcher.problem(y, *kept), capability or sm, SM_COUNT, config)
    emulate(launch, {name: t for name, t in given.items() if t is not None}, y, loaded, capability)
    return y


def assert_reference(config: str, *args, **kwargs) -> None:
    y, truth = lowbit_linear(config, *args, **kwargs), reference.lowbit_linear(*args)
    assert y.dtype == truth.dtype
    wrong = (y != truth).nonzero()
    first = f"first at (token, feature) {wrong[0].tolist()}" if len(wrong) else ""
    assert torch.equal(y, truth), f"{config}: {len(wrong)} of {y.numel()} differ, {first}"
