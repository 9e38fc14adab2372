"""Barriers of a block, barriers of a cluster, and fences."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .memory import BadAccess
from .program import Wait, handles
from .report import NotEmulated
from .shared import merge
from .warp import warp_sync


@dataclass
class Barrier:
    """bar.sync and bar.arrive of one number."""

    threads: list = field(default_factory=list)  # that have arrived
    sleepers: list = field(default_factory=list)  # (block, threads): that wait
    expected: int = 0
    round: int = 0
    knows: object = None  # what those that arrived knew


def _warps(g, threads):
    return np.unique(threads // 32) + g.cta.first_warp


@handles("bar", "barrier")
def bar(ins, program):
    mods = [m for m in ins.mods if m not in ("cta", "aligned")]
    if mods[0] == "warp":
        return warp_sync(ins, program)
    if mods[0] == "cluster":
        return cluster(ins, program, mods)
    if mods[0] not in ("sync", "arrive") or len(mods) > 1:
        raise NotEmulated(ins.line, ins.text)
    number = program.reader(ins.operands[0], "u32", ins)
    count = program.reader(ins.operands[1], "u32", ins) if len(ins.operands) > 1 else None
    arrive = mods[0] == "arrive"
    if arrive and count is None:
        raise NotEmulated(ins.line, ins.text)

    def step(g):
        if ins.opcode == "bar" or "aligned" in ins.mods:
            g.whole_warps(ins)
        key = int(np.atleast_1d(number(g))[0])
        if (np.atleast_1d(number(g)) != key).any():
            raise NotEmulated(ins.line, ins.text, "threads of one group at different barriers")
        if key > 15:
            raise BadAccess(0, f"barrier {key}: there are 0 to 15")
        total = int(np.atleast_1d(count(g))[0]) if count else -(-g.cta.machine.threads // 32) * 32
        total = min(total, g.cta.machine.threads) if count is None else total
        if count is not None and total % 32:
            raise BadAccess(0, f"barrier {key} for {total} threads, no multiple of 32")
        barrier = g.cta.barriers.setdefault(key, Barrier())
        if barrier.threads and barrier.expected != total:
            raise BadAccess(0, f"barrier {key} for {total} threads, while others wait there for {barrier.expected}")
        barrier.expected = total
        clocks = g.cta.clocks
        barrier.threads.append(g.threads)
        barrier.knows = merge(barrier.knows, clocks.snapshot(g.warp_ids))
        if not arrive:
            barrier.sleepers.append(g.threads)
        arrived = sum(len(t) for t in barrier.threads)
        if arrived > total:
            raise BadAccess(0, f"{arrived} threads arrive at barrier {key}, which is for {total}")
        if arrived == total:
            for threads in barrier.sleepers:
                warps = _warps(g, threads)
                clocks.learn(warps, *barrier.knows)
                clocks.epoch[warps] += 1
            barrier.threads, barrier.sleepers, barrier.knows = [], [], None
            barrier.round += 1
            return None if arrive else Wait(g.threads, lambda: True, str)
        if arrive:
            return None
        now = barrier.round

        def why():
            here = sum(len(t) for t in barrier.threads)
            return f"barrier {key} waits for {total} threads, {here} have arrived"

        return Wait(g.threads, lambda: barrier.round != now, why)

    return step


@handles("fence", "membar")
def fence(ins, program):
    proxy = "proxy" in ins.mods
    if proxy and not any(m.startswith(("async", "tensormap", "alias")) for m in ins.mods):
        raise NotEmulated(ins.line, ins.text)
    if proxy or "mbarrier_init" in ins.mods:
        return lambda g: g.cta.clocks.fence(g.warp_ids)
    return lambda g: None


def cluster(ins, program, mods):
    """barrier.cluster.arrive and .wait. `cluster_round` of every thread: how often it has arrived."""
    op = mods[1]
    if op not in ("arrive", "wait"):
        raise NotEmulated(ins.line, ins.text)
    relaxed = "relaxed" in mods

    def step(g):
        g.whole_warps(ins)
        leader = g.cta.peers[0]
        state = leader.barriers.setdefault("cluster", {"round": 0, "arrived": 0, "knows": None, "known": None})
        total = g.cta.machine.threads * len(g.cta.peers)
        mine = g.cta.barriers.setdefault("cluster arrivals", np.zeros(g.cta.machine.threads, np.int64))
        clocks = g.cta.clocks
        if op == "arrive":
            mine[g.index] += 1
            state["arrived"] += len(g.threads)
            if not relaxed:
                state["knows"] = merge(state["knows"], clocks.snapshot(g.warp_ids))
            if state["arrived"] == total:
                state["round"] += 1
                state["arrived"], state["known"], state["knows"] = 0, state["knows"], None
            return None
        wanted = int(mine[g.index][0])
        if state["round"] >= wanted:
            if state["known"] is not None:
                clocks.learn(g.warp_ids, *state["known"])
            clocks.epoch[g.warp_ids] += 1
            return None

        def why():
            return f"the cluster's barrier waits for {total} threads, {state['arrived']} have arrived"

        return Wait(g.threads, lambda: state["round"] >= wanted, why, advance=False)

    return step
