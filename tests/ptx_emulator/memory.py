"""Global memory: allocations with canaries around them, which bytes were written, and by whom."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

GLOBAL_BASE = 0x7000_0000_0000
SHARED_WINDOW = 0x0001_0000_0000_0000  # where generic addresses of shared memory start; of a cluster's other blocks too
LOCAL_WINDOW = 0x0002_0000_0000_0000
PARAM_WINDOW = 0x0003_0000_0000_0000
WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW, "global": 0, "const": 0}
BLOCK_SHIFT = 24  # a shared address below 2^24 is of the own block; (rank + 1) << 24 is added for that of another
MAP_MAGIC = b"TENSMAP1"


class BadAccess(Exception):
    """What is wrong with an access, without the place; `lane` is the first element of it that is wrong."""

    def __init__(self, lane: int, reason: str):
        super().__init__(reason)
        self.lane, self.reason = lane, reason


@dataclass
class Allocation:
    name: str
    address: int
    data: np.ndarray  # uint8
    mode: str  # read, write, update
    writer: np.ndarray  # of every byte the thread that wrote it last; below 0: see Memory


class Memory:
    """Global memory of one launch.

    allocate(name, array, mode): "read" may not be written, "write" may not be read before it is written and must be
    written whole, "update" is both. An allocation stands `skew` bytes behind a multiple of 256; nothing is next to it.
    """

    BEFORE = -2  # the writer of bytes an earlier launch wrote
    NOBODY = -1

    def __init__(self):
        self.allocations: list[Allocation] = []
        self.next = GLOBAL_BASE
        self.exclusive = True  # no two threads write one byte

    def allocate(self, name: str, array, mode: str = "read", skew: int = 0) -> int:
        data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        address, self.next = self.next + skew, self.next + -(-(len(data) + skew) // 256) * 256 + 65536
        self.map(name, address, data, mode)
        return address

    def map(self, name: str, address: int, array: np.ndarray, mode: str = "read") -> None:
        """An allocation of a copy of the bytes, at an address of the caller's choice: that of a tensor of the host."""
        if mode not in ("read", "write", "update"):
            raise ValueError(f"allocate: mode {mode!r} is not one of read, write, update")
        data = array.copy()
        if mode == "write":
            data[:] = 0xCD
        self.allocations.append(Allocation(name, address, data, mode, np.full(len(data), self.NOBODY, np.int64)))
        self.allocations.sort(key=lambda a: a.address)

    def allocation(self, name: str) -> Allocation:
        return next(a for a in self.allocations if a.name == name)

    def __getitem__(self, name: str) -> np.ndarray:
        """The bytes of an allocation."""
        return self.allocation(name).data

    def find(self, addresses: np.ndarray, nbytes: int, what: str) -> tuple[Allocation, np.ndarray]:
        """The allocation all n addresses (uint64) are in, and their offsets. Several allocations: see groups()."""
        first = int(addresses[0])
        for a in self.allocations:
            if a.address <= first < a.address + max(len(a.data), 1):
                offsets = addresses.astype(np.int64) - a.address
                bad = (offsets < 0) | (offsets + nbytes > len(a.data))
                if bad.any():
                    lane = int(np.flatnonzero(bad)[0])
                    raise BadAccess(lane, self._outside(int(addresses[lane]), nbytes, what))
                return a, offsets
        raise BadAccess(0, self._outside(first, nbytes, what))

    def _outside(self, address: int, nbytes: int, what: str) -> str:
        def distance(a: Allocation) -> int:
            return max(a.address - address, address + nbytes - a.address - len(a.data))

        if not self.allocations:
            return f"out-of-bounds {what} of {nbytes} bytes at 0x{address:x}: nothing is allocated"
        near = min(self.allocations, key=distance)
        at = address - near.address
        return f"out-of-bounds {what} of {nbytes} bytes at byte {at} of {near.name}, which has {len(near.data)}"

    def groups(self, addresses: np.ndarray) -> list[np.ndarray]:
        """Which of the addresses go to one allocation each: one array of indices where all do."""
        bases = np.array([a.address for a in self.allocations])
        which = np.searchsorted(bases, addresses.astype(np.int64), side="right")
        if (which == which[0]).all():
            return [np.arange(len(addresses))]
        return [np.flatnonzero(which == w) for w in np.unique(which)]

    def read(self, addresses: np.ndarray, nbytes: int) -> np.ndarray:
        """Bytes (n, nbytes) at addresses (n,)."""
        check_alignment(addresses, nbytes, "global read")
        result = np.empty((len(addresses), nbytes), np.uint8)
        for part in self.groups(addresses):
            try:
                a, offsets = self.find(addresses[part], nbytes, "global read")
            except BadAccess as bad:
                raise BadAccess(int(part[bad.lane]), bad.reason) from None
            at = offsets[:, None] + np.arange(nbytes)
            if a.mode == "write" and (a.writer[at] == self.NOBODY).any():
                lane = int(np.flatnonzero((a.writer[at] == self.NOBODY).any(axis=1))[0])
                reason = f"read of byte {offsets[lane]} of {a.name}, which nothing has written"
                raise BadAccess(int(part[lane]), reason)
            result[part] = a.data[at]
        return result

    def write(self, addresses: np.ndarray, data: np.ndarray, writers: np.ndarray) -> None:
        """Bytes (n, nbytes) to addresses (n,), by threads (n,) of the grid."""
        nbytes = data.shape[1]
        check_alignment(addresses, nbytes, "global write")
        for part in self.groups(addresses):
            try:
                a, offsets = self.find(addresses[part], nbytes, "global write")
            except BadAccess as bad:
                raise BadAccess(int(part[bad.lane]), bad.reason) from None
            if a.mode == "read":
                raise BadAccess(int(part[0]), f"write to byte {offsets[0]} of {a.name}, which is read-only")
            at = offsets[:, None] + np.arange(nbytes)
            who = np.broadcast_to(writers[part][:, None], at.shape)
            before = a.writer[at]
            a.writer[at] = who
            if self.exclusive:
                other = ((before >= 0) & (before != who)).any(axis=1) | (a.writer[at] != who).any(axis=1)
                if other.any():
                    lane = int(np.flatnonzero(other)[0])
                    was = int(np.where(before[lane] >= 0, before[lane], a.writer[at][lane]).max())
                    reason = f"write to byte {offsets[lane]} of {a.name}, which thread {was} of the grid writes too"
                    raise BadAccess(int(part[lane]), reason)
            a.data[at] = data[part]

    def unwritten(self) -> list[str]:
        """A line for every "write" allocation of which bytes were never written."""
        lines = []
        for a in self.allocations:
            missing = np.flatnonzero(a.writer == self.NOBODY)
            if a.mode == "write" and len(missing):
                where = f"the first at byte {missing[0]}"
                lines.append(f"{len(missing)} of {len(a.data)} bytes of {a.name} were never written, {where}")
        return lines


def space_of(address: np.ndarray) -> str:
    """The space generic addresses point to; all of them to one."""
    spaces = {WINDOWS[name] >> 48: name for name in ("global", "shared", "local", "param")}
    if int(address[0]) >> 48 not in spaces:
        raise BadAccess(0, f"address 0x{int(address[0]):x} is in no space")
    return spaces[int(address[0]) >> 48]


def check_alignment(addresses: np.ndarray, nbytes: int, what: str) -> None:
    bad = (addresses & np.uint64(nbytes - 1)) != 0
    if bad.any():
        lane = int(np.flatnonzero(bad)[0])
        raise BadAccess(lane, f"misaligned {what}: address 0x{int(addresses[lane]):x} is no multiple of {nbytes}")


@dataclass(frozen=True)
class TensorMap:
    """What a CUtensorMap says, in an encoding of the emulator's own: 128 bytes.

    base     address
    dims     elements, innermost first
    strides  bytes, of dims[1:]
    box      elements
    swizzle  0 none, 1 of 128 bytes, 2 of 64, 3 of 32
    """

    base: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int
    element_bytes: int

    def encode(self) -> bytes:
        """Raises ValueError for what cuTensorMapEncodeTiled refuses."""
        rank = len(self.dims)
        inner = self.box[0] * self.element_bytes
        span = {0: 1 << 30, 1: 128, 2: 64, 3: 32}[self.swizzle]
        for wrong, text in (
            (not 1 <= rank <= 5 or len(self.box) != rank or len(self.strides) != rank - 1, "ranks disagree"),
            (self.base % 16, f"base 0x{self.base:x} is no multiple of 16"),
            (any(s % 16 or not 0 < s < 1 << 40 for s in self.strides), f"strides {self.strides}: multiples of 16"),
            (any(not 0 < d <= 1 << 32 for d in self.dims), f"dims {self.dims}"),
            (any(not 0 < b <= 256 for b in self.box), f"box {self.box}: 1 to 256 elements"),
            (inner % 16, f"the inner box has {inner} bytes, no multiple of 16"),
            (inner > span, f"the inner box has {inner} bytes, swizzled in {span}"),
        ):
            if wrong:
                raise ValueError(f"tensor map: {text}")
        pad = (0,) * (5 - rank)
        strides = (*self.strides, *(0,) * (5 - rank), 0)[:4]
        blob = MAP_MAGIC + struct.pack(
            "<Q5Q4Q5I3B", self.base, *self.dims, *pad, *strides, *self.box, *pad, rank, self.swizzle, self.element_bytes
        )
        return blob.ljust(128, b"\0")

    @staticmethod
    def decode(blob: bytes) -> TensorMap:
        if blob[:8] != MAP_MAGIC:
            raise ValueError("these 128 bytes are no tensor map")
        base, *rest = struct.unpack("<Q5Q4Q5I3B", blob[8 : 8 + struct.calcsize("<Q5Q4Q5I3B")])
        rank = rest[14]
        dims, strides, box = tuple(rest[:rank]), tuple(rest[5 : 4 + rank]), tuple(rest[9 : 9 + rank])
        return TensorMap(base, dims, strides, box, rest[15], rest[16])
