"""cvt in the emulator: every pair of types, rounding and saturation, against exact fractions rounded once."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product
from math import copysign, isfinite, isinf, isnan

import numpy as np
import pytest
from _ptx import BF16, E4M3, E5M2, F16, F32, F64, FORMATS, Float, check, signed, specials

INTEGERS = [f"{s}{b}" for b in (8, 16, 32, 64) for s in "us"]
ROUND = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


def limits(kind: str) -> tuple[int, int]:
    bits = int(kind[1:])
    return (0, (1 << bits) - 1) if kind[0] == "u" else (-(1 << bits - 1), (1 << bits - 1) - 1)


def value(code: int, kind: str) -> int:
    bits = int(kind[1:])
    return signed(code, bits) if kind[0] == "s" else code & ((1 << bits) - 1)


def test_integers_to_integers():
    """The source is read from a 64-bit register; the result extends to 64 bits as its type says."""
    edges = {sum(pair) for pair in product((limit for kind in INTEGERS for limit in limits(kind)), (-1, 0, 1))}
    a = np.array(
        [e % (1 << 64) for e in sorted(edges)] + np.random.default_rng(5).integers(0, 1 << 63, 20).tolist(), np.uint64
    )

    def converted(to, source, sat):
        def of(a):
            x, (low, high) = value(a, source), limits(to)
            return value(min(max(x, low), high) if sat else x, to)

        return of

    check([
        (f"cvt{sat}.{to}.{source} {{}}, %a;", "u8", converted(to, source, sat))
        for to in INTEGERS for source in INTEGERS for sat in ("", ".sat")
    ], a=a)  # fmt: skip


@pytest.mark.parametrize("kind", ["f16", "f32", "f64"])
def test_floats_to_integers(kind):
    f = FORMATS[kind]
    edges = [limit + d for to in INTEGERS for limit in limits(to) for d in (-1, -0.5, 0, 0.5, 1)]
    near = [f.encode(Fraction(e), mode) for e in edges for mode in ("rz", "rn", "rp")]
    near += [f.encode(Fraction(k, 4)) for k in range(-12, 13)] + specials(f)
    a = np.array(sorted(set(near)), f"u{f.bits // 8}")

    def converted(to, rounding, ftz):
        def of(code):
            x, (low, high) = f.decode(f.flushed(code) if ftz else code), limits(to)
            if isnan(x):
                return value(1 << int(to[1:]) - 1, to) if kind == "f64" or to[1:] == "64" else 0
            x = ROUND[rounding](x) if isfinite(x) else x
            return value(int(min(max(x, low), high)), to)

        return of

    flushes = ("", ".ftz") if kind == "f32" else ("",)
    cases = [
        (f"cvt.{r}{ftz}.{to}.{kind} {{}}, %a;", "u8", converted(to, r, ftz))
        for to, r, ftz in product(INTEGERS, ROUND, flushes)
    ]
    check(cases, a=a)


def test_integers_to_floats():
    edges = {limit + d for kind in INTEGERS for limit in limits(kind) for d in (-1, 0, 1)}
    edges |= {(1 << p) + (1 << p - m - 1) + d for m in (10, 23, 52) for p in range(m + 2, 64, 3) for d in (-1, 0, 1)}
    a = np.array(sorted(e % (1 << 64) for e in edges), np.uint64)

    def converted(to, source):
        return lambda a: to.encode(Fraction(value(a, source)))

    cases = [
        (f"cvt.rn.{to}.{source} {{}}, %a;", f"u{FORMATS[to].bits // 8}", converted(FORMATS[to], source))
        for to, source in product(("f16", "f32", "f64"), INTEGERS)
    ]
    check(cases, a=a)


def cast(to: Float, source: Float, mode="rn", ftz=False, sat=False, relu=False, finite=False):
    def of(code, *_):
        x = source.decode(source.flushed(code) if ftz and source is F32 else code)
        out = to.encode(x, mode)
        out = to.flushed(out) if ftz and to is F32 else out
        y = to.decode(out)
        if finite and isinf(y):
            out = to.top - 1 | (to.sign if y < 0 else 0)
        if sat:
            return to.encode(0.0 if isnan(y) or y <= 0 else min(y, 1.0))
        return 0 if relu and y <= 0 else out

    return of


def whole(f: Float, rounding: str):
    """cvt to an integer in the same float format."""

    def of(code):
        x = f.decode(code)
        return f.encode(copysign(float(ROUND[rounding](x)), x) if isfinite(x) else x)

    return of


def narrowing_codes(to: Float, source: Float) -> np.ndarray:
    """Around every kind of tie and end of the narrow format."""
    narrow = [c for c in specials(to) if isfinite(to.decode(c))] + list(range(0, to.top, max(to.top // 60, 1)))
    found = set(specials(source))
    for code in narrow:
        x, above = Fraction(to.decode(code)), to.decode((code & ~to.sign) + 1)
        half = (abs(x) + Fraction(above)) / 2 if isfinite(above) else abs(x) * (1 + Fraction(1, 2 ** (to.m + 2)))
        for y in (abs(x), half):
            center = source.encode(y)
            found |= {center + d | s for d in (-1, 0, 1) for s in (0, source.sign) if 0 <= center + d < source.top}
    return np.array(sorted(found), f"u{source.bits // 8}")


@pytest.mark.parametrize("to,source", [("f16", "f32"), ("f16", "f64"), ("f32", "f64")])
def test_narrower_floats(to, source):
    t, s, d = FORMATS[to], FORMATS[source], f"u{FORMATS[to].bits // 8}"
    cases = [(f"cvt.{mode}.{to}.{source} {{}}, %a;", d, cast(t, s, mode)) for mode in ("rn", "rz", "rm", "rp")]
    cases.append((f"cvt.rn.sat.{to}.{source} {{}}, %a;", d, cast(t, s, sat=True)))
    if source == "f32":
        cases.append(("cvt.rn.ftz.f16.f32 {}, %a;", d, cast(t, s, ftz=True)))
        cases.append(("cvt.rn.relu.f16.f32 {}, %a;", d, cast(t, s, relu=True)))
        cases.append(("cvt.rn.satfinite.f16.f32 {}, %a;", d, cast(t, s, finite=True)))
    else:
        cases += [("cvt.rp.ftz.f32.f64 {}, %a;", d, cast(t, s, "rp", ftz=True))] if to == "f32" else []
    check(cases, a=narrowing_codes(t, s))


def test_wider_and_equal_floats():
    a = np.array(specials(F16) + list(range(0, 0x7C00, 97)), np.uint16)
    check([
        ("cvt.f32.f16 {}, %a;", "u4", cast(F32, F16)), ("cvt.f64.f16 {}, %a;", "u8", cast(F64, F16)),
        ("cvt.sat.f32.f16 {}, %a;", "u4", cast(F32, F16, sat=True)), ("cvt.f32.bf16 {}, %a;", "u4", cast(F32, BF16)),
        *((f"cvt.{r}.f16.f16 {{}}, %a;", "u2", whole(F16, r)) for r in ROUND),
    ], a=a)  # fmt: skip
    rng = np.random.default_rng(6)
    a = np.array(
        [
            *specials(F32),
            *(rng.integers(0, 1 << 32, 100).tolist()),
            *(F32.encode(Fraction(k, 4)) for k in range(-9, 10)),
        ],
        np.uint32,
    )
    check([
        ("cvt.sat.f32.f32 {}, %a;", "u4", cast(F32, F32, sat=True)), ("cvt.f64.f32 {}, %a;", "u8", cast(F64, F32)),
        ("cvt.ftz.f64.f32 {}, %a;", "u8", cast(F64, F32, ftz=True)),
        *((f"cvt.{r}.f32.f32 {{}}, %a;", "u4", whole(F32, r)) for r in ROUND),
    ], a=a)  # fmt: skip


def test_small_floats():
    """Pairs: the first source is the upper half."""

    def pair(t, s=F32, **options):
        one = cast(t, s, **options)
        return lambda a, b: one(a) << t.bits | one(b)

    for name, t, d in (("f16x2", F16, "u4"), ("bf16x2", BF16, "u4"), ("e4m3x2", E4M3, "u2"), ("e5m2x2", E5M2, "u2")):
        a = narrowing_codes(t, F32)
        sat = ".satfinite" if d == "u2" else ""
        options = {"finite": True} if sat else {}
        make = finite8 if sat else pair
        check([
            (f"cvt.rn{sat}.{name}.f32 {{}}, %a, %b;", d, make(t, **options)),
            (f"cvt.rn{sat}.relu.{name}.f32 {{}}, %a, %b;", d, make(t, relu=True, **options)),
        ], a=a, b=np.roll(a, 5))  # fmt: skip
    a = narrowing_codes(BF16, F32)
    check(
        [
            ("cvt.rn.bf16.f32 {}, %a;", "u2", cast(BF16, F32)),
            ("cvt.rn.relu.bf16.f32 {}, %a;", "u2", cast(BF16, F32, relu=True)),
        ],
        a=a,
    )


def finite8(t: Float, finite=True, relu=False):
    def one(code, source=F32):
        x = source.decode(code)
        if isnan(x):
            return 0x7F
        largest = t.decode(t.top - 1)
        out = t.encode(Fraction(min(max(x, -largest), largest)) if x else x)
        return 0 if relu and out & t.sign else out

    return lambda a, b: one(a) << 8 | one(b)


def test_eight_bits_to_halves_and_back():
    a = np.arange(256, dtype=np.uint16) | np.arange(256, dtype=np.uint16)[::-1] << 8
    cases = []
    for name, f in (("e4m3x2", E4M3), ("e5m2x2", E5M2)):

        def wide(a, f=f):
            return F16.encode(f.decode(a & 255)) | F16.encode(f.decode(a >> 8)) << 16

        cases.append((f"cvt.rn.f16x2.{name} {{}}, %a;", "u4", wide))
    check(cases, a=a)
    words = narrowing_codes(E4M3, F16)
    words = words.astype(np.uint32) | np.roll(words, 3).astype(np.uint32) << 16

    def narrow(t):
        f32 = lambda h: F32.encode(F16.decode(h))  # noqa: E731 - exact
        return lambda a: finite8(t)(f32(a >> 16), f32(a & 0xFFFF))

    check(
        [(f"cvt.rn.satfinite.{n}.f16x2 {{}}, %a;", "u2", narrow(t)) for n, t in (("e4m3x2", E4M3), ("e5m2x2", E5M2))],
        a=words,
    )


def test_tf32_and_packs():
    tf32 = Float(8, 10, 0x7FFFFFFF >> 13)
    a = narrowing_codes(tf32, F32)

    def to_tf32(mode):
        return lambda code: 0x7FFFFFFF if isnan(F32.decode(code)) else tf32.encode(F32.decode(code), mode) << 13

    check([("cvt.rna.tf32.f32 {}, %a;", "u4", to_tf32("rna")), ("cvt.rn.tf32.f32 {}, %a;", "u4", to_tf32("rn"))], a=a)
    edges = [e + d for e in (0, 127, -128, 255, 32767, -32768, 65535, 2**31 - 2, -(2**31) + 1) for d in (-1, 0, 1)]
    a, b = (np.array([x % 2**32 for x in column], np.uint32) for column in zip(*product(edges, repeat=2), strict=True))
    cases = []
    for to in ("s8", "u8", "s16", "u16"):
        low, high = limits(to)
        bits = int(to[1:])

        def packed(a, b, c, low=low, high=high, bits=bits):
            top, bottom = (min(max(signed(v, 32), low), high) & ((1 << bits) - 1) for v in (a, b))
            return top << bits | bottom | (c << 16 if bits == 8 else 0)

        tail = ".b32 {}, %a, %b, %c;" if bits == 8 else " {}, %a, %b;"
        cases.append((f"cvt.pack.sat.{to}.s32{tail}", "u4", packed))
    check(cases, a=a, b=b, c=np.random.default_rng(8).integers(0, 1 << 32, len(a)).astype(np.uint32))
