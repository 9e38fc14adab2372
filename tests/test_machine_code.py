"""The machine code of every kernel on every architecture, held to the table of _gates.py.

Triton kernels are compiled ahead of time, from what launchers launch; CUDA kernels are those of the built library.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib import import_module
from itertools import product
from pathlib import Path

import pytest
import torch
from _code import Code, compile_launch, disassemble
from _code_checks import words_are_whole
from _gates import ARCHITECTURES, CUDA_GATES, GATES, Gate
from _triton import triton

built = import_module("pyvit_accel.cuda.library")
KERNELS = Path(__file__).parents[1] / "kernels"
TARGETS = {80: "sm_80", 89: "sm_89", 90: "sm_90a", 100: "sm_100a"}  # of the CUDA library
SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227}  # that a block may have
# Of IEEE division and square root, where their fast path does not reach; and traps of tensor memory.
FUNCTIONS = re.compile(r"__cuda_sm\w+?_((div|sqrt|rcp)_rn_\w*slowpath|tcgen05_guardrail_trap_\w+)")
FUNCTIONS_64 = re.compile(r"__cuda_sm\w+?_(div_rn_f64_full|dsqrt_rn_f64_mediumpath_v1)")
CONTRACTED = re.compile(r"fma\.rn\S*\.f32|\.ftz|div\.(full|approx)|(rcp|sqrt|rsqrt|ex2)\.approx")


def violations(gate: Gate, code: Code, architecture: int) -> Iterator[str]:
    """What is wrong with the machine code, line by line, but what `also` asks for."""
    on_stack = {name: code.count[name] for name in ("STL", "LDL")} | {"STACK": code.stack, "LOCAL": code.local}
    if any(on_stack.values()):
        yield f"spills: {on_stack}"
    if code.matmuls != set(gate.matmuls[architecture].split()):
        yield f"tensor core instructions {sorted(code.matmuls)}, not {sorted(gate.matmuls[architecture].split())}"
    if code.registers > gate.registers:
        yield f"{code.registers} registers, more than {gate.registers}"
    units = {mods for _, name, mods, _ in code.instructions if name == "MUFU"}
    units -= {".RCP", ".RSQ"} | ({".RCP64H", ".RSQ64H"} if gate.doubles else set())
    if units:  # no exponential, no logarithm: where one is meant, it is a polynomial
        yield f"MUFU {sorted(units)}"
    if gate.launch is None:
        if code.calls:
            yield f"{code.calls} calls"
        return
    if code.shared > min(SHARED_KIB.values()) * 1024:  # Triton's kernels fit the smallest GPU
        yield f"{code.shared} bytes of shared memory"
    foreign = [name for name in code.functions if not FUNCTIONS.fullmatch(name)]
    foreign = [name for name in foreign if not (gate.doubles and FUNCTIONS_64.fullmatch(name))]
    if foreign:
        yield f"calls {foreign}"
    contracted = CONTRACTED.search(code.ptx)
    if contracted and not gate.contracts:
        yield f"{contracted[0]} in the PTX: rounding is not as written"


@cache
def library(architecture: int) -> dict[str, Code]:
    """The kernels that the CUDA library has for an architecture."""
    if not built.PATH.exists():
        pytest.skip(f"the CUDA library: not built; {built.BUILD}")
    return disassemble(built.PATH, "-arch", TARGETS[architecture])


def code_of(gate: Gate, architecture: int, folder: Path) -> Code:
    if gate.launch is None:
        return library(architecture)[gate.kernel]
    return compile_launch(gate.launch(gate.kernel, architecture), architecture, folder)


@pytest.mark.parametrize(
    ("gate", "architecture"),
    [
        pytest.param(gate, architecture, id=f"{gate.kernel.strip('_')}: {gate.case}, sm_{architecture}")
        for gate in GATES
        for architecture in gate.matmuls
    ],
)
def test_machine_code(gate, architecture, tmp_path):
    code = code_of(gate, architecture, tmp_path)
    assert not list(violations(gate, code, architecture))
    words_are_whole(code)
    gate.also.get(architecture, lambda code: None)(code)


# ---- the table is whole


def launched(source: str) -> set[str]:
    """The kernels that a module launches: name[grid](...)."""
    calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return {call.value.id for call in calls if isinstance(call, ast.Subscript) and isinstance(call.value, ast.Name)}


def test_every_triton_kernel_has_rows_for_every_architecture():
    kernels = set().union(*(launched(path.read_text()) for path in KERNELS.glob("*.py")))
    assert len(kernels) > 20
    for kernel in kernels:
        rows = [gate for gate in GATES if gate.kernel == kernel]
        assert set().union(*(gate.matmuls for gate in rows)) >= set(ARCHITECTURES), kernel
    assert {gate.kernel for gate in GATES if gate.launch is not None} == kernels


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_cuda_kernel_has_a_row(architecture):
    assert set(library(architecture)) == {gate.kernel for gate in CUDA_GATES if architecture in gate.matmuls}


def test_library_has_code_and_ptx_for_every_architecture():
    library(80)
    for option, kind in (("-lelf", "cubin"), ("-lptx", "ptx")):
        command = [triton.knobs.nvidia.cuobjdump.path, option, str(built.PATH)]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        files = {gate.kernel.partition("_sm")[0] for gate in CUDA_GATES}
        for file, (family, targets) in product(files, (("sm80", TARGETS.values()), ("sm90", ["sm_90a"]))):
            found = set(re.findall(rf"{file}_{family}\.(\w+)\.{kind}", listed))
            assert found == set(targets), (file, family, kind)


def planned(kernel: str, architecture: int):
    """A launch of the kernel, of any problem."""
    op, _, instance = kernel.partition("_sm")
    kind = instance.split("_")[1]
    launcher, one = import_module(f"pyvit_accel.cuda.{op}"), torch.ones(304)
    y, vectors = torch.empty(40, 300), (one[:1], one)
    if op == "lowbit_linear":
        w_packed = torch.zeros(304, 64 + 128 * int(kind[1:]), dtype=torch.uint8)
        x, rest = torch.zeros(40, 64, dtype=torch.int8), (w_packed, one, None, 0)
        args, after = (x, one[:1], *rest), (64,)
    else:
        x = torch.zeros(40, 64, dtype={"s8": torch.int8, "f16": torch.float16, "bf16": torch.bfloat16}[kind])
        weight = torch.zeros(304 * 64, dtype=torch.int8)
        args = x, weight, weight, None, *(vectors if kind == "s8" else (None, None)), one.int(), 0
        after = 64, weight
    problem = launcher.problem(y, *args, "none", None, None, None, 0, 8, *after)
    return launcher.OP.plan(problem, architecture, 132, kernel)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_launches_of_cuda_kernels_fit(architecture):
    """Shared memory of a block, and the registers of its threads."""
    if built.library() is None:
        pytest.skip(f"the CUDA library: {built.status()}")
    for gate in CUDA_GATES:
        if architecture in gate.matmuls:
            launch, code = planned(gate.kernel, architecture), library(architecture)[gate.kernel]
            assert launch.kernel.decode() == gate.kernel
            static = code.shared - 1024 * (architecture >= 90)  # which the system keeps of every block
            assert 0 < launch.shared_bytes + static <= SHARED_KIB[architecture] * 1024
            assert launch.block * code.registers <= 65536


# ---- the checks can fail


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A row of 4-bit weights, its launch and its code."""
    gate = next(gate for gate in GATES if gate.case == "small tile, 4 bits, full")
    launch = gate.launch(gate.kernel, 90)
    return gate, launch, compile_launch(launch, 90, tmp_path_factory.mktemp("example"))


def with_line(code: Code, line: str) -> Code:
    return replace(code, sass=f"{code.sass}\n        /*99990*/                   {line} ;")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda gate, code: (replace(gate, matmuls={90: "IGMMA.64x64x32.S8.S8"}), code), "tensor core instructions"),
        (lambda gate, code: (gate, with_line(code, "HMMA.16816.F32 R4, R8, R12, R4")), "tensor core instructions"),
        (lambda gate, code: (replace(gate, registers=code.registers - 1), code), "registers"),
        (lambda gate, code: (gate, with_line(code, "@!P0 STL.64 [R1+0x8], R4")), "spills"),
        (lambda gate, code: (gate, replace(code, shared=100 * 1024)), "shared memory"),
        (lambda gate, code: (gate, with_line(code, "MUFU.EX2 R4, R4")), "EX2"),
        (lambda gate, code: (gate, replace(code, functions=frozenset({"__cuda_sm80_mma_m16n8k32_s4_s4"}))), "calls"),
        (lambda gate, code: (gate, replace(code, ptx=f"{code.ptx}\nfma.rn.f32 %f1, %f2, %f3, %f4;")), "rounding"),
        (lambda gate, code: (replace(gate, launch=None), with_line(code, "CALL.REL.NOINC 0x20")), "calls"),
    ],
)
def test_what_is_wrong_is_found(change, message, example):
    gate, _, code = example
    assert not list(violations(gate, code, 90))
    (found,) = violations(*change(gate, code), 90)
    assert message in found


def test_spills_of_a_compiled_kernel_are_found(example, tmp_path):
    gate, (source, options), _ = example
    found = "\n".join(violations(gate, compile_launch((source, options | {"maxnreg": 64}), 90, tmp_path), 90))
    assert re.search(r"spills: \{'STL': [1-9]\d*, 'LDL': [1-9]", found)


def test_instructions_that_are_too_many_are_found(example):
    gate, _, code = example
    gate.also[90](code)
    with pytest.raises(AssertionError):
        gate.also[90](replace(code, ptx=code.ptx.replace("shl.b32", "shl.b32 $1, $2, 0; shl.b32")))
    with pytest.raises(AssertionError):
        gate.also[90](replace(code, sass=code.sass.replace("IGMMA", "STS [R4], R5 ;\nIGMMA", 1)))


def test_serialised_wgmma_is_found():
    gate = next(gate for gate in CUDA_GATES if gate.kernel == "lowbit_linear_sm90_w8_128x128")
    code = library(90)[gate.kernel]
    for was, becomes in ((r"(IGMMA[^;]*?)(, gsb0)? ;", r"\1, gsb0 ;"), ("gsb0, 0x1 ;", "gsb0, 0x0 ;")):
        with pytest.raises(AssertionError):
            gate.also[90](replace(code, sass=re.sub(was, becomes, code.sass)))
