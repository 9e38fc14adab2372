"""wgmma: matrices of a warpgroup. Operands lie in shared memory behind descriptors, results come later.

The product is computed when the instruction is issued; flight.py keeps everybody away from the registers until a wait.
The bytes are read by the warpgroup's tensor agent, which knows what all four warps know at that moment; the read lasts
until a wait_group that covers it.
Source: PTX ISA, "Asynchronous warpgroup level matrix instructions"; layouts also as CUTLASS builds its descriptors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from . import fragments, matrix_math
from .flight import Flight, flight_of
from .machine import Group
from .matrix import Words, parse_product, together
from .matrix_math import TYPES
from .memory import BadAccess
from .parse import Imm, Instruction, Vector
from .program import Program, handles
from .report import NotEmulated

RESERVED = 0xFFFFFFFFFFFFFFFF & ~(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62)
SPANS = (16, 128, 64, 32)  # bytes of a row of the layout, by the descriptor's swizzle field


class Descriptor(NamedTuple):
    """A matrix in shared memory, decoded; all in bytes."""

    start: int
    leading: int
    stride: int
    base_offset: int
    span: int  # 16: not swizzled

    @staticmethod
    def decode(bits: int) -> Descriptor:
        start, leading, stride = ((bits >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        return Descriptor(start, leading, stride, bits >> 49 & 7, SPANS[bits >> 62])

    def wrong(self, row_bytes: int) -> str:
        """What is ill-formed, or "". row_bytes: what an instruction takes of a row of a swizzled layout.

        A base offset shifts the phase of the swizzle; PTX says when it is due, what it does is inferred.
        """
        if self.span == 16:
            return "a base offset without a swizzle" if self.base_offset else ""
        begin, pattern = self.start - self.start % self.span, 8 * self.span
        if (self.base_offset - (begin >> 7)) % (pattern // 128) or begin % 128:
            where = f"the tile starts at byte {begin}, the {self.span}-byte swizzle repeats at multiples of {pattern}"
            return f"{where}, the base offset is {self.base_offset}: align the tile"
        within = self.start % self.span
        if within + row_bytes > self.span:
            return f"{row_bytes} bytes from byte {within} of a row on leave the {self.span} bytes of the swizzle"
        return ""

    def addresses(self, unit: np.ndarray, line: np.ndarray, k_major: bool) -> np.ndarray:
        """Of 16-byte units. K-major: unit counts along K, line is the row; else unit counts along rows, line is k."""
        group, inner, per_span = line >> 3, line & 7, self.span >> 4
        if self.span == 16:
            across, along = (self.leading, self.stride) if k_major else (self.stride, self.leading)
            return self.start + unit * across + group * along + inner * 16
        atom = unit // per_span * self.leading if not k_major else 0 * unit
        within = unit % per_span * 16 if not k_major else unit * 16
        address = self.start + atom + within + group * self.stride + inner * self.span
        return address ^ ((((address >> 7) - self.base_offset) & (per_span - 1)) << 4)


class Operand(NamedTuple):
    """How an instruction reads a matrix (lines, K) behind a descriptor: rows of A, columns of B."""

    kind: str
    lines: int
    K: int
    k_major: bool

    @cache  # noqa: B019 - of few operands, and descriptors come again with every stage
    def addresses(self, bits: int) -> tuple[np.ndarray, str]:
        """Of all 16-byte units (across, along memory), and what is ill-formed about the descriptor, or ""."""
        per_unit = 4 * TYPES[self.kind].per_word
        along, across = (self.K, self.lines) if self.k_major else (self.lines, self.K)
        unit, line = np.arange(-(-along // per_unit))[None, :], np.arange(across)[:, None]
        descriptor = Descriptor.decode(bits)
        wrong = descriptor.wrong(unit.size * 16 if self.k_major else min(unit.size * 16, descriptor.span))
        wrong = f"reserved bits 0x{bits & RESERVED:X} are set" if bits & RESERVED else wrong
        return descriptor.addresses(unit, line, self.k_major), wrong

    def read(self, group: Group, ins: Instruction, bits: int, agent: int, name: str) -> np.ndarray:
        """The numbers (lines, K) float32."""
        addresses, wrong = self.addresses(bits)
        if wrong:
            group.fault(ins, f"descriptor 0x{bits:016X} of {name}: {wrong}", 0)
        shared, (lines, units) = group.cta.shared, addresses.shape
        try:
            data = shared.read(shared.locate(addresses.reshape(-1), 16, "read"), agent, line=ins.line)
        except BadAccess as bad:
            along, across = ("k", "row") if self.k_major else ("row", "k")
            line, first = bad.lane // units, bad.lane % units * 4 * TYPES[self.kind].per_word
            group.fault(ins, f"{name}, {across} {line}, {along} from {first} on: {bad.reason}", 0)
        values = matrix_math.numbers(data.view(np.uint32), self.kind).reshape(lines, -1)
        return values if self.k_major else values[:, : self.lines].T


def warpgroups(ins: Instruction, act: Callable) -> Callable:
    """A step that has act(one whole warpgroup, its index in the block, flight) done for each; incomplete ones wait."""

    def step(group: Group):
        whole, wait = together(group, ins, 128)
        if whole is not None:
            for first in range(0, len(whole.threads), 128):
                one = Group(whole.cta, whole.threads[first : first + 128])
                act(one, int(one.threads[0]) // 128, flight_of(one.cta))
        return wait

    return step


@handles("wgmma")
def wgmma(ins: Instruction, program: Program) -> Callable:
    """wgmma.fence, .commit_group, .wait_group, .mma_async and .mma_async.sp."""
    kind, rest = ins.mods[0], ins.mods[1:]
    if kind == "mma_async":
        return _mma_async(ins, program, rest)
    if rest != ("sync", "aligned") or kind not in ("fence", "commit_group", "wait_group"):
        raise NotEmulated(ins.line, ins.text)
    if kind == "fence":
        return warpgroups(ins, lambda group, index, flight: flight.fence(index))
    if kind == "commit_group":
        return warpgroups(ins, lambda group, index, flight: flight.commit(index))
    if len(ins.operands) != 1 or not isinstance(ins.operands[0], Imm):
        raise NotEmulated(ins.line, ins.text, "how many groups may stay in flight has to be a literal")
    left = ins.operands[0].bits
    return warpgroups(ins, lambda group, index, flight: flight.wait(index, left))


def _legal_columns(N: int, integer: bool) -> bool:
    return N in range(8, 257, 8) and (not integer or N <= 24 or N % 16 == 0)


def _mma_async(ins: Instruction, program: Program, mods: tuple[str, ...]) -> Callable:
    sparse = mods[:1] == ("sp",)
    mods = mods[sparse:]
    if mods[:2] != ("sync", "aligned"):
        raise NotEmulated(ins.line, ins.text)
    form = parse_product(ins, mods[3:], sparse, True)
    type_a = TYPES[form.a]
    shaped = form.M == 64 and form.bits == (512 if sparse else 256) and _legal_columns(form.N, type_a.integer)
    if type_a.family == "4" or not shaped:
        raise NotEmulated(ins.line, ins.text, "the shape")
    D = Words(ins.operands[0], program, ins)
    d_per_word = 2 if form.d == "f16" else 1
    fragment_d = fragments.d_fragment(form.N // 2 // d_per_word, d_per_word)
    if D.count != fragment_d.registers:
        raise NotEmulated(ins.line, ins.text, f"{D.count} registers for D, {fragment_d.registers} were expected")
    from_registers = isinstance(ins.operands[1], Vector)
    a_registers = Words(ins.operands[1], program, ins) if from_registers else None
    if from_registers and a_registers.count != 4:
        raise NotEmulated(ins.line, ins.text, "A in registers takes four")
    rest = list(ins.operands[3:])
    E, selector = None, 0
    if sparse:
        E, selector = Words(rest.pop(0), program, ins), form.selector(ins, rest.pop(0))
    if not rest:
        raise NotEmulated(ins.line, ins.text, "scale-d is missing")
    scale_d = program.reader(rest[0], "pred", ins)
    sign_a, sign_b, k_major_a, k_major_b = _immediates(ins, form.a, rest[1:], from_registers)
    fragment_a = fragments.a_fragment(4, type_a.per_word)
    in_a = Operand(form.a, 64, form.K // 2 if sparse else form.K, k_major_a)
    in_b = Operand(form.b, form.N, form.K, k_major_b)
    descriptor_a = None if from_registers else program.reader(ins.operands[1], "u64", ins)
    descriptor_b = program.reader(ins.operands[2], "u64", ins)
    sources = (a_registers.registers if from_registers else ()) + (E.registers if sparse else ())
    shape = f"{mods[2]} {form.d} {'sparse' if sparse else 'dense'}"

    def act(group: Group, index: int, flight: Flight) -> None:
        agent = flight.issue(group, index, ins, D.registers, sources, shape)
        if from_registers:
            words = a_registers.read(group).reshape(4, 32, 4)
            a = fragment_a.matrix(matrix_math.numbers(words, form.a)).reshape(64, -1)
        else:
            a = in_a.read(group, ins, _same(group, ins, descriptor_a, "descriptor of A"), agent, "A")
        b = in_b.read(group, ins, _same(group, ins, descriptor_b, "descriptor of B"), agent, "B").T
        a = a if sign_a == sign_b else -a
        kept = None
        if sparse:
            words = E.read(group).reshape(4, 32)
            kept = form.kept_positions(words, selector, group, ins).reshape(64, -1)
        new = matrix_math.product(a, b, type_a.integer, kept)
        new = fragment_d.elements(new.reshape(4, 16, form.N))
        if _same(group, ins, scale_d, "scale-d"):
            new = new + matrix_math.accumulators(D.read(group).reshape(4, 32, D.count), form.d)
        words = matrix_math.accumulator_words(new, form.d, form.satfinite)
        D.write(group, words.reshape(128, D.count))

    return warpgroups(ins, act)


def _immediates(ins: Instruction, a: str, rest: list, from_registers: bool) -> tuple[int, int, bool, bool]:
    """imm-scale-a and -b, and whether A and B are K-major: what follows scale-d."""
    if not all(isinstance(operand, Imm) for operand in rest):
        raise NotEmulated(ins.line, ins.text, "literals were expected behind scale-d")
    values = [operand.bits for operand in rest]
    halves, integer = a in ("f16", "bf16"), TYPES[a].integer
    transposes = (1 if from_registers else 2) if halves else 0
    legal = (0,) if integer else (0, 2, 2 + transposes)
    signs, turned = values[:2], values[2:]
    if len(values) not in legal or any(s not in (1, -1) for s in signs) or any(t not in (0, 1) for t in turned):
        raise NotEmulated(ins.line, ins.text, f"{values} behind scale-d")
    turned = ([0] if from_registers else []) + turned
    sign_a, sign_b = signs or (1, 1)
    k_major_a, k_major_b = (not t for t in (*turned, 0, 0)[:2])
    return sign_a, sign_b, k_major_a, k_major_b


def _same(group: Group, ins: Instruction, reader: Callable, name: str) -> int:
    """The value all threads of the warpgroup have to agree on."""
    values = np.broadcast_to(reader(group), (len(group.threads),))
    other = values != values[0]
    if other.any():
        lane = int(np.flatnonzero(other)[0])
        group.fault(ins, f"the {name} differs from that of thread {group.threads[0]}: a warpgroup needs one", lane)
    return int(values[0])
