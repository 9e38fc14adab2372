"""What the threads of a warp do together: bar.warp.sync, shuffles, votes, reductions, elections."""

from __future__ import annotations

import numpy as np

from .memory import BadAccess
from .parse import SINK, Pair, Symbol
from .program import EXITED, TYPES, Wait, handles
from .report import NotEmulated


def warp_sync(ins, program):
    if ins.mods[-2:] != ("warp", "sync"):
        raise NotEmulated(ins.line, ins.text)

    def meet(g):
        g.cta.clocks.epoch[g.warp_ids] += 1

    return together(ins, program, ins.operands[0], meet)


def rendezvous(g, ins, mask) -> tuple:
    """The threads all of whose partners, the lanes their masks name, are here, and a wait for the others; or None.

    Lanes that do not exist or have left are not waited for.
    """
    lanes = (g.threads % 32).astype(np.uint32)
    bits = np.uint32(1) << lanes
    mask = np.broadcast_to(np.asarray(mask, np.uint32), bits.shape)
    if not (mask & bits).all():
        lane = int((mask & bits == 0).argmax())
        raise BadAccess(lane, f"the mask 0x{int(mask[lane]):08x} does not name the thread's own lane {lanes[lane]}")
    warps = g.threads // 32
    first = np.flatnonzero(np.diff(warps, prepend=-1))
    which = np.repeat(np.arange(len(first)), np.diff(first, append=len(warps)))
    missing = mask & ~np.bitwise_or.reduceat(bits, first)[which]
    if not missing.any():
        return g, None
    cta, position = g.cta, g.cta.position_now
    alive = np.zeros(-(-len(cta.state) // 32) * 32, np.uint32)
    alive[: len(cta.state)] = cta.state != EXITED
    missing &= (alive.reshape(-1, 32) << np.arange(32, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)[warps]
    late = missing != 0
    if not late.any():
        return g, None
    waiting = g.among(late)
    wanted = np.zeros(len(warps[first]), np.uint32)
    np.bitwise_or.at(wanted, which, missing)
    others = np.flatnonzero((wanted[:, None] >> np.arange(32, dtype=np.uint32) & 1).reshape(-1))
    others = warps[first][others // 32] * 32 + others % 32

    def ready():
        return bool(((cta.position_of[others] == position) | (cta.state[others] == EXITED)).all())

    def why():
        gone = others[cta.position_of[others] != position]
        return f"{ins.opcode} waits for lanes {(gone % 32).tolist()} of warp {gone[0] // 32}"

    return g.among(~late), Wait(waiting.threads, ready, why, advance=False)


def together(ins, program, mask_operand, f):
    """A step that has f(group) done when all lanes of its masks are here."""
    mask = program.reader(mask_operand, "u32", ins)

    def step(g):
        whole, wait = rendezvous(g, ins, mask(g))
        if whole is not None:
            f(whole)
        return wait

    return step


@handles("shfl")
def shfl(ins, program):
    if len(ins.mods) != 3 or ins.mods[::2] != ("sync", "b32") or ins.mods[1] not in ("up", "down", "bfly", "idx"):
        raise NotEmulated(ins.line, ins.text)
    mode = ins.mods[1]
    to = ins.operands[0]
    first, second = (to.first, to.second) if isinstance(to, Pair) else (to, SINK)
    write, found = program.writer(first, "b32", ins), program.writer(second, "pred", ins)
    value, amount, clamp = (program.reader(o, "u32", ins) for o in ins.operands[1:4])

    def shuffle(g):
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

    return together(ins, program, ins.operands[4], shuffle)


def collective(ins, program, mask_operand, f):
    """A step: f(group) for the lanes of every warp that share a mask, when all of them are here."""
    mask = program.reader(mask_operand, "u32", ins)

    def step(g):
        whole, wait = rendezvous(g, ins, mask(g))
        if whole is not None:
            masks = np.broadcast_to(np.asarray(mask(whole), np.uint64), whole.threads.shape)
            keys = (whole.threads // 32).astype(np.uint64) << np.uint64(32) | masks
            for key in np.unique(keys):
                f(whole.among(keys == key))
        return wait

    return step


@handles("vote")
def vote(ins, program):
    known = [("sync", mode, "pred") for mode in ("all", "any", "uni")] + [("sync", "ballot", "b32")]
    if ins.mods not in known:
        raise NotEmulated(ins.line, ins.text)
    mode = ins.mods[1]
    read = program.reader(ins.operands[1], "pred", ins)
    write = program.writer(ins.operands[0], "b32" if mode == "ballot" else "pred", ins)

    def f(g):
        p = np.broadcast_to(read(g), (len(g.threads),))
        bits = (np.uint64(1) << (g.threads % 32).astype(np.uint64))[p].sum()
        write(g, {"all": p.all(), "any": p.any(), "uni": p.all() or not p.any(), "ballot": np.uint32(bits)}[mode])

    return collective(ins, program, ins.operands[2], f)


@handles("redux")
def redux(ins, program):
    if len(ins.mods) != 3 or ins.mods[0] != "sync" or ins.mods[2] not in ("u32", "s32", "b32"):
        raise NotEmulated(ins.line, ins.text)
    op, kind = ins.mods[1:]
    if op not in ("add", "min", "max", "and", "or", "xor"):
        raise NotEmulated(ins.line, ins.text)
    read, write = program.reader(ins.operands[1], kind, ins), program.writer(ins.operands[0], kind, ins)
    f = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
         "xor": np.bitwise_xor}[op]  # fmt: skip

    def one(g):
        x = np.broadcast_to(read(g), (len(g.threads),)).astype(TYPES[kind])
        write(g, f.reduce(x.astype(np.int64) if op == "add" else x).astype(TYPES[kind]))

    return collective(ins, program, ins.operands[2], one)


@handles("activemask")
def active_mask(ins, program):
    if ins.mods != ("b32",):
        raise NotEmulated(ins.line, ins.text)
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
    if not isinstance(to, Pair) or ins.mods != ("sync",):
        raise NotEmulated(ins.line, ins.text)
    lane_of = program.writer(to.first, "b32", ins) if not isinstance(to.first, Symbol) else None
    chosen = program.writer(to.second, "pred", ins)

    def one(g):
        if lane_of is not None:
            lane_of(g, np.uint32(g.threads[0] % 32))
        chosen(g, g.threads == g.threads[0])

    return collective(ins, program, ins.operands[1], one)
