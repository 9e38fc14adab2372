"""What the emulator finds wrong: small kernels with one mistake, named to the thread and the line, and repaired."""

from __future__ import annotations

import re

import numpy as np
import pytest
from _ptx import SHARED, STORE, execute, line_of
from ptx_emulator import Fault
from ptx_emulator.machine import Machine

ADDRESS = "mov.u32 %r20, tile; mad.lo.u32 %r21, %r1, 4, %r20; mad.wide.u32 %d4, %r1, 4, %d0; mov.u32 %r10, 0;\n"
OTHER_WARP = "xor.b32 %r22, %r1, 32; mad.lo.u32 %r22, %r22, 4, %r20;\n"
MBARRIER = """setp.ne.u32 %p0, %r1, 0; add.u32 %r23, %r20, 512; add.u32 %r24, %r20, 520;
@!%p0 mbarrier.init.shared::cta.b64 [%r23], 1; @!%p0 mbarrier.init.shared::cta.b64 [%r24], 64;
fence.mbarrier_init.release.cluster; bar.sync 0;
"""
EXPECT = "@!%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r23], 256;\n"
LOAD = "@!%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r20], [%d0], 256, [%r23];"
WAIT = "W{}: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r2{}], {}; @!%p1 bra W{};"
FULL, EMPTY = WAIT.format(0, 3, 0, 0), WAIT.format(1, 4, 0, 1)
OUT = "@!%p0 cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r20], 256;"
MAPA = "mov.u32 %r2, %cluster_ctarank; xor.b32 %r3, %r2, 1; mapa.shared::cluster.u32 %r25, %r21, %r3;"
MEET = "barrier.cluster.arrive; barrier.cluster.wait;"

# name: body, what is wrong in it, what is right, what is said, the thread. The line at fault is marked // here.
MISTAKES = {
    # ---- global and local memory
    "read beyond the end": (
        "add.s64 %d4, %d4, 0;\nld.global.u32 %r10, [%d4+200]; // here", "+200", "+0",
        "out-of-bounds global read of 4 bytes at byte 256 of in, which has 256", 14),
    "read before the start": (
        "ld.global.u32 %r10, [%d4+-8]; // here", "+-8", "", "out-of-bounds global read of 4 bytes at byte -8 of in", 0),
    "write beyond the end": (
        "st.global.u32 [%d3+4], %r1; // here", "+4", "",
        "out-of-bounds global write of 4 bytes at byte 256 of out", 63),
    "nothing there": ("mov.b64 %d4, 64;\nld.global.u32 %r10, [%d4]; // here", "64;", "%d0;",
    "out-of-bounds global read", 0),
    "no space": (
        "mov.b64 %d5, 0x0100000000000000;\nadd.s64 %d5, %d4, %d5;\nld.u32 %r10, [%d5]; // here",
        "0x0100000000000000", "0",
        "address 0x.* is in no space", 0),
    "misaligned read": (
        "ld.global.v2.u32 {%r10, %r11}, [%d4]; // here", "v2.u32 {%r10, %r11}", "u32 %r10",
        "misaligned global read: address 0x.*4 is no multiple of 8", 1),
    "misaligned write": ("st.global.u32 [%d3+2], %r1; // here", "+2", "", "misaligned global write", 0),
    "write to an input": ("st.global.u32 [%d4], %r1; // here", "%d4", "%d3",
    "write to byte 0 of in, which is read-only", 0),
    "write to constants": (
        "mov.u64 %d5, fixed;\nst.global.u32 [%d5], %r1; // here", "st.global.u32 [%d5], %r1",
        "ld.const.u32 %r10, [%d5]",
        "write to byte 0 of fixed, which is read-only", 0),
    "two threads write one byte": (
        "st.global.u32 [%d1], %r1; // here", "%d1", "%d3", "byte 0 of out, which thread 63 of the grid writes too", 0),
    "overlapping writes": (
        "bar.sync 0;\n@!%p1 st.global.u32 [%d3], %r1;\nsetp.eq.u32 %p2, %r1, 5;\n"
        "@%p2 st.global.u32 [%d3+4], %r1; // here",
        "[%d3+4]", "[%d3]", "byte 24 of out, which thread 6 of the grid writes too", 5),
    "read of output nobody wrote": (
        "st.global.u32 [%d3], %r1;\nsetp.eq.u32 %p2, %r1, 9;\n@%p2 ld.global.u32 %r10, [%d1+256]; // here", "+256",
        "+36",
        "out-of-bounds global read|nothing has written", 9),
    "local memory beyond the end": (
        ".local .align 4 .b8 mine[16]; mov.u64 %d5, mine; and.b32 %r11, %r1, 15; mad.wide.u32 %d6, %r11, 4, %d5;\n"
        "st.local.u32 [%d6], %r1; // here", "%r1, 15", "%r1, 3",
        "out-of-bounds local write of 4 bytes at byte 16 of 16", 4),
    "local memory misaligned": (
        ".local .align 8 .b8 mine[16]; mov.u64 %d5, mine; st.local.u64 [%d5], %d4; st.local.u64 [%d5+8], %d4;\n"
        "ld.local.u64 %d6, [%d5+4]; // here", "+4", "+8", "misaligned local read", 0),
    # ---- shared memory
    "shared memory beyond the end": (
        "st.shared.u32 [%r21+800], %r1; // here", "+800", "", "out-of-bounds shared write of 4 bytes at 1024", 56),
    "shared memory misaligned": ("st.shared.u32 [%r21+2], %r1; // here", "+2", "", "misaligned shared write", 0),
    "shared memory nobody wrote": (
        "setp.ne.u32 %p2, %r1, 40; @%p2 st.shared.u32 [%r21], %r1;\nld.shared.u32 %r10, [%r21]; // here", "@%p2 ", "",
        "read of shared byte 160, which nothing has written", 40),
    "no barrier before another warp reads": (
        OTHER_WARP + "st.shared.u32 [%r21], %r1;\n/* wrong */\nld.shared.u32 %r10, [%r22]; // here", "/* wrong */",
        "bar.sync 0;",
        "race: read of shared byte 128, which thread 32 writes at PTX line .*, unordered", 0),
    "no barrier before it is overwritten": (
        OTHER_WARP + "st.shared.u32 [%r21], %r1;\nbar.sync 0;\nld.shared.u32 %r10, [%r22];\n/* wrong */\n"
        "st.shared.u32 [%r21], %r10; // here", "/* wrong */", "bar.sync 0;",
        "race: write of shared byte 128, which a thread reads at PTX line .*, unordered", 32),
    "no barrier between two writers": (
        OTHER_WARP + "st.shared.u32 [%r21], %r1;\n/* wrong */\nst.shared.u32 [%r22], %r1; // here", "/* wrong */",
        "bar.sync 0;",
        "race: write of shared byte 128, which thread 32 writes", 0),
    "two threads write one place": (
        "and.b32 %r22, %r21, -5;\nst.shared.u32 [%r22], %r1; // here", "%r22], %r1", "%r21], %r1",
        "race: two threads write shared byte", 0),
    "a barrier of only one of the warps": (
        OTHER_WARP + "st.shared.u32 [%r21], %r1;\nsetp.lt.u32 %p2, %r1, 32;\n@%p2 bar.sync 1, 32;\n"
        "ld.shared.u32 %r10, [%r22]; // here",
        "@%p2 bar.sync 1, 32", "bar.sync 1, 64", "race: read of shared byte 128", 0),
    "no bar.warp.sync between lanes": (
        "st.shared.u32 [%r21], %r1;\n/* wrong */\nxor.b32 %r22, %r21, 4;\nld.shared.u32 %r10, [%r22]; // here",
        "/* wrong */", "bar.warp.sync 0xffffffff;", "race: read of shared byte 4, which thread 1 writes", 0),
    "an mbarrier read as data": (
        MBARRIER + "ld.shared.u32 %r10, [%r20+512]; // here", "ld.shared.u32 %r10, [%r20+512]", "mov.u32 %r10, 0",
        "read of shared byte 512, which is of an mbarrier", 0),
    "an mbarrier overwritten": (
        MBARRIER + "st.shared.u32 [%r21+400], %r1; // here", "+400", "+0",
        "write to shared byte 512, which is of an mbarrier", 28),
    # ---- copies
    "cp.async not waited for": (
        "cp.async.ca.shared.global [%r21], [%d4], 4;\ncp.async.commit_group;\n/* wrong */\n"
        "ld.shared.u32 %r10, [%r21]; // here\n"
        "cp.async.wait_all;", "/* wrong */", "cp.async.wait_group 0;",
        "race: read of shared byte 0, which cp.async writes", 0),
    "cp.async of another thread without a barrier": (
        OTHER_WARP + "cp.async.ca.shared.global [%r21], [%d4], 4;\ncp.async.wait_all;\n/* wrong */\n"
        "ld.shared.u32 %r10, [%r22]; // here",
        "/* wrong */", "bar.sync 0;", "race: read of shared byte 128, which thread 32 writes", 0),
    "cp.async over what is being read": (
        OTHER_WARP + "st.shared.u32 [%r21], %r1;\nbar.sync 0;\nld.shared.u32 %r10, [%r22];\n/* wrong */\n"
        "cp.async.ca.shared.global [%r21], [%d4], 4; // here\ncp.async.wait_all;", "/* wrong */", "bar.sync 0;",
        "race: write of shared byte 128, which a thread reads", 32),
    "cp.async twice to one place": (
        "cp.async.ca.shared.global [%r21], [%d4], 4;\n/* wrong */\n"
        "cp.async.ca.shared.global [%r21], [%d0], 4; // here\n"
        "cp.async.wait_all;", "/* wrong */", "cp.async.wait_all;",
        "race: write of shared byte 4, which cp.async writes", 1),
    "cp.async misaligned": (
        "cp.async.ca.shared.global [%r21], [%d4+2], 4; // here\ncp.async.wait_all;", "+2", "",
        "misaligned global read", 0),
    "cp.async of more than there is": (
        "mov.u32 %r11, 5;\ncp.async.ca.shared.global [%r21], [%d4], 4, %r11; // here\ncp.async.wait_all;",
        "%r11, 5", "%r11, 3",
        "src-size 5 of a copy of 4 bytes", 0),
    "the block ends with cp.async in flight": (
        "cp.async.ca.shared.global [%r21], [%d4], 4; // here\ncp.async.commit_group;\ncp.async.wait_group 1;",
        "wait_group 1",
        "wait_group 0", "the block ends without a wait for this copy", 0),
    "a bulk copy not waited for": (
        MBARRIER + EXPECT + LOAD + "\n/* wrong */\nld.shared.u32 %r10, [%r21]; // here", "/* wrong */", FULL,
        "race: read of shared byte 0, which a bulk copy writes", 0),
    "the other mbarrier waited for": (
        MBARRIER + EXPECT + LOAD + "\nmbarrier.arrive.shared.b64 _, [%r24];\n"
        + EMPTY + "\nld.shared.u32 %r10, [%r21]; // here",
        EMPTY, FULL, "race: read of shared byte 0, which a bulk copy writes", 0),
    "a bulk copy waited for in the wrong phase": (
        MBARRIER + EXPECT + "\n" + FULL.replace(", 0;", ", 1;") + LOAD + "\nld.shared.u32 %r10, [%r21]; // here\n",
        FULL.replace(", 0;", ", 1;") + LOAD, LOAD + FULL, "nothing has written|race: read of shared byte", 0),
    "a bulk copy over what is being read": (
        MBARRIER + EXPECT + LOAD + FULL + "\nld.shared.u32 %r10, [%r21];\n/* wrong */\n" + EXPECT + LOAD + " // here\n"
        + WAIT.format(2, 3, 1, 2), "/* wrong */", "mbarrier.arrive.shared.b64 _, [%r24];" + EMPTY,
        "race: write of shared byte 128, which a thread reads", 0),
    "a bulk copy over one that is in flight": (
        MBARRIER + EXPECT + LOAD + "\n/* wrong */\n" + LOAD.replace("[%d0]", "[%d1]") + " // here\n" + EXPECT
        + WAIT.format(2, 3, 1, 2), "/* wrong */", FULL, "race: write of shared byte 4, which a bulk copy writes", 0),
    "no fence before a bulk copy out": (
        MBARRIER + "st.shared.u32 [%r21], %r1;\n/* wrong */\nbar.sync 0;\n" + OUT + " // here\n"
        "cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;", "/* wrong */", "fence.proxy.async.shared::cta;",
        "no fence.proxy.async before the read of shared byte 0, which thread 0 writes", 0),
    "a fence by the wrong thread": (
        MBARRIER + "st.shared.u32 [%r21], %r1;\nsetp.lt.u32 %p2, %r1, 32; @%p2 fence.proxy.async;\nbar.sync 0;\n" + OUT
        + " // here\ncp.async.bulk.commit_group; cp.async.bulk.wait_group 0;", "@%p2 ", "",
        "no fence.proxy.async before the read of shared byte 128, which thread 32 writes", 0),
    "no barrier before a bulk copy out": (
        MBARRIER + "st.shared.u32 [%r21], %r1;\nfence.proxy.async;\n/* wrong */\n" + OUT + " // here\n"
        "cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;", "/* wrong */", "bar.sync 0;",
        "race: read of shared byte 128, which thread 32 writes", 0),
    "a bulk copy out overwritten": (
        MBARRIER + "st.shared.u32 [%r21], %r1;\nfence.proxy.async;\nbar.sync 0;\n"
        + OUT + " cp.async.bulk.commit_group;\n/* wrong */\n"
        "@!%p0 st.shared.u32 [%r21], 5; // here\ncp.async.bulk.wait_group 0;", "/* wrong */",
        "cp.async.bulk.wait_group.read 0;",
        "race: write of shared byte 0, which a bulk copy reads", 0),
    "a bulk copy of an odd size": (
        MBARRIER + EXPECT + LOAD.replace("256", "200") + " // here\n" + FULL, "200", "256",
        "a bulk copy of 200 bytes", 0),
    "a bulk copy misaligned": (
        MBARRIER + EXPECT + LOAD.replace("[%r20]", "[%r20+8]") + " // here\n" + FULL, "+8", "",
        "misaligned shared bulk write", 0),
    "no fence behind the init of an mbarrier": (
        MBARRIER + EXPECT + LOAD + " // here\n" + FULL, "fence.mbarrier_init.release.cluster;", "fence.proxy.async;",
        "no fence between the init of the mbarrier at shared byte 512 and a bulk copy", 0,
        "fence.mbarrier_init.release.cluster;", ""),
    "no barrier behind the init of an mbarrier": (
        MBARRIER.replace("bar.sync 0;", "/* wrong */") + "mbarrier.arrive.shared.b64 _, [%r24]; // here",
        "/* wrong */", "bar.sync 0;",
        "the mbarrier at shared byte 520 is used without a barrier behind its init", 1),
    "the block ends with a bulk copy in flight": (
        MBARRIER + EXPECT + LOAD + " // here\n/* wrong */", "/* wrong */",
        FULL, "the block ends without a wait for this copy", 0),
    "the block ends with a bulk copy out in flight": (
        MBARRIER + "st.shared.u32 [%r21], %r1; fence.proxy.async; bar.sync 0;\n"
        + OUT + " // here\ncp.async.bulk.commit_group;\n"
        "/* wrong */", "/* wrong */", "cp.async.bulk.wait_group.read 0;",
        "the block ends without a wait for this copy out", 0),
    "bytes expected that nobody sends": (
        MBARRIER + EXPECT.strip() + " // here\n/* wrong */", "/* wrong */", LOAD + FULL,
        "the block ends while 256 bytes that an mbarrier expects have not come", 0),
    # ---- barriers
    "an mbarrier that is not initialised": (
        MBARRIER + "mbarrier.arrive.shared.b64 _, [%r24+8]; // here", "+8", "",
        "no mbarrier is initialised at shared byte 528", 0),
    "an mbarrier initialised twice": (
        MBARRIER + "@!%p0 mbarrier.init.shared::cta.b64 [%r24], 1; // here", "[%r24], 1", "[%r24+8], 1",
        "is initialised twice", 0),
    "too many arrivals at an mbarrier": (
        MBARRIER + "setp.gt.u32 %p2, %r1, 5; @!%p2 mbarrier.arrive.shared.b64 _, [%r24], 11; // here\n", "11;", "10;",
        "the mbarrier at shared byte 520 gets more than its 64 arrivals in a phase", 5),
    "an arrival missing": (
        MBARRIER + "setp.ne.u32 %p2, %r1, 33; @%p2 mbarrier.arrive.shared.b64 _, [%r24];\n"
        "W1: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r24], 0; // here\n@!%p1 bra W1;", "@%p2 ", "",
        "deadlock: .*mbarrier at shared byte 520 is in phase 0, waited for 0: 1 arrivals and 0 bytes are missing", 0),
    "a warp missing at a barrier": (
        "setp.lt.u32 %p2, %r1, 32; @%p2 bra A; bar.sync 1, 32; bar.sync 1, 32; bra B;\nA: bar.sync 0, 64; // here\n"
        "B:", "bar.sync 1, 32; bra",
        "bar.sync 0, 64; bra", "deadlock: .*barrier 0 waits for 64 threads, 32 have arrived", 0),
    "lanes missing at a barrier": (
        "and.b32 %r11, %r1, 31; setp.lt.u32 %p2, %r11, 16; @%p2 bra A; bar.warp.sync 0xffff0000; @!%p2 bra B;\n"
        "A: bar.sync 0; // here\nbra C;\n"
        "B: vote.sync.any.pred %p3, %p2, -1; C:", "B: vote.sync.any.pred %p3, %p2, -1;", "B: bra A;",
        "deadlock: .*barrier 0 waits for all threads|vote waits for lanes", 0),
    "one barrier at two instructions": (
        "setp.lt.u32 %p2, %r1, 40; @%p2 bra A;\nbar.sync 0; bra B;\nA: bar.sync 0; // here\nB:", "%r1, 40", "%r1, 32",
        "barrier 0 is aligned, but warp 1 comes to it at two instructions", 32),
    "too many threads at a barrier": (
        "bar.sync 1, 32; // here", "1, 32", "1, 64", "64 threads arrive at barrier 1, which is for 32", 0),
    "two counts at a barrier": (
        "setp.lt.u32 %p2, %r1, 32; @%p2 bar.arrive 1, 96;\n@!%p2 bar.arrive 1, 64; // here", "96", "64",
        "barrier 1 for 64 threads, while others wait there for 96", 32),
    "a barrier that is not there": ("mov.u32 %r11, 16;\nbar.sync %r11; // here", "16", "15",
    "barrier 16: there are 0 to 15", 0),
    "a lane missing at a shuffle": (
        "setp.eq.u32 %p2, %r1, 7; @%p2 bra END;\nshfl.sync.bfly.b32 %r10, %r1, 1, 31, -1; // here\nEND: bar.sync 0;",
        "@%p2 bra END", "bra.uni N; N:", r"deadlock: .*shfl waits for lanes \[7\] of warp 0", 0),
    "a mask without the lane itself": (
        "vote.sync.any.pred %p2, %p2, 0xfffffffe; // here", "0xfffffffe", "-1",
        "does not name the thread's own lane 0", 0),
    "a shuffle from a lane that left": (
        "setp.gt.u32 %p2, %r1, 40; @%p2 exit;\nshfl.sync.down.b32 %r10, %r1, 1, 31, -1; // here",
        "down.b32 %r10, %r1, 1,",
        "bfly.b32 %r10, %r1, 0,", "reads lane 9, which is not here", 40),
    "a trap": ("setp.eq.u32 %p2, %r1, 3;\n@%p2 trap; // here", "@%p2 trap", "@%p2 mov.u32 %r10, 3",
    "the kernel traps", 3),
}  # fmt: skip
FIXED = ".const .align 4 .u32 fixed[4] = {1, 2, 3, 4};"


def attempt(body: str, **options) -> None:
    body = ADDRESS + body + "\nbar.warp.sync -1;" * ("exit" not in body)
    options = {"threads": 64, "given": lanes64(), "mode": "update", "module": SHARED + FIXED, "shared": 1024} | options
    execute(body, **options)


def lanes64() -> np.ndarray:
    return np.arange(64, dtype=np.uint32)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found(name):
    body, wrong, right, said, thread, *other = MISTAKES[name]
    assert body.count(wrong) >= 1
    if other:
        attempt(body)
        body, wrong, right = body.replace(*other), "", ""
    marked = re.sub(r"\n([^\n]*// here)", r"\n.loc 1 77 3\n\1", "\n" + body)
    with pytest.raises(Fault, match=said) as caught:
        attempt(marked)
    fault = caught.value
    assert (fault.kernel, fault.block, fault.thread) == ("kernel", 0, thread)
    assert fault.line == line_of(ADDRESS + marked, "// here", SHARED + FIXED) and fault.source == "planted.cu:77"
    assert all(
        part in str(fault) for part in ("kernel", "block 0", f"thread {thread}", f"line {fault.line}", "planted.cu:77")
    )
    if not other:
        attempt(body.replace(wrong, right, 1))


CLUSTER_MISTAKES = {
    "a wait without an arrive": ("barrier.cluster.wait; // here",
    "barrier.cluster.wait", MEET[:-1], "wait without an arrive", 0),
    "two arrives": (
        "barrier.cluster.arrive;\nbarrier.cluster.arrive; // here\nbarrier.cluster.wait;",
        "barrier.cluster.arrive;\n", "",
        "arrive without a wait since the last", 0),
    "one block does not come": (
        "mov.u32 %r2, %cluster_ctarank; setp.eq.u32 %p2, %r2, 1; barrier.cluster.arrive;\n"
        "barrier.cluster.wait; // here\n"
        "@%p2 bra B; barrier.cluster.arrive; barrier.cluster.wait; bra END; B: bar.sync 1, 128; END:",
        "bar.sync 1, 128;", MEET,
        "deadlock: .*block 1, .*barrier 1 waits for 128", 0),
    "shared memory of a block that has ended": (
        "st.shared.u32 [%r21], %r1;" + MEET + MAPA + "setp.eq.u32 %p2, %r2, 1; @%p2 bra END; mov.u32 %r11, 0;\n"
        "L: add.u32 %r11, %r11, 1; setp.lt.u32 %p3, %r11, 30; @%p3 bra L;\n"
        "ld.shared::cluster.u32 %r10, [%r25]; // here\nEND: /* wrong */",
        "/* wrong */", MEET, "shared memory of block 1 of the cluster, which has ended", 0),
    "a relaxed arrive": (
        "st.shared.u32 [%r21], %r1; barrier.cluster.arrive.relaxed; barrier.cluster.wait;\n" + MAPA
        + "\nld.shared::cluster.u32 %r10, [%r25]; // here\n" + MEET, ".relaxed", "",
        "race: read of shared byte 0, which thread", 0),
    "a block that is not there": (
        "st.shared.u32 [%r21], %r1;" + MEET + MAPA.replace("xor.b32 %r3, %r2, 1", "add.u32 %r3, %r2, 2")
        + "\nld.shared::cluster.u32 %r10, [%r25]; // here\n" + MEET, "add.u32 %r3, %r2, 2", "xor.b32 %r3, %r2, 1",
        "shared address of block [23] of a cluster of 2", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CLUSTER_MISTAKES)
def test_mistakes_in_clusters_are_found(name):
    body, wrong, right, said, thread = CLUSTER_MISTAKES[name]
    with pytest.raises(Fault, match=said) as caught:
        attempt(body, grid=2, cluster=2)
    assert caught.value.thread == thread
    if "deadlock" not in said:
        assert caught.value.line == line_of(ADDRESS + body, "// here", SHARED + FIXED)
    attempt(body.replace(wrong, right, 1), grid=2, cluster=2)


def test_the_block_at_fault_is_named():
    body = "mov.u32 %r2, %ctaid.x; mad.lo.u32 %r3, %r2, 64, %r1; mad.wide.u32 %d5, %r3, 4, %d0;\n"
    body += "ld.global.u32 %r10, [%d5]; // here"
    with pytest.raises(Fault, match="byte 512 of in, which has 512") as caught:
        attempt(body, grid=3, given=np.zeros(128, np.uint32))
    assert (caught.value.block, caught.value.thread) == (2, 0)


def test_outputs_that_are_not_written():
    body = "setp.eq.u32 %p0, %r1, 20; @%p0 st.global.u16 [%d3], %r1; @!%p0 " + STORE
    with pytest.raises(Fault, match="2 of 256 bytes of out were never written, the first at byte 82") as caught:
        attempt("mov.u32 %r10, 1;" + body, mode="write")
    assert caught.value.kernel == "kernel"
    attempt("mov.u32 %r10, 1;" + body.replace("u16", "u32"), mode="write")


def test_a_block_that_does_not_end(monkeypatch):
    monkeypatch.setattr(Machine, "patience", 300)
    body = "mov.u32 %r11, 0;\nL: add.u32 %r11, %r11, 1;\nsetp.ne.u32 %p0, %r11, {}; @%p0 bra L;"
    with pytest.raises(Fault, match="does not end: 301 turns"):
        attempt(body.format(0))
    attempt(body.format(100))
