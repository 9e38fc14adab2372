"""Runs the blocks of a grid: threads, branches, barriers to wait at, and what goes wrong on the way.

All threads of a block that stand at one instruction execute it together, as one numpy operation. The group that stands
at the lowest position goes first, so that diverged threads meet again where the compiler laid out their paths to meet;
now and then the one that has waited longest does, so that nobody starves beside a loop that polls. A thread that waits
for a barrier is not scheduled; when nobody can go on, that is a deadlock, and told as such.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .memory import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, BadAccess, Memory
from .parse import Address, Entry, Imm, Instruction, Reg, Special, Symbol, Variable, parse
from .report import Fault, NotEmulated
from .shared import Clocks, Shared

HANDLERS: dict[str, Callable] = {}
TYPES = {
    **{f"u{b}": np.dtype(f"u{b // 8}") for b in (8, 16, 32, 64)},
    **{f"b{b}": np.dtype(f"u{b // 8}") for b in (8, 16, 32, 64)},
    **{f"s{b}": np.dtype(f"i{b // 8}") for b in (8, 16, 32, 64)},
    "f16": np.dtype(np.float16), "f32": np.dtype(np.float32), "f64": np.dtype(np.float64), "pred": np.dtype(bool),
    "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4"), "bf16": np.dtype("u2"),
}  # fmt: skip
BANK_DTYPES = {1: np.dtype(bool), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}
RUNNING, WAITING, EXITED = 0, 1, 2


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
        return dtype.type(operand.bits)
    return np.array(operand.bits % (1 << 8 * dtype.itemsize), np.dtype(f"u{dtype.itemsize}")).view(dtype)[()]


class Group:
    """Threads of a block that execute an instruction together."""

    def __init__(self, cta: Cta, threads: np.ndarray):
        self.cta, self.threads = cta, threads
        first, last = int(threads[0]), int(threads[-1])
        self.index = slice(first, last + 1) if last - first + 1 == len(threads) else threads

    def among(self, mask: np.ndarray) -> Group | None:
        """The threads for which mask holds."""
        if mask.all():
            return self
        return Group(self.cta, self.threads[mask]) if mask.any() else None

    @property
    def warps(self) -> np.ndarray:
        """Of every thread, numbered through the cluster."""
        return self.threads // 32 + self.cta.first_warp

    @property
    def warp_ids(self) -> np.ndarray:
        """Those with a thread here, numbered through the cluster."""
        return np.unique(self.warps)

    @property
    def cluster_threads(self) -> np.ndarray:
        return self.threads + self.cta.first_warp * 32

    def fault(self, ins: Instruction, reason: str, lane: int | None = None) -> None:
        """Raise. lane: which of the group's threads it is about."""
        thread = -1 if lane is None else int(self.threads[lane])
        machine, source = self.cta.machine, ins.source
        raise Fault(machine.program.name, self.cta.index, thread, ins.line, source, ins.text, reason)

    def whole_warps(self, ins: Instruction) -> np.ndarray:
        """Warps (W,), numbered in the block; all 32 threads of each have to be here."""
        if len(self.threads) % 32 == 0:
            warps = self.threads[::32] // 32
            expected = (warps[:, None] * 32 + np.arange(32)).reshape(-1)
            if np.array_equal(expected, self.threads):
                return warps
        counts = np.bincount(self.threads // 32)
        warp = int(np.flatnonzero((counts != 0) & (counts != 32))[0])
        here = counts[warp]
        self.fault(ins, f"{ins.opcode} needs all threads of warp {warp}, but {here} of 32 are here")


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


class Cta:
    """One block: registers, shared memory, and where every thread stands."""

    def __init__(self, machine: Machine, index: int, rank: int, clocks: Clocks):
        gx, gy, _ = machine.grid
        self.machine, self.index, self.rank, self.clocks = machine, index, rank, clocks
        self.position = (index % gx, index // gx % gy, index // (gx * gy))
        T = machine.threads
        self.first_warp = rank * -(-T // 32)
        rows = machine.program.entry.rows
        self.banks = {b: np.zeros((max(rows[b], 1), T), dtype) for b, dtype in BANK_DTYPES.items()}
        self.shared = Shared(machine.program.static_shared + machine.shared_bytes, clocks)
        self.local = np.zeros((T, max(machine.program.local_bytes, 1)), np.uint8)
        self.position_of = np.zeros(T, np.int64)
        self.state = np.full(T, RUNNING)
        self.since = np.zeros(T, np.int64)  # when each last ran
        self.waits: list[tuple[Wait, Instruction]] = []
        self.pending: dict = {}  # of wgmma: see matrix.py
        self.peers: list[Cta] = [self]
        self.barriers: dict = {}
        self.mbarriers: dict = {}
        self.copies: dict = {}  # of cp.async, by warp
        self.bulk_groups: dict = {}  # of bulk stores, by warp: clocks
        self.bulk_open: set = set()  # warps with bulk stores in no group
        self.position_now = 0

    def wake(self) -> None:
        left = []
        for wait, ins in self.waits:
            if wait.ready():
                self.state[wait.threads] = RUNNING
            else:
                left.append((wait, ins))
        self.waits = left

    def run_some(self, now: int) -> bool:
        """Some threads execute up to the next branch, wait or meeting point; False when none can."""
        if self.waits:
            self.wake()
        runnable = np.flatnonzero(self.state == RUNNING)
        if not len(runnable):
            return False
        at = self.position_of[runnable]
        position = int(at.min() if now % 16 else at[self.since[runnable].argmin()])
        threads = runnable[at == position]
        self.since[threads] = now
        self._run(Group(self, threads), position)
        return True

    def _run(self, group: Group, position: int) -> None:
        program = self.machine.program
        steps, instructions, leaders = program.steps, program.entry.instructions, program.leaders
        pending = self.pending
        while True:
            ins = instructions[position]
            active = group
            if ins.guard is not None:
                values = self.banks[1][ins.guard.row][group.index]
                active = group.among(~values if ins.guard.negated else values)
            if pending and active is not None:
                check_pending(pending, active, ins)
            if ins.opcode == "bra":
                self.position_of[group.index] = position + 1
                if active is not None:
                    self.position_of[active.index] = ins.target
                return
            outcome = None
            if active is not None:
                self.position_now = position
                try:
                    outcome = steps[position](active)
                except BadAccess as bad:
                    active.fault(ins, bad.reason, bad.lane)
            position += 1
            if isinstance(outcome, Wait):
                self.position_of[group.index] = position
                self.state[outcome.threads] = WAITING
                if not outcome.advance:
                    self.position_of[outcome.threads] = position - 1
                self.waits.append((outcome, ins))
                return
            if outcome == EXITED:
                self.state[active.index] = EXITED
                self.position_of[group.index] = position
                return
            if position in leaders:
                self.position_of[group.index] = position
                return


def check_pending(pending: dict, group: Group, ins: Instruction) -> None:
    """Fault when an instruction touches registers that a wgmma in flight owns. pending: see matrix.py."""
    for guard in pending.values():
        guard(group, ins)


class Machine:
    """One launch: the grid's clusters run one after another, the blocks of a cluster together.

    params  the bytes of the parameters, laid out as the entry has them
    shared  bytes of dynamic shared memory
    """

    def __init__(self, program: Program, grid, block, params: bytes, memory: Memory, shared: int = 0, cluster: int = 1):
        self.program, self.memory, self.shared_bytes, self.cluster = program, memory, shared, cluster
        self.grid, self.block = ((*n, 1, 1)[:3] if isinstance(n, tuple) else (n, 1, 1) for n in (grid, block))
        self.threads = int(np.prod(self.block))
        if len(params) != program.param_bytes:
            raise ValueError(f"{program.name} takes {program.param_bytes} bytes of parameters, got {len(params)}")
        if cluster > 1 and (self.grid[0] % cluster or self.grid[1:] != (1, 1)):
            raise ValueError(f"a grid of {self.grid} is no multiple of clusters of {cluster} along x")
        self.params = np.frombuffer(params, np.uint8)
        self.global_addresses = {}
        for v in program.module_variables.values():
            if v.space in ("global", "const"):
                data = np.frombuffer(v.values.ljust(v.size, b"\0"), np.uint8)
                mode = "read" if v.space == "const" else "update"
                self.global_addresses[v.name] = memory.allocate(v.name, data, mode)
        self.executed = 0

    def tick(self) -> int:
        self.executed += 1
        return self.executed

    def run(self) -> None:
        with np.errstate(all="ignore"):
            for first in range(0, int(np.prod(self.grid)), self.cluster):
                self._run_cluster(first)
        lines = self.memory.unwritten()
        if lines:
            raise Fault(self.program.name, -1, -1, 0, "", "", "; ".join(lines))

    def _run_cluster(self, first: int) -> None:
        warps = -(-self.threads // 32) * self.cluster
        clocks = Clocks(warps)
        ctas = [Cta(self, first + rank, rank, clocks) for rank in range(self.cluster)]
        for cta in ctas:
            cta.peers = ctas
        while True:
            moved = [cta.run_some(self.tick()) for cta in ctas]
            if any(moved):
                continue
            if all((cta.state == EXITED).all() for cta in ctas):
                break
            self._deadlock(ctas)
        for cta in ctas:
            left = [b for b in cta.mbarriers.values() if b.transactions > 0]
            if left:
                reason = f"the block ends while {left[0].transactions} bytes of a bulk copy are on their way"
                raise Fault(self.program.name, cta.index, -1, 0, "", "", reason)
            if cta.bulk_open or any(cta.bulk_groups.values()):
                reason = "the block ends without a wait for a bulk copy out of its shared memory"
                raise Fault(self.program.name, cta.index, -1, 0, "", "", reason)

    def _deadlock(self, ctas: list[Cta]) -> None:
        waits = [(cta, wait, ins) for cta in ctas for wait, ins in cta.waits]
        lines = []
        for cta, wait, ins in waits:
            first, last = wait.threads[0], wait.threads[-1]
            lines.append(f"block {cta.index}, threads {first}..{last} at PTX line {ins.line}: {wait.why()}")
        cta, wait, ins = waits[0]
        Group(cta, wait.threads).fault(ins, "deadlock: " + "; ".join(lines), 0)


def load(ptx: str, kernel: str) -> Program:
    """Raises ValueError when the text has no such entry, NotEmulated for what the emulator does not know."""
    entries, variables = parse(ptx, kernel)
    if not entries:
        raise ValueError(f"the PTX has no entry {kernel}")
    return Program(entries[0], variables)


def space_of(address: np.ndarray) -> str:
    """The space generic addresses point to; all of them to one."""
    window = int(address[0]) >> 48
    return {0: "global", SHARED_WINDOW >> 48: "shared", LOCAL_WINDOW >> 48: "local", PARAM_WINDOW >> 48: "param"}[window]
