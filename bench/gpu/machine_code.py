"""Whether the probes measure what they say: the opcode meant fills the loop of each kernel, and nothing spills."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

PIPES = {
    "Exp": "MUFU.EX2", "InverseRoot": "MUFU.RSQ", "ToInt": "F2I", "ToFloat": "I2F", "ToE4M3": "F2FP", "Fma": "FFMA",
    "Add": "FADD", "Mul": "FMUL", "Mad": "IMAD", "Lop": "LOP3", "Permute": "PRMT", "IntAdd": "IADD3|IMAD.IADD",
    "Shift": "SHF", "Maximum": "VIMNMX|IMNMX", "FloatMaximum": "FMNMX", "PackedMaximum": "VIMNMX.S16x2",
    "HalfFma": "HFMA2", "Dot": "IDP.4A",
}  # fmt: skip
MATRIX = {"int8": "IGMMA.64x{n}x32", "fp8": "QGMMA.64x{n}x32", "bf16": "HGMMA.64x{n}x16",
          "int8_sparse": "IGMMA.SP.64x{n}x64", "bf16_sparse": "HGMMA.SP.64x{n}x32"}  # fmt: skip
LEAST_SHARE = 0.9  # of a pipe's loop
GROUP = 8  # wgmma in a loop


def functions(sass: str) -> dict[str, list[tuple[int, str, str]]]:
    """Of every function of cuobjdump -sass: address, opcode with its modifiers, and operands of each instruction."""
    found: dict[str, list] = {}
    body: list = []
    for line in sass.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            body = found[match[1]] = []
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", line):
            body.append((int(match[1], 16), match[2], match[3]))
    return found


def loop_of(body: list[tuple[int, str, str]], opcode: str) -> list[str]:
    """The opcodes of the loop that has the most of one; empty where there is no loop."""
    loops = []
    for at, name, operands in body:
        target = re.search(r"(0x[0-9a-f]+)", operands) if name == "BRA" else None
        if target and int(target[1], 16) < at:
            loops.append([other for place, other, _ in body if int(target[1], 16) <= place <= at])
    return max(loops, key=lambda loop: _count(loop, opcode), default=[])


def _count(loop: list[str], opcode: str) -> int:
    return sum(re.match(opcode, name) is not None for name in loop)


def expected(function: str) -> tuple[str, bool] | None:
    """What a probe's loop must be made of, of its mangled name, and whether of that alone; None for other kernels."""
    if match := re.search(r"\d((?:int8|fp8|bf16)(?:_sparse)?)_(?:ss|rs)_(\d+)E", function):
        return MATRIX[match[1]].format(n=match[2]), False
    if match := re.search(r"4pipeINS\w*?_\d+(\w+?)EEE", function):
        return PIPES[match[1]], True
    return None


def faults(sass: str) -> list[str]:
    """One line for each kernel whose loop is not what it should be; a program without kernels is one."""
    wrong, seen = [], 0
    for function, body in functions(sass).items():
        wanted = expected(function)
        if wanted is None:
            continue
        seen += 1
        opcode, alone = wanted
        loop = loop_of(body, opcode)
        if not loop or _count(loop, opcode) < (LEAST_SHARE * len(loop) if alone else GROUP):
            wrong.append(f"{function}: {_count(loop, opcode)} {opcode} in a loop of {Counter(loop).most_common(3)}")
        if any(re.match("LDL|STL", name) for _, name, _ in body):
            wrong.append(f"{function}: spills")
    return wrong if seen else ["there is no probe in it"]


def check(program: Path) -> list[str] | None:
    """Faults of the program's code for Hopper; None where there is no disassembler."""
    try:
        import triton

        tool = triton.knobs.nvidia.cuobjdump.path
    except ImportError:
        tool = "cuobjdump"
    try:
        command = [tool, "-sass", "-arch", "sm_90a", str(program)]
        return faults(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    except FileNotFoundError:
        return None
