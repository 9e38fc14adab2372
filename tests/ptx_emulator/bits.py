"""Bits: logic, shifts, fields, permutations of bytes, counts, carries, dot products of bytes."""

from __future__ import annotations

import numpy as np

from .parse import Imm
from .program import TYPES, handles
from .report import NotEmulated
from .scalar import allow, kind_of, wrap


@handles("and", "or", "xor")
def logic(ins, program):
    kind = kind_of(ins)
    allow(ins)
    f = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[ins.opcode]
    return wrap(ins, kind, f, 2, program)


@handles("shl", "shr")
def shift(ins, program):
    kind = kind_of(ins)
    allow(ins)
    bits = TYPES[kind].itemsize * 8
    value, amount = program.reader(ins.operands[1], kind, ins), program.reader(ins.operands[2], "u32", ins)
    write = program.writer(ins.operands[0], kind, ins)
    left, signed = ins.opcode == "shl", kind.startswith("s")

    def step(g):
        x, n = np.asarray(value(g)), np.asarray(amount(g)).astype(np.uint64)
        small = np.minimum(n, bits - 1).astype(x.dtype)
        y = np.left_shift(x, small) if left else np.right_shift(x, small)
        write(g, y if signed and not left else np.where(n >= bits, x.dtype.type(0), y))

    return step


@handles("shf")
def funnel(ins, program):
    if len(ins.mods) != 3 or ins.mods[0] not in "lr" or ins.mods[1] not in ("wrap", "clamp") or ins.mods[2] != "b32":
        raise NotEmulated(ins.line, ins.text)
    low, high, amount = (program.reader(o, "u32", ins) for o in ins.operands[1:4])
    write = program.writer(ins.operands[0], "u32", ins)
    left, clamp = "l" in ins.mods, "clamp" in ins.mods

    def step(g):
        both = (np.asarray(high(g)).astype(np.uint64) << np.uint64(32)) | np.asarray(low(g)).astype(np.uint64)
        n = np.asarray(amount(g)).astype(np.uint64)
        n = np.minimum(n, np.uint64(32)) if clamp else n & np.uint64(31)
        y = (both << n) >> np.uint64(32) if left else both >> n
        write(g, (y & np.uint64(0xFFFFFFFF)).astype(np.uint32))

    return step


@handles("lop3")
def lop3(ins, program):
    if any(mod not in ("b32",) for mod in ins.mods) or not isinstance(ins.operands[4], Imm):
        raise NotEmulated(ins.line, ins.text)
    a, b, c = (program.reader(o, "u32", ins) for o in ins.operands[1:4])
    write, table = program.writer(ins.operands[0], "u32", ins), ins.operands[4].bits
    terms = [i for i in range(8) if table >> i & 1]

    def step(g):
        x, y, z = (np.asarray(v, np.uint32) for v in (a(g), b(g), c(g)))
        out = np.zeros_like(x | y | z)
        for i in terms:
            out |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
        write(g, out)

    return step


@handles("prmt")
def prmt(ins, program):
    if ins.mods != ("b32",):
        raise NotEmulated(ins.line, ins.text)
    a, b, c = (program.reader(o, "u32", ins) for o in ins.operands[1:4])
    write = program.writer(ins.operands[0], "u32", ins)

    def step(g):
        both = (np.asarray(b(g)).astype(np.uint64) << np.uint64(32)) | np.asarray(a(g)).astype(np.uint64)
        chosen, out = np.asarray(c(g)).astype(np.uint64), np.uint64(0)
        for i in range(4):
            code = chosen >> np.uint64(4 * i) & np.uint64(15)
            byte = both >> ((code & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
            byte = np.where(code & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(255), byte)
            out = out | byte << np.uint64(8 * i)
        write(g, out.astype(np.uint32))

    return step


@handles("bfe")
def extract(ins, program):
    kind = kind_of(ins)
    allow(ins)
    bits = TYPES[kind].itemsize * 8
    value = program.reader(ins.operands[1], kind, ins)
    start, length = (program.reader(o, "u32", ins) for o in ins.operands[2:4])
    write = program.writer(ins.operands[0], kind, ins)

    def step(g):
        x = np.asarray(value(g)).astype(object)
        p, n = (np.asarray(v).astype(np.int64) & 255 for v in (start(g), length(g)))

        def one(x, p, n):
            field = (int(x) >> min(int(p), bits - 1 if kind[0] == "s" else bits)) & ((1 << int(n)) - 1)
            sign = int(x) >> min(int(p) + int(n) - 1, bits - 1) & 1 if n else 0
            return (field - (sign << min(int(n), bits)) if kind[0] == "s" else field) % (1 << bits)

        out = np.vectorize(one, otypes=[np.uint64])(x, p, n)
        write(g, np.atleast_1d(out).astype(TYPES[f"u{bits}"]).view(TYPES[kind]))

    return step


@handles("bfi")
def insert(ins, program):
    kind = kind_of(ins)
    allow(ins)
    bits = TYPES[kind].itemsize * 8
    source, base = (program.reader(o, f"u{bits}", ins) for o in ins.operands[1:3])
    start, length = (program.reader(o, "u32", ins) for o in ins.operands[3:5])
    write = program.writer(ins.operands[0], f"u{bits}", ins)

    def step(g):
        def one(a, b, p, n):
            mask = (((1 << int(n & 255)) - 1) << int(p & 255)) & ((1 << bits) - 1)
            return (int(b) & ~mask) | (int(a) << int(p & 255) & mask)

        args = (np.asarray(r(g)).astype(object) for r in (source, base, start, length))
        write(g, np.atleast_1d(np.vectorize(one, otypes=[np.uint64])(*args)).astype(TYPES[f"u{bits}"]))

    return step


@handles("dp4a")
def dp4a(ins, program):
    if len(ins.mods) != 2 or set(ins.mods) - {"u32", "s32"}:
        raise NotEmulated(ins.line, ins.text)
    first, second = ins.mods
    a, b = (program.reader(o, "u32", ins) for o in ins.operands[1:3])
    c, write = program.reader(ins.operands[3], "s32", ins), program.writer(ins.operands[0], "s32", ins)

    def step(g):
        def four(word, kind):
            word = np.ascontiguousarray(np.broadcast_to(np.asarray(word, np.uint32), (len(g.threads),)))
            return word.view(np.int8 if kind == "s32" else np.uint8).reshape(-1, 4).astype(np.int64)

        total = (four(a(g), first) * four(b(g), second)).sum(axis=1) + np.asarray(c(g)).astype(np.int64)
        write(g, (total & 0xFFFFFFFF).astype(np.uint32).view(np.int32))

    return step


@handles("popc", "clz", "brev", "bfind")
def count(ins, program):
    kind, op = kind_of(ins), ins.opcode
    allow(ins, *(("shiftamt",) if op == "bfind" else ()))
    bits = TYPES[kind].itemsize * 8
    read = program.reader(ins.operands[1], f"u{bits}", ins)
    write = program.writer(ins.operands[0], f"u{bits}" if op == "brev" else "u32", ins)
    planes = np.arange(bits, dtype=np.uint64)

    def step(g):
        x = np.atleast_1d(np.asarray(read(g))).astype(np.uint64)
        if op == "bfind" and kind.startswith("s"):
            x = np.where(x >> np.uint64(bits - 1), ~x & np.uint64((1 << bits) - 1), x)
        digits = (x[:, None] >> planes) & np.uint64(1)
        top = np.where(digits.any(axis=1), bits - 1 - digits[:, ::-1].argmax(axis=1), -1)
        if op == "popc":
            write(g, digits.sum(axis=1).astype(np.uint32))
        elif op == "clz":
            write(g, (bits - 1 - top).astype(np.uint32))
        elif op == "bfind":
            y = np.where(top < 0, -1, bits - 1 - top if "shiftamt" in ins.mods else top)
            write(g, y.astype(np.int32).view(np.uint32))
        else:
            write(g, (digits << planes[::-1]).sum(axis=1).astype(TYPES[f"u{bits}"]))

    return step


@handles("addc", "subc")
def carry(ins, program):
    """add.cc, sub.cc and what takes their carry up: of 32 bits."""
    kind = kind_of(ins)
    if kind not in ("u32", "s32", "b32") or set(ins.mods) - {"cc", kind}:
        raise NotEmulated(ins.line, ins.text)
    a, b = (program.reader(o, "u32", ins) for o in ins.operands[1:3])
    write = program.writer(ins.operands[0], "u32", ins)
    takes, gives, subtract = ins.opcode.endswith("c"), "cc" in ins.mods, ins.opcode.startswith("sub")

    def step(g):
        flags = g.cta.banks.setdefault("carry", np.zeros(g.cta.machine.threads, np.int64))
        x, y = (np.asarray(v).astype(np.int64) for v in (a(g), b(g)))
        c = flags[g.index] if takes else 0
        total = x - y - c if subtract else x + y + c
        if gives:
            flags[g.index] = (total < 0) if subtract else total >> 32
        write(g, (total & 0xFFFFFFFF).astype(np.uint32))

    return step
