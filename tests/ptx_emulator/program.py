"""One entry of a module as steps: how operands are read and written, and what each opcode registers itself with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .parse import Address, Entry, Imm, Instruction, Reg, Special, Symbol, Variable, parse
from .report import NotEmulated

HANDLERS: dict[str, Callable] = {}
TYPES = {
    **{f"u{b}": np.dtype(f"u{b // 8}") for b in (8, 16, 32, 64)},
    **{f"b{b}": np.dtype(f"u{b // 8}") for b in (8, 16, 32, 64)},
    **{f"s{b}": np.dtype(f"i{b // 8}") for b in (8, 16, 32, 64)},
    "f16": np.dtype(np.float16), "f32": np.dtype(np.float32), "f64": np.dtype(np.float64), "pred": np.dtype(bool),
    "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4"), "bf16": np.dtype("u2"),
}  # fmt: skip
BANK_DTYPES = {1: np.dtype(bool), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}
RUNNING, WAITING, EXITED = 0, 1, 2  # states of a thread


def handles(*opcodes: str):
    """Decorates a factory: factory(instruction, program) gives step(group), run once for every instruction at load."""

    def register(factory):
        for opcode in opcodes:
            HANDLERS[opcode] = factory
        return factory

    return register


@dataclass
class Wait:
    """What a step returns for threads that cannot go on: they stay here until ready().

    advance: they have executed the instruction, and go on behind it; else they execute it again.
    """

    threads: np.ndarray
    ready: Callable[[], bool]
    why: Callable[[], str]
    advance: bool = True


SPECIALS: dict[str, Callable] = {
    "tid.x": lambda g: g.threads % g.cta.machine.block[0],
    "tid.y": lambda g: g.threads // g.cta.machine.block[0] % g.cta.machine.block[1],
    "tid.z": lambda g: g.threads // (g.cta.machine.block[0] * g.cta.machine.block[1]),
    "laneid": lambda g: g.threads % 32,
    "warpid": lambda g: g.threads // 32,
    "clock": lambda g: g.cta.machine.tick(),
    "clock64": lambda g: g.cta.machine.tick(),
    "globaltimer": lambda g: g.cta.machine.tick(),
    "smid": lambda g: g.cta.index,
    "cluster_ctarank": lambda g: g.cta.rank,
    "cluster_nctarank": lambda g: g.cta.machine.cluster,
    "cluster_ctaid.x": lambda g: g.cta.rank,
    "cluster_ctaid.y": lambda g: 0,
    "cluster_ctaid.z": lambda g: 0,
    "cluster_nctaid.x": lambda g: g.cta.machine.cluster,
    "cluster_nctaid.y": lambda g: 1,
    "cluster_nctaid.z": lambda g: 1,
    "clusterid.x": lambda g: g.cta.index // g.cta.machine.cluster,
    "nclusterid.x": lambda g: g.cta.machine.grid[0] // g.cta.machine.cluster,
    "lanemask_lt": lambda g: (1 << (g.threads % 32).astype(np.int64)) - 1,
    "lanemask_le": lambda g: (2 << (g.threads % 32).astype(np.int64)) - 1,
    "lanemask_eq": lambda g: 1 << (g.threads % 32).astype(np.int64),
    "lanemask_ge": lambda g: 0xFFFFFFFF - ((1 << (g.threads % 32).astype(np.int64)) - 1),
    "lanemask_gt": lambda g: 0xFFFFFFFF - ((2 << (g.threads % 32).astype(np.int64)) - 1),
    **{f"ntid.{d}": lambda g, i=i: g.cta.machine.block[i] for i, d in enumerate("xyz")},
    **{f"nctaid.{d}": lambda g, i=i: g.cta.machine.grid[i] for i, d in enumerate("xyz")},
    **{f"ctaid.{d}": lambda g, i=i: g.cta.position[i] for i, d in enumerate("xyz")},
}


class Program:
    """One entry of a module, its instructions as steps."""

    def __init__(self, entry: Entry, variables: dict[str, Variable]):
        self.entry, self.name = entry, entry.name
        self.module_variables = variables
        self.param_offsets, at = {}, 0
        for p in entry.params:
            at = -(-at // p.align) * p.align
            self.param_offsets[p.name] = at
            at += p.size
        self.param_bytes = at
        self.shared_offsets, self.static_shared = self._lay_out("shared")
        self.local_offsets, self.local_bytes = self._lay_out("local")
        leaders = {i.target for i in entry.instructions if i.target >= 0}
        self.leaders = leaders
        self.steps = [self._compile(i) for i in entry.instructions]

    def _lay_out(self, space: str) -> tuple[dict[str, int], int]:
        """Offsets of the variables, those without a size last, and the bytes of the others."""
        own = [v for v in (*self.module_variables.values(), *self.entry.variables.values()) if v.space == space]
        offsets, at = {}, 0
        for v in sorted(own, key=lambda v: v.size == 0):
            at = -(-at // v.align) * v.align
            offsets[v.name] = at
            at += v.size
        return offsets, at

    def _compile(self, ins: Instruction) -> Callable:
        if ins.opcode not in HANDLERS:
            raise NotEmulated(ins.line, ins.text)
        return HANDLERS[ins.opcode](ins, self)

    def reader(self, operand, kind: str, ins: Instruction | None = None) -> Callable:
        """f(group) -> an array over its threads, or one number, of what the operand holds, as `kind`."""
        if kind not in TYPES:
            raise NotEmulated(ins.line if ins else 0, ins.text if ins else kind, f"type {kind}")
        dtype = TYPES[kind]
        if isinstance(operand, Reg):
            row, bank = operand.row, operand.bank
            if bank == 1:
                if operand.negated:
                    return lambda g: ~g.cta.banks[1][row][g.index]
                return lambda g: g.cta.banks[1][row][g.index]
            size = bank // 8
            if dtype.itemsize == size:
                return lambda g: g.cta.banks[bank][row][g.index].view(dtype)
            if dtype.itemsize > size:
                raise NotEmulated(ins.line, ins.text, f"a {bank}-bit register read as {kind}")
            narrow = np.dtype(f"u{dtype.itemsize}")
            return lambda g: g.cta.banks[bank][row][g.index].astype(narrow).view(dtype)
        if isinstance(operand, Imm):
            value = _constant(operand, kind)
            return lambda g: value
        if isinstance(operand, Special):
            get = SPECIALS.get(operand.name)
            if get is None:
                raise NotEmulated(ins.line if ins else 0, f"%{operand.name}")
            return lambda g: np.asarray(get(g)).astype(dtype)
        if isinstance(operand, Symbol):
            name, _, offset = operand.name.partition("+")
            address = self.address_of(name, ins)
            extra = int(offset or 0)
            return lambda g: dtype.type(address(g.cta) + extra)
        raise NotEmulated(ins.line if ins else 0, ins.text if ins else "", "an operand of another form")

    def address_of(self, name: str, ins: Instruction | None) -> Callable:
        """f(cta) -> the address of a variable in its own space."""
        for offsets in (self.shared_offsets, self.local_offsets, self.param_offsets):
            if name in offsets:
                at = offsets[name]
                return lambda cta: at
        if name in self.module_variables:
            return lambda cta: cta.machine.global_addresses[name]
        raise NotEmulated(ins.line if ins else 0, ins.text if ins else name, f"no variable {name}")

    def address(self, operand: Address, ins: Instruction) -> Callable:
        """f(group) -> addresses (threads,) uint64."""
        if not isinstance(operand, Address):
            raise NotEmulated(ins.line, ins.text, "an address was expected")
        kind = "u64" if not isinstance(operand.base, Reg) or operand.base.bank == 64 else "u32"
        base, offset = self.reader(operand.base, kind, ins), np.uint64(operand.offset % (1 << 64))

        def read(g):
            value = np.asarray(base(g)).astype(np.uint64)
            return np.broadcast_to(value, (len(g.threads),)) + offset

        return read

    def writer(self, operand, kind: str, ins: Instruction | None = None) -> Callable:
        """f(group, values): the destination takes values of the type, extended to its width."""
        if isinstance(operand, Symbol) and operand.name == "_":
            return lambda g, values: None
        if not isinstance(operand, Reg):
            raise NotEmulated(ins.line if ins else 0, ins.text if ins else "", "the destination is no register")
        row, bank, dtype = operand.row, operand.bank, TYPES[kind]
        to = BANK_DTYPES[bank]
        if bank == 1:

            def write(g, values):
                g.cta.banks[1][row][g.index] = values
        elif dtype.itemsize == to.itemsize:

            def write(g, values):
                g.cta.banks[bank][row][g.index] = np.asarray(values, dtype).view(to)
        elif dtype.itemsize > to.itemsize:
            raise NotEmulated(ins.line if ins else 0, ins.text if ins else "", f"{kind} to a {bank}-bit register")
        else:
            wide = np.dtype(f"i{to.itemsize}") if dtype.kind == "i" else to
            narrow = np.dtype(f"u{dtype.itemsize}")
            first = dtype if dtype.kind in "iu" else narrow

            def write(g, values):
                g.cta.banks[bank][row][g.index] = np.asarray(values, dtype).view(first).astype(wide).view(to)

        return write


def _constant(operand: Imm, kind: str):
    dtype = TYPES[kind]
    if kind == "pred":
        return np.bool_(operand.bits)
    if operand.kind == "f32" and kind not in ("f32", "b32", "u32"):
        raise NotEmulated(0, f"0f{operand.bits:08X}", f"as {kind}")
    if operand.kind == "f64":
        value = np.uint64(operand.bits).view(np.float64)
        return value.astype(dtype) if dtype.kind == "f" else np.uint64(operand.bits)
    if dtype.kind == "f" and operand.kind == "int":
        raise NotEmulated(0, str(operand.bits), f"an integer as {kind}")
    return np.array(operand.bits % (1 << 8 * dtype.itemsize), np.dtype(f"u{dtype.itemsize}")).view(dtype)[()]


def load(ptx: str, kernel: str) -> Program:
    """Raises ValueError when the text has no such entry, NotEmulated for what the emulator does not know."""
    entries, variables = parse(ptx, kernel)
    if not entries:
        raise ValueError(f"the PTX has no entry {kernel}")
    return Program(entries[0], variables)
