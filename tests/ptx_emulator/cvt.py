"""cvt: between integers and floats of all widths, with the rounding and saturation that are written."""

from __future__ import annotations

import numpy as np

from .floats8 import decode_e4m3, decode_e5m2, encode_e4m3, encode_e5m2, encode_tf32
from .program import TYPES, handles
from .report import NotEmulated
from .rounding import bf16_to_f32, canonical, f32_to_bf16, flush

EIGHT = {"e4m3x2": (decode_e4m3, encode_e4m3), "e5m2x2": (decode_e5m2, encode_e5m2)}
ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
DIRECTED = ("rn", "rz", "rm", "rp")


@handles("cvt")
def cvt(ins, program):
    mods = list(ins.mods)
    if "pack" in mods:
        return pack(ins, program)
    if mods in (["rna", "tf32", "f32"], ["rn", "tf32", "f32"]):
        read, write = program.reader(ins.operands[1], "f32", ins), program.writer(ins.operands[0], "u32", ins)
        return lambda g: write(g, encode_tf32(read(g), ties_away=mods[0] == "rna"))
    types = [m for m in mods if m in TYPES or m in EIGHT]
    if len(types) != 2 or len(ins.operands) != (3 if types[0].endswith("x2") and types[1] == "f32" else 2):
        raise NotEmulated(ins.line, ins.text)
    to, source = types
    if to in EIGHT or source in EIGHT:
        return eight(ins, program, to, source)
    if to in ("f16x2", "bf16x2"):
        return two(ins, program, to)
    if to == "bf16" or source == "bf16":
        return brain(ins, program, to, source)
    a, b = TYPES[source], TYPES[to]
    if "pred" in types or source.endswith("x2"):
        raise NotEmulated(ins.line, ins.text)
    read, write = program.reader(ins.operands[1], source, ins), program.writer(ins.operands[0], to, ins)
    if a.kind == "f" and b.kind == "f":
        f = floats(ins, a, b)
        return lambda g: write(g, f(np.asarray(read(g))))
    if a.kind == "f":
        (rounding,) = only(ins, *ROUND, optional=("ftz", "sat"))
        ftz = "ftz" in mods and source == "f32"
        return lambda g: write(g, to_integer(flush(np.asarray(read(g))) if ftz else read(g), ROUND[rounding], b))
    if b.kind == "f":
        only(ins, "rn")
        return lambda g: write(g, np.asarray(read(g)).astype(b))
    only(ins, optional=("sat",))
    if "sat" not in mods:
        return lambda g: write(g, np.asarray(read(g)).astype(b))
    low, high = max(np.iinfo(a).min, np.iinfo(b).min), min(np.iinfo(a).max, np.iinfo(b).max)
    return lambda g: write(g, np.clip(np.asarray(read(g)), a.type(low), a.type(high)).astype(b))


def only(ins, *one: str, optional: tuple = ()) -> list[str]:
    """The modifier that is one of `one`, if there are any of those; refuses what else is not a type or optional."""
    rest = [m for m in ins.mods if m not in TYPES and m not in EIGHT and m not in optional]
    if len(rest) != bool(one) or any(m not in one for m in rest):
        raise NotEmulated(ins.line, ins.text)
    return rest


def floats(ins, a: np.dtype, b: np.dtype):
    """Between f16, f32 and f64."""
    narrower, wider = b.itemsize < a.itemsize, b.itemsize > a.itemsize
    written = [m for m in ins.mods if m in DIRECTED or m in ROUND]
    steps = DIRECTED if narrower else () if wider else ROUND if written else ()
    rounding = (only(ins, *steps, optional=("ftz", "sat", "relu", "satfinite")) or [None])[0]
    ftz, relu, finite = ("ftz" in ins.mods, "relu" in ins.mods, "satfinite" in ins.mods)
    if (relu or finite) and (a.itemsize, b.itemsize) != (4, 2):
        raise NotEmulated(ins.line, ins.text)

    def convert(x):
        x = flush(x) if ftz and a.itemsize == 4 else x
        if rounding in ROUND:
            x = ROUND[rounding](x)
        if rounding in ("rz", "rm", "rp"):
            x = toward(x, rounding, b)
        y = x.astype(b)
        y = flush(y) if ftz and b.itemsize == 4 else y
        y = np.clip(y, np.finfo(b).min, np.finfo(b).max) if finite else y
        if "sat" in ins.mods:
            y = np.where(y > 0, np.minimum(y, b.type(1)), b.type(0))
        return canonical(np.where(y <= 0, b.type(0), y) if relu else y)

    return convert


def toward(x: np.ndarray, rounding: str, to: np.dtype) -> np.ndarray:
    """x moved so that a rounding to nearest of it is the directed one."""
    y = x.astype(to).astype(x.dtype)
    up = {"rz": x < 0, "rm": np.zeros(np.shape(x), bool), "rp": np.ones(np.shape(x), bool)}[rounding]
    beyond = np.where(up, y < x, y > x)
    other = np.where(y > x, np.nextafter(x.astype(to), to.type(-np.inf)), np.nextafter(x.astype(to), to.type(np.inf)))
    return np.where(beyond, other.astype(x.dtype), y)


def to_integer(x, rounding, to: np.dtype) -> np.ndarray:
    """Saturated; NaN is zero, or the highest bit alone where one of the types has 64 bits."""
    info = np.iinfo(to)
    unknown = np.uint64(1 << info.bits - 1 if 8 in (np.asarray(x).itemsize, to.itemsize) else 0).astype(to)
    x = rounding(np.asarray(x).astype(np.float64))
    nan = np.isnan(x)
    x = np.where(nan, 0.0, x)
    top = float(info.max)  # 2^63 - 1 rounds up to 2^63: what reaches it is clipped below
    inside = np.clip(x, float(info.min), np.nextafter(top, 0) if info.bits == 64 else top)
    return np.where(nan, unknown, np.where(x >= top, to.type(info.max), inside.astype(to)))


def eight(ins, program, to, source):
    """Between pairs of fp8 numbers and pairs of halves, or two float32."""
    only(ins, "rn", optional=("relu", "satfinite"))
    relu = "relu" in ins.mods
    if ("satfinite" in ins.mods) != (to in EIGHT):
        raise NotEmulated(ins.line, ins.text)
    if to in EIGHT:
        encode = EIGHT[to][1]
        write = program.writer(ins.operands[0], "u16", ins)
        if source == "f32":
            high, low = (program.reader(o, "f32", ins) for o in ins.operands[1:3])

            def values(g):
                return high(g), low(g)
        elif source == "f16x2":
            word = program.reader(ins.operands[1], "u32", ins)

            def values(g):
                halves = np.atleast_1d(np.asarray(word(g), np.uint32)).view(np.float16).reshape(-1, 2)
                return halves[:, 1].astype(np.float32), halves[:, 0].astype(np.float32)
        else:
            raise NotEmulated(ins.line, ins.text)

        def narrow(g):
            pair = [np.broadcast_to(np.asarray(v, np.float32), (len(g.threads),)) for v in values(g)]
            pair = [np.maximum(v, np.float32(0)) for v in pair] if relu else pair
            top, bottom = (encode(v).astype(np.uint16) for v in pair)
            write(g, top << np.uint16(8) | bottom)

        return narrow
    if to != "f16x2":
        raise NotEmulated(ins.line, ins.text)
    decode = EIGHT[source][0]
    read, write = program.reader(ins.operands[1], "u16", ins), program.writer(ins.operands[0], "u32", ins)

    def widen(g):
        both = np.asarray(read(g))
        low, high = (decode((both >> np.uint16(s) & np.uint16(255)).astype(np.uint8)) for s in (0, 8))
        low, high = (canonical(v.astype(np.float16)).view(np.uint16).astype(np.uint32) for v in (low, high))
        out = high << np.uint32(16) | low
        write(g, _relu(out) if relu else out)

    return widen


def _relu(pairs: np.ndarray) -> np.ndarray:
    halves = np.ascontiguousarray(pairs).view(np.float16)
    return np.maximum(halves, np.float16(0)).view(np.uint32)


def two(ins, program, to):
    """Two float32 to a pair, the first in the high half."""
    high, low = (program.reader(o, "f32", ins) for o in ins.operands[1:3])
    write, relu = program.writer(ins.operands[0], "u32", ins), "relu" in ins.mods
    only(ins, "rn", optional=("relu",))

    def half(x):
        x = np.asarray(x, np.float32)
        x = np.maximum(x, np.float32(0)) if relu else x
        bits = f32_to_bf16(x) if to == "bf16x2" else canonical(x.astype(np.float16)).view(np.uint16)
        return np.asarray(bits).astype(np.uint32)

    return lambda g: write(g, half(high(g)) << np.uint32(16) | half(low(g)))


def brain(ins, program, to, source):
    if {to, source} != {"bf16", "f32"}:
        raise NotEmulated(ins.line, ins.text)
    only(ins, *(("rn",) if to == "bf16" else ()), optional=("relu",) if to == "bf16" else ())
    if to == "bf16":
        read, write = program.reader(ins.operands[1], "f32", ins), program.writer(ins.operands[0], "u16", ins)
        relu = "relu" in ins.mods
        return lambda g: write(g, f32_to_bf16(np.maximum(read(g), np.float32(0)) if relu else read(g)))
    read, write = program.reader(ins.operands[1], "u16", ins), program.writer(ins.operands[0], "f32", ins)
    return lambda g: write(g, bf16_to_f32(read(g)))


def pack(ins, program):
    """cvt.pack.sat.s8.s32.b32 d, a, b, c: d = c << 16 | sat(a) << 8 | sat(b), of 16 bits without c."""
    types = [m for m in ins.mods if m in TYPES]
    known = len(types) in (2, 3) and types[0] in ("s8", "u8", "s16", "u16") and types[1:] in (["s32"], ["s32", "b32"])
    if not known or set(ins.mods) != {"pack", "sat", *types} or len(ins.operands) != len(types) + 1:
        raise NotEmulated(ins.line, ins.text)
    info, bits = np.iinfo(TYPES[types[0]]), TYPES[types[0]].itemsize * 8
    a, b = (program.reader(o, "s32", ins) for o in ins.operands[1:3])
    c = program.reader(ins.operands[3], "u32", ins) if len(ins.operands) > 3 else None
    write = program.writer(ins.operands[0], "u32", ins)

    def step(g):
        clipped = (np.clip(np.asarray(v(g)), info.min, info.max).astype(np.int64) for v in (a, b))
        high, low = ((v & ((1 << bits) - 1)).astype(np.uint32) for v in clipped)
        rest = np.uint32(0) if c is None else np.asarray(c(g), np.uint32) << np.uint32(2 * bits)
        write(g, rest | high << np.uint32(bits) | low)

    return step
