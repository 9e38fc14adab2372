"""mbarriers: arrivals, bytes on their way, phases, and what those who wait learn of those who arrived."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .memory import BLOCK_SHIFT, SHARED_WINDOW, BadAccess
from .parse import SINK
from .program import Wait, handles
from .report import NotEmulated
from .shared import merge


@dataclass
class MBarrier:
    count: int
    pending: int
    transactions: int = 0
    phase: int = 0
    knows: object = None  # what arrived in this phase
    known: object = None  # in the last one
    warp: int = -1  # that initialised it
    fenced: bool = False  # by fence.mbarrier_init
    public: bool = False  # so fenced, and the cluster has met since: known to it though it met without release
    expects: tuple = ()  # the thread and the instruction that last expected bytes

    def settle(self) -> None:
        if self.pending == 0 and self.transactions == 0:
            self.phase += 1
            self.pending = self.count
            self.known, self.knows = self.knows, None


def mbarrier_at(g, address: int, lane: int = 0):
    """(block, offset, MBarrier) of a shared address."""
    rank = address >> BLOCK_SHIFT & 0xFF
    if rank > len(g.cta.peers):
        raise BadAccess(lane, f"an mbarrier of block {rank - 1} of a cluster of {len(g.cta.peers)}")
    cta = g.cta if rank == 0 else g.cta.peers[rank - 1]
    offset = address & ((1 << BLOCK_SHIFT) - 1)
    if offset not in cta.mbarriers:
        raise BadAccess(lane, f"no mbarrier is initialised at shared byte {offset}")
    return cta, offset, cta.mbarriers[offset]


def addresses_of(program, operand, ins):
    """Shared addresses of the threads, of a generic or a shared address."""
    read = program.address(operand, ins)
    generic = not any(m.startswith("shared") for m in ins.mods)

    def shared(g):
        at = read(g)
        if generic and (at >> np.uint64(48) != np.uint64(SHARED_WINDOW >> 48)).any():
            raise BadAccess(0, "an mbarrier outside of shared memory")
        return at - np.uint64(SHARED_WINDOW) if generic else at

    return shared


def complete(g, address: int, nbytes: int, knows, lane: int = 0) -> None:
    """A bulk copy reports bytes to an mbarrier."""
    _, _, barrier = mbarrier_at(g, address, lane)
    barrier.transactions -= nbytes
    barrier.knows = merge(barrier.knows, knows)
    barrier.settle()


@handles("mbarrier")
def mbarrier(ins, program):
    op = ins.mods[0]
    known = {"shared", "shared::cta", "shared::cluster", "b64", "release", "acquire", "relaxed", "cta", "cluster",
             "parity", "expect_tx"}  # fmt: skip
    if set(ins.mods[1:]) - known:
        raise NotEmulated(ins.line, ins.text)
    if op in ("init", "inval"):
        return _init(ins, program, op)
    if op in ("arrive", "arrive_drop", "expect_tx", "complete_tx"):
        return _arrive(ins, program, op)
    if op in ("try_wait", "test_wait"):
        return _wait(ins, program, op)
    raise NotEmulated(ins.line, ins.text)


def _init(ins, program, op):
    at = addresses_of(program, ins.operands[0], ins)
    count = program.reader(ins.operands[1], "u32", ins) if op == "init" else None

    def step(g):
        shared = g.cta.shared
        for lane, address in enumerate(at(g)):
            one = np.array([address], np.uint64)
            where = shared.locate(one, 8, "mbarrier")
            if op == "inval":
                mbarrier_at(g, int(address), lane)
                shared.barrier[where] = False
                del g.cta.mbarriers[int(address)]
                continue
            if shared.barrier[where].any():
                raise BadAccess(lane, f"the mbarrier at shared byte {int(address)} is initialised twice")
            n = int(np.broadcast_to(count(g), (len(g.threads),))[lane])
            if not 0 < n < 1 << 20:
                raise BadAccess(lane, f"an mbarrier for {n} arrivals")
            shared.write(where, np.zeros((1, 8), np.uint8), g.warps[lane], g.cluster_threads[lane : lane + 1], ins.line)
            shared.barrier[where] = True
            g.cta.mbarriers[int(address)] = MBarrier(n, n, warp=int(g.warps[lane]))

    return step


def check_initialised(g, cta, offset: int, lane: int, proxy: bool = False) -> None:
    """The init of an mbarrier must be known to who uses it, and fenced for the copy engine."""
    if cta.mbarriers[offset].public:
        return
    shared, clocks = cta.shared, g.cta.clocks
    writer, clock, warp = int(shared.agent[offset]), int(shared.clock[offset]), int(g.warps[lane])
    own = int(shared.thread[offset]) == int(g.cluster_threads[lane])
    if writer != warp and clock > clocks.clock[warp, writer]:
        raise BadAccess(lane, f"the mbarrier at shared byte {offset} is used without a barrier behind its init")
    if writer == warp and not own and shared.epoch[offset] >= clocks.epoch[warp]:
        raise BadAccess(lane, f"the mbarrier at shared byte {offset} is used without a barrier behind its init")
    if proxy and not cta.mbarriers[offset].fenced and clock > clocks.fenced[warp, writer]:
        raise BadAccess(lane, f"no fence between the init of the mbarrier at shared byte {offset} and a bulk copy")


def _arrive(ins, program, op):
    returns = op.startswith("arrive")
    operands = ins.operands[1:] if returns else ins.operands
    if returns and not any(isinstance(o, type(SINK)) and o == SINK for o in ins.operands[:1]):
        write = program.writer(ins.operands[0], "u64", ins)
    else:
        write = None
    at = addresses_of(program, operands[0], ins)
    amount = program.reader(operands[1], "u32", ins) if len(operands) > 1 else None
    expects, relaxed = "expect_tx" in ins.mods, "relaxed" in ins.mods

    def step(g):
        n, clocks = len(g.threads), g.cta.clocks
        values = np.broadcast_to(np.asarray(1 if amount is None else amount(g)).astype(np.int64), (n,))
        state = np.zeros(n, np.uint64)
        knows = {int(w): clocks.snapshot([w]) for w in g.warp_ids}
        for lane, address in enumerate(at(g)):
            cta, offset, barrier = mbarrier_at(g, int(address), lane)
            check_initialised(g, cta, offset, lane)
            state[lane] = barrier.phase
            if op == "complete_tx":
                barrier.transactions -= int(values[lane])
            elif expects:
                barrier.transactions += int(values[lane])
                barrier.expects = g.among(g.threads == g.threads[lane]), ins
            if returns:
                arrivals = 1 if expects else int(values[lane])
                barrier.pending -= arrivals
                barrier.count -= arrivals if op == "arrive_drop" else 0
                if barrier.pending < 0:
                    text = f"the mbarrier at shared byte {offset} gets more than its {barrier.count} arrivals"
                    raise BadAccess(lane, f"{text} in a phase")
                warp = int(g.warps[lane])
                if not relaxed and cta is not g.cta:
                    cta.reached[warp] = int(knows[warp][0][warp]), g.among(g.threads == g.threads[lane]), ins
                if not relaxed:
                    barrier.knows = merge(barrier.knows, knows[warp])
            barrier.settle()
        if write is not None:
            write(g, state)

    return step


def _wait(ins, program, op):
    parity = "parity" in ins.mods
    write = program.writer(ins.operands[0], "pred", ins)
    at = addresses_of(program, ins.operands[1], ins)
    phase = program.reader(ins.operands[2], "u32" if parity else "u64", ins)
    relaxed = "relaxed" in ins.mods

    def step(g):
        addresses = at(g)
        phases = np.broadcast_to(np.asarray(phase(g)).astype(np.int64), (len(g.threads),))
        barriers = []
        for lane, address in enumerate(addresses):
            cta, offset, barrier = mbarrier_at(g, int(address), lane)
            check_initialised(g, cta, offset, lane)
            barriers.append(barrier)

        def done(barrier, wanted):
            return barrier.phase % 2 != wanted if parity else barrier.phase > wanted

        over = np.array([done(b, int(p)) for b, p in zip(barriers, phases, strict=True)])
        write(g, over)
        for warp in np.unique(g.warps[over]) if over.any() else ():
            mine = np.flatnonzero(over & (g.warps == warp))
            for barrier in {id(barriers[i]): barriers[i] for i in mine}.values():
                if barrier.known is not None and not relaxed:
                    g.cta.clocks.learn([warp], *barrier.known)
        if over.all() or op == "test_wait":
            return None
        late = np.flatnonzero(~over)
        first, wanted, offset = barriers[late[0]], int(phases[late[0]]), int(addresses[late[0]])

        def ready():
            return any(done(barriers[i], int(phases[i])) for i in late)

        def why():
            left = f"{first.pending} arrivals and {first.transactions} bytes are missing"
            return f"the mbarrier at shared byte {offset} is in phase {first.phase}, waited for {wanted}: {left}"

        return Wait(g.threads[late], ready, why, advance=False)

    return step
