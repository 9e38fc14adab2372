"""Float arithmetic of the emulator, bit for bit against exact fractions rounded once."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product
from math import copysign, inf, isfinite, isinf, isnan, nan

import numpy as np
import pytest
from _ptx import F32, FORMATS, Float, check, specials, table
from ptx_emulator import NotEmulated
from test_ptx_arithmetic import COMPARISONS


def codes(f: Float, count: int, rng: np.random.Generator, extra: int = 150) -> list[np.ndarray]:
    """Arrays of bit patterns: pairs of all specials, random ones, ones near 1; a third where a sum or product ties."""
    edges = specials(f)
    rows = [
        (*pair, *(edges[int(i)] for i in rng.integers(0, len(edges), count - 2))) for pair in product(edges, repeat=2)
    ]
    width = f.bits // 8
    for i in range(extra):
        row = [int.from_bytes(rng.bytes(width), "little") for _ in range(count)]
        if i % 2:
            row = [
                code & ~(f.top) & ((1 << f.bits) - 1) | f.bias + int(rng.integers(-4, 5)) << f.m | code & f.sign
                for code in row
            ]
            row = [code & (f.sign | (f.top - 1 | (1 << f.m) - 1)) for code in row]
        rows.append(tuple(row))
        if count == 3:  # the sum nearly cancels, or the third decides a tie of the product
            x, y = f.decode(row[0]), f.decode(row[1])
            if isfinite(x) and isfinite(y) and x * y:
                p = Fraction(x) * Fraction(y)
                rows.append((row[0], row[1], f.encode(-p)))
                coarse = int(rng.integers(1, f.m))
                rows.append((row[0] >> coarse << coarse, row[1] >> f.m - coarse << f.m - coarse, row[2]))
                half = 1 << f.m - f.m // 2 - 1
                rows.append(
                    (f.bias << f.m | half, f.bias << f.m | half << f.m // 2 - 1, specials(f)[int(rng.integers(1, 4))])
                )
    return [np.array(column, f"u{width}") for column in zip(*rows, strict=True)]


def sign(x: float) -> float:
    return copysign(1.0, x)


def add(x: float, y: float):
    return Fraction(x) + Fraction(y) if isfinite(x) and isfinite(y) and (x or y) and x != -y else x + y


def mul(x: float, y: float):
    return Fraction(x) * Fraction(y) if isfinite(x) and isfinite(y) and x and y else x * y


def fma(x: float, y: float, z: float):
    p = mul(x, y)
    if isinstance(p, Fraction):
        total = p + Fraction(z) if isfinite(z) else z
        return 0.0 if total == 0 else total
    return z if isfinite(p) and z else p + z


def div(x: float, y: float):
    if isnan(x) or isnan(y) or (isinf(x) and isinf(y)) or (x == 0 and y == 0):
        return nan
    if isinf(x) or y == 0:
        return inf * sign(x) * sign(y)
    return Fraction(x) / Fraction(y) if x and not isinf(y) else 0.0 * sign(x) * sign(y)


def root(x: float):
    if not x > 0 or isinf(x):
        return nan if x < 0 else x
    scaled = Fraction(x) * 4**1200
    whole = math.isqrt(int(scaled))
    return Fraction(2 * whole + (whole * whole != scaled), 2**1201)  # a bit more says "not exactly"


def smaller(x: float, y: float, propagates: bool = False) -> float:
    if isnan(x) or isnan(y):
        return nan if propagates or (isnan(x) and isnan(y)) else y if isnan(x) else x
    return x if (x, sign(x)) <= (y, sign(y)) else y


def larger(x: float, y: float, propagates: bool = False) -> float:
    return -smaller(-x, -y, propagates)


def truth(f: Float, op, ftz=False, sat=False, relu=False, take=None):
    """From bit patterns to the bit pattern of op's result."""

    def of(*rows):
        args = rows[: take or op.__code__.co_argcount]
        code = f.encode(op(*(f.decode(f.flushed(a) if ftz else a) for a in args)))
        code = f.flushed(code) if ftz else code
        value = f.decode(code)
        if sat:
            return f.encode(0.0 if isnan(value) or value <= 0 else min(value, 1.0))
        return f.encode(0.0) if relu and (value <= 0) else code

    return of


@pytest.mark.parametrize("kind", FORMATS)
def test_floats(kind):
    f, small = FORMATS[kind], kind in ("f16", "bf16")
    d, rng = f"u{f.bits // 8}", np.random.default_rng(3)
    cases = [
        (f"add.rn.{kind} {{}}, %a, %b;", d, truth(f, add)),
        (f"sub.rn.{kind} {{}}, %a, %b;", d, truth(f, lambda x, y: add(x, -y))),
        (f"mul.rn.{kind} {{}}, %a, %b;", d, truth(f, mul)),
        (f"fma.rn.{kind} {{}}, %a, %b, %c;", d, truth(f, fma)),
        (f"min.{kind} {{}}, %a, %b;", d, truth(f, smaller, take=2)),
        (f"max.{kind} {{}}, %a, %b;", d, truth(f, larger, take=2)),
        (f"neg.{kind} {{}}, %a;", d, truth(f, lambda x: -x)),
        (f"abs.{kind} {{}}, %a;", d, truth(f, lambda x: abs(x))),
    ]
    if kind != "f64":
        cases += [
            (f"min.NaN.{kind} {{}}, %a, %b;", d, truth(f, lambda x, y: smaller(x, y, True))),
            (f"max.NaN.{kind} {{}}, %a, %b;", d, truth(f, lambda x, y: larger(x, y, True))),
        ]
    if small:
        cases.append((f"fma.rn.relu.{kind} {{}}, %a, %b, %c;", d, truth(f, fma, relu=True)))
    if kind in ("f16", "f32"):
        cases += [
            (f"add.rn.ftz.{kind} {{}}, %a, %b;", d, truth(f, add, ftz=True)),
            (f"mul.ftz.{kind} {{}}, %a, %b;", d, truth(f, mul, ftz=True)),
            (f"fma.rn.ftz.{kind} {{}}, %a, %b, %c;", d, truth(f, fma, ftz=True)),
            (f"min.ftz.{kind} {{}}, %a, %b;", d, truth(f, smaller, ftz=True, take=2)),
            (f"add.sat.{kind} {{}}, %a, %b;", d, truth(f, add, sat=True)),
            (f"mul.ftz.sat.{kind} {{}}, %a, %b;", d, truth(f, mul, ftz=True, sat=True)),
            (f"fma.rn.sat.{kind} {{}}, %a, %b, %c;", d, truth(f, fma, sat=True)),
            (f"neg.ftz.{kind} {{}}, %a;", d, truth(f, lambda x: -x, ftz=True)),
            (f"setp.gt.ftz.{kind} {{}}, %a, %b;", "?", compared(f, COMPARISONS["gt"], flushed=True)),
        ]
    if kind in ("f32", "f64"):
        cases += [
            (f"div.rn.{kind} {{}}, %a, %b;", d, truth(f, div)),
            (f"rcp.rn.{kind} {{}}, %a;", d, truth(f, lambda x: div(1.0, x))),
            (f"sqrt.rn.{kind} {{}}, %a;", d, truth(f, root)),
            (f"copysign.{kind} {{}}, %a, %b;", d, lambda a, b, c: b & (f.sign - 1) | a & f.sign),
            (f"testp.finite.{kind} {{}}, %a;", "?", lambda a, b, c: isfinite(f.decode(a))),
            (f"testp.infinite.{kind} {{}}, %a;", "?", lambda a, b, c: isinf(f.decode(a))),
            (f"testp.number.{kind} {{}}, %a;", "?", lambda a, b, c: not isnan(f.decode(a))),
            (f"testp.notanumber.{kind} {{}}, %a;", "?", lambda a, b, c: isnan(f.decode(a))),
            ("slct.b32.f32 {}, 5, 6, %a;" if kind == "f32" else "selp.f64 {}, %a, %b, 0;", "u4" if kind == "f32" else d,
             lambda a, b, c: b if kind == "f64" else 5 if F32.decode(a) >= 0 else 6),
        ]  # fmt: skip
    if kind == "f32":
        cases += [
            ("div.full.f32 {}, %a, %b;", d, truth(f, div)),
            ("rcp.approx.ftz.f32 {}, %a;", d, truth(f, lambda x: div(1.0, x), ftz=True)),
            ("sqrt.approx.f32 {}, %a;", d, truth(f, root)),
            ("add.f32 {}, %a, 0fBF800000;", d, truth(f, lambda x: add(x, -1.0))),
            ("slct.ftz.u32.f32 {}, 5, 6, %a;", "u4", lambda a, b, c: 5 if F32.decode(F32.flushed(a)) >= 0 else 6),
            ("set.lt.f32.f32 {}, %a, %b;", "u4", lambda a, b, c: 0x3F800000 * (F32.decode(a) < F32.decode(b))),
            (
                "set.geu.ftz.u32.f32 {}, %a, %b;",
                "u4",
                lambda a, b, c: -(not F32.decode(F32.flushed(a)) < F32.decode(F32.flushed(b))),
            ),
        ]
    if kind != "bf16":
        for name, compare in COMPARISONS.items():
            cases.append((f"setp.{name}.{kind} {{}}, %a, %b;", "?", compared(f, compare)))
            cases.append((f"setp.{name}u.{kind} {{}}, %a, %b;", "?", compared(f, compare, unordered=True)))
        cases.append((f"setp.num.{kind} {{}}, %a, %b;", "?", compared(f, lambda x, y: True)))
        cases.append((f"setp.nan.{kind} {{}}, %a, %b;", "?", compared(f, lambda x, y: False, unordered=True)))
    a, b, c = codes(f, 3, rng)
    check(cases, a=a, b=b, c=c)


def compared(f: Float, compare, unordered=False, flushed=False):
    def of(a, b, c):
        x, y = (f.decode(f.flushed(v) if flushed else v) for v in (a, b))
        return unordered if isnan(x) or isnan(y) else compare(x, y)

    return of


def both(one):
    """A truth of halves, for pairs of them."""
    return lambda *rows: one(*(r & 0xFFFF for r in rows)) | one(*(r >> 16 for r in rows)) << 16


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_packed_floats(kind):
    f, rng = FORMATS[kind], np.random.default_rng(4)
    cases = [
        (f"add.rn.{kind}x2 {{}}, %a, %b;", "u4", both(truth(f, add))),
        (f"sub.{kind}x2 {{}}, %a, %b;", "u4", both(truth(f, lambda x, y: add(x, -y)))),
        (f"mul.{kind}x2 {{}}, %a, %b;", "u4", both(truth(f, mul))),
        (f"fma.rn.{kind}x2 {{}}, %a, %b, %c;", "u4", both(truth(f, fma))),
        (f"fma.rn.relu.{kind}x2 {{}}, %a, %b, %c;", "u4", both(truth(f, fma, relu=True))),
        (f"max.{kind}x2 {{}}, %a, %b;", "u4", both(truth(f, larger, take=2))),
        (f"min.NaN.{kind}x2 {{}}, %a, %b;", "u4", both(truth(f, lambda x, y: smaller(x, y, True)))),
        (f"neg.{kind}x2 {{}}, %a;", "u4", both(truth(f, lambda x: -x))),
        (f"abs.{kind}x2 {{}}, %a;", "u4", both(truth(f, lambda x: abs(x)))),
    ]
    low, high = (codes(f, 3, rng) for _ in range(2))
    n = min(len(low[0]), len(high[0]))
    a, b, c = (
        x[:n].astype(np.uint32) | rng.permutation(y[:n]).astype(np.uint32) << 16 for x, y in zip(low, high, strict=True)
    )
    check(cases, a=a, b=b, c=c)


FUNCTIONS = {
    "ex2": lambda x: inf if x >= 1000 else 2.0**x, "sin": math.sin, "cos": math.cos, "tanh": math.tanh,
    "lg2": lambda x: math.log2(x) if x > 0 else -inf if x == 0 else nan,
    "rsqrt": lambda x: 1 / math.sqrt(x) if x > 0 else copysign(inf, x) if x == 0 else nan,
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_approximate_functions(name):
    """Within two units in the last place, where hardware promises no more; exact at the ends."""
    x = np.concatenate(
        [np.linspace(-30, 30, 301), [0.0, -0.0, 127.5, -140.25, -200, 1000, np.inf, -np.inf, np.nan]]
    ).astype(np.float32)
    if name in ("sin", "cos"):
        x = x[np.isfinite(x)]
    got, flushed = table(
        [(f"{name}.approx{'' if name == 'tanh' else ftz}.f32 {{}}, %a;", "f4") for ftz in ("", ".ftz")], a=x
    )
    for value, approximate, zeroed in zip(x.tolist(), got.tolist(), flushed.tolist(), strict=True):
        exact = FUNCTIONS[name](value)
        assert isnan(exact) == isnan(approximate) and (
            isnan(exact) or isinf(exact) == isinf(approximate) or exact > 3e38
        )
        if isfinite(exact) and exact < 3e38:
            assert abs(approximate - exact) <= max(2.0**-22 * abs(exact), 2.0**-149) and sign(exact) == sign(
                approximate
            )
        if abs(exact) < 2.0**-126 and name != "tanh":
            assert zeroed == 0
    with pytest.raises(NotEmulated, match="rz"):
        table([(f"{name}.rz.f32 {{}}, %a;", "f4")], a=x)
