"""Comparisons, and choices between two values."""

from __future__ import annotations

import numpy as np

from .parse import Pair
from .program import TYPES, handles
from .report import NotEmulated
from .rounding import flush
from .scalar import PACKED, allow, kind_of

COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}


def _compare(ins, kind):
    name = next(m for m in ins.mods if m in COMPARISONS or m in UNORDERED or m in ("num", "nan"))
    floating = kind.startswith(("f", "bf"))
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name in UNORDERED:
        f = COMPARISONS[UNORDERED[name]]
        return lambda a, b: f(a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne" and floating:
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    return COMPARISONS[name]


@handles("setp")
def setp(ins, program):
    kind = kind_of(ins)
    allow(ins, *COMPARISONS, *UNORDERED, "num", "nan", "and", "or", "xor", "ftz")
    joined = any(m in ("and", "or", "xor") for m in ins.mods)
    if kind in PACKED or kind == "bf16" or len(ins.operands) != 3 + joined:
        raise NotEmulated(ins.line, ins.text)
    a, b = flushing(ins, kind, *(program.reader(o, kind, ins) for o in ins.operands[1:3]))
    compare = _compare(ins, kind)
    joins = [m for m in ins.mods if m in ("and", "or", "xor")]
    join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[joins[0]] if joins else None
    other = program.reader(ins.operands[3], "pred", ins) if joins else None
    to = ins.operands[0]
    first, second = (to.first, to.second) if isinstance(to, Pair) else (to, None)
    write = program.writer(first, "pred", ins)
    write_second = program.writer(second, "pred", ins) if second is not None else None

    def step(g):
        p = compare(a(g), b(g))
        q = ~p
        if join:
            with_ = other(g)
            p, q = join(p, with_), join(q, with_)
        write(g, p)
        if write_second is not None:
            write_second(g, q)

    return step


def flushing(ins, kind, *reads):
    """Readers that flush where .ftz says so."""
    if "ftz" not in ins.mods:
        return reads
    if kind not in ("f32", "f16"):
        raise NotEmulated(ins.line, ins.text)
    return [lambda g, read=read: flush(np.asarray(read(g))) for read in reads]


@handles("set")
def set_(ins, program):
    """1.0 or all ones where the comparison holds."""
    types = [m for m in ins.mods if m in TYPES]
    allow(ins, *COMPARISONS, *UNORDERED, "num", "nan", "ftz")
    if types[0] not in ("u32", "s32", "f32") or types[1] in PACKED or types[1] == "bf16":
        raise NotEmulated(ins.line, ins.text)
    a, b = flushing(ins, types[1], *(program.reader(o, types[1], ins) for o in ins.operands[1:3]))
    write, compare = program.writer(ins.operands[0], types[0], ins), _compare(ins, types[1])
    if len(ins.operands) > 3:
        raise NotEmulated(ins.line, ins.text)
    yes = 1 if types[0] == "f32" else -1
    dtype = TYPES[types[0]]
    return lambda g: write(g, np.where(compare(a(g), b(g)), np.asarray(yes).astype(dtype), dtype.type(0)))


@handles("selp", "slct")
def select(ins, program):
    kind = kind_of(ins) if ins.opcode == "selp" else next(m for m in ins.mods if m in TYPES)
    allow(ins, *(("ftz",) if ins.opcode == "slct" else ()))
    if len(ins.operands) != 4:
        raise NotEmulated(ins.line, ins.text)
    a, b = (program.reader(o, kind, ins) for o in ins.operands[1:3])
    write = program.writer(ins.operands[0], kind, ins)
    if ins.opcode == "selp":
        p = program.reader(ins.operands[3], "pred", ins)
        return lambda g: write(g, np.where(p(g), a(g), b(g)))
    (c,) = flushing(ins, kind_of(ins), program.reader(ins.operands[3], kind_of(ins), ins))
    return lambda g: write(g, np.where(np.asarray(c(g)) >= 0, a(g), b(g)))
