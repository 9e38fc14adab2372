"""The inline assembly that unpacks weights, which no interpreter runs, executed here instruction by instruction.

That its plain form means the same follows: tests of the kernels hold that form to the same codes.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from _triton import random_codes, triton

from pyvit_accel.formats.packed import PLANES, pack

pytest.importorskip("triton", reason="triton is not installed")
BITS = tuple(bits for bits in PLANES if bits < 8)
MASK = np.uint64(0xFFFFFFFF)


def lop3(a, b, c, table):
    """The truth table's bit 4 a + 2 b + c, at every position."""
    result = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            x, y, z = (v if i >> n & 1 else ~v for v, n in ((a, 2), (b, 1), (c, 0)))
            result |= x & y & z
    return result & MASK


def prmt(a, b, selector):
    """Byte i is byte n & 7 of (b, a), n the selector's nibble i; where n & 8, its sign eight times."""
    both, result = a | b << np.uint64(32), np.zeros_like(a)
    for i in range(4):
        n = selector >> 4 * i & 15
        byte = both >> np.uint64(8 * (n & 7)) & np.uint64(255)
        byte = (byte >> np.uint64(7)) * np.uint64(255) if n & 8 else byte
        result |= byte << np.uint64(8 * i)
    return result


OPERATIONS = {
    "shl.b32": lambda a, n: a << n & MASK,
    "shr.b32": lambda a, n: a >> n,
    "shf.r.wrap.b32": lambda a, b, n: (b << np.uint64(32) | a) >> (n & np.uint64(31)) & MASK,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "add.u32": lambda a, b: a + b & MASK,
    "lop3.b32": lambda a, b, c, table: lop3(a, b, c, int(table)),
    "prmt.b32": lambda a, b, selector: prmt(a, b, int(selector)),
}


def execute(code, outputs, *inputs):
    """Runs PTX on arrays of 32-bit words: registers by name, $0 .. the outputs and then the inputs."""
    registers = {f"${outputs + n}": words.astype(np.uint64) for n, words in enumerate(inputs)}
    declaration, *lines = (line.strip() for line in code.strip("{ }").split(";") if line.strip())
    assert declaration.startswith(".reg .b32 ")
    for line in lines:
        name, target, *sources = re.split(r",?\s+", line)
        values = [registers[s] if s in registers else np.uint64(int(s, 0)) for s in sources]
        registers[target] = OPERATIONS[name](*values)
    return [registers[f"${n}"].astype(np.uint32) for n in range(outputs)]


def planes(q, bits):
    """The words (j, feature) that hold the inputs of both halves of a chunk, and the shift of each, for every plane."""
    data, j = pack(q, bits)[0, 64:].numpy(), np.arange(4)[:, None]
    for p in PLANES[bits]:
        words, data = data[: 64 * p].view(np.uint32).reshape(p, 16), data[64 * p :]
        yield words[np.arange(4) % p], np.broadcast_to((j // p * p).astype(np.uint32) * 0x01010101, (4, 16))


@pytest.mark.parametrize("bits", BITS)
def test_unpacks_the_codes(bits):
    from pyvit_accel.kernels._packed import unpack_asm, unpack_constraints

    for _ in range(20):
        q = random_codes(bits, 16, 32)
        words, shifts = zip(*planes(q, bits), strict=True)
        inputs = [*words, *(s for s, p in zip(shifts, PLANES[bits], strict=True) if p < 4)]
        code = str(unpack_asm(bits))
        assert str(unpack_constraints(bits)).split(",") == ["=&r"] * 2 + ["r"] * len(inputs)
        low, high = (half.view(np.int8).reshape(4, 16, 4) for half in execute(code, 2, *inputs))
        codes = np.concatenate([low, high]).transpose(1, 0, 2).reshape(16, 32)
        assert (codes == q.numpy().astype(np.int8) << (8 - bits)).all()


@pytest.mark.parametrize("bits, instructions", [(2, 5), (3, 10), (4, 3), (5, 8), (6, 8)])
def test_instructions_for_eight_codes(bits, instructions):
    from pyvit_accel.kernels._packed import unpack_asm

    assert str(unpack_asm(bits)).count(";") - 1 == instructions  # but the declaration


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_high_bits_become_e4m3(bits):
    """Every byte, in every place of a word."""
    from pyvit_accel.kernels._packed import _e4m3_asm

    h = np.arange(256, dtype=np.uint8)
    words = np.stack([h, h[::-1], np.roll(h, 85), np.roll(h, 200)], axis=1)
    (out,) = execute(str(_e4m3_asm(bits)), 1, words.copy().view(np.uint32)[:, 0])
    values = torch.from_numpy(out.view(np.uint8)).view(torch.float8_e4m3fn).double()
    assert torch.equal(values * 2**9, torch.from_numpy(words.reshape(-1).view(np.int8) >> (8 - bits)).double())


def test_uses_the_assembly_when_compiled():
    from pyvit_accel.kernels._packed import ASM

    assert ASM.value == (not triton.knobs.runtime.interpret)
