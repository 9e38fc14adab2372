"""cvt: between integers and floats of all widths, with the rounding and saturation that are written."""

from __future__ import annotations

import numpy as np

from .floats8 import decode_e4m3, decode_e5m2, encode_e4m3, encode_e5m2, encode_tf32
from .program import TYPES, handles
from .report import NotEmulated
from .scalar import bf16_to_f32, f32_to_bf16, flush

EIGHT = {"e4m3x2": (decode_e4m3, encode_e4m3), "e5m2x2": (decode_e5m2, encode_e5m2)}
ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
KNOWN = {*ROUND, "rn", "rz", "rm", "rp", "ftz", "sat", "satfinite", "relu"}


@handles("cvt")
def cvt(ins, program):
    mods = list(ins.mods)
    if "pack" in mods:
        return pack(ins, program)
    if mods in (["rna", "tf32", "f32"], ["rn", "tf32", "f32"]):
        read, write = program.reader(ins.operands[1], "f32", ins), program.writer(ins.operands[0], "u32", ins)
        return lambda g: write(g, encode_tf32(read(g), ties_away=mods[0] == "rna"))
    types = [m for m in mods if m in TYPES or m in EIGHT]
    if len(types) != 2 or any(m not in KNOWN for m in mods if m not in types):
        raise NotEmulated(ins.line, ins.text)
    to, source = types
    if to in EIGHT or source in EIGHT:
        return eight(ins, program, to, source)
    if to in ("f16x2", "bf16x2"):
        return two(ins, program, to)
    if to == "bf16" or source == "bf16":
        return brain(ins, program, to, source)
    read, write = program.reader(ins.operands[1], source, ins), program.writer(ins.operands[0], to, ins)
    rounding = next((m for m in mods if m in KNOWN - {"ftz", "sat", "satfinite", "relu"}), None)
    ftz, sat, relu = "ftz" in mods, "sat" in mods, "relu" in mods
    a, b = TYPES[source], TYPES[to]
    if a.kind == "f" and b.kind in "iu":
        return lambda g: write(g, to_integer(flush(read(g)) if ftz else read(g), ROUND[rounding], b))
    if a.kind in "iu" and b.kind in "iu":
        if not sat:
            return lambda g: write(g, np.asarray(read(g)).astype(b))
        info = np.iinfo(b)
        return lambda g: write(g, np.clip(np.asarray(read(g)).astype(np.int64), info.min, info.max).astype(b))
    if a.kind in "iu":
        if rounding != "rn":
            raise NotEmulated(ins.line, ins.text)
        return lambda g: write(g, np.asarray(read(g)).astype(b))

    def floats(g):
        x = np.asarray(read(g))
        x = flush(x) if ftz and a.itemsize == 4 else x
        if rounding in ROUND:
            x = ROUND[rounding](x)
        if rounding in ("rz", "rm", "rp") and b.itemsize < a.itemsize:
            x = toward(x, rounding, b)
        y = x.astype(b)
        y = np.clip(y, 0, 1).astype(b) if sat else y
        write(g, np.maximum(y, b.type(0)) if relu else y)

    return floats


def toward(x: np.ndarray, rounding: str, to: np.dtype) -> np.ndarray:
    """x moved so that a rounding to nearest of it is the directed one."""
    y = x.astype(to).astype(x.dtype)
    up = {"rz": x < 0, "rm": np.zeros(np.shape(x), bool), "rp": np.ones(np.shape(x), bool)}[rounding]
    beyond = np.where(up, y < x, y > x)
    other = np.where(y > x, np.nextafter(x.astype(to), to.type(-np.inf)), np.nextafter(x.astype(to), to.type(np.inf)))
    return np.where(beyond, other.astype(x.dtype), y)


def to_integer(x, rounding, to: np.dtype) -> np.ndarray:
    """Saturated; NaN is zero."""
    info = np.iinfo(to)
    x = rounding(np.asarray(x).astype(np.float64))
    x = np.where(np.isnan(x), 0.0, x)
    top = float(info.max)  # 2^63 - 1 rounds up to 2^63: what reaches it is clipped below
    inside = np.clip(x, float(info.min), np.nextafter(top, 0) if info.bits == 64 else top)
    return np.where(x >= top, to.type(info.max), inside.astype(to))


def eight(ins, program, to, source):
    """Between pairs of fp8 numbers and pairs of halves, or two float32."""
    relu, finite = "relu" in ins.mods, "satfinite" in ins.mods
    if to in EIGHT:
        if not finite:
            raise NotEmulated(ins.line, ins.text)
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
        low, high = (v.astype(np.float16).view(np.uint16).astype(np.uint32) for v in (low, high))
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
    if "rn" not in ins.mods:
        raise NotEmulated(ins.line, ins.text)

    def half(x):
        x = np.asarray(x, np.float32)
        x = np.maximum(x, np.float32(0)) if relu else x
        bits = f32_to_bf16(x) if to == "bf16x2" else x.astype(np.float16).view(np.uint16)
        return np.asarray(bits).astype(np.uint32)

    return lambda g: write(g, half(high(g)) << np.uint32(16) | half(low(g)))


def brain(ins, program, to, source):
    if {to, source} != {"bf16", "f32"} or (to == "bf16" and "rn" not in ins.mods):
        raise NotEmulated(ins.line, ins.text)
    if to == "bf16":
        read, write = program.reader(ins.operands[1], "f32", ins), program.writer(ins.operands[0], "u16", ins)
        return lambda g: write(g, f32_to_bf16(read(g)))
    read, write = program.reader(ins.operands[1], "u16", ins), program.writer(ins.operands[0], "f32", ins)
    return lambda g: write(g, bf16_to_f32(read(g)))


def pack(ins, program):
    """cvt.pack.sat.s8.s32.b32 d, a, b, c: d = c << 16 | sat(a) << 8 | sat(b), of 16 bits without c."""
    types = [m for m in ins.mods if m in TYPES]
    if "sat" not in ins.mods or types[1] != "s32" or types[0] not in ("s8", "u8", "s16", "u16"):
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
