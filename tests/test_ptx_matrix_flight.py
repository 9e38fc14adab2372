"""What wgmma owns until it is waited for, in the emulator: planted bugs, and sequences that are right."""

from __future__ import annotations

import _ptx_matrix as ptx
import numpy as np
import pytest
from ptx_emulator import Fault
from test_ptx_matrix_wgmma import from_d, small

FENCE, COMMIT = "wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned;"
D, OTHER = "{%i0,%i1,%i2,%i3}", "{%i8,%i9,%i10,%i11}"
A = "{%i4,%i5,%i6,%i7}"
N16 = "{%i0,%i1,%i2,%i3,%i8,%i9,%i10,%i11}"
SPARSE = "wgmma.mma_async.sp.sync.aligned.m64n8k64.s32.s8.s8 {%i0,%i1,%i2,%i3}, %d10, %d11, %x11, 0, %p1;"


def wait(left):
    return f"wgmma.wait_group.sync.aligned {left};"


def product(d=D, a="%d10", b="%d11"):
    return f"wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {d}, {a}, {b}, %p1;"


def launch(*lines, threads=128, outputs=("%i0", "%i1", "%i2", "%i3")):
    """Runs the lines between the set-up and the stores of `outputs`; 12 registers of zeros a thread, A of ones."""
    image, desc_a, desc_b, a, b = small()
    setup = f"mov.u64 %d10, {desc_a}; mov.u64 %d11, {desc_b}; setp.eq.u32 %p1, 0, 0;"
    moves = [f"mov.u32 %o{i}, {register};" for i, register in enumerate(outputs)]
    inputs = np.zeros((threads, 12), np.uint32)
    inputs[:, 4:8] = 0x01010101
    out = ptx.launch("\n".join([setup, *lines, *moves]), inputs, len(outputs), image)
    return from_d(out[:128].view(np.int32), 8), a.view(np.int8).astype(int) @ b.view(np.int8).T.astype(int)


RIGHT = {  # how many times the product is summed, and the lines
    "one": (1, [FENCE, product(), COMMIT, wait(0)]),
    "three on the same sums, without waits": (3, [FENCE, product(), product(), COMMIT, product(), COMMIT, wait(0)]),
    "zeros between fence and product": (
        1,
        [FENCE, *(f"mov.u32 %i{i}, 0;" for i in range(4)), product(), COMMIT, wait(0)],
    ),
    "the older of two groups is waited for": (
        1,
        [FENCE, product(), COMMIT, product(OTHER), COMMIT, wait(1), "mov.u32 %x9, 7;", "add.u32 %i0, %i0, 0;", wait(0)],
    ),
    "fence between an ordinary access and the next": (
        2,
        [FENCE, product(), COMMIT, wait(0), "add.u32 %i0, %i0, 0;", FENCE, product(), COMMIT, wait(0)],
    ),
    "renamed in flight, and added to": (
        2,
        [
            FENCE,
            product(),
            COMMIT,
            *(f"mov.b32 %i{i + 8}, %i{i};" for i in range(4)),
            product(OTHER),
            COMMIT,
            wait(0),
            *(f"mov.b32 %i{i}, %i{i + 8};" for i in range(4)),
        ],
    ),
    "operand registers free again": (0, [FENCE, product(OTHER, A), COMMIT, wait(0), "mov.u32 %i4, %x1;"]),
    "operand registers read, and given to two": (
        0,
        [FENCE, product(OTHER, A), product(OTHER, A), COMMIT, "add.u32 %x9, %i4, 1;", wait(0)],
    ),
    "a new value behind a mov of an operand": (0, [FENCE, product(OTHER, A), COMMIT, "mov.b32 %i4, %x1;", wait(0)]),
    "what a mov gave a new value is no operand": (
        0,
        [FENCE, product(OTHER, A), COMMIT, "mov.b32 %i4, %x1;", "add.u32 %i4, %i4, 1;", wait(0)],
    ),
    "another shape behind a wait and a fence": (
        2,
        [FENCE, product(), COMMIT, wait(0), FENCE, product(N16).replace("n8k", "n16k"), COMMIT, wait(0)],
    ),
    "shared memory overwritten behind the wait": (
        1,
        [FENCE, product(), COMMIT, wait(0), "bar.sync 0;", "st.shared.u32 [%x3+1024], %x1;"],
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right(name):
    times, lines = RIGHT[name]
    got, once = launch(*lines)
    assert np.array_equal(got, times * once)


BUGS = {  # what is said, the lines
    "read before the wait": (
        "read of the result of wgmma at PTX line",
        [FENCE, product(), COMMIT, "add.u32 %x9, %i3, 1;"],
    ),
    "taken apart before the wait": ("read of the result", [FENCE, product(), COMMIT, "mov.b32 {%h0,%h1}, %i0;"]),
    "stored before the wait": ("read of the result", [FENCE, product(), COMMIT, "st.global.u32 [%d1], %i0;"]),
    "read after a wait for older groups": (
        "read of the result",
        [FENCE, product(OTHER), COMMIT, product(), COMMIT, wait(1), "add.u32 %x9, %i0, 1;"],
    ),
    "never committed": ("read of the result", [FENCE, product(), wait(0), "add.u32 %x9, %i0, 1;"]),
    "read of what a mov renamed": (
        "read of the result",
        [FENCE, product(), COMMIT, "mov.b32 %x9, %i0;", "add.u32 %x9, %x9, 1;"],
    ),
    "overwritten before the wait": ("write over the result", [FENCE, product(), COMMIT, "add.u32 %i0, %x1, 1;"]),
    "zeroed before the wait": ("write over the result", [FENCE, product(), COMMIT, "mov.u32 %i0, 0;"]),
    "operand overwritten before the wait": (
        "write over an operand of wgmma",
        [FENCE, product(D, A), COMMIT, "add.u32 %i5, %x1, 1;"],
    ),
    "operand loaded before the wait": (
        "write over an operand",
        [FENCE, product(D, A), COMMIT, "ld.shared.u32 %i7, [%x0+1024];"],
    ),
    "metadata overwritten before the wait": (
        "write over an operand of wgmma",
        ["mov.u32 %x11, 0x44444444;", FENCE, SPARSE, COMMIT, "add.u32 %x11, %x1, 1;"],
    ),
    "no fence at all": ("no wgmma.fence before the first wgmma", [product()]),
    "no fence after a write": (
        "accumulator 2 was written by another instruction at PTX line",
        [FENCE, "add.u32 %i2, %i2, 1;", product()],
    ),
    "no fence after a constant": ("accumulator 2 was written", [FENCE, "mov.u32 %i2, 5;", product()]),
    "no fence after a read": (
        "accumulator 1 was read",
        [FENCE, product(), COMMIT, wait(0), "add.u32 %x9, %i1, 1;", product()],
    ),
    "no fence after a write of an operand": (
        "operand register 1 was written",
        [FENCE, "add.u32 %i5, %x1, 1;", product(D, A)],
    ),
    "no fence after a load of what a mov renames": (
        "operand register 1 was written",
        [FENCE, "ld.shared.u32 %x9, [%x0+1024];", "mov.b32 %i5, %x9;", product(D, A)],
    ),
    "another shape": (
        "accumulator 0 has another shape or place .* in flight",
        [FENCE, product(), product(N16).replace("n8k", "n16k")],
    ),
    "another order": ("accumulator 0 has another shape or place", [FENCE, product(), product("{%i1,%i0,%i2,%i3}")]),
    "another shape without a fence": (
        "accumulator 0 has another shape or place .*: wgmma.fence",
        [FENCE, product(), COMMIT, wait(0), product(N16).replace("n8k", "n16k")],
    ),
    "a result as an operand": (
        "operand register 0 is the result of the wgmma at PTX line .*, in flight",
        [FENCE, product(), FENCE, product(OTHER, D)],
    ),
    "an operand as a result": (
        "accumulator 0 is an operand of the wgmma",
        [FENCE, product(OTHER, D), FENCE, product(D)],
    ),
    "the end in flight": ("the thread ends while a wgmma is in flight", [FENCE, product(), COMMIT, "ret;"]),
    "shared memory overwritten before the wait": (
        "race: write of shared byte .*, which (a )?wgmma reads",
        [FENCE, product(), COMMIT, "bar.sync 0;", "st.shared.u32 [%x3+1024], %x1;"],
    ),
    "shared memory written without a proxy fence": (
        "A, row 0, k from 0 on: no fence.proxy.async",
        ["st.shared.u32 [%x3+1024], %x1;", "bar.sync 0;", FENCE, product()],
    ),
    "shared memory of other warps without a barrier": (
        "A, row 0, k from 0 on: race",
        ["st.shared.u32 [%x3+1024], %x1;", "fence.proxy.async;", FENCE, product()],
    ),
    "descriptors disagree": (
        "the descriptor of A differs from that of thread 0",
        ["cvt.u64.u32 %d12, %x1;", "shr.u64 %d12, %d12, 6;", "add.u64 %d10, %d10, %d12;", FENCE, product()],
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name):
    """Each at the line it is in: the last."""
    reason, lines = BUGS[name]
    with pytest.raises(Fault, match=reason) as fault:
        launch(*lines)
    assert lines[-1].rstrip(";").endswith(str(fault.value).split("\n")[-1].strip())


def test_another_warpgroup_overwrites_without_a_barrier():
    sequence = [FENCE, product(), COMMIT, wait(0), "bar.sync 0;", "st.shared.u32 [%x3+1024], %x1;"]
    launch(*sequence, threads=256)
    with pytest.raises(Fault, match=r"race: write of shared byte .*, which (a )?wgmma reads"):
        launch(*[line for line in sequence if line != "bar.sync 0;"], threads=256)


def test_warps_of_a_warpgroup_meet():
    """They come at different times: warp 2 turns in a loop, and what another warpgroup does is its own affair."""
    delay = [
        "shr.u32 %x9, %x1, 5;",
        "setp.eq.u32 %p2, %x9, 2;",
        "mov.u32 %x10, 0;",
        "@!%p2 bra GO;",
        "TURN: add.u32 %x10, %x10, 1;",
        "setp.lt.u32 %p3, %x10, 20;",
        "@%p3 bra TURN;",
        "GO:",
    ]
    got, once = launch(*delay, FENCE, product(), COMMIT, wait(0), threads=256)
    assert np.array_equal(got, once)


def test_a_warpgroup_that_is_not_whole():
    reason = "needs all 128 threads of warpgroup 0; only 96 are left|deadlock.*rest of warpgroup 0"
    with pytest.raises(Fault, match=reason):
        launch("setp.gt.u32 %p2, %x1, 95;", "@%p2 bra OUT;", FENCE, product(), COMMIT, wait(0), "OUT:")
