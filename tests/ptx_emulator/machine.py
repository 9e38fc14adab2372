"""Runs the blocks of a grid: threads, branches, barriers to wait at, and what goes wrong on the way.

All threads of a block that stand at one instruction execute it together, as one numpy operation. The group that stands
at the lowest position goes first, so that diverged threads meet again where the compiler laid out their paths to meet;
now and then the one that has waited longest does, so that nobody starves beside a loop that polls. A thread that waits
for a barrier is not scheduled; when nobody can go on, that is a deadlock, and told as such.
"""

from __future__ import annotations

import numpy as np

from .memory import BadAccess, Memory
from .parse import Instruction
from .program import BANK_DTYPES, EXITED, RUNNING, WAITING, Program, Wait
from .report import Fault
from .shared import Clocks, Shared

# What registers hold that nothing was written to; predicates are false.
UNSET = {1: 0, 16: 0xCDCD, 32: 0xCDCDCDCD, 64: 0xCDCDCDCDCDCDCDCD}


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


class Cta:
    """One block: registers, shared memory, and where every thread stands."""

    def __init__(self, machine: Machine, index: int, rank: int, clocks: Clocks):
        gx, gy, _ = machine.grid
        self.machine, self.index, self.rank, self.clocks = machine, index, rank, clocks
        self.position = (index % gx, index // gx % gy, index // (gx * gy))
        T = machine.threads
        self.first_warp = rank * -(-T // 32)
        rows = machine.program.entry.rows
        self.banks = {b: np.full((max(rows[b], 1), T), UNSET[b], dtype) for b, dtype in BANK_DTYPES.items()}
        self.shared = Shared(machine.program.static_shared + machine.shared_bytes, clocks)
        self.local = np.zeros((T, max(machine.program.local_bytes, 1)), np.uint8)
        self.position_of = np.zeros(T, np.int64)
        self.state = np.full(T, RUNNING)
        self.since = np.zeros(T, np.int64)  # when each last ran
        self.waits: list[tuple[Wait, Instruction]] = []
        self.pending: dict = {}  # of wgmma: see flight.py
        self.peers: list[Cta] = [self]
        self.barriers: dict = {}
        self.mbarriers: dict = {}
        self.copies: dict = {}  # of cp.async, by warp: see copies.py
        self.copy_groups = np.zeros(T, np.int64)  # of cp.async that every thread has committed
        self.bulk_groups: dict = {}  # of bulk stores, by thread: see bulk.py
        self.reached: dict[int, tuple] = {}  # by warps of other blocks: their clock then, the group, the instruction
        self.awaited = not machine.dependent
        self.position_now = 0
        self.turns = 0
        self.exits = 0  # how often threads have left

    @property
    def memory(self) -> Memory:
        """Global memory. Of a dependent launch the one before may still write there, until a thread has awaited it."""
        if not self.awaited:
            raise BadAccess(0, "global memory before griddepcontrol.wait, in a dependent launch")
        return self.machine.memory

    def wake(self) -> None:
        left = []
        for wait, ins in self.waits:
            if wait.ready():
                self.state[wait.threads] = RUNNING
            else:
                left.append((wait, ins))
        self.waits = left

    def run_some(self) -> bool:
        """Some threads execute up to the next branch, wait or meeting point; False when none can."""
        self.turns = now = self.turns + 1
        if now > self.machine.patience:
            self._fault_endless()
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

    def _fault_endless(self) -> None:
        busy = np.flatnonzero(self.state == RUNNING)
        thread = busy[self.since[busy].argmax()] if len(busy) else self.waits[0][0].threads[0]
        ins = self.machine.program.entry.instructions[self.position_of[thread]]
        Group(self, np.array([thread])).fault(ins, f"the block does not end: {self.turns} turns of its threads", 0)

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
                outcome = [outcome]
            if isinstance(outcome, list) and outcome:
                self.position_of[group.index] = position
                for wait in outcome:
                    self.state[wait.threads] = WAITING
                    if not wait.advance:
                        self.position_of[wait.threads] = position - 1
                    self.waits.append((wait, ins))
                return
            if outcome == EXITED:
                self.exits += 1
                self.state[active.index] = EXITED
                self.position_of[group.index] = position
                return
            if position in leaders:
                self.position_of[group.index] = position
                return


def check_pending(pending: dict, group: Group, ins: Instruction) -> None:
    """Fault when an instruction touches registers that a wgmma in flight owns. pending: see flight.py."""
    for guard in pending.values():
        guard(group, ins)


class Machine:
    """One launch: the grid's clusters run one after another, the blocks of a cluster together.

    grid, block    numbers, or tuples of up to three
    params         the bytes of the parameters, laid out as the entry has them
    shared         bytes of dynamic shared memory
    complete       every byte of "write" allocations must be written
    dependent      a programmatic dependent launch: the one before has not ended until griddepcontrol.wait says so
    held_operands  a wgmma's A registers may not be written before it is waited for. The PTX ISA says so. Triton leaves
                   it to the assembler, which keeps the old value in another register, or puts a wait there.
    """

    def __init__(
        self, program: Program, grid, block, params: bytes, memory: Memory, shared: int = 0, cluster: int = 1,
        complete: bool = True, held_operands: bool = True, dependent: bool = False,
    ):  # fmt: skip
        self.program, self.memory, self.shared_bytes, self.cluster = program, memory, shared, cluster
        self.complete, self.held_operands, self.dependent = complete, held_operands, dependent
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

    patience = 1_000_000  # turns of a block's threads before it is taken for endless

    def tick(self) -> int:
        self.executed += 1
        return self.executed

    def run(self) -> None:
        with np.errstate(all="ignore"):
            for first in range(0, int(np.prod(self.grid)), self.cluster):
                self._run_cluster(first)
        lines = self.memory.unwritten()
        if lines and self.complete:
            raise Fault(self.program.name, -1, -1, 0, "", "", "; ".join(lines))

    def _run_cluster(self, first: int) -> None:
        warps = -(-self.threads // 32) * self.cluster
        clocks = Clocks(warps)
        ctas = [Cta(self, first + rank, rank, clocks) for rank in range(self.cluster)]
        for cta in ctas:
            cta.peers = ctas
        while True:
            moved = [cta.run_some() for cta in ctas]
            if any(moved):
                continue
            if all((cta.state == EXITED).all() for cta in ctas):
                break
            self._deadlock(ctas)
        for cta in ctas:
            for barrier in cta.mbarriers.values():
                if barrier.transactions > 0:
                    who, ins = barrier.expects
                    reason = f"the block ends while {barrier.transactions} bytes that an mbarrier expects have not come"
                    who.fault(ins, reason, 0)
            flying = [c for group in cta.bulk_groups.values() for _, copies in group for c in copies]
            for who, ins in flying[:1]:
                who.fault(ins, "the block ends without a wait for this copy out of its shared memory", 0)
            for copy in (c for waiting in cta.copies.values() for c in waiting):
                Group(cta, copy.threads[:1]).fault(copy.ins, "the block ends without a wait for this copy", 0)
            last = cta.first_warp + warps // self.cluster
            for warp, (clock, who, ins) in cta.reached.items():
                if clocks.clock[cta.first_warp : last, warp].max() < clock:
                    who.fault(ins, f"block {cta.index} may have ended before this reaches its shared memory", 0)
        for agent, (clock, who, ins) in clocks.copied.items():
            if clocks.clock[:warps, agent].max() < clock:
                who.fault(ins, "the block ends without a wait for this copy", 0)

    def _deadlock(self, ctas: list[Cta]) -> None:
        waits = [(cta, wait, ins) for cta in ctas for wait, ins in cta.waits]
        lines = []
        for cta, wait, ins in waits:
            first, last = wait.threads[0], wait.threads[-1]
            lines.append(f"block {cta.index}, threads {first}..{last} at PTX line {ins.line}: {wait.why()}")
        cta, wait, ins = waits[0]
        Group(cta, wait.threads).fault(ins, "deadlock: " + "; ".join(lines), 0)
