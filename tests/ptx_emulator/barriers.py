"""Barriers of a block, barriers of a cluster, and fences."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .memory import BadAccess
from .program import EXITED, Wait, handles
from .report import NotEmulated
from .shared import merge
from .warp import warp_sync


@dataclass
class Barrier:
    """bar.sync and bar.arrive of one number. A warp arrives when all its threads that have not left the kernel have."""

    counts: np.ndarray  # how often every thread has arrived
    expected: int | None = None  # threads, in whole warps; None: all that have not left
    sleepers: list = field(default_factory=list)  # [threads that wait, whether they may go on]
    knows: object = None  # what those that arrived knew
    position: dict = field(default_factory=dict)  # of the instruction of an aligned barrier that a warp is at
    exits: int = 0  # of the block, when last looked at

    def settle(self, cta) -> int:
        """Let those go that wait for nobody any more; returns how many threads too many have arrived."""
        self.exits = cta.exits
        warps = len(self.counts) // 32
        alive = np.zeros(32 * warps, bool)
        alive[: len(cta.state)] = cta.state != EXITED
        alive = alive.reshape(warps, 32)
        counts, many = self.counts.reshape(warps, 32), np.iinfo(np.int64).max
        least = np.where(alive, counts, many).min(axis=1)
        arrived = np.where(least == many, counts.max(axis=1), least)
        expected = 32 * int((alive.any(axis=1) | (arrived > 0)).sum()) if self.expected is None else self.expected
        here = 32 * int(arrived.sum())
        if here != expected:
            return here - expected
        counts -= np.minimum(arrived[:, None], counts)
        for sleeper in self.sleepers:
            if arrived[sleeper[0] // 32].all():
                ids = np.unique(sleeper[0] // 32) + cta.first_warp
                cta.clocks.learn(ids, *self.knows)
                cta.clocks.epoch[ids] += 1
                sleeper[1] = True
        self.sleepers = [s for s in self.sleepers if not s[1]]
        self.knows = None
        self.position.clear()
        return 0

    def done(self, cta, sleeper: list) -> bool:
        if not sleeper[1] and self.exits != cta.exits:
            self.settle(cta)
        return sleeper[1]


@handles("bar", "barrier")
def bar(ins, program):
    mods = [m for m in ins.mods if m not in ("cta", "aligned")]
    if mods[0] == "warp":
        return warp_sync(ins, program)
    if mods[0] == "cluster":
        return cluster(ins, program, mods)
    if mods not in (["sync"], ["arrive"]) or len(ins.operands) not in (1, 2):
        raise NotEmulated(ins.line, ins.text)
    number = program.reader(ins.operands[0], "u32", ins)
    count = program.reader(ins.operands[1], "u32", ins) if len(ins.operands) > 1 else None
    arrive, aligned = mods[0] == "arrive", ins.opcode == "bar" or "aligned" in ins.mods
    if arrive and count is None:
        raise NotEmulated(ins.line, ins.text)

    def step(g):
        keys = np.broadcast_to(np.asarray(number(g)), g.threads.shape)
        waits = [one(g.among(keys == key), int(key)) for key in np.unique(keys)]
        return [wait for wait in waits if wait is not None]

    def one(g, key):
        if key > 15:
            raise BadAccess(0, f"barrier {key}: there are 0 to 15")
        total = None if count is None else int(np.atleast_1d(count(g))[0])
        if total is not None and (total % 32 or not total or (np.asarray(count(g)) != total).any()):
            raise BadAccess(0, f"barrier {key} for {total} threads: one number for all, a multiple of 32")
        cta = g.cta
        if key not in cta.barriers:
            cta.barriers[key] = Barrier(np.zeros(-(-len(cta.state) // 32) * 32, np.int64))
        barrier = cta.barriers[key]
        if barrier.counts.any() and barrier.expected != total:
            others = "all" if barrier.expected is None else barrier.expected
            raise BadAccess(0, f"barrier {key} for {total or 'all'} threads, while others wait there for {others}")
        barrier.expected = total
        for warp in np.unique(g.threads // 32) if aligned else ():
            if barrier.position.setdefault(int(warp), cta.position_now) != cta.position_now and not arrive:
                lane = int((g.threads // 32 == warp).argmax())
                raise BadAccess(lane, f"barrier {key} is aligned, but warp {warp} comes to it at two instructions")
        barrier.counts[g.threads] += 1
        barrier.knows = merge(barrier.knows, cta.clocks.snapshot(g.warp_ids))
        sleeper = [g.threads, False]
        if not arrive:
            barrier.sleepers.append(sleeper)
        over = barrier.settle(cta)
        if over > 0:
            raise BadAccess(0, f"{total + over} threads arrive at barrier {key}, which is for {total}")
        if arrive:
            return None

        def why():
            here = int((barrier.counts > 0).sum())
            return f"barrier {key} waits for {total or 'all'} threads, {here} have arrived"

        return Wait(g.threads, lambda: barrier.done(cta, sleeper), why)

    return step


@handles("fence", "membar")
def fence(ins, program):
    """Of the proxies, of an mbarrier's init, and of ordinary accesses around volatile and relaxed ones."""
    if ins.mods == ("mbarrier_init", "release", "cluster"):

        def publish(g):
            for barrier in g.cta.mbarriers.values():
                barrier.fenced |= barrier.warp in g.warp_ids

        return publish
    if ins.mods in (("proxy", "async"), ("proxy", "async", "shared::cta"), ("proxy", "async", "shared::cluster")):
        return lambda g: g.cta.clocks.fence(g.warp_ids)
    if ins.mods == ("proxy", "async", "global"):
        return lambda g: None
    if set(ins.mods) - {"acq_rel", "sc", "acquire", "release", "cta", "cluster", "gpu", "sys", "gl"}:
        raise NotEmulated(ins.line, ins.text)

    def order(g):
        for warp in g.warp_ids:
            g.cta.clocks.order(int(warp))

    return order


@dataclass
class ClusterBarrier:
    """barrier.cluster: `round` of them are over. Threads that have left the kernel are not waited for."""

    round: int = 0
    arrived: dict = field(default_factory=dict)  # of every block's threads: how often
    waited: dict = field(default_factory=dict)
    knows: object = None
    known: object = None
    exits: int = -1

    def settle(self, peers) -> None:
        exits = sum(cta.exits for cta in peers)
        if all((self.arrived[c.rank][c.state != EXITED] > self.round).all() for c in peers):
            self.round += 1
            self.known, self.knows = self.knows, None
        self.exits = exits

    def done(self, peers, wanted: int) -> bool:
        if self.round < wanted and self.exits != sum(cta.exits for cta in peers):
            self.settle(peers)
        return self.round >= wanted


def cluster(ins, program, mods):
    """barrier.cluster.arrive and .wait."""
    op = mods[1] if len(mods) > 1 else ""
    if op not in ("arrive", "wait") or set(mods[2:]) - {"relaxed", "release", "acquire"}:
        raise NotEmulated(ins.line, ins.text)
    relaxed = "relaxed" in mods

    def step(g):
        peers, clocks, rank = g.cta.peers, g.cta.clocks, g.cta.rank
        barriers = peers[0].barriers
        if "cluster" not in barriers:
            zeros = [{c.rank: np.zeros(len(c.state), np.int64) for c in peers} for _ in range(2)]
            barriers["cluster"] = ClusterBarrier(0, *zeros)
        barrier = barriers["cluster"]
        arrived, waited = barrier.arrived[rank], barrier.waited[rank]
        out_of_turn = arrived[g.index] - waited[g.index] != (op == "wait")
        if out_of_turn.any():
            missing = "an arrive before it" if op == "wait" else "a wait since the last"
            raise BadAccess(int(out_of_turn.argmax()), f"barrier.cluster.{op} without {missing}")
        if op == "arrive":
            arrived[g.index] += 1
            if not relaxed:
                barrier.knows = merge(barrier.knows, clocks.snapshot(g.warp_ids))
            barrier.settle(peers)
            return None
        wanted = int(arrived[g.index].max())
        if barrier.done(peers, wanted):
            waited[g.index] += 1
            if barrier.known is not None:
                clocks.learn(g.warp_ids, *barrier.known)
            clocks.epoch[g.warp_ids] += 1
            for mbarrier in (m for c in peers for m in c.mbarriers.values()):
                mbarrier.public |= mbarrier.fenced
            return None

        def why():
            late = sum(int((barrier.arrived[c.rank][c.state != EXITED] <= barrier.round).sum()) for c in peers)
            return f"the cluster's barrier waits for {late} threads"

        return Wait(g.threads, lambda: barrier.done(peers, wanted), why, advance=False)

    return step
