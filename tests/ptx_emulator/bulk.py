"""Bulk copies and tensor maps: the copy engine of sm_90, working for the thread that issues.

A copy is done when it is issued, but in the name of another agent: that of the mbarrier which hears of it, or of the
warp's copies out of shared memory. Only who waited for the mbarrier, or for the bulk group, knows of it, so whatever
reads too early or overwrites too soon is a race.
"""

from __future__ import annotations

import numpy as np

from .access import read_bytes
from .copies import literal
from .mbarriers import addresses_of, check_initialised, complete, mbarrier_at
from .memory import BLOCK_SHIFT, PARAM_WINDOW, BadAccess, TensorMap, space_of
from .parse import Address
from .report import NotEmulated

UNIT_MASK = {0: 0, 1: 7, 2: 3, 3: 1}  # of a swizzle: which bits of the line of 128 bytes move 16-byte units


def swizzled(at: np.ndarray, swizzle: int) -> np.ndarray:
    """Shared addresses as the copy engine and wgmma permute them: bits 4.. ^= bits 7.."""
    return at ^ ((at >> 7 & UNIT_MASK[swizzle]) << 4)


def bulk(ins, program):
    mods = ins.mods[2:]
    if mods in (("commit_group",), ("wait_group",), ("wait_group", "read")):
        return _groups(ins)
    if mods == ("prefetch", "L2", "global"):
        return _prefetch(ins, program)
    known = {"tensor", "1d", "2d", "3d", "4d", "5d", "shared::cluster", "shared::cta", "global", "tile", "bulk_group",
             "mbarrier::complete_tx::bytes", "multicast::cluster", "L2::cache_hint"}  # fmt: skip
    if set(mods) - known:
        raise NotEmulated(ins.line, ins.text, f".{sorted(set(mods) - known)[0]}")
    tensor = "tensor" in mods
    spaces = [m for m in mods if m in ("shared::cluster", "shared::cta", "global")]
    ways = ("mbarrier::complete_tx::bytes", "bulk_group")
    way = [m for m in mods if m in ways]
    if len(spaces) != 2 or way != [ways[spaces[0] == "global"]]:
        raise NotEmulated(ins.line, ins.text)
    if spaces[0].startswith("shared"):
        return _into_shared(ins, program, tensor, spaces[1])
    return _out_of_shared(ins, program, tensor)


def _map_of(g, address: int) -> TensorMap:
    where = np.array([address], np.uint64)
    space = space_of(where)
    if address % 64:
        raise BadAccess(0, f"a tensor map at 0x{address:x}, no multiple of 64")
    if space == "param":
        at = address - PARAM_WINDOW
        blob = g.cta.machine.params[at : at + 128].tobytes()
    elif space == "global":
        blob = g.cta.memory.read(where + np.arange(0, 128, 16, dtype=np.uint64), 16).tobytes()
    else:
        raise BadAccess(0, f"a tensor map in {space} memory")
    try:
        return TensorMap.decode(blob)
    except ValueError as error:
        raise BadAccess(0, str(error)) from None


def _box(tensor: TensorMap, coordinates: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Global addresses of the box's rows in pieces of 16 bytes (pieces, 16), and which bytes are inside the tensor."""
    size = tensor.element_bytes
    inner = coordinates[0] * size + np.arange(tensor.box[0] * size)
    address, inside = tensor.base + inner, (inner >= 0) & (inner < tensor.dims[0] * size)
    for c, n, box, stride in zip(coordinates[1:], tensor.dims[1:], tensor.box[1:], tensor.strides, strict=True):
        i = c + np.arange(box)
        address = (i * stride)[:, None] + address.reshape(1, -1)
        inside = ((i >= 0) & (i < n))[:, None] & inside.reshape(1, -1)
        address, inside = address.reshape(-1), inside.reshape(-1)
    return address.reshape(-1), inside.reshape(-1)


def _fetch(g, tensor: TensorMap, coordinates: list[int]) -> np.ndarray:
    """The bytes of a box, zeros outside of the tensor."""
    address, inside = _box(tensor, coordinates)
    data = np.zeros(len(address), np.uint8)
    if inside.any():
        data[inside] = g.cta.memory.read(address[inside].astype(np.uint64), 1)[:, 0]
    return data


def _into_shared(ins, program, tensor: bool, source_space: str):
    to = addresses_of(program, ins.operands[0], ins)
    multicast = "multicast::cluster" in ins.mods
    if tensor:
        map_address = program.address(Address(ins.operands[1].base, ins.operands[1].offset), ins)
        coordinates = [program.reader(c, "s32", ins) for c in ins.operands[1].coordinates]
        rank = next(int(m[0]) for m in ins.mods if m in ("1d", "2d", "3d", "4d", "5d"))
        if len(coordinates) != rank:
            raise NotEmulated(ins.line, ins.text, "another number of coordinates")
        rest = ins.operands[2:]
    else:
        source, size = program.address(ins.operands[1], ins), program.reader(ins.operands[2], "u32", ins)
        rest = ins.operands[3:]
    if len(rest) != 1 + multicast + ("L2::cache_hint" in ins.mods):
        raise NotEmulated(ins.line, ins.text, f"{len(ins.operands)} operands")
    barrier_at = addresses_of(program, rest[0], ins)
    mask = program.reader(rest[1], "u16", ins) if multicast else None

    def step(g):
        n, clocks = len(g.threads), g.cta.clocks
        targets, barriers = to(g), barrier_at(g)
        sizes = None if tensor else np.broadcast_to(np.asarray(size(g)), (n,))
        masks = np.broadcast_to(np.asarray(mask(g)), (n,)) if multicast else None
        where = [np.broadcast_to(np.asarray(c(g)), (n,)) for c in coordinates] if tensor else None
        for lane in range(n):
            warp = int(g.warps[lane])
            one = g.among(g.threads == g.threads[lane])
            swizzle, align = 0, 16
            if tensor:
                box = _map_of(g, int(map_address(g)[lane]))
                if len(box.dims) != len(where):
                    raise BadAccess(lane, f"{len(where)} coordinates for a tensor map of rank {len(box.dims)}")
                data, swizzle, align = _fetch(g, box, [int(c[lane]) for c in where]), box.swizzle, 128
            else:
                if sizes[lane] % 16 or sizes[lane] == 0:
                    raise BadAccess(lane, f"a bulk copy of {sizes[lane]} bytes, no multiple of 16")
                start = source(g)[lane] + np.arange(0, int(sizes[lane]), 16, dtype=np.uint64)
            ranks = [r for r in range(16) if int(masks[lane]) >> r & 1] if multicast else [None]
            for rank in ranks:
                address = int(barriers[lane])
                if rank is not None:
                    address = (address & ((1 << BLOCK_SHIFT) - 1)) | (rank + 1) << BLOCK_SHIFT
                cta, offset = _target(g, int(targets[lane]), rank, lane)
                owner, inside, _ = mbarrier_at(g, address, lane)
                check_initialised(g, owner, inside, lane, proxy=True)
                agent = clocks.mbarrier(owner.rank, inside)
                if not tensor:
                    data = read_for(one, ins, source_space, start, agent).reshape(-1)
                at = cta.shared.locate(np.array([offset], np.uint64), len(data), "bulk write", align)
                if swizzle:
                    at = swizzled(at, swizzle)
                    if (at >= cta.shared.size).any():
                        raise BadAccess(lane, "a swizzled box reaches beyond shared memory")
                cta.shared.write(at, data[None], agent, None, ins.line, knows=warp)
                clock = clocks.tick(agent)
                clocks.copied[agent] = clock, one, ins
                complete(g, address, len(data), clocks.only(agent, clock), lane)

    return step


def _prefetch(ins, program):
    """To L2: it delivers nothing and orders nothing, but what it names has to be there."""
    source, size = program.address(ins.operands[0], ins), program.reader(ins.operands[1], "u32", ins)

    def step(g):
        n = len(g.threads)
        starts, sizes = (np.broadcast_to(np.asarray(of(g)), (n,)) for of in (source, size))
        for lane in range(n):
            nbytes = int(sizes[lane])
            if nbytes % 16 or not nbytes or int(starts[lane]) % 16:
                raise BadAccess(lane, f"a prefetch of {nbytes} bytes at 0x{int(starts[lane]):x}: multiples of 16")
            try:
                g.cta.machine.memory.find(starts[lane : lane + 1].astype(np.uint64), nbytes, "prefetch")
            except BadAccess as bad:
                raise BadAccess(lane, bad.reason) from None

    return step


def read_for(g, ins, space: str, addresses: np.ndarray, agent: int) -> np.ndarray:
    """Pieces of 16 bytes: of global memory, or of the own block's shared memory by the copy engine."""
    if space == "global":
        return read_bytes(g, ins, "global", addresses, 16)
    at = g.cta.shared.locate(addresses, 16, "bulk read")
    return g.cta.shared.read(at, agent, None, ins.line, knows=int(g.warps[0]))


def _target(g, address: int, rank: int | None, lane: int):
    """The block a shared address, or the multicast rank, names, and the offset there."""
    offset = address & ((1 << BLOCK_SHIFT) - 1)
    rank = (address >> BLOCK_SHIFT & 0xFF) - 1 if rank is None else rank
    if rank >= len(g.cta.peers):
        raise BadAccess(lane, f"a copy to block {rank} of a cluster of {len(g.cta.peers)}")
    return (g.cta if rank < 0 else g.cta.peers[rank]), offset


def _out_of_shared(ins, program, tensor: bool):
    if tensor:
        map_address = program.address(Address(ins.operands[0].base, ins.operands[0].offset), ins)
        coordinates = [program.reader(c, "s32", ins) for c in ins.operands[0].coordinates]
    else:
        to, size = program.address(ins.operands[0], ins), program.reader(ins.operands[2], "u32", ins)
    source = addresses_of(program, ins.operands[1], ins)

    def step(g):
        n, clocks, memory = len(g.threads), g.cta.clocks, g.cta.memory
        for lane in range(n):
            warp, swizzle, align = int(g.warps[lane]), 0, 16
            if tensor:
                box = _map_of(g, int(map_address(g)[lane]))
                where = [int(np.broadcast_to(c(g), (n,))[lane]) for c in coordinates]
                address, inside = _box(box, where)
                swizzle, align = box.swizzle, 128
            else:
                nbytes = int(np.broadcast_to(size(g), (n,))[lane])
                if nbytes % 16 or not nbytes or int(to(g)[lane]) % 16:
                    raise BadAccess(lane, f"a bulk copy of {nbytes} bytes to 0x{int(to(g)[lane]):x}: multiples of 16")
                address = int(to(g)[lane]) + np.arange(nbytes)
                inside = np.ones(nbytes, bool)
            shared = g.cta.shared
            at = shared.locate(source(g)[lane : lane + 1], len(address), "bulk read", align)
            at = swizzled(at, swizzle)
            if (at >= shared.size).any():
                raise BadAccess(lane, "a swizzled box reaches beyond shared memory")
            data = shared.read(at, clocks.bulk + warp, None, ins.line, knows=warp)[0]
            who = np.full(int(inside.sum()), int(g.threads[lane]) + g.cta.index * g.cta.machine.threads)
            if inside.any():
                memory.write(address[inside].astype(np.uint64), data[inside][:, None], who)
            one = g.among(g.threads == g.threads[lane])
            groups = g.cta.bulk_groups.setdefault(int(g.threads[lane]), [(0, [])])
            groups[-1][1].append((one, ins))

    return step


def _groups(ins):
    """Of every thread that has copied: (the clock at the commit, copies) of its groups; the last is open."""
    keep = literal(ins.operands[0], ins) if ins.operands else 0

    def step(g):
        clocks = g.cta.clocks
        for thread in set(g.cta.bulk_groups).intersection(g.threads.tolist()):
            groups, warp = g.cta.bulk_groups[thread], thread // 32 + g.cta.first_warp
            agent = clocks.bulk + warp
            if "commit_group" in ins.mods:
                groups[-1] = (clocks.tick(agent), groups[-1][1])
                groups.append((0, []))
                continue
            done = groups[: max(len(groups) - 1 - keep, 0)]
            del groups[: len(done)]
            if done:
                clocks.clock[warp, agent] = max(int(clocks.clock[warp, agent]), done[-1][0])

    return step
