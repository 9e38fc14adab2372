"""cp.async: copies of 4, 8 or 16 bytes from global to shared memory, and their groups.

A copy is done when it is issued, but in the name of an agent of its own. When the thread that issued it waits, what it
brought counts as the thread's own write; other threads need a barrier besides.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .memory import BadAccess, check_alignment
from .parse import Imm, Instruction
from .program import handles
from .report import NotEmulated


class Copy(NamedTuple):
    """One instruction's, of one warp."""

    at: np.ndarray  # bytes of shared memory (threads, nbytes)
    threads: np.ndarray  # of the block
    groups: np.ndarray  # of every thread: which of its groups
    ins: Instruction


@handles("cp")
def cp(ins, program):
    if ins.mods[:2] == ("async", "bulk"):
        from .bulk import bulk

        return bulk(ins, program)
    if ins.mods[1:2] and ins.mods[1] in ("commit_group", "wait_group", "wait_all"):
        return _groups(ins, program)
    if not {"ca", "cg"} & set(ins.mods) or len(ins.operands) < 3:
        raise NotEmulated(ins.line, ins.text)
    to, source = (program.address(o, ins) for o in ins.operands[:2])
    known = {"async", "ca", "cg", "shared", "shared::cta", "global", "L2::cache_hint"}
    known |= {f"L2::{n}B" for n in (64, 128, 256)}
    if set(ins.mods) - known or len(ins.operands) > 4 + ("L2::cache_hint" in ins.mods):
        raise NotEmulated(ins.line, ins.text)
    nbytes = literal(ins.operands[2], ins)
    rest = ins.operands[3] if len(ins.operands) > 3 + ("L2::cache_hint" in ins.mods) else None
    if rest is not None and getattr(rest, "bank", 32) == 1:
        ignore, size = program.reader(rest, "pred", ins), None
    else:
        ignore, size = None, None if rest is None else program.reader(rest, "u32", ins)
    if nbytes not in (4, 8, 16) or ("cg" in ins.mods and nbytes != 16):
        raise NotEmulated(ins.line, ins.text, f"{nbytes} bytes")

    def step(g):
        n = len(g.threads)
        wanted = np.full(n, nbytes) if size is None else np.broadcast_to(np.asarray(size(g)).astype(np.int64), (n,))
        if ignore is not None:
            wanted = np.where(ignore(g), 0, wanted)
        if (wanted > nbytes).any():
            raise BadAccess(int((wanted > nbytes).argmax()), f"src-size {wanted.max()} of a copy of {nbytes} bytes")
        data = np.zeros((n, nbytes), np.uint8)
        addresses = source(g)
        for count in np.unique(wanted[wanted > 0]):
            some = np.flatnonzero(wanted == count)
            try:
                check_alignment(addresses[some], nbytes, "global read")
                if int(count) == nbytes:
                    data[some] = g.cta.memory.read(addresses[some], nbytes)
                else:
                    for byte in range(int(count)):
                        data[some, byte] = g.cta.memory.read(addresses[some] + np.uint64(byte), 1)[:, 0]
            except BadAccess as bad:
                raise BadAccess(int(some[bad.lane]), bad.reason) from None
        shared, clocks = g.cta.shared, g.cta.clocks
        at = shared.locate(to(g), nbytes, "write")
        shared.write(at, data, clocks.copy + g.warps, None, ins.line, knows=g.warps)
        groups = np.broadcast_to(g.cta.copy_groups[g.index], (n,))
        for warp in g.warp_ids:
            some = np.flatnonzero(g.warps == warp)
            copy = Copy(at[some], g.threads[some], groups[some].copy(), ins)
            g.cta.copies.setdefault(int(warp), []).append(copy)

    return step


def literal(operand, ins) -> int:
    if not isinstance(operand, Imm):
        raise NotEmulated(ins.line, ins.text, "a number was expected")
    return operand.bits


def _groups(ins, program):
    op = ins.mods[1]
    if len(ins.mods) != 2 or len(ins.operands) != (op == "wait_group"):
        raise NotEmulated(ins.line, ins.text)
    keep = literal(ins.operands[0], ins) if ins.operands else 0

    def step(g):
        cta = g.cta
        if op == "commit_group":
            cta.copy_groups[g.index] += 1
            return
        for warp in g.warp_ids:
            cta.copies[int(warp)] = [c for copy in cta.copies.get(int(warp), ()) for c in wait(g, int(warp), copy)]

    def wait(g, warp, copy):
        """What is left of a copy: of threads that do not wait here, and of groups that may still fly."""
        cta, clocks = g.cta, g.cta.clocks
        open_ = cta.copy_groups[copy.threads]
        done = (copy.groups < open_ - keep) if op == "wait_group" else np.ones(len(copy.threads), bool)
        done &= np.isin(copy.threads, g.threads)
        threads = copy.threads[done] + cta.first_warp * 32
        cta.shared.settle(copy.at[done], int(clocks.copy + warp), warp, threads)
        if not done.all():
            yield Copy(copy.at[~done], copy.threads[~done], copy.groups[~done], copy.ins)

    return step
