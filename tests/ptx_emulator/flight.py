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

    reads: np.ndarray
    writes: np.ndarray
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


class Tracked:
    """The registers of a program that some wgmma uses or that a mov joins to such, and who else touches them."""

    def __init__(self, program: Program):
        instructions = program.entry.instructions
        moves, rows = [], set()
        for ins in instructions:
            if ins.opcode == "mov" and all(isinstance(o, Reg) and o.bank == 32 for o in ins.operands):
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
                if len(access.reads) or len(access.writes):
                    self.access[id(ins)] = access

    def _access(self, ins: Instruction) -> Access:
        first = 0 if ins.opcode in NO_DESTINATION or not ins.operands or isinstance(ins.operands[0], Address) else 1
        writes = [row for operand in ins.operands[:first] for row in _registers(operand)]
        reads = [row for operand in ins.operands[first:] for row in _registers(operand)]
        simple = ins.opcode == "mov" and len(ins.operands) == 2
        source = ins.operands[1] if simple else None
        renames = simple and isinstance(source, Reg) and source.bank == 32
        zero = simple and isinstance(source, Imm) and source.bits == 0
        reads, writes = ([self.index[row] for row in rows if row in self.index] for rows in (reads, writes))
        return Access(np.array(reads, int), np.array(writes, int), renames, zero)


_TRACKED: WeakKeyDictionary[Program, Tracked] = WeakKeyDictionary()


def flight_of(cta: Cta) -> Flight:
    """The block's, made when its first wgmma instruction comes."""
    if "wgmma" not in cta.pending:
        cta.pending["wgmma"] = Flight(cta)
    return cta.pending["wgmma"]


class Flight:
    """State per tracked register and warpgroup. Groups of a warpgroup are numbered from 1 as they are committed."""

    def __init__(self, cta: Cta):
        program = cta.machine.program
        if program not in _TRACKED:
            _TRACKED[program] = Tracked(program)
        self.tracked, self.cta = _TRACKED[program], cta
        groups = -(-cta.machine.threads // 128)
        size = (len(self.tracked.index), groups)
        self.result = np.zeros(size, np.int32)  # the group a result comes with
        self.source = np.zeros(size, np.int32)  # the last group that takes the register as A or metadata
        self.slot = np.zeros(size, np.int32)  # shape and place of a result: only the same may be added to
        self.since = np.zeros(size, bool)  # a result was asked for since the last fence
        self.written, self.read = np.zeros(size, np.int32), np.zeros(size, np.int32)  # PTX line, since the last fence
        self.line = np.zeros(size, np.int32)  # of the wgmma that took the register last
        self.open = np.zeros(groups, bool)  # something is issued and not committed
        self.committed, self.done = np.zeros(groups, np.int32), np.zeros(groups, np.int32)
        self.fenced = np.zeros(groups, bool)
        self.clocks: list[list[int]] = [[] for _ in range(groups)]  # the tensor agent's, at each commit
        self.shapes: dict[str, int] = {}

    def __call__(self, group: Group, ins: Instruction) -> None:
        """Before an ordinary instruction."""
        access = self.tracked.access.get(id(ins))
        if access is None:
            if ins.opcode in ("ret", "exit"):
                self._leave(group, ins)
            return
        where = np.unique(group.threads >> 7)[None, :]
        done = self.done[where]
        reads, writes = access.reads[:, None], access.writes[:, None]
        if access.renames:
            for state in (self.result, self.slot, self.since, self.written, self.read, self.line):
                state[writes, where] = state[reads, where]
            self.source[writes, where] = 0
            return
        self._refuse(group, ins, self.result[reads, where] > done, reads, where, "read of the result of wgmma")
        self._refuse(group, ins, self.result[writes, where] > done, writes, where, "write over the result of wgmma")
        self._refuse(group, ins, self.source[writes, where] > done, writes, where, "write over an operand of wgmma")
        self.read[reads, where] = ins.line
        if not access.zero:
            self.written[writes, where] = ins.line

    def _refuse(self, group: Group, ins: Instruction, bad: np.ndarray, rows: np.ndarray, where: np.ndarray, what: str):
        if bad.any():
            row, column = np.argwhere(bad)[0]
            wg = where[0, column]
            lane, line = int(np.flatnonzero(group.threads >> 7 == wg)[0]), self.line[rows[row, 0], wg]
            group.fault(ins, f"{what} at PTX line {line} before a wgmma.wait_group that covers it", lane)

    def _leave(self, group: Group, ins: Instruction) -> None:
        for wg in np.unique(group.threads >> 7):
            if self.open[wg] or self.committed[wg] > self.done[wg]:
                lane = int(np.flatnonzero(group.threads >> 7 == wg)[0])
                group.fault(ins, "the thread ends while a wgmma is in flight: wgmma.wait_group 0", lane)

    def _agent(self, wg: int) -> tuple[int, np.ndarray]:
        first = self.cta.first_warp + 4 * wg
        return self.cta.clocks.tensor + first, first + np.arange(4)

    def fence(self, wg: int) -> None:
        self.fenced[wg] = True
        self.written[:, wg] = self.read[:, wg] = 0
        self.since[:, wg] = False

    def issue(self, group: Group, wg: int, ins: Instruction, results: tuple, sources: tuple, shape: str) -> int:
        """Check what a wgmma needs of its registers, take them; returns the agent that reads shared memory for it."""
        if not self.fenced[wg]:
            group.fault(ins, "no wgmma.fence before the first wgmma of the warpgroup", 0)
        index = self.tracked.index
        results, sources = (np.array([index[row] for row in rows], int) for rows in (results, sources))
        done, number = self.done[wg], self.committed[wg] + 1
        slots = 256 * (1 + self.shapes.setdefault(shape, len(self.shapes))) + np.arange(len(results))

        def refuse(bad: np.ndarray, rows: np.ndarray, text: str, lines: np.ndarray) -> None:
            if bad.any():
                at = int(np.flatnonzero(bad)[0])
                group.fault(ins, text.format(line=lines[rows[at], wg], place=at), 0)

        other = self.slot[results, wg] != slots
        flying = self.result[results, wg] > done
        flight, wait = "the wgmma at PTX line {line}, in flight", "wgmma.wait_group first"
        other_use = "has another shape or place in the wgmma at PTX line {line}"
        refuse(flying & other, results, f"accumulator {{place}} {other_use}, in flight: {wait}", self.line)
        refuse(self.since[results, wg] & other, results, f"accumulator {{place}} {other_use}: wgmma.fence", self.line)
        operands, taken = self.source[results, wg] > done, self.result[sources, wg] > done
        refuse(operands, results, f"accumulator {{place}} is an operand of {flight}: {wait}", self.line)
        refuse(taken, sources, f"operand register {{place}} is the result of {flight}: {wait}", self.line)
        fence = "by another instruction at PTX line {line}, with no wgmma.fence since"
        refuse(self.written[results, wg] > 0, results, f"accumulator {{place}} was written {fence}", self.written)
        refuse(self.read[results, wg] > 0, results, f"accumulator {{place}} was read {fence}", self.read)
        refuse(self.written[sources, wg] > 0, sources, f"operand register {{place}} was written {fence}", self.written)
        self.result[results, wg], self.slot[results, wg], self.since[results, wg] = number, slots, True
        self.source[sources, wg] = number
        self.line[results, wg] = self.line[sources, wg] = ins.line
        self.open[wg] = True
        agent, warps = self._agent(wg)
        clocks = self.cta.clocks
        # every warp of the four has to know of a write, or the wgmma may start before it
        clocks.clock[agent] = np.maximum(clocks.clock[agent], clocks.clock[warps].min(axis=0))
        clocks.fenced[agent] = np.maximum(clocks.fenced[agent], clocks.fenced[warps].min(axis=0))
        return agent

    def commit(self, wg: int) -> None:
        self.committed[wg] += 1
        self.open[wg] = False
        self.clocks[wg].append(self.cta.clocks.tick(self._agent(wg)[0]))

    def wait(self, wg: int, left: int) -> None:
        done = max(self.done[wg], self.committed[wg] - left)
        if done > self.done[wg]:
            self.done[wg] = done
            agent, warps = self._agent(wg)
            known = np.zeros(len(self.cta.clocks.clock), np.int64)
            known[agent] = self.clocks[wg][done - 1]
            self.cta.clocks.learn(warps, known, np.zeros_like(known))
