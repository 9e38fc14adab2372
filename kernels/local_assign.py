"""Soft assignment of the tokens of a grid to the centres near them, and the centres' new places.

Arguments and results are those of reference/local_assign.py. Two kernels an iteration: one program per token compares
it with its window^2 candidates side by side; one per centre and 128 channels adds up the rectangle of tokens that have
it as a candidate, a row of the grid at a time. No two write to one place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FLAGS, exp2

FLOOR = tl.constexpr(1e-12)  # reference/local_assign.py
LOG2_E = tl.constexpr(1.44269504)


@triton.jit
def _assign_kernel(
    x_ptr, centres_ptr, weight_ptr, index_ptr, h, w, gh, gw, tau,
    C: tl.constexpr, WINDOW: tl.constexpr, SQUARES: tl.constexpr, MASK: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    b, i = item // (h * w), (item % (h * w)).to(tl.int32)
    slot = tl.arange(0, BLOCK_W)
    row = i // w * gh // h - WINDOW // 2 + slot // WINDOW
    column = i % w * gw // w - WINDOW // 2 + slot % WINDOW
    is_slot = slot < WINDOW * WINDOW
    inside = is_slot & (row >= 0) & (row < gh) & (column >= 0) & (column < gw)
    index = tl.where(inside, row * gw + column, -1)
    offs_c = tl.arange(0, BLOCK_C)
    centre_ptrs = centres_ptr + b * gh * gw * C + index[:, None].to(tl.int64) * C + offs_c[None, :]
    sums = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    for c in range(0, C, BLOCK_C):
        mask = offs_c < C - c
        x = tl.load(x_ptr + item * C + c + offs_c, mask=mask, other=0.0).to(tl.float32)[None, :]
        centre = tl.load(centre_ptrs + c, mask=inside[:, None] & mask[None, :], other=0.0).to(tl.float32)
        sums += (x - centre) * (x - centre) if SQUARES else x * centre
    logit = tl.sum(sums, axis=1) * (-tau if SQUARES else tau)
    logit = tl.where(inside if MASK else is_slot, logit, -float("inf"))
    t = (logit - tl.max(logit, axis=0)) * LOG2_E
    e = tl.where(t >= -100, exp2(tl.maximum(t, -100.0)), tl.where(t < -100, 0.0, t))  # NaN where t is
    weight = tl.div_rn(e, tl.zeros_like(e) + tl.sum(tl.where(is_slot, e, 0.0), axis=0))
    tl.store(weight_ptr + item * WINDOW * WINDOW + slot, weight, mask=is_slot)
    tl.store(index_ptr + item * WINDOW * WINDOW + slot, index, mask=is_slot)


@triton.jit
def _first(home, tokens, homes):
    """The first token at home at `home` or after it."""
    return tl.minimum(tl.maximum((home * tokens + homes - 1) // homes, 0), tokens)


@triton.jit
def _move_kernel(
    x_ptr, weight_ptr, centres_ptr, h, w, gh, gw,
    C: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    b, i = item // (gh * gw), (item % (gh * gw)).to(tl.int32)
    y, x, reach = i // gw, i % gw, WINDOW // 2
    top, bottom = _first(tl.maximum(y - reach, 0), h, gh), _first(y + reach + 1, h, gh)
    left, right = _first(tl.maximum(x - reach, 0), w, gw), _first(x + reach + 1, w, gw)
    columns, offs_c = left + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    slots = x - columns * gw // w + reach
    total, mass = tl.zeros((BLOCK_N, BLOCK_C), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for r in range(ROWS):
        row = top + r
        seen = (columns < right) & (row < bottom)
        token = (b * h + row) * w + columns
        slot = (y - row * gh // h + reach) * WINDOW + slots
        share = tl.load(weight_ptr + token * WINDOW * WINDOW + slot, mask=seen, other=0.0)
        x_ptrs = x_ptr + token[:, None] * C + offs_c[None, :]
        tokens = tl.load(x_ptrs, mask=seen[:, None] & (offs_c < C)[None, :], other=0.0).to(tl.float32)
        total += share[:, None] * tokens
        mass += share
    weight = tl.sum(mass, axis=0)
    y = tl.sum(total, axis=0)
    y = tl.div_rn(y, tl.zeros_like(y) + tl.where(weight < FLOOR, FLOOR, weight))
    tl.store(centres_ptr + item * C + offs_c, y, mask=offs_c < C)


def local_assign(
    x: Tensor, centres: Tensor, window: int, metric: str, tau: float, iterations: int, border: str
) -> tuple[Tensor, Tensor, Tensor]:
    (B, h, w, C), (gh, gw) = x.shape, centres.shape[1:3]
    x, centres = x.contiguous(), centres.contiguous()
    weight = x.new_empty(B, h * w, window * window, dtype=torch.float32)
    index = torch.empty_like(weight, dtype=torch.int32)
    moved = torch.empty_like(centres, dtype=torch.float32)
    if x.numel() == 0:
        return weight, index, moved.zero_()
    BLOCK_W = triton.next_power_of_2(window * window)
    BLOCK_C = min(triton.next_power_of_2(C), max(16, 2048 // BLOCK_W))
    # Of the tokens whose home is in reach: window cells hold this many rows and columns at most.
    ROWS, columns = (min(n, triton.cdiv(window * n, g)) for n, g in ((h, gh), (w, gw)))
    BLOCK_N = triton.next_power_of_2(columns)
    BLOCK_MOVED = min(triton.next_power_of_2(C), max(16, min(128, 4096 // BLOCK_N)))
    with torch.cuda.device_of(x):
        for _ in range(iterations):
            _assign_kernel[(B * h * w,)](
                x, centres, weight, index, h, w, gh, gw, float(tau), C=C, WINDOW=window, SQUARES=metric == "l2",
                MASK=border == "mask", BLOCK_W=BLOCK_W, BLOCK_C=BLOCK_C, num_warps=4, **FLAGS,
            )  # fmt: skip
            _move_kernel[(B * gh * gw, triton.cdiv(C, BLOCK_MOVED))](
                x, weight, moved, h, w, gh, gw, C=C, WINDOW=window, ROWS=ROWS, BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_MOVED,
                num_warps=4, **FLAGS,
            )  # fmt: skip
            centres = moved
    return weight, index, moved
