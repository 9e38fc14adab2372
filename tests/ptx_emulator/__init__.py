"""Runs the PTX of compiled kernels on the CPU, and says where they do what a GPU forbids or leaves undefined.

    memory = Memory()
    x = memory.allocate("x", codes)
    y = memory.allocate("y", np.empty(100, np.float32), "write")
    run(load(ptx, "kernel"), grid=2, block=128, params=struct.pack("<QQi", x, y, 100), memory=memory)
    memory["y"].view(np.float32)

All threads of a block run, with their divergence and barriers; the blocks of a cluster run together, clusters one
after another. Found and reported as Fault, with kernel, block, thread and line: accesses out of bounds or misaligned,
in global, shared and local memory; reads of shared memory nothing has written; races on shared memory, asynchronous
copies and tensor cores included; results of wgmma used before they were waited for; copies nobody waited for;
deadlocks, and blocks that do not end; a block of a cluster that ends while others still use its shared memory; global
memory before a dependent launch has awaited the one before; illegal metadata of sparse products; writes to read-only
arguments; two threads writing one byte; bytes of outputs nobody wrote. An instruction, or a form of one, that is not
known raises NotEmulated when the kernel is loaded. Not seen: races on global memory but for two writers, and a byte
that one lane reads and another lane of its warp overwrites with no barrier between.

Timing is not modelled: what a kernel does in one order it must, by its barriers, do in every order, and that is what is
checked. Float results of matrix products are rounded once, where hardware has an order and a precision of its own.
"""

from __future__ import annotations

from . import (  # noqa: F401 - they register their instructions
    access,
    barriers,
    bits,
    bulk,
    compare,
    copies,
    cvt,
    matrix,
    mbarriers,
    scalar,
    warp,
    wgmma,
)
from .machine import Machine
from .memory import Memory, TensorMap
from .program import Program, load
from .report import Fault, NotEmulated

__all__ = ["Fault", "Memory", "NotEmulated", "Program", "TensorMap", "load", "run"]


def run(program: Program, grid, block, params: bytes, memory: Memory, **options) -> None:
    """One launch; arguments and options are those of Machine.

    Raises Fault for what the kernel does wrong, ValueError for a launch that is.
    """
    Machine(program, grid, block, params, memory, **options).run()
