"""Integers and bits in the emulator, against Python's integers."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from _ptx import check, signed

RNG = np.random.default_rng(7)


def integers(bits: int, count: int, extra: int = 120) -> list[np.ndarray]:
    """`count` arrays (uint): all combinations of edges where there are two, and random ones."""
    edges = [0, 1, 2, 7, (1 << bits) - 1, 1 << bits - 1, (1 << bits - 1) - 1, (1 << bits - 1) + 1, 0x5555555555555555]
    edges = [e % (1 << bits) for e in edges]
    rows = list(product(edges, repeat=2)) if count > 1 else [(e,) for e in edges]
    rows = [(*row, *(edges[int(i)] for i in RNG.integers(0, len(edges), count - len(row)))) for row in rows]
    for _ in range(extra):
        rows.append(
            tuple(int.from_bytes(RNG.bytes(bits // 8), "little") >> int(RNG.integers(0, bits)) for _ in range(count))
        )
    return [np.array(column, f"u{bits // 8}") for column in zip(*rows, strict=True)]


def quotient(a: int, b: int, bits: int) -> int:
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_integers(bits):
    s = lambda x: signed(x, bits)  # noqa: E731
    u, d, wide = f"u{bits}", f"u{bits // 8}", f"u{bits // 4}"
    cases = [
        (f"add.s{bits} {{}}, %a, %b;", d, lambda a, b, c: a + b),
        (f"sub.u{bits} {{}}, %a, %b;", d, lambda a, b, c: a - b),
        (f"mul.lo.s{bits} {{}}, %a, %b;", d, lambda a, b, c: a * b),
        (f"mul.hi.s{bits} {{}}, %a, %b;", d, lambda a, b, c: s(a) * s(b) >> bits),
        (f"mul.hi.{u} {{}}, %a, %b;", d, lambda a, b, c: a * b >> bits),
        (f"mad.lo.{u} {{}}, %a, %b, %c;", d, lambda a, b, c: a * b + c),
        (f"mad.hi.s{bits} {{}}, %a, %b, %c;", d, lambda a, b, c: (s(a) * s(b) >> bits) + c),
        (f"mad.hi.{u} {{}}, %a, %b, %c;", d, lambda a, b, c: (a * b >> bits) + c),
        (f"div.s{bits} {{}}, %a, %b;", d, lambda a, b, c: quotient(s(a), s(b), bits)),
        (f"div.{u} {{}}, %a, %b;", d, lambda a, b, c: quotient(a, b, bits)),
        (f"rem.s{bits} {{}}, %a, %b;", d, lambda a, b, c: s(a) - quotient(s(a), s(b), bits) * s(b) if b else a),
        (f"rem.{u} {{}}, %a, %b;", d, lambda a, b, c: a % b if b else a),
        (f"min.s{bits} {{}}, %a, %b;", d, lambda a, b, c: min(s(a), s(b))),
        (f"max.s{bits} {{}}, %a, %b;", d, lambda a, b, c: max(s(a), s(b))),
        (f"min.{u} {{}}, %a, %b;", d, lambda a, b, c: min(a, b)),
        (f"max.{u} {{}}, %a, %b;", d, lambda a, b, c: max(a, b)),
        (f"neg.s{bits} {{}}, %a;", d, lambda a, b, c: -a),
        (f"abs.s{bits} {{}}, %a;", d, lambda a, b, c: abs(s(a))),
        (f"not.b{bits} {{}}, %a;", d, lambda a, b, c: ~a),
        (f"cnot.b{bits} {{}}, %a;", d, lambda a, b, c: a == 0),
        (f"and.b{bits} {{}}, %a, %b;", d, lambda a, b, c: a & b),
        (f"or.b{bits} {{}}, %a, %b;", d, lambda a, b, c: a | b),
        (f"xor.b{bits} {{}}, %a, -2;", d, lambda a, b, c: a ^ -2),
        (f"add.s{bits} {{}}, %a, -7;", d, lambda a, b, c: a - 7),
        (f"sub.s{bits} {{}}, 0x10, %a;", d, lambda a, b, c: 16 - a),
        (f"selp.b{bits} {{}}, %a, %b, 1;", d, lambda a, b, c: a),
        (f"slct.u{bits}.s32 {{}}, %a, %b, -1;", d, lambda a, b, c: b),
    ]
    if bits < 64:
        cases += [
            (f"mul.wide.s{bits} {{}}, %a, %b;", wide, lambda a, b, c: s(a) * s(b)),
            (f"mul.wide.{u} {{}}, %a, %b;", wide, lambda a, b, c: a * b),
            (f"{{.reg .b{2 * bits} %t; cvt.u{2 * bits}.{u} %t, %c; mad.wide.s{bits} {{}}, %a, %b, %t;}}", wide,
             lambda a, b, c: s(a) * s(b) + c),
        ]  # fmt: skip
    if bits > 16:
        cases += [
            (f"popc.b{bits} {{}}, %a;", "u4", lambda a, b, c: a.bit_count()),
            (f"clz.b{bits} {{}}, %a;", "u4", lambda a, b, c: bits - a.bit_length()),
            (f"brev.b{bits} {{}}, %a;", d, lambda a, b, c: int(f"{a:0{bits}b}"[::-1], 2)),
            (f"bfind.{u} {{}}, %a;", "u4", lambda a, b, c: a.bit_length() - 1),
            (f"bfind.shiftamt.{u} {{}}, %a;", "u4", lambda a, b, c: bits - a.bit_length() if a else -1),
            (f"bfind.s{bits} {{}}, %a;", "u4", lambda a, b, c: (s(a) if s(a) >= 0 else ~s(a)).bit_length() - 1),
        ]
    for name, compare in COMPARISONS.items():
        cases.append((f"setp.{name}.s{bits} {{}}, %a, %b;", "?", lambda a, b, c, f=compare: f(s(a), s(b))))
        cases.append((f"setp.{name}.{u} {{}}, %a, %b;", "?", lambda a, b, c, f=compare: f(a, b)))
        cases.append((f"set.{name}.u32.s{bits} {{}}, %a, %b;", "u4", lambda a, b, c, f=compare: -f(s(a), s(b))))
    for name, unsigned in (("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge")):
        cases.append((f"setp.{name}.{u} {{}}, %a, %b;", "?", lambda a, b, c, f=COMPARISONS[unsigned]: f(a, b)))
    a, b, c = integers(bits, 3)
    check(cases, a=a, b=b, c=c)


COMPARISONS = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


def field(a: int, start: int, length: int, bits: int, is_signed: bool) -> int:
    """bfe, bit by bit as the ISA has it."""
    start, length, top = start & 255, length & 255, bits - 1
    sign = 0 if not is_signed or length == 0 else a >> min(start + length - 1, top) & 1
    return sum((a >> start + i & 1 if i < length and start + i <= top else sign) << i for i in range(bits))


def inserted(a: int, b: int, start: int, length: int, bits: int) -> int:
    """bfi, bit by bit."""
    start, length = start & 255, length & 255
    for i in range(length):
        if start + i < bits:
            b = b & ~(1 << start + i) | (a >> i & 1) << start + i
    return b


@pytest.mark.parametrize("bits", [32, 64])
def test_shifts_and_fields(bits):
    amounts = [0, 1, 5, 15, 16, 31, 32, 33, 63, 64, 65, 200, 255, 256, 257, 0x80000000, 0xFFFFFFFF]
    a, b = integers(bits, 2, 40)
    rows = [(int(x), int(y), n, m) for x, y in zip(a, b, strict=True) for n, m in RNG.choice(amounts, (3, 2))]
    rows += [
        (x, 0x0123456789ABCDEF % (1 << bits), n, m)
        for x in (0xF0F0F0F0, (1 << bits) - 1)
        for n in amounts
        for m in amounts
    ]
    a, b, n, m = (
        np.array(column, t)
        for column, t in zip(zip(*rows, strict=True), (f"u{bits // 8}",) * 2 + ("u4", "u4"), strict=True)
    )
    d = f"u{bits // 8}"
    cases = [
        (f"shl.b{bits} {{}}, %a, %n;", d, lambda a, b, n, m: a << min(n, 64)),
        (f"shr.u{bits} {{}}, %a, %n;", d, lambda a, b, n, m: a >> n),
        (f"shr.b{bits} {{}}, %a, 40;", d, lambda a, b, n, m: a >> 40),
        (f"shr.s{bits} {{}}, %a, %n;", d, lambda a, b, n, m: signed(a, bits) >> n),
        (f"shr.s{bits} {{}}, -5, %n;", d, lambda a, b, n, m: -5 >> n),
        (f"bfe.u{bits} {{}}, %a, %n, %m;", d, lambda a, b, n, m: field(a, n, m, bits, False)),
        (f"bfe.s{bits} {{}}, %a, %n, %m;", d, lambda a, b, n, m: field(a, n, m, bits, True)),
        (f"bfe.s{bits} {{}}, %a, 28, 4;", d, lambda a, b, n, m: field(a, 28, 4, bits, True)),
        (f"bfi.b{bits} {{}}, %a, %b, %n, %m;", d, lambda a, b, n, m: inserted(a, b, n, m, bits)),
        (f"bfi.b{bits} {{}}, %a, %b, 8, 8;", d, lambda a, b, n, m: inserted(a, b, 8, 8, bits)),
    ]
    if bits == 32:
        cases += [
            ("shl.b16 {}, %h, %n;", "u2", lambda a, b, n, m: (a & 0xFFFF) << min(n, 16)),
            ("shr.s16 {}, %h, %n;", "u2", lambda a, b, n, m: signed(a, 16) >> n),
            ("shr.u16 {}, %h, %n;", "u2", lambda a, b, n, m: (a & 0xFFFF) >> n),
            ("shf.l.wrap.b32 {}, %a, %b, %n;", "u4", lambda a, b, n, m: (b << 32 | a) << (n & 31) >> 32),
            ("shf.l.clamp.b32 {}, %a, %b, %n;", "u4", lambda a, b, n, m: (b << 32 | a) << min(n, 32) >> 32),
            ("shf.r.wrap.b32 {}, %a, %b, %n;", "u4", lambda a, b, n, m: (b << 32 | a) >> (n & 31)),
            ("shf.r.clamp.b32 {}, %a, %b, %n;", "u4", lambda a, b, n, m: (b << 32 | a) >> min(n, 32)),
        ]
        cases = [
            (text if "%h" not in text else f"{{.reg .b16 %h, %no; mov.b32 {{%h, %no}}, %a; {text}}}", *rest)
            for text, *rest in cases
        ]
    check(cases, a=a, b=b, n=n, m=m)


def permuted(a: int, b: int, selector: int) -> int:
    source = (b << 32 | a).to_bytes(8, "little")
    picked = [
        source[s & 7] if not s & 8 else 255 * (source[s & 7] >> 7) for s in (selector >> 4 * i & 15 for i in range(4))
    ]
    return int.from_bytes(bytes(picked), "little")


def dots(a: int, b: int, c: int, kinds: str) -> int:
    parts = [
        [signed(byte, 8) if kind == "s" else byte for byte in x.to_bytes(4, "little")]
        for x, kind in zip((a, b), kinds, strict=True)
    ]
    return c + sum(x * y for x, y in zip(*parts, strict=True))


def test_bits_of_words():
    tables = [0x00, 0xFF, 0xF0, 0xCC, 0xAA, 0x96, 0xE8, 0x6A, *RNG.integers(0, 256, 12).tolist()]

    def looked_up(a, b, c, lut):
        return sum((lut >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))

    a, b, c = integers(32, 3)
    cases = [
        (f"lop3.b32 {{}}, %a, %b, %c, {lut:#x};", "u4", lambda a, b, c, lut=lut: looked_up(a, b, c, lut))
        for lut in tables
    ]
    cases += [("prmt.b32 {}, %a, %b, %c;", "u4", permuted)]
    cases += [(f"prmt.b32 {{}}, %a, %b, 0x{i:x}{i:x}{(i + 5) % 16:x}{i:x};", "u4",
               lambda a, b, c, i=i: permuted(a, b, i * 0x1101 | (i + 5) % 16 << 4)) for i in range(16)]  # fmt: skip
    cases += [
        (f"dp4a.{x}32.{y}32 {{}}, %a, %b, %c;", "u4", lambda a, b, c, k=x + y: dots(a, b, c, k))
        for x, y in product("us", repeat=2)
    ]
    cases += [
        ("add.sat.s32 {}, %a, %b;", "u4", lambda a, b, c: min(max(signed(a, 32) + signed(b, 32), -(2**31)), 2**31 - 1)),
        ("sub.sat.s32 {}, %a, %b;", "u4", lambda a, b, c: min(max(signed(a, 32) - signed(b, 32), -(2**31)), 2**31 - 1)),
        ("{.reg .b32 %t; add.cc.u32 %t, %a, %b; addc.u32 {}, %c, %a;}", "u4", lambda a, b, c: c + a + (a + b >> 32)),
        ("{.reg .b32 %t; sub.cc.u32 %t, %a, %b; subc.u32 {}, %c, %a;}", "u4", lambda a, b, c: c - a - (a < b)),
        ("{.reg .b32 %t; add.cc.u32 %t, %a, %b; addc.cc.u32 %t, %c, %a; addc.u32 {}, 0, 0;}", "u4",
         lambda a, b, c: c + a + (a + b >> 32) >> 32),
        ("{.reg .b32 %t; sub.cc.u32 %t, %a, %b; subc.cc.u32 %t, %c, %a; subc.u32 {}, 0, 0;}", "u4",
         lambda a, b, c: -(c - a - (a < b) < 0)),
        ("{.reg .b16 %l, %u; mov.b32 {%l, %u}, %a; mov.b32 {}, {%u, %l};}", "u4", lambda a, b, c: a >> 16 | a << 16),
        ("mov.b64 {}, {%a, %b};", "u8", lambda a, b, c: b << 32 | a),
        ("{.reg .b64 %w; mov.b64 %w, {%a, %b}; mov.b64 {_, {}}, %w;}", "u4", lambda a, b, c: b),
    ]  # fmt: skip
    for kind in ("s16x2", "u16x2"):
        for op, f in (("add", lambda x, y: x + y), ("min", min), ("max", max)):

            def halves(a, b, c, f=f, kind=kind):
                value = (lambda x: signed(x, 16)) if kind[0] == "s" else (lambda x: x & 0xFFFF)
                return sum((f(value(a >> k), value(b >> k)) & 0xFFFF) << k for k in (0, 16))

            cases.append((f"{op}.{kind} {{}}, %a, %b;", "u4", halves))
    check(cases, a=a, b=b, c=c)
