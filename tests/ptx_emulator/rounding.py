"""Floats rounded once: bf16, fused products, what .ftz flushes, and the one NaN that arithmetic gives."""

from __future__ import annotations

from fractions import Fraction

import numpy as np


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Half to even."""
    x = np.asarray(x, np.float32)
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


NAN = {d: np.array(bits, f"u{d.itemsize}").view(d)[()] for d, bits in (
    (np.dtype("f2"), 0x7FFF), (np.dtype("f4"), 0x7FFFFFFF), (np.dtype("f8"), 0x7FF8000000000000)
)}  # fmt: skip


def canonical(x: np.ndarray) -> np.ndarray:
    nan = x != x
    return np.where(nan, NAN[x.dtype], x) if nan.any() else x


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers become zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def odd32(x: np.ndarray) -> np.ndarray:
    """float64 to float32 rounded to odd: it may be rounded once more, to fewer bits."""
    y = x.astype(np.float32)
    y = np.where(np.abs(y.astype(np.float64)) > np.abs(x), np.nextafter(y, np.float32(0)), y)
    return (np.atleast_1d(y).view(np.uint32) | (np.atleast_1d(y) < x) | (np.atleast_1d(y) > x)).view(np.float32)


def odd_fma(a, b, c) -> np.ndarray:
    """a b + c of float32 numbers, as float64 rounded to odd."""
    a, b, c = (np.asarray(v, np.float64) for v in (a, b, c))
    product = a * b  # exact
    total = product + c
    t = total - product
    error = (product - (total - t)) + (c - t)
    bits = np.atleast_1d(total).view(np.int64)
    odd = (bits & 1).astype(bool).reshape(total.shape)
    step = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    fix = (error != 0) & np.isfinite(error) & ~odd
    return np.where(fix, step, total)


def fma64(a, b, c) -> np.ndarray:
    """By fractions."""
    def one(x, y, z):
        product = x * y
        if not all(np.isfinite((x, y, z))) or x == 0 or y == 0:
            return z if np.isinf(z) and np.isfinite((x, y)).all() else product + z
        total = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        try:
            return float(total) if total else 0.0 if z else product  # a product that rounds to zero keeps its sign
        except OverflowError:
            return np.inf if total > 0 else -np.inf

    return np.vectorize(one, otypes=[np.float64])(a, b, c)
