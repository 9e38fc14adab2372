"""Arithmetic and moves, of one value or of two packed into a register, and the end of a thread.

Floats are IEEE as written: fma rounds once, .ftz flushes, NaN is canonical but of 64 bits, divisions and roots are
correctly rounded in all their forms.
ex2, lg2, sin, cos, tanh and the approximate reciprocals are the correctly rounded functions: hardware may differ in the
last bit or two, so nothing bit-exact may rest on them.
"""

from __future__ import annotations

import numpy as np

from .parse import Instruction, Vector
from .program import EXITED, TYPES, Program, handles
from .report import NotEmulated
from .rounding import bf16_to_f32, canonical, f32_to_bf16, flush, fma64, odd32, odd_fma

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


def _fma(kind):
    if kind == "f32":
        return lambda a, b, c: odd_fma(a, b, c).astype(np.float32)
    if kind == "f16":  # the product and the sum are exact in float64 but for bits a float16 cannot tell
        return lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float16)
    if kind == "bf16":
        return lambda a, b, c: odd32(odd_fma(a, b, c)).reshape(np.shape(a))
    return fma64


def wrap(ins: Instruction, kind: str, f, arity: int, program: Program):
    """A step that computes f of the sources, of every half where the type is packed."""
    if len(ins.operands) != 1 + arity:
        raise NotEmulated(ins.line, ins.text, f"{len(ins.operands)} operands")
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
    """f with .ftz, .sat and .relu around it, and canonical NaN of floats."""
    ftz, sat, relu = ("ftz" in ins.mods, "sat" in ins.mods, "relu" in ins.mods)
    floating = kind.startswith(("f", "bf"))
    if (ftz and kind not in ("f32", "f16", "f16x2")) or (sat and not floating):
        raise NotEmulated(ins.line, ins.text)
    if not (floating or relu):
        return f

    def around(*args):
        y = np.asarray(f(*(flush(a) for a in args)) if ftz else f(*args))
        y = flush(y) if ftz else y
        if sat:
            y = np.where(y > 0, np.minimum(y, y.dtype.type(1)), y.dtype.type(0))
        y = np.where(y <= 0, y.dtype.type(0), y) if relu else y
        return canonical(y) if floating else y

    return around


def _minimum(kind, nan):
    if not kind.startswith(("f", "bf")):
        return np.minimum, np.maximum
    low, high = (np.minimum, np.maximum) if nan else (np.fmin, np.fmax)  # -0 is less than +0

    def smaller(a, b):
        return np.where((a == b) & np.signbit(a), a, np.where(a == b, b, low(a, b)))

    def larger(a, b):
        return np.where((a == b) & np.signbit(a), b, np.where(a == b, a, high(a, b)))

    return smaller, larger


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
        if kind != "s32" or op not in ("add", "sub") or set(ins.mods) != {"sat", "s32"}:
            raise NotEmulated(ins.line, ins.text)
        f = {"add": np.add, "sub": np.subtract}[op]

        def saturated(a, b):
            wide = f(np.asarray(a).astype(np.int64), np.asarray(b).astype(np.int64))
            return np.clip(wide, -(2**31), 2**31 - 1).astype(np.int32)

        return wrap(ins, kind, saturated, 2, program)
    allow(ins, *ROUNDING)
    low, high = _minimum(PACKED.get(kind, kind), "NaN" in ins.mods)
    f = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": low, "max": high}.get(op)
    if op == "mul" and kind.startswith("bf"):
        def f(a, b):  # a product below float32's normal numbers has more bits than it
            return odd32(a.astype(np.float64) * b).reshape(np.broadcast(a, b).shape)
    if op == "div":
        f = np.divide if kind in ("f32", "f64") else _integer_division(ins, kind)
    return wrap(ins, kind, finished(ins, kind, f), 2, program)


def _integer_division(ins, kind):
    if kind[0] not in "us" or kind in PACKED:
        raise NotEmulated(ins.line, ins.text)

    def magnitude(x):
        return np.abs(x).view(f"u{x.dtype.itemsize}")  # of the lowest number too

    def divide(a, b):
        safe = np.where(b == 0, 1, b).astype(np.asarray(b).dtype)
        if kind.startswith("u"):
            return np.where(b == 0, np.asarray(a).dtype.type(-1 % (1 << 8 * safe.itemsize)), a // safe)
        a = np.asarray(a)
        q = (magnitude(a) // magnitude(safe)).astype(a.dtype)
        return np.where(b == 0, -1, np.where((a < 0) ^ (safe < 0), -q, q)).astype(np.asarray(a).dtype)

    return divide


@handles("rem")
def remainder(ins, program):
    kind = kind_of(ins)
    allow(ins)
    divide = _integer_division(ins, kind)
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


@handles("mad")
def mad(ins, program, addend=True):
    kind = kind_of(ins)
    if kind.startswith("f"):
        return fma(ins, program)
    allow(ins, "lo", "hi", "wide")
    if len({"lo", "hi", "wide"} & set(ins.mods)) != 1 or len(ins.operands) != 3 + addend:
        raise NotEmulated(ins.line, ins.text)
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
    allow(ins, *(("ftz",) if op in ("neg", "abs") else ()))
    if kind == "pred":
        return wrap(ins, kind, np.logical_not, 1, program)
    f = {
        "neg": np.negative, "abs": np.abs, "not": np.invert,
        "cnot": lambda a: (np.asarray(a) == 0).astype(TYPES[kind]),
    }[op]  # fmt: skip
    return wrap(ins, kind, finished(ins, kind, f) if kind.startswith(("f", "bf")) else f, 1, program)


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
    if "approx" not in ins.mods and (ins.opcode not in ("rcp", "sqrt") or "rn" not in ins.mods):
        raise NotEmulated(ins.line, ins.text)
    f, dtype = FUNCTIONS[ins.opcode], TYPES[PACKED.get(kind, kind)]
    return wrap(ins, kind, finished(ins, kind, lambda x: np.asarray(f(np.asarray(x))).astype(dtype)), 1, program)


@handles("copysign")
def copysign(ins, program):
    allow(ins)
    return wrap(ins, kind_of(ins), lambda a, b: np.copysign(b, a), 2, program)


@handles("testp")
def testp(ins, program):
    tests = {"finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan, "number": lambda x: ~np.isnan(x)}
    f = next((tests[m] for m in ins.mods if m in tests), None)
    allow(ins, *tests)
    if f is None:
        raise NotEmulated(ins.line, ins.text)
    read, write = program.reader(ins.operands[1], kind_of(ins), ins), program.writer(ins.operands[0], "pred", ins)
    return lambda g: write(g, f(read(g)))


@handles("mov")
def mov(ins, program):
    kind = kind_of(ins)
    allow(ins)
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
    if set(ins.mods) - {"uni"}:
        raise NotEmulated(ins.line, ins.text)
    return lambda g: None  # the machine's own


HINTS = {
    "nanosleep": {"u32"}, "prefetchu": {"L1"},
    "prefetch": {"global", "L1", "L2", "L2::evict_last", "L2::evict_normal", "tensormap", "param"},
    "pmevent": {"mask"},
    "setmaxnreg": {"inc", "dec", "sync", "aligned", "u32"}, "applypriority": {"global", "L2::evict_normal"},
}  # fmt: skip


@handles(*HINTS)
def nothing(ins, program):
    if set(ins.mods) - HINTS[ins.opcode]:
        raise NotEmulated(ins.line, ins.text)
    return lambda g: None


@handles("griddepcontrol")
def dependency(ins, program):
    if ins.mods not in (("wait",), ("launch_dependents",)):
        raise NotEmulated(ins.line, ins.text)

    def wait(g):
        g.cta.awaited = True

    return wait if ins.mods == ("wait",) else lambda g: None


@handles("createpolicy")
def policy(ins, program):
    write = program.writer(ins.operands[0], "u64", ins)
    return lambda g: write(g, np.uint64(0))

