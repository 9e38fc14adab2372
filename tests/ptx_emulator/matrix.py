"""mma, mma.sp, ldmatrix, stmatrix, movmatrix: what a warp does together.

Source: PTX ISA, "Warp-level matrix instructions". Sums: see matrix_math.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import fragments, matrix_math
from .machine import Group
from .memory import SHARED_WINDOW, space_of
from .parse import Address, Imm, Instruction, Reg, Vector
from .program import EXITED, Program, Wait, handles
from .report import NotEmulated


class Words:
    """Some registers of 32 bits, read and written together. Immediates may stand among those that are read."""

    def __init__(self, operand, program: Program, ins: Instruction):
        items = operand.items if isinstance(operand, Vector) else (operand,)
        for item in items:
            if not (isinstance(item, Imm) or (isinstance(item, Reg) and item.bank == 32)):
                raise NotEmulated(ins.line, ins.text, "32-bit registers were expected")
        self.count = len(items)
        self.registers = tuple(item.row for item in items if isinstance(item, Reg))
        self.rows = np.array([item.row if isinstance(item, Reg) else 0 for item in items])
        constants = [(i, item) for i, item in enumerate(items) if isinstance(item, Imm)]
        self.constants = [(i, program.reader(item, "u32", ins)) for i, item in constants]

    def read(self, group: Group) -> np.ndarray:
        """(threads, count) uint32."""
        words = group.cta.banks[32][self.rows][:, group.index].T
        if self.constants:
            words = words.copy()
            for i, constant in self.constants:
                words[:, i] = constant(group)
        return words

    def write(self, group: Group, words: np.ndarray) -> None:
        bank = group.cta.banks[32]
        for row, values in zip(self.rows, words.T, strict=True):
            bank[row][group.index] = values


def together(group: Group, ins: Instruction, size: int) -> tuple[Group | None, Wait | None]:
    """The part of the group whose units of `size` threads are all here, and a wait for what misses of the others."""
    threads = group.threads
    if isinstance(group.index, slice) and group.index.start % size == 0 and len(threads) % size == 0:
        return group, None
    unit, here = np.unique(threads // size, return_counts=True)
    if (here == size).all():
        return group, None
    name = {32: "warp", 128: "warpgroup"}[size]
    cta, position, short = group.cta, group.cta.position_now, unit[here != size]
    expected = (short[:, None] * size + np.arange(size)).reshape(-1)
    absent = np.setdiff1d(expected, threads)
    if (absent >= len(cta.state)).any() or (cta.state[absent] == EXITED).any():
        left = here[here != size][0]
        group.fault(ins, f"{ins.opcode} needs all {size} threads of {name} {short[0]}; only {left} are left")

    def why() -> str:
        late = expected[cta.position_of[expected] != position]
        return f"waits for the rest of {name} {late[0] // size}: thread {late[0]} and {len(late) - 1} more"

    rest = group.among(np.isin(threads // size, short))
    wait = Wait(rest.threads, lambda: bool((cta.position_of[expected] == position).all()), why, advance=False)
    return group.among(~np.isin(threads // size, short)), wait


def by_warps(ins: Instruction, act: Callable) -> Callable:
    """A step that has act(group) done by whole warps; warps that are not complete wait."""

    def step(group: Group):
        whole, wait = together(group, ins, 32)
        if whole is not None:
            act(whole)
        return wait

    return step


class Product(NamedTuple):
    """The types and the shape an instruction names; K counts logical columns of A."""

    M: int
    N: int
    K: int
    d: str
    a: str
    b: str
    satfinite: bool
    sparse: bool
    ordered: bool

    @property
    def bits(self) -> int:
        """Of a logical row of A."""
        return self.K * 32 // matrix_math.TYPES[self.a].per_word

    @property
    def nibbles_per_register(self) -> int:
        """Of metadata, that a register of A needs."""
        return 1 if matrix_math.TYPES[self.a].per_word <= 2 else 2

    def selector(self, ins: Instruction, operand) -> int:
        """The literal that says which lanes' metadata count."""
        selectors = (2 if self.nibbles_per_register == 1 else 1) * (512 // self.bits)
        if not isinstance(operand, Imm) or not 0 <= operand.bits < selectors:
            raise NotEmulated(ins.line, ins.text, f"the selector has to be a literal below {selectors}")
        return operand.bits

    def kept_positions(self, words: np.ndarray, selector: int, group: Group, ins: Instruction) -> np.ndarray:
        """Metadata (warps, 32) to the columns of A's values (warps, 16, K / 2); faults on an illegal nibble."""
        where = fragments.metadata(self.bits // 128, self.nibbles_per_register, selector)
        nibble = matrix_math.nibbles(words, where)
        legal = matrix_math.LEGAL_PAIRS if self.a == "tf32" else matrix_math.LEGAL
        if not self.ordered and self.a != "tf32":
            legal = matrix_math.LEGAL_UNORDERED
        bad = ~np.isin(nibble, legal)
        if bad.any():
            warp, row, chunk = np.argwhere(bad)[0]
            lane = where.lane[row, chunk]
            found, shift = nibble[warp, row, chunk], where.shift[row, chunk]
            reason = f"illegal sparse metadata 0x{found:X}, chunk {chunk} of row {row}, in lane {lane} at bit {shift}"
            group.fault(ins, f"{reason}; legal are {' '.join(f'{n:X}' for n in legal)}", int(warp * 32 + lane))
        return matrix_math.positions(nibble, self.a)


def parse_product(ins: Instruction, types: tuple[str, ...], sparse: bool, ordered: bool) -> Product:
    """types: the modifiers behind the shape, d a b (c); raises NotEmulated for what does not belong together."""
    shape = next((m for m in ins.mods if re.fullmatch(r"m\d+n\d+k\d+", m)), None)
    satfinite = "satfinite" in types
    types = tuple(t for t in types if t != "satfinite")
    if shape is None or len(types) < 3:
        raise NotEmulated(ins.line, ins.text, "a shape and the types of D, A and B were expected")
    M, N, K = (int(n) for n in re.findall(r"\d+", shape))
    d, a, b = types[:3]
    known = a in matrix_math.TYPES and b in matrix_math.TYPES
    if not known or matrix_math.TYPES[a].family != matrix_math.TYPES[b].family:
        raise NotEmulated(ins.line, ins.text, f"the types {a} and {b}")
    if d not in matrix_math.TYPES[a].accumulators or types[3:] not in ((), (d,)):
        raise NotEmulated(ins.line, ins.text, f"accumulators of type {' and '.join((d, *types[3:]))} for {a}")
    if satfinite and d != "s32":
        raise NotEmulated(ins.line, ins.text, "satfinite is for integers")
    return Product(M, N, K, d, a, b, satfinite, sparse, ordered)


def _sparse_shapes(a: str) -> tuple[int, ...]:
    return {"f16": (16, 32), "bf16": (16, 32), "tf32": (8, 16), "f8": (64,), "8": (32, 64), "4": (128,)}[
        matrix_math.TYPES[a].family
    ]


@handles("mma")
def mma(ins: Instruction, program: Program) -> Callable:
    """mma.sync and mma.sp(::ordered_metadata).sync, m16n8; A row-major, B column-major."""
    mods = ins.mods
    sparse = mods[0].startswith("sp")
    if mods[0] not in ("sync", "sp", "sp::ordered_metadata"):
        raise NotEmulated(ins.line, ins.text)
    rest = mods[1:] if sparse else mods
    if rest[:2] != ("sync", "aligned") or rest[3:5] != ("row", "col"):
        raise NotEmulated(ins.line, ins.text, ".sync.aligned.<shape>.row.col was expected")
    form = parse_product(ins, rest[5:], sparse, mods[0] != "sp")
    legal = form.K in _sparse_shapes(form.a) if sparse else form.bits in (128, 256)
    if (form.M, form.N) != (16, 8) or not legal or len(rest) < 9:
        raise NotEmulated(ins.line, ins.text, "the shape")
    per_word = matrix_math.TYPES[form.a].per_word
    a_registers, b_registers = form.bits // (128 if sparse else 64), form.bits // 128
    d_per_word = 2 if form.d == "f16" else 1
    fragment_a = fragments.a_fragment(a_registers, per_word)
    fragment_b = fragments.b_fragment(b_registers, per_word)
    fragment_d = fragments.d_fragment(4 // d_per_word, d_per_word)
    D, A, B, C = (Words(operand, program, ins) for operand in ins.operands[:4])
    counts = (D.count, A.count, B.count, C.count)
    expected = (fragment_d.registers, a_registers, b_registers, fragment_d.registers)
    if counts != expected or len(ins.operands) != (6 if sparse else 4):
        raise NotEmulated(ins.line, ins.text, f"{counts} registers for D, A, B, C; {expected} were expected")
    if sparse:
        E, selector = Words(ins.operands[4], program, ins), form.selector(ins, ins.operands[5])
    integer = matrix_math.TYPES[form.a].integer

    def act(group: Group) -> None:
        warps = len(group.threads) // 32

        def tile(words: Words, kind: str, fragment: fragments.Fragment) -> np.ndarray:
            lanes = words.read(group).reshape(warps, 32, words.count)
            return fragment.matrix(matrix_math.numbers(lanes, kind))

        a, b = tile(A, form.a, fragment_a), tile(B, form.b, fragment_b)
        kept = None
        if sparse:
            kept = form.kept_positions(E.read(group).reshape(warps, 32), selector, group, ins)
        new = fragment_d.elements(matrix_math.product(a, b, integer, kept))
        old = matrix_math.accumulators(C.read(group).reshape(warps, 32, C.count), form.d)
        words = matrix_math.accumulator_words(old + new, form.d, form.satfinite)
        D.write(group, words.reshape(len(group.threads), D.count))

    return by_warps(ins, act)


def _matrix_form(ins: Instruction, mods: tuple[str, ...]) -> tuple[int, bool]:
    """How many 8 x 8 matrices of 16-bit elements, and whether they are transposed."""
    left = [m for m in mods if m not in ("shared", "shared::cta", "trans")]
    if left[:3] != ["sync", "aligned", "m8n8"] or left[4:] != ["b16"] or left[3] not in ("x1", "x2", "x4"):
        raise NotEmulated(ins.line, ins.text, "the form .sync.aligned.m8n8.x1|x2|x4{.trans}{.shared}.b16 was expected")
    return int(left[3][1:]), "trans" in mods


def _row_addresses(ins: Instruction, program: Program, operand: Address, count: int) -> Callable:
    """f(group) -> the lanes (warps * 8 * count,) that give the addresses of rows, and the byte indices (..., 16)."""
    address = program.address(operand, ins)
    generic = not any(m.startswith("shared") for m in ins.mods)

    def rows(group: Group) -> tuple[np.ndarray, np.ndarray]:
        lanes = (np.arange(0, len(group.threads), 32)[:, None] + np.arange(8 * count)).reshape(-1)
        addresses = address(group)[lanes]
        if generic:
            if space_of(addresses) != "shared":
                group.fault(ins, f"{ins.opcode} of an address that is not of shared memory", int(lanes[0]))
            addresses = addresses - np.uint64(SHARED_WINDOW)
        return lanes, addresses

    return rows


@handles("ldmatrix")
def ldmatrix(ins: Instruction, program: Program) -> Callable:
    count, trans = _matrix_form(ins, ins.mods)
    D, rows = Words(ins.operands[0], program, ins), _row_addresses(ins, program, ins.operands[1], count)
    if D.count != count:
        raise NotEmulated(ins.line, ins.text, f"{D.count} registers for {count} matrices")
    fragment = fragments.matrix_8x8(trans)

    def act(group: Group) -> None:
        lanes, addresses = rows(group)
        shared = group.cta.shared
        at = shared.locate(addresses, 16, "read")
        data = shared.read(at, group.warps[lanes], group.cluster_threads[lanes], ins.line)
        matrices = data.view(np.uint16).reshape(-1, count, 8, 8)
        words = np.ascontiguousarray(fragment.elements(matrices)).view(np.uint32)  # (warps, count, 32, 1, 1)
        D.write(group, words.reshape(-1, count, 32).transpose(0, 2, 1).reshape(-1, count))

    return by_warps(ins, act)


@handles("stmatrix")
def stmatrix(ins: Instruction, program: Program) -> Callable:
    count, trans = _matrix_form(ins, ins.mods)
    rows, S = _row_addresses(ins, program, ins.operands[0], count), Words(ins.operands[1], program, ins)
    if S.count != count:
        raise NotEmulated(ins.line, ins.text, f"{S.count} registers for {count} matrices")
    fragment = fragments.matrix_8x8(trans)

    def act(group: Group) -> None:
        lanes, addresses = rows(group)
        words = np.ascontiguousarray(S.read(group).reshape(-1, 32, count).transpose(0, 2, 1))
        data = fragment.matrix(words[..., None].view(np.uint16)[..., None, :]).reshape(-1, 8)
        shared = group.cta.shared
        at = shared.locate(addresses, 16, "write")
        data = np.ascontiguousarray(data).view(np.uint8)
        shared.write(at, data, group.warps[lanes], group.cluster_threads[lanes], ins.line)

    return by_warps(ins, act)


@handles("movmatrix")
def movmatrix(ins: Instruction, program: Program) -> Callable:
    if ins.mods != ("sync", "aligned", "m8n8", "trans", "b16"):
        raise NotEmulated(ins.line, ins.text)
    D, S = (Words(operand, program, ins) for operand in ins.operands)
    straight, turned = fragments.matrix_8x8(False), fragments.matrix_8x8(True)

    def act(group: Group) -> None:
        halves = np.ascontiguousarray(S.read(group)).reshape(-1, 32, 1, 1).view(np.uint16)
        moved = np.ascontiguousarray(turned.elements(straight.matrix(halves)))
        D.write(group, moved.view(np.uint32).reshape(-1, 1))

    return by_warps(ins, act)
