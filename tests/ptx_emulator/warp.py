"""What the threads of a warp do together: bar.warp.sync, shuffles, votes, reductions, elections."""

from __future__ import annotations

import numpy as np

from .memory import BadAccess
from .parse import SINK, Pair, Symbol
from .program import TYPES, Wait, handles
from .report import NotEmulated


def warp_sync(ins, program):
    mask = program.reader(ins.operands[0], "u32", ins)

    def step(g):
        here, wait = rendezvous(g, ins, mask(g))
        if here is not None:
            g.cta.clocks.epoch[here.warp_ids] += 1
        return wait

    return step


def rendezvous(g, ins, mask):
    """(group, Wait): the threads of warps of which every lane that `mask` names is here, and a Wait of the others.

    Either is None when there are no such threads.
    """
    mask = np.broadcast_to(np.asarray(mask, np.uint32), (len(g.threads),))
    warps, lanes = g.threads // 32, (g.threads % 32).astype(np.uint32)
    own = mask >> lanes & np.uint32(1)
    if not own.all():
        lane = int((own == 0).argmax())
        raise BadAccess(lane, f"the mask 0x{int(mask[lane]):08x} does not name the thread's own lane {lanes[lane]}")
    cta = g.cta
    missing, late = {}, np.zeros(len(g.threads), bool)
    for warp in np.unique(warps):
        mine = warps == warp
        here = int((np.uint64(1) << lanes[mine].astype(np.uint64)).sum())
        exists = (1 << min(32, cta.machine.threads - warp * 32)) - 1
        lacking = int(np.bitwise_or.reduce(mask[mine])) & exists & ~here
        if lacking:
            missing[int(warp)] = lacking
            late |= mine
    if not missing:
        return g, None
    position = cta.position_now
    others = [warp * 32 + lane for warp, lacking in missing.items() for lane in range(32) if lacking >> lane & 1]

    def ready():
        return bool((cta.position_of[others] == position).any())

    def why():
        warp, lacking = next(iter(missing.items()))
        return f"{ins.opcode} waits for lanes 0x{lacking:08x} of warp {warp}"

    return g.among(~late), Wait(g.threads[late], ready, why, advance=False)


@handles("shfl")
def shfl(ins, program):
    mode = next(m for m in ins.mods if m in ("up", "down", "bfly", "idx"))
    to = ins.operands[0]
    first, second = (to.first, to.second) if isinstance(to, Pair) else (to, SINK)
    write, found = program.writer(first, "b32", ins), program.writer(second, "pred", ins)
    value, amount, clamp, mask = (program.reader(o, "u32", ins) for o in ins.operands[1:5])

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

    def step(g):
        here, wait = rendezvous(g, ins, mask(g))
        if here is not None:
            shuffle(here)
        return wait

    return step


def _collective(ins, program, mask_operand, f):
    """f(group, indices of one warp's threads) for every warp, when all lanes of the mask are here."""
    mask = program.reader(mask_operand, "u32", ins)

    def step(g):
        here, wait = rendezvous(g, ins, mask(g))
        for warp in () if here is None else np.unique(here.threads // 32):
            f(here.among(here.threads // 32 == warp))
        return wait

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
