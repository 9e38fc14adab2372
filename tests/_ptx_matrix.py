"""Kernels of one instruction for the emulator's tests, and where the PTX ISA says its matrices' elements lie."""

from __future__ import annotations

import struct

import numpy as np
import torch
from ptx_emulator import Memory, load, run

HEAD = """.version 8.7
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 in, .param .u64 out, .param .u64 image)
{
.reg .pred %p<8>; .reg .b16 %h<2>; .reg .b32 %i<160>; .reg .b32 %o<160>; .reg .b32 %x<64>; .reg .b64 %d<64>;
"""


def kernel(body: str, inputs: int, outputs: int, threads: int, shared: int) -> str:
    """PTX: words to %i0.., `shared` bytes to the tile at %x0, the body, %o0.. to the output. %x1 is the thread."""
    lines = [HEAD, f".shared .align 1024 .b8 tile[{shared}];" if shared else "", "mov.u32 %x1, %tid.x;"]
    lines += ["ld.param.u64 %d0, [in];", "ld.param.u64 %d1, [out];", "ld.param.u64 %d2, [image];"]
    lines += [f"mul.wide.u32 %d3, %x1, {4 * inputs};", "add.s64 %d0, %d0, %d3;"]
    lines += [f"mul.wide.u32 %d3, %x1, {4 * outputs};", "add.s64 %d1, %d1, %d3;"]
    lines += [f"ld.global.u32 %i{i}, [%d0+{4 * i}];" for i in range(inputs)]
    if shared:
        lines += ["mov.u32 %x0, tile;", "shl.b32 %x2, %x1, 4;", "add.u32 %x3, %x0, %x2;"]
        lines += ["cvt.u64.u32 %d3, %x2;", "add.s64 %d2, %d2, %d3;"]
        for at in range(0, shared, 16 * threads):
            lines += [f"ld.global.v4.u32 {{%x4,%x5,%x6,%x7}}, [%d2+{at}];"]
            lines += [f"st.shared.v4.u32 [%x3+{at}], {{%x4,%x5,%x6,%x7}};"]
        lines += ["fence.proxy.async;", "bar.sync 0;"]
    lines += [body]
    lines += [f"st.global.u32 [%d1+{4 * i}], %o{i};" for i in range(outputs)]
    return "\n".join([*lines, "ret;", "}"])


def launch(body: str, inputs: np.ndarray, outputs: int, image: np.ndarray | None = None) -> np.ndarray:
    """Runs the body in one block.

    inputs (threads, n) words; image: what the tile holds; returns (threads, outputs) uint32.
    """
    threads = len(inputs)
    memory = Memory()
    given = memory.allocate("in", inputs.astype(np.uint32))
    out = memory.allocate("out", np.empty((threads, outputs), np.uint32), "write")
    shared = 0
    if image is not None:
        shared = -(-image.nbytes // (16 * threads)) * 16 * threads
        image = np.concatenate([image.view(np.uint8).reshape(-1), np.zeros(shared - image.nbytes, np.uint8)])
    bytes_at = memory.allocate("image", image if shared else np.zeros(1, np.uint8))
    program = load(kernel(body, inputs.shape[1], outputs, threads, shared), "kernel")
    run(program, 1, threads, struct.pack("<QQQ", given, out, bytes_at), memory)
    return memory["out"].view(np.uint32).reshape(threads, outputs)


def names(letter: str, first: int, count: int) -> str:
    return "{" + ",".join(f"%{letter}{first + i}" for i in range(count)) + "}"


# (row, column) of element i of a lane, g = lane // 4, t = lane % 4, as the PTX ISA spells it out per shape and type
A_LAYOUT = {
    ("m16n8k16", 16): lambda g, t, i: (g if i < 2 or 4 <= i < 6 else g + 8, 2 * t + (i & 1) + (8 if i >= 4 else 0)),
    ("m16n8k8", 16): lambda g, t, i: (g if i < 2 else g + 8, 2 * t + (i & 1)),
    ("m16n8k8", 32): lambda g, t, i: (g if i in (0, 2) else g + 8, t if i < 2 else t + 4),
    ("m16n8k4", 32): lambda g, t, i: (g if i == 0 else g + 8, t),
    ("m16n8k32", 8): lambda g, t, i: (g if i < 4 or 8 <= i < 12 else g + 8, 4 * t + (i & 3) + (16 if i >= 8 else 0)),
    ("m16n8k16", 8): lambda g, t, i: (g if i < 4 else g + 8, 4 * t + (i & 3)),
    ("m16n8k64", 4): lambda g, t, i: (g if i < 8 or 16 <= i < 24 else g + 8, 8 * t + (i & 7) + (32 if i >= 16 else 0)),
    ("m16n8k32", 4): lambda g, t, i: (g if i < 8 else g + 8, 8 * t + (i & 7)),
}
B_LAYOUT = {
    ("m16n8k16", 16): lambda g, t, i: (2 * t + (i & 1) + (8 if i >= 2 else 0), g),
    ("m16n8k8", 16): lambda g, t, i: (2 * t + i, g),
    ("m16n8k8", 32): lambda g, t, i: (t if i == 0 else t + 4, g),
    ("m16n8k4", 32): lambda g, t, i: (t, g),
    ("m16n8k32", 8): lambda g, t, i: (4 * t + (i & 3) + (16 if i >= 4 else 0), g),
    ("m16n8k16", 8): lambda g, t, i: (4 * t + i, g),
    ("m16n8k64", 4): lambda g, t, i: (8 * t + (i & 7) + (32 if i >= 8 else 0), g),
    ("m16n8k32", 4): lambda g, t, i: (8 * t + i, g),
}


def d_layout(g: int, t: int, i: int) -> tuple[int, int]:
    return (g if i < 2 else g + 8), 2 * t + (i & 1)


def spread(layout, matrix: np.ndarray, per_lane: int) -> np.ndarray:
    """The elements of every lane (32, per_lane)."""
    lanes = [[matrix[layout(lane // 4, lane % 4, i)] for i in range(per_lane)] for lane in range(32)]
    return np.array(lanes, matrix.dtype)


def gather(layout, elements: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The matrix of what every lane (32, per_lane) holds."""
    matrix = np.zeros(shape, elements.dtype)
    for lane in range(32):
        for i in range(elements.shape[1]):
            matrix[layout(lane // 4, lane % 4, i)] = elements[lane, i]
    return matrix


ASCENDING = (0x4, 0x8, 0xC, 0x9, 0xD, 0xE)  # legal metadata
BITS = {"s8": 8, "u8": 8, "e4m3": 8, "e5m2": 8, "s4": 4, "u4": 4, "f16": 16, "bf16": 16, "tf32": 32}


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Bit patterns (..., n) of `bits` each to uint32 (..., n * bits / 32), the first in the low bits."""
    codes = codes.astype(np.uint64).reshape(*codes.shape[:-1], -1, 32 // bits)
    return (codes << np.arange(0, 32, bits, dtype=np.uint64)).sum(axis=-1).astype(np.uint32)


def decode(codes: np.ndarray, kind: str) -> np.ndarray:
    """What bit patterns of a type are worth, float64, by torch and numpy."""
    if kind in ("s4", "u4"):
        return (codes.astype(np.int64) ^ 8) - 8.0 if kind == "s4" else codes.astype(np.float64)
    if kind in ("s8", "u8"):
        return codes.astype(np.uint8).view(np.int8 if kind == "s8" else np.uint8).astype(np.float64)
    if kind == "f16":
        return codes.astype(np.uint16).view(np.float16).astype(np.float64)
    if kind == "tf32":
        return (codes.astype(np.uint32) >> 13 << 13).view(np.float32).astype(np.float64)
    dtype = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[kind]
    narrow = codes.astype(np.uint16 if kind == "bf16" else np.uint8)
    return torch.from_numpy(narrow).view(dtype).double().numpy()


def random_codes(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Bit patterns: integers with many extremes, floats of moderate size, tf32 with noise in the bits below."""
    bits = BITS[kind]
    if bits <= 8 and kind[0] in "su":
        extremes = np.array([0, (1 << bits) - 1, 1 << bits - 1, (1 << bits - 1) - 1])
        return np.where(rng.random(shape) < 0.3, rng.choice(extremes, shape), rng.integers(0, 1 << bits, shape))
    x = torch.from_numpy(rng.standard_normal(shape).astype(np.float32) * 2)
    if kind == "tf32":
        return x.numpy().view(np.uint32)
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[kind]
    return x.to(dtype).view(torch.uint8 if bits == 8 else torch.uint16).numpy()


def accumulator_codes(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """uint32 of s32 (near both ends too) and f32, uint16 of f16."""
    if kind == "s32":
        near = rng.choice(np.array([0, 2**31 - 1, -(2**31), 5]), shape) + rng.integers(-1000, 1000, shape)
        return (near & 0xFFFFFFFF).astype(np.uint32)
    x = rng.standard_normal(shape).astype(np.float32) * 4
    return x.view(np.uint32) if kind == "f32" else x.astype(np.float16).view(np.uint16)


def is_product(got, a, b, c, kind: str, satfinite: bool = False) -> bool:
    """Whether the codes `got` are a b + c, c codes too: integers exactly, floats to the rounding of the result."""
    if kind == "s32":
        exact = (a @ b).astype(np.int64) + c.view(np.int32)
        exact = np.clip(exact, -(2**31), 2**31 - 1) if satfinite else exact & 0xFFFFFFFF
        return bool((got == (exact & 0xFFFFFFFF)).all())
    value, start = (x.view(np.float16 if kind == "f16" else np.float32).astype(np.float64) for x in (got, c))
    bound = (2.0**-11 if kind == "f16" else 2.0**-24) * (np.abs(a) @ np.abs(b) + np.abs(start))
    return bool((np.abs(value - (a @ b + start)) <= bound).all())


def nibble(E: np.ndarray, KW: int, EPW: int, sel: int, row: int, q: int) -> int:
    """Metadata of chunk q of a row, from the words E (32,) of the lanes; section 1.6 of the 2:4 specification.

    KW: words of a compressed row; EPW: elements a word.
    """
    g, hi = row & 7, row >> 3
    if EPW <= 2 and KW == 8:
        return int(E[4 * g + 2 * sel + (q >> 2)]) >> (16 * hi + 4 * (q & 3)) & 15
    if EPW <= 2:
        return int(E[4 * g + sel]) >> (16 * hi + 4 * q) & 15
    if KW == 8:
        return int(E[4 * g + hi + 2 * (q >> 3)]) >> (4 * (q & 7)) & 15
    return int(E[4 * g + 2 * sel + hi]) >> (4 * q) & 15
