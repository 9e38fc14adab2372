"""Which lane and register holds which element of a matrix, for mma, wgmma and their sparse forms.

Lane l = 4 g + t. per_word elements of one type lie in a 32-bit register, the first in its low bits. Every map is a
bijection between (lanes, registers, per_word) and (rows, columns), and is checked to be one when it is made.
Source: PTX ISA, "Matrix fragments" of mma, mma.sp and wgmma; the 2:4 specification, section 1.3.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

LANES = np.arange(32)[:, None, None]
G, T = LANES >> 2, LANES & 3


class Fragment(NamedTuple):
    """A matrix of `shape` spread over `registers` words of `per_word` elements in 32 lanes."""

    shape: tuple[int, int]
    registers: int
    per_word: int
    position: np.ndarray  # (32 * registers * per_word,) row * columns + column of each element
    order: np.ndarray  # its inverse

    def matrix(self, elements: np.ndarray) -> np.ndarray:
        """(..., 32, registers, per_word) to (..., rows, columns)."""
        lead = elements.shape[:-3]
        return elements.reshape(*lead, -1)[..., self.order].reshape(*lead, *self.shape)

    def elements(self, matrix: np.ndarray) -> np.ndarray:
        """(..., rows, columns) to (..., 32, registers, per_word)."""
        lead = matrix.shape[:-2]
        return matrix.reshape(*lead, -1)[..., self.position].reshape(*lead, 32, self.registers, self.per_word)


def _fragment(shape: tuple[int, int], rows: np.ndarray, columns: np.ndarray) -> Fragment:
    rows, columns = np.broadcast_arrays(rows, columns)
    position = (rows * shape[1] + columns).reshape(-1)
    order = np.argsort(position)
    if not np.array_equal(position[order], np.arange(shape[0] * shape[1])):
        raise ValueError(f"a fragment of {rows.shape} words does not hold every element of a {shape} matrix once")
    return Fragment(shape, rows.shape[1], rows.shape[2], position, order)


def _words(registers: int, per_word: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(registers)[None, :, None], np.arange(per_word)[None, None, :]


@cache
def a_fragment(registers: int, per_word: int) -> Fragment:
    """A (16, 2 registers per_word): register r is row g + 8 (r & 1), columns from per_word (4 (r >> 1) + t) on."""
    r, e = _words(registers, per_word)
    return _fragment((16, 2 * registers * per_word), G + 8 * (r & 1), per_word * (4 * (r >> 1) + T) + e)


@cache
def b_fragment(registers: int, per_word: int) -> Fragment:
    """B (4 registers per_word, 8): register r holds column g, from row 4 per_word r + t per_word on."""
    r, e = _words(registers, per_word)
    return _fragment((4 * registers * per_word, 8), per_word * (4 * r + T) + e, G + 0 * r)


@cache
def d_fragment(registers: int, per_word: int) -> Fragment:
    """C and D (16, 2 registers per_word) of mma, and of one warp of wgmma.

    Element i of a lane is row g + 8 (i >> 1 & 1), column 8 (i >> 2) + 2 t + (i & 1).
    """
    r, e = _words(registers, per_word)
    i = r * per_word + e
    return _fragment((16, 2 * registers * per_word), G + 8 * (i >> 1 & 1), 8 * (i >> 2) + 2 * T + (i & 1))


@cache
def matrix_8x8(trans: bool) -> Fragment:
    """8 x 8 elements of 16 bits, of ldmatrix, stmatrix, movmatrix: a lane holds row g, columns 2 t, 2 t + 1.

    trans: column g, rows 2 t, 2 t + 1.
    """
    _, e = _words(1, 2)
    rows, columns = G, 2 * T + e
    return _fragment((8, 8), *((columns, rows) if trans else (rows, columns)))


class Metadata(NamedTuple):
    """Where the nibble of a chunk of a row lies: from bit `shift` of the word of `lane` on; both (16, chunks)."""

    lane: np.ndarray
    shift: np.ndarray


@cache
def metadata(a_registers: int, per_register: int, selector: int) -> Metadata:
    """Of one mma.sp tile whose A is 2 or 4 registers a lane.

    per_register: nibbles that a register of A needs, 1 of 16 and 32-bit types, whose words of metadata serve rows g and
    g + 8, or 2 of 8 and 4-bit types, whose words serve one row.
    """
    row, q = np.arange(16)[:, None], np.arange(2 * a_registers * per_register)[None, :]
    g, upper = row & 7, row >> 3
    if per_register == 1 and a_registers == 4:
        lane, shift = 4 * g + 2 * selector + (q >> 2), 16 * upper + 4 * (q & 3)
    elif per_register == 1:
        lane, shift = 4 * g + selector, 16 * upper + 4 * q
    elif a_registers == 4:
        lane, shift = 4 * g + upper + 2 * (q >> 3), 4 * (q & 7)
    else:
        lane, shift = 4 * g + 2 * selector + upper, 4 * q
    return Metadata(*np.broadcast_arrays(lane, shift))
