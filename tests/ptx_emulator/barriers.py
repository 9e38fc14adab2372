"""Barriers of a block, mbarriers, barriers of a cluster, fences, and what the threads of a warp do together."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .machine import TYPES, Wait, handles
from .memory import BLOCK_SHIFT, SHARED_WINDOW, BadAccess
from .parse import SINK, Pair, Symbol
from .report import NotEmulated
from .shared import merge


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


def warp_sync(ins, program):
    mask = program.reader(ins.operands[0], "u32", ins)

    def step(g):
        wait = rendezvous(g, ins, mask(g))
        if wait is None:
            g.cta.clocks.epoch[g.warp_ids] += 1
        return wait

    return step


def rendezvous(g, ins, mask):
    """None when every group of lanes that `mask` names is here; else a Wait until the missing ones are."""
    mask = np.broadcast_to(np.asarray(mask, np.uint32), (len(g.threads),))
    warps, lanes = g.threads // 32, g.threads % 32
    if not (mask >> lanes.astype(np.uint32) & 1).all():
        lane = int((~(mask >> lanes.astype(np.uint32) & 1).astype(bool)).argmax())
        raise BadAccess(lane, f"the mask 0x{int(mask[lane]):08x} does not name the thread's own lane {lanes[lane]}")
    cta = g.cta
    last = cta.machine.threads
    missing = []
    for warp in np.unique(warps):
        mine = warps == warp
        here = int((np.uint64(1) << lanes[mine].astype(np.uint64)).sum())
        exists = (1 << min(32, last - warp * 32)) - 1
        wanted = int(np.bitwise_or.reduce(mask[mine])) & exists
        if wanted & ~here:
            missing.append((warp, wanted & ~here, g.threads[mine]))
    if not missing:
        return None
    threads = np.concatenate([t for _, _, t in missing])
    if len(threads) != len(g.threads):
        raise NotEmulated(ins.line, ins.text, "one warp is whole and another is not")
    position = cta.position_now
    lanes_of = [(warp * 32 + np.flatnonzero([m >> i & 1 for i in range(32)])) for warp, m, _ in missing]
    others = np.concatenate(lanes_of)

    def ready():
        return bool((cta.position_of[others] == position).all() and (cta.state[others] != 2).all())

    def why():
        warp, mask, _ = missing[0]
        return f"{ins.opcode} waits for lanes 0x{mask:08x} of warp {warp}"

    return Wait(threads, ready, why, advance=False)


# ---- mbarriers


@dataclass
class MBarrier:
    count: int
    pending: int
    transactions: int = 0
    phase: int = 0
    knows: object = None  # what arrived in this phase
    known: object = None  # in the last one

    def settle(self) -> None:
        if self.pending == 0 and self.transactions == 0:
            self.phase += 1
            self.pending = self.count
            self.known, self.knows = self.knows, None


def mbarrier_at(g, address: int, lane: int = 0):
    """(block, offset, MBarrier) of a shared address."""
    rank = address >> BLOCK_SHIFT & 0xFF
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
             "parity", "expect_tx", "noComplete", op}  # fmt: skip
    if set(ins.mods) - known or "noComplete" in ins.mods:
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
            g.cta.mbarriers[int(address)] = MBarrier(n, n)

    return step


def check_initialised(g, cta, offset: int, lane: int, proxy: bool = False) -> None:
    """The init of an mbarrier must be known to who uses it, and fenced for the copy engine."""
    shared, clocks = cta.shared, g.cta.clocks
    writer, clock, warp = int(shared.agent[offset]), int(shared.clock[offset]), int(g.warps[lane])
    own = int(shared.thread[offset]) == int(g.cluster_threads[lane])
    if writer != warp and clock > clocks.clock[warp, writer]:
        raise BadAccess(lane, f"the mbarrier at shared byte {offset} is used without a barrier behind its init")
    if writer == warp and not own and shared.epoch[offset] >= clocks.epoch[warp]:
        raise BadAccess(lane, f"the mbarrier at shared byte {offset} is used without a barrier behind its init")
    if proxy and clock > clocks.fenced[warp, writer]:
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
    expects = "expect_tx" in ins.mods

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
            if returns:
                arrivals = 1 if expects else int(values[lane])
                barrier.pending -= arrivals
                barrier.count -= arrivals if op == "arrive_drop" else 0
                if barrier.pending < 0:
                    text = f"the mbarrier at shared byte {offset} gets more than its {barrier.count} arrivals"
                    raise BadAccess(lane, f"{text} in a phase")
                barrier.knows = merge(barrier.knows, knows[int(g.warps[lane])])
            barrier.settle()
        if write is not None:
            write(g, state)

    return step


def _wait(ins, program, op):
    parity = "parity" in ins.mods
    write = program.writer(ins.operands[0], "pred", ins)
    at = addresses_of(program, ins.operands[1], ins)
    phase = program.reader(ins.operands[2], "u32" if parity else "u64", ins)

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
                if barrier.known is not None:
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


# ---- fences, clusters


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


# ---- the threads of a warp


@handles("shfl")
def shfl(ins, program):
    mode = next(m for m in ins.mods if m in ("up", "down", "bfly", "idx"))
    to = ins.operands[0]
    first, second = (to.first, to.second) if isinstance(to, Pair) else (to, SINK)
    write, found = program.writer(first, "b32", ins), program.writer(second, "pred", ins)
    value, amount, clamp, mask = (program.reader(o, "u32", ins) for o in ins.operands[1:5])

    def step(g):
        wait = rendezvous(g, ins, mask(g))
        if wait is not None:
            return wait
        n = len(g.threads)
        lane = (g.threads % 32).astype(np.int64)
        b, c = (np.broadcast_to(np.asarray(v(g)).astype(np.int64), (n,)) & 31 for v in (amount, clamp))
        segment = np.broadcast_to(np.asarray(clamp(g)).astype(np.int64), (n,)) >> 8 & 31
        top, bottom = (lane & segment) | (c & ~segment), lane & segment
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": bottom | (b & ~segment)}[mode]
        valid = source >= top if mode == "up" else source <= top
        source = np.where(valid, source, lane)
        values = np.zeros(g.cta.machine.threads + 32, np.uint32)
        here = np.zeros(g.cta.machine.threads + 32, bool)
        values[g.threads], here[g.threads] = value(g), True
        at = g.threads - lane + source
        if not here[at].all():
            raise BadAccess(int((~here[at]).argmax()), f"reads lane {source[(~here[at]).argmax()]}, which is not here")
        write(g, values[at])
        found(g, valid)
        return None

    return step


def _collective(ins, program, mask_operand, f):
    """f(group, indices of one warp's threads) for every warp, when all lanes of the mask are here."""
    mask = program.reader(mask_operand, "u32", ins)

    def step(g):
        wait = rendezvous(g, ins, mask(g))
        if wait is not None:
            return wait
        for warp in np.unique(g.threads // 32):
            f(g.among(g.threads // 32 == warp))
        return None

    return step


@handles("vote")
def vote(ins, program):
    if "sync" not in ins.mods:
        raise NotEmulated(ins.line, ins.text)
    mode = next(m for m in ins.mods if m in ("all", "any", "uni", "ballot"))
    read = program.reader(ins.operands[1], "pred", ins)
    write = program.writer(ins.operands[0], "b32" if mode == "ballot" else "pred", ins)

    def f(g):
        p = np.broadcast_to(read(g), (len(g.threads),))
        bits = (np.uint64(1) << (g.threads % 32).astype(np.uint64))[p].sum()
        write(g, {"all": p.all(), "any": p.any(), "uni": p.all() or not p.any(), "ballot": np.uint32(bits)}[mode])

    return _collective(ins, program, ins.operands[2], f)


@handles("match")
def match(ins, program):
    raise NotEmulated(ins.line, ins.text)


@handles("redux")
def redux(ins, program):
    op, kind = next(m for m in ins.mods if m in ("add", "min", "max", "and", "or", "xor")), ins.mods[-1]
    if kind not in ("u32", "s32", "b32"):
        raise NotEmulated(ins.line, ins.text)
    read, write = program.reader(ins.operands[1], kind, ins), program.writer(ins.operands[0], kind, ins)
    f = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
         "xor": np.bitwise_xor}[op]  # fmt: skip

    def one(g):
        x = np.broadcast_to(read(g), (len(g.threads),)).astype(TYPES[kind])
        write(g, f.reduce(x.astype(np.int64) if op == "add" else x).astype(TYPES[kind]))

    return _collective(ins, program, ins.operands[2], one)


@handles("activemask")
def active_mask(ins, program):
    write = program.writer(ins.operands[0], "b32", ins)

    def step(g):
        for warp in np.unique(g.threads // 32):
            one = g.among(g.threads // 32 == warp)
            write(one, np.uint32((np.uint64(1) << (one.threads % 32).astype(np.uint64)).sum()))

    return step


@handles("elect")
def elect(ins, program):
    """The lowest lane of the mask."""
    to = ins.operands[0]
    if not isinstance(to, Pair):
        raise NotEmulated(ins.line, ins.text)
    lane_of = program.writer(to.first, "b32", ins) if not isinstance(to.first, Symbol) else None
    chosen = program.writer(to.second, "pred", ins)

    def one(g):
        if lane_of is not None:
            lane_of(g, np.uint32(g.threads[0] % 32))
        chosen(g, g.threads == g.threads[0])

    return _collective(ins, program, ins.operands[1], one)
