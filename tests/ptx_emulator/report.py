"""What the emulator finds wrong."""

from __future__ import annotations


class Fault(Exception):
    """A kernel does what a GPU forbids, or leaves undefined. The text names kernel, block, thread and line.

    kernel   name of the entry
    block    index of the block in the grid
    thread   index of the thread in its block, -1 where it is of no single thread
    line     of the PTX
    source   "file.cu:12" of the compiler's line information, "" without it
    reason   the text without the place
    """

    def __init__(self, kernel: str, block: int, thread: int, line: int, source: str, text: str, reason: str):
        self.kernel, self.block, self.thread, self.line = kernel, block, thread, line
        self.source, self.reason = source, reason
        who = f"block {block}" + (f", thread {thread}" if thread >= 0 else "")
        at = f"PTX line {line}" + (f" ({source})" if source else "")
        super().__init__(f"{kernel}, {who}, {at}: {reason}\n    {text}")


class NotEmulated(Exception):
    """An instruction, or a form of one, that the emulator does not know."""

    def __init__(self, line: int, text: str, why: str = ""):
        super().__init__(f"not implemented: {text} (PTX line {line}){': ' + why if why else ''}")
