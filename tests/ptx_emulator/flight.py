"""What a wgmma in flight owns: its accumulators, A and metadata registers, and the bytes it reads.

Rules (PTX ISA, wgmma.fence and wgmma.wait_group):
- results may be read or overwritten only behind a wait_group that covers the group they were committed in; so may A and
  metadata registers be overwritten. More products may be added to results in flight: the same registers in the same
  order, the same shape.
- between an ordinary access to accumulators, or a write of A registers, and a wgmma on them stands a wgmma.fence; one
  stands before the first wgmma of a warpgroup.
A mov from register to register hands on what is in flight, as the assembler does, which renames registers across such
moves (ptxas 13.0 injects no wait for a mov of a pending accumulator, and one for an add). A mov of the constant zero
needs no fence, as there: it becomes the instruction's own "do not accumulate".
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from .machine import Cta, Group
from .parse import Address, Imm, Instruction, Pair, Reg, Vector
from .program import Program

NO_DESTINATION = ("st", "red", "bar", "barrier", "stmatrix", "cp", "mbarrier", "setmaxnreg")


class Access(NamedTuple):
    """What an ordinary instruction does with registers some wgmma uses; indices among those."""

    reads: list[int]
    writes: list[int]
    renames: bool  # a mov of registers: reads[i] to writes[i]
    zero: bool  # a mov of zero


def _registers(operand) -> list[int]:
    if isinstance(operand, Reg):
        return [operand.row] if operand.bank == 32 else []
    if isinstance(operand, Vector):
        return [row for item in operand.items for row in _registers(item)]
    if isinstance(operand, Pair):
        return _registers(operand.first) + _registers(operand.second)
    if isinstance(operand, Address):
        return _registers(operand.base) + [row for item in operand.coordinates for row in _registers(item)]
    return []


def _renames(ins: Instruction) -> bool:
    return ins.opcode == "mov" and all(isinstance(o, Reg) and o.bank == 32 for o in ins.operands)


class Tracked:
    """The registers of a program that some wgmma uses or that a mov joins to such, and who else touches them."""

    def __init__(self, program: Program):
        instructions = program.entry.instructions
        moves, rows = [], set()
        for ins in instructions:
            if _renames(ins):
                moves.append({o.row for o in ins.operands})
            elif ins.opcode == "wgmma" and ins.mods[0] == "mma_async":
                rows.update(row for operand in ins.operands for row in _registers(operand))
        while True:
            more = {row for move in moves if move & rows for row in move} - rows
            if not more:
                break
            rows |= more
        self.index = {row: i for i, row in enumerate(sorted(rows))}
        self.access = {}
        for ins in instructions:
            if ins.opcode != "wgmma":
                access = self._access(ins)
                if access.reads or access.writes:
                    self.access[id(ins)] = access

    def _access(self, ins: Instruction) -> Access:
        first = 0 if ins.opcode in NO_DESTINATION or not ins.operands or isinstance(ins.operands[0], Address) else 1
        writes = [row for operand in ins.operands[:first] for row in _registers(operand)]
        reads = [row for operand in ins.operands[first:] for row in _registers(operand)]
        source = ins.operands[1] if ins.opcode == "mov" else None
        zero = isinstance(source, Imm) and source.bits == 0
        reads, writes = ([self.index[row] for row in rows if row in self.index] for rows in (reads, writes))
        return Access(reads, writes, _renames(ins), zero)


_TRACKED: WeakKeyDictionary[Program, Tracked] = WeakKeyDictionary()


def flight_of(cta: Cta) -> Flight:
    """The block's, made when its first wgmma instruction comes."""
    if "wgmma" not in cta.pending:
        cta.pending["wgmma"] = Flight(cta)
    return cta.pending["wgmma"]


class Warpgroup:
    """What one warpgroup has in flight. Lists are over the tracked registers; groups are numbered from 1."""

    def __init__(self, registers: int, agent: int, warps: np.ndarray):
        self.registers, self.agent, self.warps = registers, agent, warps
        self.result = [0] * registers  # the group a result comes with
        self.source = [0] * registers  # the last group that takes the register as A or metadata
        self.slot = [None] * registers  # shape and place of a result: only the same may be added to
        self.line = [0] * registers  # PTX line of the wgmma that took the register last
        self.committed = self.done = 0  # groups
        self.open = False  # something is issued and not committed
        self.fenced = False  # ever
        self.clocks: list[int] = []  # the tensor agent's, at each commit
        self.forget()

    def forget(self) -> None:
        """wgmma.fence"""
        self.used = [False] * self.registers  # a result was asked for since
        self.written, self.read = [0] * self.registers, [0] * self.registers  # PTX lines since

    @property
    def busy(self) -> bool:
        return self.open or self.committed > self.done


class Flight:
    """The warpgroups of a block, and the ordinary instructions that touch what is theirs."""

    def __init__(self, cta: Cta):
        program = cta.machine.program
        if program not in _TRACKED:
            _TRACKED[program] = Tracked(program)
        self.tracked, self.cta = _TRACKED[program], cta
        firsts = [cta.first_warp + 4 * wg for wg in range(-(-cta.machine.threads // 128))]
        registers, tensor = len(self.tracked.index), cta.clocks.tensor
        self.warpgroups = [Warpgroup(registers, tensor + first, first + np.arange(4)) for first in firsts]

    def __call__(self, group: Group, ins: Instruction) -> None:
        """Before an ordinary instruction."""
        access = self.tracked.access.get(id(ins))
        if access is None and ins.opcode not in ("ret", "exit"):
            return
        first, last = int(group.threads[0]) >> 7, int(group.threads[-1]) >> 7
        for wg in (first,) if first == last else np.unique(group.threads >> 7):
            mine = self.warpgroups[wg]
            wrong = self._wrong(mine, access, ins) if mine.busy else ""
            if wrong:
                group.fault(ins, wrong, int(np.flatnonzero(group.threads >> 7 == wg)[0]))
            if access is not None:
                self._note(mine, access, ins.line)

    def _wrong(self, mine: Warpgroup, access: Access | None, ins: Instruction) -> str:
        if access is None:
            return "the thread ends while a wgmma is in flight: wgmma.wait_group 0"
        if access.renames:
            return ""
        rows = [(row, "read of the result") for row in access.reads if mine.result[row] > mine.done]
        rows += [(row, "write over the result") for row in access.writes if mine.result[row] > mine.done]
        if self.cta.machine.held_operands:
            rows += [(row, "write over an operand") for row in access.writes if mine.source[row] > mine.done]
        for row, what in rows:
            return f"{what} of wgmma at PTX line {mine.line[row]} before a wgmma.wait_group that covers it"
        return ""

    @staticmethod
    def _note(mine: Warpgroup, access: Access, line: int) -> None:
        if access.renames:
            (to,), (source,) = access.writes, access.reads
            for state in (mine.result, mine.slot, mine.used, mine.written, mine.read, mine.line):
                state[to] = state[source]
            mine.source[to] = 0
            return
        for row in access.reads:
            mine.read[row] = line
        if not access.zero:
            for row in access.writes:
                mine.written[row] = line

    def fence(self, wg: int) -> None:
        self.warpgroups[wg].fenced = True
        self.warpgroups[wg].forget()

    def issue(self, group: Group, wg: int, ins: Instruction, results: tuple, sources: tuple, shape: str) -> int:
        """Check what a wgmma needs of its registers, take them; returns the agent that reads shared memory for it."""
        mine, index = self.warpgroups[wg], self.tracked.index
        results, sources = ([index[row] for row in rows] for rows in (results, sources))
        wrong = "" if mine.fenced else "no wgmma.fence before the first wgmma of the warpgroup"
        for i, row in enumerate(results):
            wrong = wrong or self._wrong_result(mine, row, (shape, i), f"accumulator {i}")
        for i, row in enumerate(sources):
            wrong = wrong or self._wrong_source(mine, row, f"operand register {i}")
        if wrong:
            group.fault(ins, wrong, 0)
        number, mine.open = mine.committed + 1, True
        for i, row in enumerate(results):
            mine.result[row], mine.slot[row], mine.used[row], mine.line[row] = number, (shape, i), True, ins.line
        for row in sources:
            mine.source[row], mine.line[row] = number, ins.line
        clocks, agent, warps = self.cta.clocks, mine.agent, mine.warps
        # every warp of the four has to know of a write, or the wgmma may start before it
        clocks.clock[agent] = np.maximum(clocks.clock[agent], clocks.clock[warps].min(axis=0))
        clocks.fenced[agent] = np.maximum(clocks.fenced[agent], clocks.fenced[warps].min(axis=0))
        return agent

    @staticmethod
    def _wrong_result(mine: Warpgroup, row: int, slot: tuple, name: str) -> str:
        if slot != mine.slot[row]:
            other = f"{name} has another shape or place in the wgmma at PTX line {mine.line[row]}"
            if mine.result[row] > mine.done:
                return f"{other}, in flight: wgmma.wait_group first"
            if mine.used[row]:
                return f"{other}: wgmma.fence first"
        if mine.source[row] > mine.done:
            return f"{name} is an operand of the wgmma at PTX line {mine.line[row]}, in flight: wgmma.wait_group first"
        for done, line in (("written", mine.written[row]), ("read", mine.read[row])):
            if line:
                return f"{name} was {done} by another instruction at PTX line {line}, with no wgmma.fence since"
        return ""

    @staticmethod
    def _wrong_source(mine: Warpgroup, row: int, name: str) -> str:
        if mine.result[row] > mine.done:
            return f"{name} is the result of the wgmma at PTX line {mine.line[row]}, in flight: wgmma.wait_group first"
        if mine.written[row]:
            line = mine.written[row]
            return f"{name} was written by another instruction at PTX line {line}, with no wgmma.fence since"
        return ""

    def commit(self, wg: int) -> None:
        mine = self.warpgroups[wg]
        mine.committed, mine.open = mine.committed + 1, False
        mine.clocks.append(self.cta.clocks.tick(mine.agent))

    def wait(self, wg: int, left: int) -> None:
        mine = self.warpgroups[wg]
        if mine.committed - left > mine.done:
            mine.done = mine.committed - left
            known = np.zeros(len(self.cta.clocks.clock), np.int64)
            known[mine.agent] = mine.clocks[mine.done - 1]
            self.cta.clocks.learn(mine.warps, known, np.zeros_like(known))
