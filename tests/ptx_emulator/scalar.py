"""Arithmetic, logic, comparisons and moves, of one value or of two packed into a register.

Float32 is IEEE as written: fma rounds once, .ftz flushes, divisions and roots are correctly rounded in all their forms.
ex2, lg2, sin, cos, tanh and the approximate reciprocals are the correctly rounded functions: hardware may differ in the
last bit or two, so nothing bit-exact may rest on them.
"""

from __future__ import annotations

import numpy as np

from .parse import SINK, Instruction, Pair, Symbol, Vector
from .program import EXITED, TYPES, Program, handles
from .report import NotEmulated

PACKED = {"f16x2": "f16", "bf16x2": "bf16", "s16x2": "s16", "u16x2": "u16"}


def kind_of(ins: Instruction) -> str:
    """The type of an instruction: its last modifier that is one."""
    for mod in reversed(ins.mods):
        if mod in TYPES or mod in PACKED:
            return mod
    raise NotEmulated(ins.line, ins.text, "no type")


def allow(ins: Instruction, *mods: str) -> None:
    """Refuse modifiers other than these and types."""
    for mod in ins.mods:
        if mod not in mods and mod not in TYPES and mod not in PACKED:
            raise NotEmulated(ins.line, ins.text, f".{mod}")


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Half to even."""
    x = np.asarray(x, np.float32)
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def flush(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def fma32(a, b, c) -> np.ndarray:
    """a b + c rounded once: the float64 sum rounded to odd, then to float32."""
    a, b, c = (np.asarray(v, np.float64) for v in (a, b, c))
    product = a * b  # exact
    total = product + c
    t = total - product
    error = (product - (total - t)) + (c - t)
    bits = np.atleast_1d(total).view(np.int64)
    odd = (bits & 1).astype(bool).reshape(total.shape)
    step = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    fix = (error != 0) & np.isfinite(error) & ~odd
    return np.where(fix, step, total).astype(np.float32)


def _fma(kind):
    if kind == "f32":
        return fma32
    if kind == "f16":  # the product and the sum are exact in float64 but for bits a float16 cannot tell
        return lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float16)
    if kind == "bf16":
        return lambda a, b, c: fma32(a, b, c)
    if kind == "f64":
        return lambda a, b, c: (a.astype(np.longdouble) * b + c).astype(np.float64)
    return None


def wrap(ins: Instruction, kind: str, f, arity: int, program: Program):
    """A step that computes f of the sources, of every half where the type is packed."""
    if kind in PACKED:
        half = PACKED[kind]
        reads = [program.reader(o, "u32", ins) for o in ins.operands[1 : 1 + arity]]
        write = program.writer(ins.operands[0], "u32", ins)

        def halves(word):
            word = np.atleast_1d(np.asarray(word, np.uint32))
            both = word.view(np.uint16).reshape(-1, 2)
            return bf16_to_f32(both) if half == "bf16" else both.view(TYPES[half])

        def packed(g):
            out = f(*(halves(r(g)) for r in reads))
            out = f32_to_bf16(out) if half == "bf16" else np.asarray(out, TYPES[half]).view(np.uint16)
            write(g, np.ascontiguousarray(out).view(np.uint32).reshape(-1))

        return packed
    narrow = kind == "bf16"
    reads = [program.reader(o, "u16" if narrow else kind, ins) for o in ins.operands[1 : 1 + arity]]
    write = program.writer(ins.operands[0], "u16" if narrow else kind, ins)
    if narrow:
        return lambda g: write(g, f32_to_bf16(f(*(bf16_to_f32(r(g)) for r in reads))))
    if arity == 1:
        (read,) = reads
        return lambda g: write(g, f(read(g)))
    if arity == 2:
        first, second = reads
        return lambda g: write(g, f(first(g), second(g)))
    return lambda g: write(g, f(*(r(g) for r in reads)))


def finished(ins: Instruction, kind: str, f):
    """f with .ftz, .sat and .relu around it."""
    ftz, sat, relu = "ftz" in ins.mods and kind == "f32", "sat" in ins.mods, "relu" in ins.mods
    if not (ftz or sat or relu):
        return f

    def around(*args):
        y = f(*(flush(a) for a in args)) if ftz else f(*args)
        y = flush(y) if ftz else y
        if sat:
            y = np.where(np.isnan(y), y.dtype.type(0), np.clip(y, 0, 1).astype(y.dtype))
        return np.maximum(y, y.dtype.type(0)) if relu else y

    return around


def _minimum(kind, nan):
    if kind.startswith(("f", "bf")):
        return (np.minimum, np.maximum) if nan else (np.fmin, np.fmax)
    return np.minimum, np.maximum


ROUNDING = ("rn", "ftz", "sat", "approx", "full", "NaN", "relu", "noftz")


@handles("add", "sub", "mul", "min", "max", "div")
def binary(ins, program):
    kind, op = kind_of(ins), ins.opcode
    if op == "mul" and not kind.startswith(("f", "bf")):
        return multiply(ins, program)
    if "cc" in ins.mods:
        from .bits import carry

        return carry(ins, program)
    if "sat" in ins.mods and not kind.startswith(("f", "bf")):
        if kind != "s32":
            raise NotEmulated(ins.line, ins.text)
        f = {"add": np.add, "sub": np.subtract}[op]

        def saturated(a, b):
            wide = f(np.asarray(a).astype(np.int64), np.asarray(b).astype(np.int64))
            return np.clip(wide, -(2**31), 2**31 - 1).astype(np.int32)

        return wrap(ins, kind, saturated, 2, program)
    allow(ins, *ROUNDING)
    low, high = _minimum(PACKED.get(kind, kind), "NaN" in ins.mods)
    f = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": low, "max": high}.get(op)
    if op == "div":
        f = np.divide if kind.startswith("f") else _integer_division(kind)
    return wrap(ins, kind, finished(ins, kind, f), 2, program)


def _integer_division(kind):
    def divide(a, b):
        safe = np.where(b == 0, 1, b).astype(np.asarray(b).dtype)
        if kind.startswith("u"):
            return np.where(b == 0, np.asarray(a).dtype.type(-1 % (1 << 8 * safe.itemsize)), a // safe)
        q = np.abs(np.asarray(a).astype(np.int64)) // np.abs(safe.astype(np.int64))
        return np.where(b == 0, -1, np.where((a < 0) ^ (safe < 0), -q, q)).astype(np.asarray(a).dtype)

    return divide


@handles("rem")
def remainder(ins, program):
    kind = kind_of(ins)
    divide = _integer_division(kind)
    return wrap(ins, kind, lambda a, b: np.where(b == 0, a, a - divide(a, b) * b), 2, program)


def _wider(kind: str) -> str:
    return kind[0] + str(2 * int(kind[1:]))


def _product(ins, a, b, kind):
    """The whole product, as int of twice the width; of 64 bits only its low half."""
    bits = int(kind[1:])
    if bits == 64:
        return np.asarray(a) * b
    wide = np.int64 if kind[0] == "s" else np.uint64
    return np.asarray(a).astype(wide) * np.asarray(b).astype(wide)


def multiply(ins, program):
    return mad(ins, program, addend=False)


@handles("mad", "mul24", "mad24")
def mad(ins, program, addend=True):
    kind = kind_of(ins)
    if kind.startswith("f"):
        return fma(ins, program)
    allow(ins, "lo", "hi", "wide")
    bits, wide = int(kind[1:]), "wide" in ins.mods
    result = _wider(kind) if wide else kind
    a, b = (program.reader(o, kind, ins) for o in ins.operands[1:3])
    c = program.reader(ins.operands[3], result, ins) if addend else None
    write = program.writer(ins.operands[0], result, ins)
    dtype = TYPES[result]
    if "hi" in ins.mods and bits == 64:
        def high(x, y):
            n = np.broadcast(np.asarray(x), np.asarray(y)).size
            xs, ys = np.broadcast_to(x, (n,)), np.broadcast_to(y, (n,))
            return np.array([(int(p) * int(q) >> 64) % (1 << 64) for p, q in zip(xs, ys, strict=True)], np.uint64)
    elif "hi" in ins.mods:
        def high(x, y):
            return _product(ins, x, y, kind) >> np.asarray(bits, np.int64 if kind[0] == "s" else np.uint64)
    else:
        def high(x, y):
            return _product(ins, x, y, kind)

    def step(g):
        y = high(a(g), b(g)).astype(dtype)
        write(g, y if c is None else (y + c(g)).astype(dtype))

    return step


@handles("fma")
def fma(ins, program):
    kind = kind_of(ins)
    allow(ins, *ROUNDING)
    f = _fma(PACKED.get(kind, kind))
    return wrap(ins, kind, finished(ins, kind, f), 3, program)


@handles("neg", "abs", "not", "cnot")
def unary(ins, program):
    kind, op = kind_of(ins), ins.opcode
    if kind == "pred":
        return wrap(ins, kind, np.logical_not, 1, program)
    f = {
        "neg": np.negative, "abs": np.abs, "not": np.invert,
        "cnot": lambda a: (np.asarray(a) == 0).astype(TYPES[kind]),
    }[op]  # fmt: skip
    return wrap(ins, kind, finished(ins, kind, f) if kind.startswith(("f", "bf")) else f, 1, program)


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
    if kind in PACKED or kind == "bf16":
        raise NotEmulated(ins.line, ins.text)
    a, b = (program.reader(o, kind, ins) for o in ins.operands[1:3])
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
        if write_second is not None:
            write_second(g, join(~p, other(g)) if join else ~p)
        write(g, join(p, other(g)) if join else p)

    return step


@handles("set")
def set_(ins, program):
    """1.0 or all ones where the comparison holds."""
    types = [m for m in ins.mods if m in TYPES]
    a, b = (program.reader(o, types[1], ins) for o in ins.operands[1:3])
    write, compare = program.writer(ins.operands[0], types[0], ins), _compare(ins, types[1])
    if len(ins.operands) > 3:
        raise NotEmulated(ins.line, ins.text)
    yes = 1 if types[0] == "f32" else -1
    dtype = TYPES[types[0]]
    return lambda g: write(g, np.where(compare(a(g), b(g)), np.asarray(yes).astype(dtype), dtype.type(0)))


@handles("selp", "slct")
def select(ins, program):
    kind = kind_of(ins) if ins.opcode == "selp" else next(m for m in ins.mods if m in TYPES)
    a, b = (program.reader(o, kind, ins) for o in ins.operands[1:3])
    write = program.writer(ins.operands[0], kind, ins)
    if ins.opcode == "selp":
        p = program.reader(ins.operands[3], "pred", ins)
        return lambda g: write(g, np.where(p(g), a(g), b(g)))
    c = program.reader(ins.operands[3], kind_of(ins), ins)
    return lambda g: write(g, np.where(np.asarray(c(g)) >= 0, a(g), b(g)))


FUNCTIONS = {
    "rcp": lambda x: x.dtype.type(1) / x, "sqrt": np.sqrt, "rsqrt": lambda x: (1 / np.sqrt(x.astype(np.float64))),
    "ex2": lambda x: np.exp2(x.astype(np.float64)), "lg2": lambda x: np.log2(x.astype(np.float64)),
    "sin": lambda x: np.sin(x.astype(np.float64)), "cos": lambda x: np.cos(x.astype(np.float64)),
    "tanh": lambda x: np.tanh(x.astype(np.float64)),
}  # fmt: skip


@handles(*FUNCTIONS)
def function(ins, program):
    kind = kind_of(ins)
    allow(ins, "approx", "rn", "ftz", "full")
    if kind not in ("f32", "f16", "f16x2", "f64"):
        raise NotEmulated(ins.line, ins.text)
    f, dtype = FUNCTIONS[ins.opcode], TYPES[PACKED.get(kind, kind)]
    return wrap(ins, kind, finished(ins, kind, lambda x: np.asarray(f(np.asarray(x))).astype(dtype)), 1, program)


@handles("copysign")
def copysign(ins, program):
    return wrap(ins, kind_of(ins), lambda a, b: np.copysign(b, a), 2, program)


@handles("testp")
def testp(ins, program):
    tests = {"finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan, "number": lambda x: ~np.isnan(x)}
    f = next((tests[m] for m in ins.mods if m in tests), None)
    if f is None:
        raise NotEmulated(ins.line, ins.text)
    read, write = program.reader(ins.operands[1], kind_of(ins), ins), program.writer(ins.operands[0], "pred", ins)
    return lambda g: write(g, f(read(g)))


@handles("mov")
def mov(ins, program):
    kind = kind_of(ins)
    to, source = ins.operands
    if isinstance(source, Vector):  # {low, high} to one register
        parts = source.items
        bits = TYPES[kind].itemsize * 8 // len(parts)
        reads, write = [program.reader(p, f"u{bits}", ins) for p in parts], program.writer(to, kind, ins)

        def join(g):
            out = sum((np.asarray(r(g)).astype(np.uint64) << np.uint64(bits * i)) for i, r in enumerate(reads))
            write(g, np.broadcast_to(out, (len(g.threads),)).astype(TYPES[f"u{bits * len(parts)}"]).view(TYPES[kind]))

        return join
    if isinstance(to, Vector):
        bits = TYPES[kind].itemsize * 8 // len(to.items)
        read = program.reader(source, f"u{bits * len(to.items)}", ins)
        writes = [program.writer(p, f"u{bits}", ins) for p in to.items]

        def split(g):
            word = np.asarray(read(g))
            for i, write in enumerate(writes):
                write(g, (word >> word.dtype.type(bits * i)).astype(TYPES[f"u{bits}"]))

        return split
    if isinstance(source, Symbol) and source != SINK and source.name.partition("+")[0] in program.local_offsets:
        raise NotEmulated(ins.line, ins.text, "the address of a local variable in its own space")
    read, write = program.reader(source, kind, ins), program.writer(to, kind, ins)
    return lambda g: write(g, read(g))


@handles("ret", "exit")
def leave(ins, program):
    return lambda g: EXITED


@handles("trap", "brkpt")
def trap(ins, program):
    return lambda g: g.fault(ins, "the kernel traps", 0)


@handles("bra")
def branch(ins, program):
    return lambda g: None  # the machine's own


@handles("nanosleep", "prefetch", "prefetchu", "griddepcontrol", "setmaxnreg", "pmevent", "discard", "applypriority")
def nothing(ins, program):
    """Hints; of griddepcontrol because one launch runs alone."""
    return lambda g: None


@handles("createpolicy")
def policy(ins, program):
    write = program.writer(ins.operands[0], "u64", ins)
    return lambda g: write(g, np.uint64(0))

