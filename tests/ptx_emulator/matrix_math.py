"""What the matrix instructions compute, on plain arrays: words to numbers, metadata to positions, products to sums.

Integers are exact: a sum of 128 products of bytes lies below 2^24, so float32 holds it. Floating sums are exact
products added in float64 and rounded once to the accumulator's type; a tensor core adds in an order of its own and
truncates, so compare floats with a tolerance. Pruned positions are not read: infinities there do not reach the sum.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import floats8
from .fragments import Metadata

LEGAL = (0x4, 0x8, 0xC, 0x9, 0xD, 0xE)  # ascending pairs of two positions of four
LEGAL_UNORDERED = (*LEGAL, 0x1, 0x2, 0x3, 0x6, 0x7, 0xB)
LEGAL_PAIRS = (0x4, 0xE)  # one of two: tf32


class Type(NamedTuple):
    """An operand type: elements in a 32-bit word, integer or not, the accumulators it goes with."""

    per_word: int
    integer: bool
    accumulators: tuple[str, ...]
    family: str  # types of one family mix


TYPES = {
    "s8": Type(4, True, ("s32",), "8"),
    "u8": Type(4, True, ("s32",), "8"),
    "s4": Type(8, True, ("s32",), "4"),
    "u4": Type(8, True, ("s32",), "4"),
    "f16": Type(2, False, ("f32", "f16"), "f16"),
    "bf16": Type(2, False, ("f32",), "bf16"),
    "tf32": Type(1, False, ("f32",), "tf32"),
    "e4m3": Type(4, False, ("f32", "f16"), "f8"),
    "e5m2": Type(4, False, ("f32", "f16"), "f8"),
}


def numbers(words: np.ndarray, kind: str) -> np.ndarray:
    """uint32 (...) to float32 (..., per_word)."""
    words = np.ascontiguousarray(words, np.uint32)[..., None]
    if kind in ("s8", "u8"):
        return words.view(np.int8 if kind == "s8" else np.uint8).astype(np.float32)
    if kind in ("s4", "u4"):
        nibbles = (words >> np.arange(0, 32, 4, dtype=np.uint32)) & np.uint32(15)
        return (nibbles.astype(np.int8) ^ 8).astype(np.float32) - 8 if kind == "s4" else nibbles.astype(np.float32)
    if kind == "f16":
        return words.view(np.float16).astype(np.float32)
    if kind == "bf16":
        return floats8.decode_bf16(words.view(np.uint16))
    if kind == "tf32":
        return floats8.decode_tf32(words)
    return (floats8.decode_e4m3 if kind == "e4m3" else floats8.decode_e5m2)(words.view(np.uint8))


def accumulators(words: np.ndarray, kind: str) -> np.ndarray:
    """uint32 (...) to float64 (f16: two a word, f32: one) or int64 (s32: one) (..., per_word)."""
    words = np.ascontiguousarray(words, np.uint32)[..., None]
    if kind == "s32":
        return words.view(np.int32).astype(np.int64)
    return words.view(np.float16 if kind == "f16" else np.float32).astype(np.float64)


def accumulator_words(values: np.ndarray, kind: str, satfinite: bool = False) -> np.ndarray:
    """The way back, (..., per_word) to uint32 (...): rounded half to even; integers modulo 2^32, or clamped."""
    if kind == "s32":
        if satfinite:
            values = np.clip(values, -(2**31), 2**31 - 1)
        return (values & 0xFFFFFFFF).astype(np.uint32)[..., 0]
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(values.astype(np.float16 if kind == "f16" else np.float32))
    return values.view(np.uint32)[..., 0]


def nibbles(words: np.ndarray, where: Metadata) -> np.ndarray:
    """Metadata words (..., 32) of the lanes to the nibble of each row and chunk (..., 16, chunks)."""
    return (words[..., where.lane] >> where.shift.astype(np.uint32)) & np.uint32(15)


def positions(nibble: np.ndarray, kind: str) -> np.ndarray:
    """Nibbles (..., rows, chunks) to the logical column of every kept value (..., rows, kept)."""
    chunk = np.arange(nibble.shape[-1])
    nibble = nibble.astype(np.int64)
    if kind == "tf32":
        return 2 * chunk + (nibble >> 3)
    kept = np.stack([4 * chunk + (nibble & 3), 4 * chunk + (nibble >> 2)], axis=-1).reshape(*nibble.shape[:-1], -1)
    if kind in ("s4", "u4"):  # positions are of pairs
        kept = np.stack([2 * kept, 2 * kept + 1], axis=-1).reshape(*kept.shape[:-1], -1)
    return kept


def product(a: np.ndarray, b: np.ndarray, integer: bool, kept: np.ndarray | None = None) -> np.ndarray:
    """a (..., rows, K) times b (..., K, columns), int64 or float64. kept (..., rows, K / 2): columns of a values."""
    if integer:
        if kept is not None:
            a = expand(a, kept, b.shape[-2])
        return np.rint(a @ b).astype(np.int64)
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        if kept is None:
            return a @ b
        if np.isfinite(b).all():
            return expand(a, kept, b.shape[-2]) @ b
        lead = np.ix_(*[np.arange(n) for n in b.shape[:-2]], [0], [0])[:-2]
        return (a[..., None] * b[(*lead, kept)]).sum(axis=-2)


def expand(a: np.ndarray, kept: np.ndarray, K: int) -> np.ndarray:
    """The kept values at their places (..., rows, K), zeros between them."""
    dense = np.zeros((*a.shape[:-1], K), a.dtype)
    np.put_along_axis(dense, kept, a, axis=-1)
    return dense
