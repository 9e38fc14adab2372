"""Threads in the emulator: how they part and meet, shuffles and votes, barriers, those that left, clusters."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from _ptx import SHARED, STORE, execute, filled, kernel, lanes
from ptx_emulator import Fault, Memory, load, run


def collatz(n: int) -> int:
    steps = 0
    while n != 1:
        n, steps = (3 * n + 1 if n % 2 else n // 2), steps + 1
    return steps


def test_loops_of_different_lengths():
    body = """add.u32 %r2, %r1, 1; mov.u32 %r10, 0;
    LOOP: setp.eq.u32 %p0, %r2, 1; @%p0 bra END; and.b32 %r3, %r2, 1; setp.eq.u32 %p1, %r3, 0; @%p1 bra EVEN;
    mad.lo.u32 %r2, %r2, 3, 1; bra.uni NEXT; EVEN: shr.u32 %r2, %r2, 1; NEXT: add.u32 %r10, %r10, 1; bra LOOP; END: """
    assert execute(body + STORE, threads=75).tolist() == [collatz(i + 1) for i in range(75)]


def test_registers_hold_nothing_at_first():
    """Nothing a kernel could rely on, such as sums that begin at zero."""
    assert (execute(STORE) != 0).all()
    assert (execute("mov.b64 {%r9, %r10}, %d20;" + STORE) != 0).all()


def test_nested_branches_and_guards():
    body = """mov.u32 %r10, 0; and.b32 %r2, %r1, 1; and.b32 %r3, %r1, 2; setp.ne.u32 %p0, %r2, 0;
    setp.ne.u32 %p1, %r3, 0;
    @!%p0 bra ELSE; @%p1 bra INNER; add.u32 %r10, %r10, 1; bra JOIN1; INNER: add.u32 %r10, %r10, 2;
    JOIN1: add.u32 %r10, %r10, 10; bra JOIN;
    ELSE: @%p1 add.u32 %r10, %r10, 4; @!%p1 bra JOIN; add.u32 %r10, %r10, 8; JOIN: setp.lt.and.u32 %p2|%p3, %r1, 8, %p0;
    @%p2 add.u32 %r10, %r10, 100; @%p3 add.u32 %r10, %r10, 200; setp.gt.or.u32 %p3|%p2, %r1, 8, !%p3;
    @%p3 add.u32 %r10, %r10, 1000;
    @%p2 add.u32 %r10, %r10, 2000;"""

    def truth(t):
        x = ((1 if not t & 2 else 2) + 10) if t & 1 else (12 if t & 2 else 0)
        p, q = t < 8 and t & 1, t >= 8 and t & 1
        return x + 100 * bool(p) + 200 * bool(q) + 1000 * (t > 8 or not q) + 2000 * (not t > 8 or not q)

    assert execute(body + STORE, threads=40).tolist() == [truth(t) for t in range(40)]


def test_lanes_meet_again_before_a_shuffle():
    """The odd lanes loop, a quarter waits longer than the rest; the shuffle waits for all its lanes."""
    body = """mov.u32 %r10, %r1; and.b32 %r2, %r1, 1; setp.eq.u32 %p0, %r2, 0; @%p0 bra MEET; mov.u32 %r3, 0;
    LOOP: add.u32 %r3, %r3, 1; add.u32 %r10, %r10, 100; setp.lt.u32 %p1, %r3, %r1; @%p1 bra LOOP;
    MEET: shfl.sync.bfly.b32 %r10, %r10, 1, 0x1f, -1;"""
    lane = lanes(64)
    value = np.where(lane & 1, lane + 100 * lane, lane)
    assert np.array_equal(execute(body + STORE, threads=64), value[lane ^ 1])


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("c", [0x1F, 0, 0x181F, 0x1C1F, 0x1800, 0x0F])
def test_shuffle(mode, c):
    amounts = RNG.integers(0, 32, 32).astype(np.uint32)
    body = f"""ld.param.u64 %d4, [in]; mad.wide.u32 %d5, %r1, 4, %d4; ld.global.u32 %r2, [%d5]; add.u32 %r3, %r1, 100;
    shfl.sync.{mode}.b32 %r10|%p0, %r3, %r2, {c}, 0xffffffff; @%p0 add.u32 %r10, %r10, 1000;"""
    wanted = []
    for lane, b in enumerate(amounts.tolist()):  # the ISA's own words
        clamp, mask = c & 31, c >> 8 & 31
        top, low = (lane & mask) | (clamp & ~mask), lane & mask
        j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": low | (b & ~mask)}[mode]
        valid = j >= top if mode == "up" else j <= top
        wanted.append((j if valid else lane) + 100 + 1000 * valid)
    assert execute(body + STORE, given=amounts).tolist() == wanted


RNG = np.random.default_rng(11)


def test_votes_and_reductions_of_parts_of_a_warp():
    """The two sides of a branch, each with its own mask, and both with one mask in a register."""
    body = """ld.param.u64 %d4, [in]; mad.wide.u32 %d5, %r1, 4, %d4; ld.global.u32 %r2, [%d5]; and.b32 %r3, %r1, 31;
    and.b32 %r9, %r2, 1;
    setp.ne.u32 %p1, %r9, 0; setp.lt.u32 %p0, %r3, 11; mov.u32 %r4, 0x7FF; selp.b32 %r5, 0x7FF, 0xFFFFF800, %p0;
    @%p0 bra LOW;
    vote.sync.ballot.b32 %r10, %p1, 0xFFFFF800; redux.sync.add.s32 %r11, %r2, 0xFFFFF800; bra MEET;
    LOW: vote.sync.ballot.b32 %r10, %p1, %r4; redux.sync.add.s32 %r11, %r2, %r4;
    MEET: redux.sync.max.s32 %r12, %r2, %r5; redux.sync.min.u32 %r13, %r2, %r5; redux.sync.xor.b32 %r14, %r2, %r5;
    elect.sync %r15|%p2, %r5; selp.u32 %r16, 1, 0, %p2; elect.sync _|%p2, -1; selp.u32 %r17, 1, 0, %p2;
    vote.sync.any.pred %p3, %p1, %r5; vote.sync.all.pred %p4, %p1, %r5; vote.sync.uni.pred %p5, !%p1, %r5;
    activemask.b32 %r21;
    selp.u32 %r18, 1, 0, %p3; selp.u32 %r19, 2, 0, %p4; selp.u32 %r20, 4, 0, %p5; or.b32 %r18, %r18, %r19;
    or.b32 %r18, %r18, %r20;
    mad.wide.u32 %d6, %r1, 40, %d1; st.global.v2.b32 [%d6], {%r10, %r11}; st.global.v2.b32 [%d6+8], {%r12, %r13};
    st.global.v2.b32 [%d6+16], {%r14, %r15}; st.global.v2.b32 [%d6+24], {%r16, %r17};
    st.global.v2.b32 [%d6+32], {%r18, %r21};"""
    values = RNG.integers(0, 1 << 32, 64).astype(np.uint32)
    values[:11] |= 1
    out = execute(body, threads=64, given=values, words=640).reshape(64, 10)
    for start, end in ((0, 11), (11, 32), (32, 43), (43, 64)):
        x = values[start:end]
        odd = x & 1
        ballot = sum(int(bit) << i for i, bit in zip(range(start % 32, 32), odd, strict=False))
        uniform = 4 * (odd.all() or not odd.any())
        wanted = [ballot, int(x.astype(np.int64).sum()) % 2**32, int(x.view(np.int32).max()) % 2**32, int(x.min()),
                  int(np.bitwise_xor.reduce(x)), start % 32, 1, start % 32 == 0,
                  odd.any() + 2 * odd.all() + uniform, 2**32 - 1]  # fmt: skip
        assert out[start].tolist() == [int(w) for w in wanted]
        assert (out[start:end, :6] == out[start, :6]).all() and not out[start + 1 : end, 6:8].any()


EXCHANGE = """mov.u32 %r20, tile; shl.b32 %r21, %r1, 2; add.u32 %r22, %r20, %r21; st.shared.u32 [%r22], %r1; {barrier}
xor.b32 %r23, %r1, {other}; shl.b32 %r23, %r23, 2; add.u32 %r23, %r20, %r23; ld.shared.u32 %r10, [%r23];"""


def exchange(barrier: str, other: int) -> str:
    return EXCHANGE.replace("{barrier}", barrier).replace("{other}", str(other))


@pytest.mark.parametrize("threads", [32, 40, 72, 8])
def test_blocks_that_are_no_multiple_of_a_warp(threads):
    body = exchange("bar.sync 0;", 7)
    assert np.array_equal(execute(body + STORE, threads=threads, module=SHARED, shared=4 * threads), lanes(threads) ^ 7)
    full = exchange("barrier.sync 3, 64;", 7) + STORE  # counted in whole warps
    assert threads > 64 or threads <= 32 or np.array_equal(
        execute(full, threads=threads, module=SHARED, shared=4 * threads), lanes(threads) ^ 7)  # fmt: skip


def test_threads_that_left_are_not_waited_for():
    body = "setp.ge.u32 %p0, %r1, 70; @%p0 exit; setp.ge.u32 %p0, %r1, 50; @%p0 bra SLOW; bra.uni MEET;"
    body += "SLOW: mov.u32 %r5, 0; L: add.u32 %r5, %r5, 1; setp.lt.u32 %p1, %r5, 40; @%p1 bra L; MEET:" + exchange(
        "bar.sync 0;", 1
    )
    body += "bar.warp.sync -1; shfl.sync.bfly.b32 %r10, %r10, 1, 31, -1;"
    out = execute(body + STORE, threads=128, module=SHARED, shared=512, mode="update")
    assert np.array_equal(out, np.where(lanes(128) < 70, lanes(128), 0))


def test_warps_leave_while_others_wait():
    """The barrier is over when the last that were missing have left."""
    body = """setp.lt.u32 %p0, %r1, 32; @%p0 bra WAIT; mov.u32 %r5, 0; L: add.u32 %r5, %r5, 1;
    setp.lt.u32 %p1, %r5, 50; @%p1 bra L;
    ret; WAIT: bar.sync 0; mov.u32 %r10, 9;"""
    out = execute(body + STORE, threads=96, mode="update")
    assert np.array_equal(out, np.where(lanes(96) < 32, 9, 0))


def test_named_barriers():
    """Pairs of warps, each with a barrier whose number is in a register, while the others are elsewhere."""
    body = "shr.u32 %r2, %r1, 6; add.u32 %r3, %r2, 1;" + exchange("barrier.sync.aligned %r3, 64;", 32)
    assert np.array_equal(execute(body + STORE, threads=256, module=SHARED, shared=1024), lanes(256) ^ 32)


PRODUCER = """mov.u32 %r20, tile; and.b32 %r2, %r1, 31; shl.b32 %r21, %r2, 2; add.u32 %r22, %r20, %r21; mov.u32 %r10, 0;
mov.u32 %r4, 0; setp.ge.u32 %p0, %r1, 32; @%p0 bra CONSUMER;
P: {empty_wait} mad.lo.u32 %r5, %r4, 100, %r2; st.shared.u32 [%r22], %r5; {full_arrive} add.u32 %r4, %r4, 1;
setp.lt.u32 %p1, %r4, 5;
@%p1 bra P; bra END;
CONSUMER: xor.b32 %r22, %r22, 4; {first}
C: {full_wait} ld.shared.u32 %r6, [%r22]; {empty_arrive} mad.lo.u32 %r10, %r10, 3, %r6; add.u32 %r4, %r4, 1;
setp.lt.u32 %p1, %r4, 5; @%p1 bra C; END:"""
BARRIERS = {
    "empty_wait": "bar.sync 2, 64;", "full_arrive": "bar.arrive 1, 64;", "first": "bar.arrive 2, 64;",
    "full_wait": "bar.sync 1, 64;", "empty_arrive": "setp.lt.u32 %p2, %r4, 4; @%p2 bar.arrive 2, 64;",
}  # fmt: skip


def consumed(lane: int) -> int:
    total = 0
    for k in range(5):
        total = 3 * total + 100 * k + (lane ^ 1)
    return total


def test_producer_and_consumer_by_barriers():
    out = execute(filled(PRODUCER, BARRIERS) + STORE, threads=64, module=SHARED, shared=128)
    assert out.tolist() == [0] * 32 + [consumed(lane) for lane in range(32)]


def test_nobody_starves_beside_a_loop_that_polls():
    """The flag is set at a higher position than the loop that waits for it, in one block, and from another."""
    body = """mov.u32 %r11, %ctaid.x; setp.eq.u32 %p0, %r1, {setter}; mov.u32 %r12, {block};
    setp.eq.and.u32 %p0, %r11, %r12, %p0; @%p0 bra SET;
    POLL: ld.volatile.global.u32 %r10, [%d0]; setp.eq.u32 %p1, %r10, 0; @%p1 bra POLL; bra END;
    SET: mov.u32 %r10, 5; st.volatile.global.u32 [%d0], %r10; END: mad.lo.u32 %r13, %r11, %r0, %r1;
    mad.wide.u32 %d3, %r13, 4, %d1;"""
    for blocks, setter, block in ((1, 3, 0), (2, 3, 0), (2, 63, 1)):
        memory = Memory()
        flag = memory.allocate("flag", np.zeros(1, np.uint32), "update")
        out = memory.allocate("out", np.zeros(64 * blocks, np.uint32), "write")
        text = kernel(filled(body, {"setter": str(setter), "block": str(block)}) + STORE)
        run(load(text, "kernel"), blocks, 64, struct.pack("<QQI", flag, out, 64), memory, cluster=blocks)
        assert (memory["out"].view(np.uint32) == 5).all()


# ---- clusters

CLUSTER = """mov.u32 %r2, %cluster_ctarank; xor.b32 %r3, %r2, 1; mov.u32 %r20, tile; mad.lo.u32 %r21, %r1, 4, %r20;
mov.u32 %r4, %ctaid.x;
mad.lo.u32 %r5, %r4, 1000, %r1; st.shared.u32 [%r21], %r5; mad.lo.u32 %r6, %r4, %r0, %r1; mad.wide.u32 %d3, %r6, 4, %d1;
{before} mapa.shared::cluster.u32 %r22, %r21, %r3; {read} {after}"""
MEET = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
READS = {
    "shared": "ld.shared::cluster.u32 %r10, [%r22];",
    "generic": "cvt.u64.u32 %d4, %r21; cvta.shared.u64 %d4, %d4; mapa.u64 %d5, %d4, %r3; ld.u32 %r10, [%d5]; "
    "getctarank.u64 %r7, %d5; "
    "mad.lo.u32 %r10, %r7, 0, %r10; isspacep.shared::cluster %p0, %d5; @!%p0 mov.u32 %r10, 0;",
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("threads", [32, 40])
def test_a_cluster_reads_its_other_block(read, threads):
    body = filled(CLUSTER, {"before": MEET, "read": READS[read], "after": MEET})
    out = execute(body + STORE, threads=threads, grid=4, cluster=2, n=threads, module=SHARED, shared=4 * threads)
    wanted = [1000 * (block ^ 1) + t for block in range(4) for t in range(threads)]
    assert out.tolist() == wanted
    with pytest.raises(Fault, match=r"race|nothing has written"):
        body = filled(CLUSTER, {"before": "", "read": READS[read], "after": MEET})
        execute(body + STORE, threads=threads, grid=2, cluster=2, n=threads, module=SHARED, shared=4 * threads)
    with pytest.raises(Fault, match=r"block \d (of the cluster, which has|may have) ended"):
        body = filled(CLUSTER, {"before": MEET, "read": READS[read], "after": ""})
        execute(body + STORE, threads=threads, grid=2, cluster=2, n=threads, module=SHARED, shared=4 * threads)


def test_the_cluster_is_what_the_registers_say():
    body = """mov.u32 %r2, %cluster_ctarank; mov.u32 %r3, %cluster_nctarank; mov.u32 %r4, %clusterid.x;
    mov.u32 %r5, %ctaid.x;
    shl.b32 %r3, %r3, 4; shl.b32 %r4, %r4, 8; or.b32 %r10, %r2, %r3; or.b32 %r10, %r10, %r4;
    mad.wide.u32 %d3, %r5, 4, %d1;"""
    out = execute(body + STORE, threads=1, grid=6, cluster=2)
    assert out.tolist() == [i % 2 | 2 << 4 | (i // 2) << 8 for i in range(6)]
    with pytest.raises(ValueError, match="no multiple of clusters"):
        execute(body + STORE, threads=1, grid=3, cluster=2)


ACCESSES = ("ld.global.u32 %r10, [%d0]; {wait}", "mov.u32 %r10, 7; st.global.u32 [%d3], %r10; {wait}")


@pytest.mark.parametrize("access", ACCESSES)
def test_a_dependent_launch_awaits_the_one_before(access):
    body = "griddepcontrol.launch_dependents; {wait} " + access
    for text, dependent in ((body.replace("{wait}", "griddepcontrol.wait;", 1), True), (body, False)):
        assert execute(filled(text, {"wait": ""}) + STORE, given=(7,), dependent=dependent).tolist() == [7] * 32
    with pytest.raises(Fault, match=r"global memory before griddepcontrol\.wait"):
        late = body.replace("{wait}", "", 1)
        execute(filled(late, {"wait": "griddepcontrol.wait;"}) + STORE, given=(7,), dependent=True)


FLAG = """mov.u32 %r20, tile; setp.ne.u32 %p0, %r1, {setter}; setp.eq.u32 %p2, %r1, 0; @%p2 st.shared.u32 [%r20+4], 0;
bar.sync 0;
@!%p0 bra SET; POLL: {load} %r3, [%r20+4]; setp.eq.u32 %p1, %r3, 0; @%p1 bra POLL; {acquire} bra END;
SET: st.shared.u32 [%r20], 42; {release} {store} [%r20+4], 1; END: ld.shared.u32 %r10, [%r20];"""
FLAGS = {
    "release and acquire": ("st.release.cta.shared.u32", "ld.acquire.cta.shared.u32", "", ""),
    "volatile and fences": ("st.volatile.shared.u32", "ld.volatile.shared.u32", "membar.cta;", "membar.cta;"),
    "relaxed and fences": ("st.relaxed.cta.shared.u32", "ld.relaxed.cta.shared.u32", "fence.acq_rel.cta;",
    "fence.sc.cta;"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("setter", [5, 40, 63])
def test_a_flag_in_shared_memory(kind, setter):
    """By a thread of the warp that polls too, at a higher position than the loop."""
    store, load_, release, acquire = FLAGS[kind]
    parts = {"setter": str(setter), "store": store, "load": load_, "release": release, "acquire": acquire}
    options = {"threads": 64, "module": SHARED, "shared": 16}
    assert (execute(filled(FLAG, parts) + STORE, **options) == 42).all()
    plain = {"store": "st.shared.u32"} if kind == "release and acquire" else {"release": ""}
    for broken in (plain, {"load": "ld.relaxed.cta.shared.u32", "acquire": ""}):
        with pytest.raises(Fault, match=r"race: (read|write) of shared byte"):
            execute(filled(FLAG, parts | broken) + STORE, **options)
