"""Machine code as the disassembler in Triton's wheel prints it: of compiled Triton kernels and of the CUDA library."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pytest
from _triton import triton

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w+)(\S*)(.*)", re.M)
RESOURCES = re.compile(r"^ Function (\w+):\n\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", re.M)


@dataclass(frozen=True)
class Code:
    """One compiled kernel: what ptxas gave it, its instructions, and for Triton what they were made of.

    shared is in bytes; of a CUDA kernel it is without what is asked for at launch. functions: the names of those of the
    compiler that a Triton kernel calls.
    """

    kernel: str
    sass: str
    registers: int
    stack: int
    shared: int
    local: int
    ptx: str = ""
    ttgir: str = ""
    functions: frozenset[str] = frozenset()

    @cached_property
    def instructions(self) -> list[tuple[int, str, str, str]]:
        """Address, opcode, what follows the opcode in the same word, operands."""
        return [(int(at, 16), *rest) for at, *rest in INSTRUCTION.findall(self.sass)]

    @cached_property
    def count(self) -> Counter:
        return Counter(name for _, name, _, _ in self.instructions)

    @cached_property
    def matmuls(self) -> set[str]:
        """The tensor core instructions with their shape and types: IMMA.16832.S8.S8."""
        return {name + mods for _, name, mods, _ in self.instructions if "MMA" in name}

    @cached_property
    def calls(self) -> int:
        """Calls of functions; one to the next instructions only brings a warp together."""
        targets = [(at, int(rest.split(";")[0], 16)) for at, name, _, rest in self.instructions if name == "CALL"]
        return sum(not at < target <= at + 3 * 16 for at, target in targets)


def disassemble(file: Path, *options: str) -> dict[str, Code]:
    """The kernels of a cubin, or of a library for the one architecture that the options select."""
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", *options, str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    resources = {name: map(int, rest) for name, *rest in RESOURCES.findall(text)}
    bodies = re.split(r"^\t\tFunction : (\w+)$", text, flags=re.M)[1:]
    return {
        name: Code(name, body, *resources[name]) for name, body in zip(bodies[::2], bodies[1::2], strict=True)
    }


def compile_launch(launch, architecture: int, folder: Path) -> Code:
    """What a launch runs, compiled anew: a stale cache must not answer for the source as it is."""
    from triton.backends.compiler import GPUTarget

    source, options = launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    (code,) = disassemble(cubin).values()
    functions = frozenset(name.decode() for name in re.findall(rb"\$__internal_\d+_\$(\w+)", compiled.asm["cubin"]))
    return replace(
        code, ptx=compiled.asm["ptx"], ttgir=compiled.asm["ttgir"], shared=compiled.metadata.shared, functions=functions
    )
