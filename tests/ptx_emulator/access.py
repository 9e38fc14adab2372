"""Loads, stores and atomics of all spaces, cp.async, and address arithmetic between spaces."""

from __future__ import annotations

import numpy as np

from .memory import BLOCK_SHIFT, SHARED_WINDOW, WINDOWS, BadAccess, check_alignment, space_of
from .parse import SINK, Symbol, Vector
from .program import EXITED, TYPES, handles
from .report import NotEmulated

SPACES = ("global", "shared", "local", "param", "const")
HINTS = {
    "weak", "relaxed", "acquire", "release", "volatile", "cta", "gpu", "sys", "cluster", "nc", "ca", "cg", "cs", "cv",
    "lu", "wb", "wt", "mmio", "L1::evict_last", "L1::evict_first", "L1::no_allocate", "L1::evict_normal",
    "L1::evict_unchanged", "L2::64B", "L2::128B", "L2::256B", "L2::cache_hint", "v2", "v4", "v8", "u", "entry",
    "shared::cta", "shared::cluster", "param::entry",
}  # fmt: skip

STRONG = {"volatile": "relaxed", "relaxed": "relaxed", "mmio": "relaxed", "acquire": "acquire", "release": "release"}


def space(ins) -> str:
    for mod in ins.mods:
        if mod.split("::")[0] in SPACES:
            return mod.split("::")[0]
    return "generic"


def shape(ins) -> tuple[str, int, int]:
    """Type, how many of it, and the bytes of all."""
    kind = next((m for m in reversed(ins.mods) if m in TYPES), None)
    unknown = [m for m in ins.mods if m not in TYPES and m not in HINTS and m not in SPACES]
    if kind is None or unknown:
        raise NotEmulated(ins.line, ins.text, f".{unknown[0]}" if unknown else "no type")
    count = next((int(m[1]) for m in ins.mods if m in ("v2", "v4", "v8")), 1)
    return kind, count, count * TYPES[kind].itemsize


def strength(ins) -> str:
    """How Shared knows a volatile, relaxed, acquire or release access."""
    return next((STRONG[m] for m in ins.mods if m in STRONG), "")


def read_bytes(g, ins, where: str, addresses: np.ndarray, nbytes: int) -> np.ndarray:
    """Bytes (threads, nbytes)."""
    where, addresses = resolve(ins, where, addresses)
    if where in ("global", "const"):
        return g.cta.memory.read(addresses, nbytes)
    if where == "shared":
        return each_block(g, ins, addresses, lambda part, cta, at: cta.shared.read(
            cta.shared.locate(at, nbytes, "read"), g.warps[part], g.cluster_threads[part], ins.line,
            strong=strength(ins),
        ), nbytes)  # fmt: skip
    if where == "param":
        return g.cta.machine.params[_inside(addresses, nbytes, "param read", len(g.cta.machine.params))]
    return g.cta.local[g.threads[:, None], _inside(addresses, nbytes, "local read", g.cta.machine.program.local_bytes)]


def resolve(ins, where: str, addresses: np.ndarray) -> tuple[str, np.ndarray]:
    """The space of generic addresses, and the addresses there."""
    if where != "generic":
        return where, addresses
    windows = addresses >> np.uint64(48)
    if (windows != windows[0]).any():
        raise NotEmulated(ins.line, ins.text, "generic addresses of several spaces in one instruction")
    where = space_of(addresses)
    return where, addresses - np.uint64(WINDOWS[where])


def _inside(addresses, nbytes: int, what: str, size: int) -> np.ndarray:
    """Byte indices (n, nbytes)."""
    check_alignment(addresses, nbytes, what)
    at = addresses.astype(np.int64)[:, None] + np.arange(nbytes)
    outside = ((at < 0) | (at >= size)).any(axis=1)
    if outside.any():
        lane = int(outside.argmax())
        raise BadAccess(lane, f"out-of-bounds {what} of {nbytes} bytes at byte {at[lane, 0]} of {size}")
    return at


def each_block(g, ins, addresses: np.ndarray, access, nbytes: int = 0):
    """access(indices of threads, block, addresses there) for every block of the cluster that is addressed."""
    ranks = (addresses >> np.uint64(BLOCK_SHIFT)).astype(np.int64)
    inside = addresses & np.uint64((1 << BLOCK_SHIFT) - 1)
    if not ranks.any():
        return access(slice(None), g.cta, inside)
    out = np.empty((len(addresses), nbytes), np.uint8) if nbytes else None
    for rank in np.unique(ranks):
        part = np.flatnonzero(ranks == rank)
        if rank > len(g.cta.peers):
            raise BadAccess(int(part[0]), f"shared address of block {rank - 1} of a cluster of {len(g.cta.peers)}")
        cta = g.cta if rank == 0 else g.cta.peers[rank - 1]
        if (cta.state == EXITED).all():
            raise BadAccess(int(part[0]), f"shared memory of block {rank - 1} of the cluster, which has ended")
        try:
            found = access(part, cta, inside[part])
        except BadAccess as bad:
            raise BadAccess(int(part[bad.lane]), bad.reason) from None
        for warp in np.unique(g.warps[part]) if cta is not g.cta else ():
            cta.reached[int(warp)] = int(g.cta.clocks.clock[warp, warp]), g.among(g.warps == warp), ins
        if nbytes:
            out[part] = found
    return out


def write_bytes(g, ins, where: str, addresses: np.ndarray, data: np.ndarray) -> None:
    nbytes = data.shape[1]
    where, addresses = resolve(ins, where, addresses)
    if where == "global":
        cta = g.cta
        g.cta.memory.write(addresses, data, g.threads + cta.index * cta.machine.threads)
    elif where == "shared":
        each_block(g, ins, addresses, lambda part, cta, at: cta.shared.write(
            cta.shared.locate(at, nbytes, "write"), data[part], g.warps[part], g.cluster_threads[part], ins.line,
            strong=strength(ins),
        ))  # fmt: skip
    elif where == "local":
        at = _inside(addresses, nbytes, "local write", g.cta.machine.program.local_bytes)
        g.cta.local[g.threads[:, None], at] = data
    else:
        raise BadAccess(0, f"write to {where} memory")


@handles("ld", "ldu")
def load(ins, program):
    kind, count, nbytes = shape(ins)
    where, address = space(ins), program.address(ins.operands[1], ins)
    to = ins.operands[0].items if isinstance(ins.operands[0], Vector) else (ins.operands[0],)
    if len(to) != count:
        raise NotEmulated(ins.line, ins.text, "a vector of another length")
    writes, dtype = [program.writer(o, kind, ins) for o in to], TYPES[kind]

    def step(g):
        values = np.ascontiguousarray(read_bytes(g, ins, where, address(g), nbytes)).view(dtype)
        for i, write in enumerate(writes):
            write(g, values[:, i])

    return step


@handles("st")
def store(ins, program):
    kind, count, _ = shape(ins)
    where, address = space(ins), program.address(ins.operands[0], ins)
    source = ins.operands[1].items if isinstance(ins.operands[1], Vector) else (ins.operands[1],)
    if len(source) != count:
        raise NotEmulated(ins.line, ins.text, "a vector of another length")
    reads, dtype = [program.reader(o, kind, ins) for o in source], TYPES[kind]

    def step(g):
        values = np.empty((len(g.threads), count), dtype)
        for i, read in enumerate(reads):
            values[:, i] = read(g)
        write_bytes(g, ins, where, address(g), values.view(np.uint8))

    return step


ATOMICS = {
    "add": lambda a, b: a + b, "min": min, "max": max, "and": lambda a, b: a & b, "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b, "exch": lambda a, b: b,
}  # fmt: skip


@handles("atom", "red")
def atomic(ins, program):
    """Threads one after another, in order of their index; on global memory."""
    op = next((m for m in ins.mods if m in ATOMICS or m in ("cas", "inc", "dec")), None)
    kind = next((m for m in reversed(ins.mods) if m in TYPES), None)
    known = {"global", "relaxed", "acquire", "release", "acq_rel", "cta", "cluster", "gpu", "sys", op, kind}
    operands = {"cas": 3}.get(op, 2) + (ins.opcode == "atom")
    kinds = ("u32", "s32", "b32", "u64", "s64", "b64", *(("f32", "f64") if op in ("add", "exch") else ()))
    if op in (None, "inc", "dec") or set(ins.mods) - known or len(ins.operands) != operands or kind not in kinds:
        raise NotEmulated(ins.line, ins.text)
    returns = ins.opcode == "atom"
    operands = ins.operands[1:] if returns else ins.operands
    where, address, dtype = space(ins), program.address(operands[0], ins), TYPES[kind]
    values = [program.reader(o, kind, ins) for o in operands[1:]]
    write = program.writer(ins.operands[0] if returns else SINK, kind, ins)

    def step(g):
        addresses = address(g)
        if resolve(ins, where, addresses)[0] != "global":
            raise NotEmulated(ins.line, ins.text, "atomics on shared memory")
        args = [np.broadcast_to(np.asarray(v(g), dtype), addresses.shape) for v in values]
        old = np.empty(len(addresses), dtype)
        memory = g.cta.memory
        exclusive, memory.exclusive = memory.exclusive, False
        for i in range(len(addresses)):
            one = g.among(g.threads == g.threads[i])
            at = addresses[i : i + 1]
            old[i] = read_bytes(one, ins, where, at, dtype.itemsize).view(dtype)[0, 0]
            new = (args[1][i] if old[i] == args[0][i] else old[i]) if op == "cas" else ATOMICS[op](old[i], args[0][i])
            write_bytes(one, ins, where, at, np.array([[new]], dtype).view(np.uint8))
        memory.exclusive = exclusive
        write(g, old)

    return step


@handles("cvta")
def cvta(ins, program):
    """To a generic address, or with .to from one."""
    where, bits = space(ins), "u64"
    if where == "generic" or ins.mods[-1] != bits or len(ins.mods) != 2 + ("to" in ins.mods):
        raise NotEmulated(ins.line, ins.text)
    read, write = program.reader(ins.operands[1], bits, ins), program.writer(ins.operands[0], bits, ins)
    window = np.uint64(WINDOWS[where])
    if "to" in ins.mods:
        return lambda g: write(g, np.asarray(read(g)) - window)
    return lambda g: write(g, np.asarray(read(g)).astype(np.uint64) + window)


@handles("isspacep")
def is_space(ins, program):
    where, read = space(ins), program.reader(ins.operands[1], "u64", ins)
    if len(ins.mods) != 1 or where in ("generic", "const"):
        raise NotEmulated(ins.line, ins.text)
    write = program.writer(ins.operands[0], "pred", ins)
    window = np.uint64(WINDOWS[where] >> 48)
    return lambda g: write(g, np.asarray(read(g)) >> np.uint64(48) == window)


@handles("mapa")
def mapa(ins, program):
    """The address of the same place in another block of the cluster."""
    bits = ins.mods[-1]
    if bits not in ("u32", "u64") or ins.mods[:-1] not in ((), ("shared::cluster",)):
        raise NotEmulated(ins.line, ins.text)
    generic = not any(m.startswith("shared") for m in ins.mods)
    source = ins.operands[1]
    read = program.reader(source, "u32" if isinstance(source, Symbol) else bits, ins)
    rank, write = program.reader(ins.operands[2], "u32", ins), program.writer(ins.operands[0], bits, ins)

    def step(g):
        base = np.asarray(read(g)).astype(np.uint64)
        inside = base & np.uint64((1 << BLOCK_SHIFT) - 1)
        to = inside | (np.asarray(rank(g)).astype(np.uint64) + np.uint64(1)) << np.uint64(BLOCK_SHIFT)
        write(g, (to + np.uint64(SHARED_WINDOW if generic else 0)).astype(TYPES[bits]))

    return step


@handles("getctarank")
def get_rank(ins, program):
    if ins.mods[-1] not in ("u32", "u64") or ins.mods[:-1] not in ((), ("shared::cluster",)):
        raise NotEmulated(ins.line, ins.text)
    read, write = program.reader(ins.operands[1], ins.mods[-1], ins), program.writer(ins.operands[0], "u32", ins)

    def step(g):
        rank = np.asarray(read(g)).astype(np.uint64) >> np.uint64(BLOCK_SHIFT) & np.uint64(0xFF)
        write(g, np.where(rank == 0, g.cta.rank, rank.astype(np.int64) - 1).astype(np.uint32))

    return step
