"""What the emulator reads: text, what it refuses, variables, spaces, parameters, threads of several dimensions."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from _ptx import HEAD, STORE, check, execute, kernel, lanes
from ptx_emulator import Fault, Memory, NotEmulated, load, run

# ---- text


def test_immediates():
    number = [
        ("-5", -5), ("0xFFFFFFF0", 0xFFFFFFF0), ("017", 15), ("-017", -15), ("0b101", 5), ("10U", 10), ("0x1FU", 31),
        ("0", 0), ("-0x8", -8), ("0f3F800000", 0x3F800000), ("0FBF000000", 0xBF000000), ("WARP_SZ", 32),
    ]  # fmt: skip
    cases = [(f"mov.b32 {{}}, {text};", "u4", lambda a, x=x: x) for text, x in number]
    cases += [
        ("mov.b16 {}, 0xFFFF;", "u2", lambda a: 0xFFFF),
        ("mov.b64 {}, -2;", "u8", lambda a: -2),
        ("mov.b64 {}, 0d3FF8000000000000;", "u8", lambda a: 0x3FF8000000000000),
        ("add.f32 {}, 0f40000000, 1.5;", "f4", lambda a: 0),
        ("add.u32 {}, %a, -0x10;", "u4", lambda a: a - 16),
        ("or.b32 {}, %a, 0x80000000;", "u4", lambda a: a | 0x80000000),
    ]
    cases[-3] = ("{.reg .f32 %t; add.f32 %t, 0f40000000, 1.5; mov.b32 {}, %t;}", "u4", lambda a: 0x40600000)
    check(cases, a=np.array([0, 1, 20, 0xFFFFFFFF], np.uint32))


def test_scopes_of_registers_and_labels():
    """As inline assembly has them: names declared again inside, the same label in two scopes, a jump out of one."""
    loop = """{ .reg .b32 %r10, t; .reg .pred P; mov.u32 t, 0;
    WAIT: add.u32 t, t, 1; setp.lt.u32 P, t, {times}; @P bra WAIT; @!P bra.uni DONE; mov.u32 t, 999;
    DONE: mov.u32 %r10, 77; add.u32 %r11, %r11, t; }"""
    body = "mov.u32 %r10, 5; mov.u32 %r11, 0;" + "".join(loop.replace("{times}", str(k)) for k in (3, 4))
    body += "{ { bra.uni OUT; } } mov.u32 %r11, 0; "
    body += "OUT: /* a comment; with {braces} */ mad.lo.u32 %r10, %r10, 100, %r11; // end"
    assert (execute(body + "\n" + STORE) == 507).all()


def test_only_the_entry_that_is_asked_for_is_read():
    other = ".visible .entry other() { unknown.thing %x; ret; }\n.func (.param .b32 r) helper(.param .b32 a) { ret; }"
    assert (execute("mov.u32 %r10, 1;" + STORE, module=other) == 1).all()
    with pytest.raises(ValueError, match="no entry missing"):
        load(kernel(""), "missing")
    with pytest.raises(NotEmulated, match=r"unknown\.thing.*PTX line \d+"):
        load(kernel("", other), "other")


REFUSED = {
    "opcodes": ["frobnicate.b32 %r1, %r2;", "tex.2d.v4.f32.f32 {%f0,%f1,%f2,%f3}, [%d0, {%f0,%f1}];", "call.uni foo;",
                "match.any.sync.b32 %r1, %r2, -1;", "vadd.u32.u32.u32 %r1, %r2, %r3;", "mul24.lo.u32 %r1, %r2, %r3;"],
    "modifiers": [
        "add.rz.f32 %f0, %f1, %f2;", "add.sat.u32 %r1, %r2, %r3;", "min.xorsign.abs.f32 %f0, %f1, %f2;",
        "min.f32 %f0, %f1, %f2, %f3;", "fma.rm.f32 %f0, %f1, %f2, %f3;", "rcp.rz.f32 %f0, %f1;",
        "div.rp.f32 %f0, %f1, %f2;",
        "mad.lo.cc.u32 %r1, %r2, %r3, %r4;", "mad.hi.sat.s32 %r1, %r2, %r3, %r4;", "madc.lo.u32 %r1, %r2, %r3, %r4;",
        "lop3.or.b32 %r1|%p1, %r2, %r3, %r4, 0x80, %p0;", "prmt.b32.f4e %r1, %r2, %r3, %r4;",
        "shf.l.b32 %r1, %r2, %r3, %r4;",
        "dp4a.lo.u32.u32 %r1, %r2, %r3, %r4;", "set.lt.and.u32.f32 %r1, %f0, %f1, %p0;",
        "setp.lt.bf16x2 %p0, %r1, %r2;",
        "cvt.rz.s32.f32 %r1, %f0;", "cvt.s32.f32 %r1, %f0;", "cvt.f16.f32 %h0, %f0;",
        "cvt.rs.f16x2.f32 %r1, %f0, %f1, %r2;",
        "cvt.rn.e4m3x2.f32 %h0, %f0, %f1;", "cvt.rn.satfinite.bf16x2.f32 %r1, %f0, %f1;",
        "cvt.rn.bf16x2.ue8m0x2 %r1, %h0;",
        "cvt.pack.sat.u4.s32.b32 %r1, %r2, %r3, %r4;", "cvt.rz.f32.s32 %f0, %r1;", "ld.async.u32 %r1, [%d0];",
        "ld.global.v2.u32 {%r1,%r2,%r3}, [%d0];", "st.async.shared::cluster.u32 [%r1], %r2;",
        "atom.shared.add.u32 %r1, [%r2], 1;",
        "atom.global.inc.u32 %r1, [%d0], 7;", "atom.global.add.noftz.f16x2 %r1, [%d0], %r2;",
        "red.global.v2.f32.add [%d0], {%f0,%f1};",
        "red.global.add.L2::cache_hint.u32 [%d0], %r1, %d1;", "shfl.up.b32 %r1, %r2, 1, 0;", "vote.all.pred %p0, %p1;",
        "redux.sync.add.f32 %f0, %f1, -1;", "bar.red.popc.u32 %r1, 0, %p0;", "barrier.cluster.foo;",
        "fence.proxy.alias;",
        "fence.proxy.tensormap::generic.release.gpu;", "mbarrier.arrive.noComplete.b64 %d4, [%r1], 1;",
        "isspacep.const %p0, %d0;",
        "mbarrier.pending_count.b64 %r1, %d4;", "cp.async.mbarrier.arrive.noinc.b64 [%r1];",
        "cvta.shared.u32 %r1, %r2;",
        "cp.async.cg.shared.global [%r1], [%d0], 8;", "cp.async.ca.shared.global [%r1], [%d0], 12;",
        "cp.async.cg.foo [%r1], [%d0], 16;",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%d0], [%r1], 16;",
        "cp.async.bulk.wait_group.foo 0;",
        "cp.async.bulk.tensor.1d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%r1], [%d0, {%r2}], [1];",
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d0, {%r2,%r3}], [%r4];",
        "bra.conv FOO;", "mov.v2.u32 %r1, %r2;", "neg.relu.s32 %r1, %r2;", "abs.sat.f32 %f0, %f1;",
        "popc.shiftamt.b32 %r1, %r2;",
        "discard.global.L2 [%d0], 128;", "mov.u32 %r1, %nowhere;", "mov.u32 %r1, missing;", "mov.u64 %r1, %d0;",
        "add.f32 %f0, %f1, 1;",
        "add.u32 %r1, %r2;", "selp.f32 %f0, %f1, %f2;", "ex2.approx.ftz.bf16 %h0, %h1;", "sin.f32 %f0, %f1;",
        "setmaxnreg.foo 24;",
        "elect.sync %r1, -1;", "activemask.u32 %r1;", "mapa.shared::cta.u32 %r1, %r2, 0;",
        "slct.foo.u32.s32 %r1, %r2, %r3, %r4;",
    ],
    "declarations": [".reg .v4 .f32 %v;", ".shared .v4 .f32 x[2];", ".global .u64 p = other;",
    ".global .u32 x = 0f3F800000;"],
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_known_is_refused_when_loaded(kind):
    accepted = []
    for text in REFUSED[kind]:
        try:
            load(kernel(text), "kernel")
            accepted.append(text)
        except NotEmulated as error:
            assert "PTX line" in str(error)
    assert not accepted


# ---- variables and spaces


def test_variables_with_values():
    module = """.global .align 4 .u32 words[6] = {1, -2, 0x10, 017};
    .const .align 4 .f32 floats[2] = {0f3F800000, 0fBF800000};
    .global .align 2 .b8 bytes[8] = {1, 2, 255};
    .const .align 8 .u64 wide = 0x1122334455667788;
    .visible .global .align 4 .u32 counter;"""
    body = """mov.u64 %d4, words; mad.wide.u32 %d5, %r1, 4, %d4; mov.u64 %d6, floats; cvta.const.u64 %d7, %d6;
    ld.global.u32 %r10, [%d5];
    setp.eq.u32 %p0, %r1, 6; @%p0 bra A; setp.eq.u32 %p0, %r1, 7; @%p0 bra B; bra.uni END;
    A: ld.const.u32 %r10, [floats+4]; ld.f32 %f0, [%d7]; cvt.rzi.s32.f32 %r11, %f0; add.s32 %r10, %r10, %r11;
    bra.uni END;
    B: ld.global.u8 %r10, [bytes+2]; ld.const.v2.u32 {%r11, %r12}, [wide]; add.u32 %r10, %r10, %r11;
       st.global.u32 [counter], %r12; ld.global.u32 %r13, [counter]; add.u32 %r10, %r10, %r13; END:"""
    body = body.replace(
        "ld.global.u32 %r10, [%d5];", "mov.u32 %r10, 0; setp.lt.u32 %p1, %r1, 6; @%p1 ld.global.u32 %r10, [%d5];"
    )
    wanted = [1, 2**32 - 2, 16, 15, 0, 0, 0xBF800001, 255 + 0x55667788 + 0x11223344]
    assert execute(body + STORE, threads=8, module=module).tolist() == wanted
    with pytest.raises(Fault, match="read-only"):
        execute("mov.u64 %d4, floats; st.global.u32 [%d4], %r1;", module=module)


def test_local_memory():
    """A thread's own, by its own address and by a generic one, as nvcc has it."""
    body = """.local .align 8 .b8 __local_depot0[32];
    mov.u64 %d4, __local_depot0; cvta.local.u64 %d5, %d4; isspacep.local %p0, %d5; isspacep.shared %p1, %d5;
    mul.lo.u32 %r11, %r1, 3; st.local.v2.u32 [%d4+8], {%r11, %r1}; and.b32 %r12, %r1, 3; mad.wide.u32 %d6, %r12, 4, %d5;
    st.u32 [%d6+16], %r1; ld.u32 %r13, [%d5+8]; ld.local.u32 %r14, [%d4+12]; cvta.to.local.u64 %d7, %d6;
    ld.local.u32 %r15, [%d7+16];
    add.u32 %r10, %r13, %r14; add.u32 %r10, %r10, %r15; selp.u32 %r16, 1000, 0, %p0; selp.u32 %r17, 1, 0, %p1;
    add.u32 %r10, %r10, %r16; add.u32 %r10, %r10, %r17;"""
    assert np.array_equal(execute(body + STORE), 5 * lanes() + 1000)


def test_parameters():
    """A structure by value, read in pieces, by generic address too; alignment between parameters."""
    text = f"""{HEAD}.visible .entry kernel(
    .param .u8 a, .param .align 16 .b8 s[24], .param .f32 b, .param .u64 .ptr .global out)
    {{ .reg .b32 %r<9>; .reg .b64 %d<5>;
    ld.param.u8 %r0, [a]; ld.param.v2.u32 {{%r1, %r2}}, [s+8]; ld.param.u32 %r3, [b]; ld.param.u64 %d0, [out];
    mov.b64 %d1, s; cvta.param.u64 %d2, %d1; ld.u16 %r4, [%d2+20];
    st.global.v4.u32 [%d0], {{%r0, %r1, %r2, %r3}}; st.global.u32 [%d0+16], %r4; ret; }}"""
    memory = Memory()
    out = memory.allocate("out", np.zeros(5, np.uint32), "write")
    program = load(text, "kernel")
    assert program.param_bytes == 56
    params = struct.pack("<B15x8xIIHHHHf4xQ", 7, 11, 12, 0, 0, 13, 14, 1.0, out)
    run(program, 1, 1, params, memory)
    assert memory["out"].view(np.uint32).tolist() == [7, 11, 12, 0x3F800000, 13]
    with pytest.raises(ValueError, match="takes 56 bytes"):
        run(program, 1, 1, params[:-4], memory)


def test_vectors_and_widths():
    data = np.arange(64, dtype=np.uint8) * 7
    body = """ld.global.v4.u8 {%r2, %r3, %r4, %r5}, [%d0+4]; ld.global.s8 %r6, [%d0+37];
    ld.global.v2.u16 {%h0, %h1}, [%d0+8];
    ld.global.s16 %r7, [%d0+38]; ld.global.v2.u64 {%d4, %d5}, [%d0+16]; cvt.u32.u16 %r8, %h1; cvt.u32.u64 %r9, %d5;
    st.global.v4.b32 [%d1], {%r2, %r3, %r4, %r5}; st.global.v2.b32 [%d1+16], {%r6, %r7};
    st.global.v2.b32 [%d1+24], {%r8, %r9};
    st.global.u8 [%d1+32], %r6; st.global.v2.u8 [%d1+34], {%r2, %r3}; st.global.u8 [%d1+33], 0xAB;"""
    out = execute(body, threads=1, given=data, words=9)
    assert out[:4].tolist() == data[4:8].tolist()
    assert out[4:6].view(np.int32).tolist() == [int(data[37:38].view(np.int8)[0]), int(data[38:40].view(np.int16)[0])]
    assert out[6] == data[10:12].view(np.uint16)[0] and out[7] == data[24:28].view(np.uint32)[0]
    assert out[8:].tobytes() == bytes([data[37], 0xAB, data[4], data[5]])


def test_threads_and_blocks_of_several_dimensions():
    body = """mov.u32 %r2, %tid.y; mov.u32 %r3, %tid.z; mov.u32 %r4, %ntid.x; mov.u32 %r5, %ntid.y;
    mov.u32 %r6, %ctaid.x;
    mov.u32 %r7, %ctaid.y; mov.u32 %r8, %nctaid.x; mov.u32 %r9, %ntid.z; mov.u32 %r18, %ctaid.z;
    mov.u32 %r19, %nctaid.y;
    mad.lo.u32 %r10, %r3, %r5, %r2; mad.lo.u32 %r10, %r10, %r4, %r1; mad.lo.u32 %r11, %r18, %r19, %r7;
    mad.lo.u32 %r11, %r11, %r8, %r6;
    mul.lo.u32 %r12, %r4, %r5; mul.lo.u32 %r12, %r12, %r9; mad.lo.u32 %r13, %r11, %r12, %r10;
    mad.wide.u32 %d4, %r13, 4, %d1; mov.u32 %r14, %laneid; mov.u32 %r15, %warpid; mov.u32 %r16, %nctaid.z;
    shl.b32 %r15, %r15, 5; or.b32 %r14, %r14, %r15; shl.b32 %r17, %r13, 12; or.b32 %r17, %r17, %r14;
    mad.lo.u32 %r17, %r16, 1000000, %r17;
    st.global.u32 [%d4], %r17;"""
    out = execute(body, threads=(7, 3, 2), grid=(3, 2, 2))
    i = np.arange(42 * 12, dtype=np.uint32)
    assert np.array_equal(out, (i << 12 | i % 42) + 2000000)
