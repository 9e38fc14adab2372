"""Shared memory of a block, and who may see what of it.

Every access is checked for bounds, alignment, bytes nothing has written, and races. Races are found by vector clocks,
so by what the barriers order, not by what happened to come first. Agents are the warps, and what runs beside them:
copies of cp.async, bulk copies out of shared memory on behalf of a warp, bulk copies that one mbarrier hears of, and
the tensor core of a warpgroup. clock[a] says up to which clock of every agent a knows what it did; a barrier, an
mbarrier or a wait makes an agent learn. A copy knows what the warp knew that issued it; nobody knows of a copy but who
waited.

The asynchronous proxy (bulk copies, wgmma) sees ordinary writes only after a fence: `fenced` holds what of `clock` was
fenced. Threads of one warp count as ordered among each other only by a barrier or bar.warp.sync between a write and
another thread's access. A second write of the same value is no race: compilers let all threads that hold one write it.
Neither are accesses that both are volatile, relaxed, acquire or release: so a flag may be polled, and what was written
before it is known to who acquires what was released, by the accesses themselves or by fences beside them.
"""

from __future__ import annotations

import numpy as np

from .memory import BadAccess, check_alignment

MBARRIERS = 64  # that hear of bulk copies, of a cluster


class Clocks:
    """Vector clocks of the agents of a cluster. Warps come first, numbered through all blocks."""

    def __init__(self, warps: int):
        self.warps, n = warps, 4 * warps + MBARRIERS
        self.copy, self.bulk, self.tensor = warps, 2 * warps, 3 * warps  # agents of warp 0; tensor: of its warpgroup
        self.mbarriers: dict[tuple, int] = {}  # (block, offset): agent
        self.copied: dict[int, tuple] = {}  # of those agents: the clock of the last copy, its thread, its instruction
        self.clock = np.zeros((n, n), np.int64)
        self.clock[np.arange(n), np.arange(n)] = 1
        self.fenced = np.zeros((n, n), np.int64)
        self.epoch = np.zeros(warps, np.int64)  # of every warp: barriers among its threads
        self.readers: set[int] = set()  # agents that have read anything
        self.own = np.zeros(warps, np.int64)  # up to which clock of its own a warp's threads know of each other
        self.fences: dict[int, tuple] = {}  # of warps: what they knew at their last fence
        self.seen: dict[int, tuple] = {}  # what was released to relaxed loads since then

    def tick(self, agent: int) -> int:
        """Ends what the agent did up to now; returns the clock that this had."""
        now = int(self.clock[agent, agent])
        self.clock[agent, agent] = now + 1
        return now

    def snapshot(self, agents) -> tuple[np.ndarray, np.ndarray]:
        """What the agents together know, and what of it was fenced: to be learned by others. Ends their clocks."""
        agents = np.asarray(agents)
        known, fenced = self.clock[agents].max(axis=0), self.fenced[agents].max(axis=0)
        self.clock[agents, agents] += 1
        return known, fenced

    def learn(self, agents, known: np.ndarray, fenced: np.ndarray) -> None:
        agents = np.asarray(agents)
        self.own[agents] = np.maximum(self.own[agents], known[agents])
        self.clock[agents] = np.maximum(self.clock[agents], known)
        self.fenced[agents] = np.maximum(self.fenced[agents], fenced)

    def mbarrier(self, rank: int, offset: int) -> int:
        """The agent of the bulk copies that an mbarrier hears of."""
        agent = self.mbarriers.setdefault((rank, offset), 4 * self.warps + len(self.mbarriers))
        if agent == len(self.clock):
            raise ValueError(f"more than {MBARRIERS} mbarriers of a cluster hear of bulk copies")
        return agent

    def only(self, agent: int, clock: int) -> tuple[np.ndarray, np.ndarray]:
        """To be learned: what one agent did."""
        known = np.zeros(len(self.clock), np.int64)
        known[agent] = clock
        return known, np.zeros_like(known)

    def kind(self, agent: int) -> str:
        kinds = ("a thread", "cp.async", "a bulk copy", "a wgmma", "a bulk copy")
        return kinds[min(agent // self.warps, 4)]

    def order(self, warp: int) -> None:
        """fence.acq_rel: what relaxed loads saw is acquired, what relaxed stores say from here on is released."""
        if warp in self.seen:
            self.learn([warp], *self.seen.pop(warp))
        self.fences[warp] = self.snapshot([warp])

    def fence(self, warps) -> None:
        """fence.proxy.async"""
        warps = np.asarray(warps)
        self.fenced[warps] = np.maximum(self.fenced[warps], self.clock[warps])

    def is_proxy(self, agent):
        return np.asarray(agent) >= self.bulk


def merge(a, b):
    """Two snapshots as one; a may be None."""
    return b if a is None else tuple(np.maximum(x, y) for x, y in zip(a, b, strict=True))


class Shared:
    """The bytes of one block. Agents and threads are numbered through its cluster."""

    def __init__(self, size: int, clocks: Clocks):
        self.size, self.clocks = size, clocks
        self.data = np.full(size, 0xCD, np.uint8)
        self.written = np.zeros(size, bool)
        self.barrier = np.zeros(size, bool)  # bytes of an mbarrier
        self.agent = np.zeros(size, np.int16)  # who wrote it last
        self.clock = np.zeros(size, np.int64)  # at which clock of its
        self.thread = np.full(size, -1, np.int32)
        self.epoch = np.zeros(size, np.int64)  # of that thread's warp
        self.line = np.zeros(size, np.int32)  # of the PTX
        self.reads = np.zeros((len(clocks.clock), size), np.int64)  # last clock of every agent that read it
        self.read_line = np.zeros(size, np.int32)
        self.strong = np.zeros(size, bool)  # the last write was volatile, relaxed or release
        self.strong_read = np.zeros(size, bool)  # the last read was volatile, relaxed or acquire
        self.released: dict[int, tuple] = {}  # of the first byte of a strong write: what who acquires it learns

    def locate(self, addresses: np.ndarray, nbytes: int, what: str, aligned: int | None = None) -> np.ndarray:
        """Byte indices (n, nbytes). aligned: what addresses must be a multiple of, nbytes without it."""
        addresses = addresses.astype(np.uint64)
        check_alignment(addresses, nbytes if aligned is None else aligned, f"shared {what}")
        bad = addresses + np.uint64(nbytes) > self.size
        if bad.any():
            lane = int(np.flatnonzero(bad)[0])
            at = int(addresses[lane])
            raise BadAccess(lane, f"out-of-bounds shared {what} of {nbytes} bytes at {at}: the block has {self.size}")
        return addresses.astype(np.int64)[:, None] + np.arange(nbytes)

    def read(self, at: np.ndarray, agents, threads=None, line: int = 0, knows=None, strong: str = "") -> np.ndarray:
        """The bytes at indices (n, nbytes), by agents (n,) or one, threads (n,) of the cluster or None of no warp's.

        knows   the warps whose knowledge the agents act on, their own without it
        strong  "relaxed" (volatile too), "acquire", of writes "release"
        """
        clocks = self.clocks
        if not self.written[at].all():
            lane, byte = np.argwhere(~self.written[at])[0]
            raise BadAccess(int(lane), f"read of shared byte {at[lane, byte]}, which nothing has written")
        if self.barrier[at].any():
            lane, byte = np.argwhere(self.barrier[at])[0]
            raise BadAccess(int(lane), f"read of shared byte {at[lane, byte]}, which is of an mbarrier")
        agents = np.broadcast_to(np.asarray(agents), at.shape[:1])
        by = agents[:, None]
        who = by if knows is None else np.asarray(knows).reshape(-1, 1)
        self._check_writes(at, by, who, threads, "read", ~self.strong[at] if strong else True)
        self.strong_read[at] = bool(strong)
        for byte, warp in set(zip(at[:, 0].tolist(), agents.tolist(), strict=True)) if strong else ():
            if byte in self.released and strong == "acquire":
                clocks.learn([warp], *self.released[byte])
            elif byte in self.released:
                clocks.seen[warp] = merge(clocks.seen.get(warp), self.released[byte])
        self.reads[by, at] = clocks.clock[agents, agents][:, None]
        self.read_line[at] = line
        clocks.readers.update(np.unique(agents).tolist())
        return self.data[at]

    def _check_writes(self, at, by, knows, threads, what, matters) -> None:
        """Raise where the last write of a byte matters to the agents `by` (n, 1) and is not known to `knows`."""
        clocks, writer = self.clocks, self.agent[at]
        clock = self.clock[at]
        unknown = (clock > clocks.clock[knows, writer]) & matters
        proxy = clocks.is_proxy(by)
        if proxy.any():
            unfenced = proxy & (writer < clocks.warps) & (clock > clocks.fenced[knows, writer]) & (clock > 0)
            if (unfenced & ~unknown).any():
                lane, byte = np.argwhere(unfenced & ~unknown)[0]
                raise BadAccess(int(lane), self._text("no fence.proxy.async before the", what, at[lane, byte]))
        if threads is not None:
            same = (writer == by) & (self.thread[at] != threads[:, None]) & (clock > 0)
            safe = np.minimum(writer, clocks.warps - 1)
            unknown |= same & (self.epoch[at] >= clocks.epoch[safe]) & (clock > clocks.own[safe]) & matters
        if unknown.any():
            lane, byte = np.argwhere(unknown)[0]
            raise BadAccess(int(lane), self._text("race:", what, at[lane, byte]))

    def _text(self, start: str, what: str, byte: int) -> str:
        agent, thread = int(self.agent[byte]), int(self.thread[byte])
        who = f"thread {thread}" if agent < self.clocks.warps else self.clocks.kind(agent)
        return f"{start} {what} of shared byte {byte}, which {who} writes at PTX line {self.line[byte]}, unordered"

    def write(
        self, at: np.ndarray, data: np.ndarray, agents, threads=None, line: int = 0, knows=None, strong: str = ""
    ) -> None:
        """Bytes (n, nbytes) to indices of the same shape. knows, strong: as in read."""
        clocks = self.clocks
        if self.barrier[at].any():
            lane, byte = np.argwhere(self.barrier[at])[0]
            raise BadAccess(int(lane), f"write to shared byte {at[lane, byte]}, which is of an mbarrier")
        agents = np.broadcast_to(np.asarray(agents), at.shape[:1])
        by = agents[:, None]
        who = by if knows is None else np.asarray(knows).reshape(-1, 1)
        matters = self.data[at] != data
        self._check_writes(at, by, who, threads, "write", matters & ~self.strong[at] if strong else matters)
        for reader in clocks.readers:
            late = (self.reads[reader][at] > clocks.clock[who, reader]) & (by != reader)
            late &= ~self.strong_read[at] if strong else True
            if late.any():
                lane, byte = np.argwhere(late)[0]
                byte = at[lane, byte]
                kind = clocks.kind(reader)
                text = f"race: write of shared byte {byte}, which {kind} reads at PTX line {self.read_line[byte]}"
                raise BadAccess(int(lane), f"{text}, unordered")
        self.data[at] = data
        twice = self.data[at] != data
        if twice.any():
            lane, byte = np.argwhere(twice)[0]
            raise BadAccess(int(lane), f"race: two threads write shared byte {at[lane, byte]} in one instruction")
        self.thread[at] = -1 if threads is None else threads[:, None]
        self.written[at] = True
        self.agent[at], self.clock[at] = by, clocks.clock[agents, agents][:, None]
        self.epoch[at] = clocks.epoch[np.minimum(agents, clocks.warps - 1)][:, None]  # of asynchronous agents unused
        self.line[at] = line
        self.strong[at] = bool(strong)
        for byte, warp in set(zip(at[:, 0].tolist(), agents.tolist(), strict=True)) if strong else ():
            known = clocks.snapshot([warp]) if strong == "release" else clocks.fences.get(warp)
            self.released.pop(byte, None)
            if known is not None:
                self.released[byte] = known

    def settle(self, at: np.ndarray, agent: int, warp: int, threads: np.ndarray) -> None:
        """What cp.async brought becomes the waiting threads' own write; of warp."""
        mine = self.agent[at] == agent
        at, who = at[mine], np.broadcast_to(threads[:, None], at.shape)[mine]
        self.agent[at], self.clock[at], self.thread[at] = warp, self.clocks.clock[warp, warp], who
        self.epoch[at] = self.clocks.epoch[warp]
