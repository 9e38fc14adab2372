"""Asynchronous copies in the emulator: cp.async and its groups, bulk copies, tensor maps and swizzles, mbarriers."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from _ptx import SHARED, STORE, execute, filled, lanes
from ptx_emulator import Fault, TensorMap
from test_ptx_threads import PRODUCER, consumed

RNG = np.random.default_rng(13)
TILE = ".shared .align 1024 .b8 tile[8192]; .shared .align 8 .b8 bar[64];"
START = """mov.u32 %r20, tile; mov.u32 %r21, bar; setp.ne.u32 %p0, %r1, 0; {init} fence.mbarrier_init.release.cluster;
bar.sync 0; mov.u32 %r30, 0; """
INIT = "@!%p0 mbarrier.init.shared::cta.b64 [%r21], 1;"
EXPECT = "@!%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r21], {bytes};"
WAIT = "W{k}: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r21], {parity}; @!%p1 bra W{k};"
DUMP = """mov.u32 %r40, %r1; D: setp.ge.u32 %p9, %r40, %r0; @%p9 bra E; mad.lo.u32 %r41, %r40, 4, %r20;
ld.shared.u32 %r42, [%r41];
mad.wide.u32 %d20, %r40, 4, %d1;
st.global.u32 [%d20], %r42; add.u32 %r40, %r40, %ntid.x; bra D; E:"""


def wait(k: int, parity: int | None = None) -> str:
    return filled(WAIT, {"k": str(k), "parity": str(k % 2 if parity is None else parity)})


# ---- cp.async


@pytest.mark.parametrize("cache,nbytes", [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
def test_copies_fill_with_zeros(cache, nbytes):
    """Thread t takes t % (nbytes + 1) bytes, all, or none where it is told to ignore the source."""
    data = RNG.integers(1, 256, 16 * 64).astype(np.uint8)
    body = f"""mov.u32 %r20, tile; shl.b32 %r21, %r1, 4; add.u32 %r22, %r20, %r21; cvt.u64.u32 %d4, %r21;
    add.s64 %d4, %d4, %d0;
    rem.u32 %r2, %r1, {nbytes + 1}; and.b32 %r3, %r1, 1; setp.ne.u32 %p0, %r3, 0; add.u32 %r23, %r22, 1024;
    add.u32 %r24, %r22, 2048;
    cp.async.{cache}.shared.global [%r22], [%d4], {nbytes}, %r2;
    cp.async.{cache}.shared.global.L2::128B [%r23], [%d4], {nbytes};
    cp.async.{cache}.shared.global [%r24], [%d4], {nbytes}, %p0; cp.async.wait_all; mul.wide.u32 %d5, %r1, 48;
    add.s64 %d5, %d5, %d1;"""
    for i, (piece, register) in enumerate(product(range(0, nbytes, 4), ("%r22", "%r23", "%r24"))):
        at = 16 * ["%r22", "%r23", "%r24"].index(register) + piece
        body += f"ld.shared.u32 %r{4 + i}, [{register}+{piece}]; st.global.u32 [%d5+{at}], %r{4 + i};"
    out = (
        execute(body, threads=64, given=data, words=64 * 12, module=TILE, mode="update")
        .view(np.uint8)
        .reshape(64, 3, 16)
    )
    source = data.reshape(64, 16)[:, :nbytes]
    for t in range(64):
        size = t % (nbytes + 1)
        assert out[t, 0, :nbytes].tolist() == source[t, :size].tolist() + [0] * (nbytes - size)
        assert np.array_equal(out[t, 1, :nbytes], source[t]) and np.array_equal(
            out[t, 2, :nbytes], source[t] * (t % 2 == 0)
        )


GROUPS = """mov.u32 %r20, tile; shl.b32 %r21, %r1, 2; add.u32 %r22, %r20, %r21; mul.wide.u32 %d4, %r1, 4;
add.s64 %d4, %d4, %d0;
and.b32 %r3, %r1, 1; setp.ne.u32 %p0, %r3, 0;
cp.async.ca.shared.global [%r22], [%d4], 4; cp.async.commit_group; cp.async.ca.shared.global [%r22+512], [%d4+512], 4;
cp.async.commit_group; @%p0 cp.async.ca.shared.global [%r22+1024], [%d4+1024], 4; @%p0 cp.async.commit_group;
{wait} {barrier} xor.b32 %r23, %r22, {other}; ld.shared.u32 %r10, [%r23]; cp.async.wait_group 0;"""


@pytest.mark.parametrize("lane", ["own", "other"])
def test_groups_of_copies(lane):
    """Odd lanes have a group more: they may leave two in flight, even ones only one."""
    data = RNG.integers(0, 1 << 32, 512).astype(np.uint32)
    other, barrier = (0, "") if lane == "own" else (4, "bar.warp.sync -1;")
    enough = "@%p0 cp.async.wait_group 2; @!%p0 cp.async.wait_group 1;"
    for text in (enough, "cp.async.wait_group 1;", "cp.async.wait_all;"):
        body = filled(GROUPS, {"wait": text, "barrier": barrier, "other": str(other)})
        out = execute(body + STORE, threads=40, given=data, module=TILE)
        assert np.array_equal(out, data[lanes(40) ^ (other // 4)])
    for text in ("cp.async.wait_group 2;", "@%p0 cp.async.wait_group 3; @!%p0 cp.async.wait_group 1;", ""):
        with pytest.raises(Fault, match=r"race: read of shared byte \d+, which cp.async writes"):
            execute(
                filled(GROUPS, {"wait": text, "barrier": barrier, "other": str(other)}) + STORE,
                threads=40,
                given=data,
                module=TILE,
            )
    if lane == "other":
        with pytest.raises(Fault, match="race: read of shared byte"):
            execute(
                filled(GROUPS, {"wait": enough, "barrier": "", "other": "4"}) + STORE,
                threads=40,
                given=data,
                module=TILE,
            )


# ---- bulk copies and mbarriers

BULK = "@!%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r20], [%d0], 256, [%r21];"


def test_bulk_copies_in_several_rounds():
    """Each round's parity, the next copy only behind a barrier; the second expects its bytes after they have come."""
    data = RNG.integers(0, 1 << 32, 192).astype(np.uint32)
    rounds, body = 3, filled(START, {"init": INIT})
    for k in range(rounds):
        expect = EXPECT.replace("{bytes}", "256")
        body += BULK + expect if k == 1 else expect + BULK
        body += wait(k) + "mad.lo.u32 %r41, %r1, 4, %r20; ld.shared.u32 %r42, [%r41]; mad.lo.u32 %r30, %r30, 3, %r42;"
        body += "bar.sync 0; add.s64 %d0, %d0, 256;"
    out = execute(body + "mov.u32 %r10, %r30;" + STORE, threads=64, given=data, module=TILE)
    wanted = np.zeros(64, np.uint32)
    for part in data.reshape(3, 64):
        wanted = wanted * 3 + part
    assert np.array_equal(out, wanted)


def test_bulk_copy_out():
    body = """mov.u32 %r20, tile; mad.lo.u32 %r21, %r1, 4, %r20; st.shared.u32 [%r21], %r1;
    fence.proxy.async.shared::cta; bar.sync 0;
    setp.ne.u32 %p0, %r1, 0; @%p0 bra END; cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r20], 128;
    cp.async.bulk.commit_group; add.s64 %d4, %d1, 128; add.u32 %r22, %r20, 128;
    cp.async.bulk.global.shared::cta.bulk_group [%d4], [%r22], 128; cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 1;
    st.shared.u32 [%r20], 7; cp.async.bulk.wait_group 0; st.shared.u32 [%r22], 7; END: """
    assert np.array_equal(execute(body, threads=64, module=TILE), lanes(64))
    for old, new in (("wait_group.read 1", "wait_group.read 2"), ("wait_group 0;", "wait_group 1;")):
        with pytest.raises(Fault, match=r"race: write of shared byte .*, which a bulk copy reads"):
            execute(body.replace(old, new), threads=64, module=TILE)


def test_prefetches_of_what_is_there():
    """Of a dependent launch even before it awaits the one before: nothing is read."""
    body = "mul.wide.u32 %d5, %r1, 16; add.s64 %d5, %d5, %d0; cp.async.bulk.prefetch.L2.global [%d5], 32;"
    body += "griddepcontrol.wait; mov.u32 %r10, %r1;" + STORE
    given = np.zeros(33 * 16, np.uint8)
    assert np.array_equal(execute(body, given=given, dependent=True), lanes())
    for old, new, said in (
        ("32;", "48;", "out-of-bounds prefetch of 48 bytes at byte 496 of in, which has 528"),
        ("32;", "8;", "a prefetch of 8 bytes at .*: multiples of 16"),
        ("[%d5]", "[%d5+8]", "a prefetch of 32 bytes at .*: multiples of 16"),
    ):
        with pytest.raises(Fault, match=said):
            execute(body.replace(old, new), given=given)


@pytest.mark.parametrize("kind", ["parity", "state", "test_wait"])
def test_producer_and_consumer_by_mbarriers(kind):
    """One pair of mbarriers, five rounds; parities, or the state that an arrival returned, or a loop that polls."""
    full, empty = "[%r20+256]", "[%r20+264]"
    polls = "mbarrier.test_wait.parity.shared.b64 %p3, {at}, {parity}; @!%p3 bra L{k};"
    waits = polls if kind == "test_wait" else polls.replace("test_wait", "try_wait")
    start = f"""setp.ne.u32 %p0, %r1, 0; @%p0 bra READY; mov.u32 %r20, tile; mbarrier.init.shared::cta.b64 {full}, 32;
    mbarrier.init.shared::cta.b64 {empty}, 32; READY: bar.sync 0; mov.u32 %r15, 0; mov.u32 %r16, 1;"""
    flip = "xor.b32 {p}, {p}, 1;"
    parts = {
        "empty_wait": "L0:" + filled(waits, {"at": empty, "parity": "%r16", "k": "0"}) + flip.replace("{p}", "%r16"),
        "full_arrive": f"mbarrier.arrive.release.cta.shared::cta.b64 _, {full};",
        "first": "",
        "full_wait": "L1:" + filled(waits, {"at": full, "parity": "%r15", "k": "1"}) + flip.replace("{p}", "%r15"),
        "empty_arrive": f"mbarrier.arrive.shared.b64 %d9, {empty};",
    }
    if kind == "state":  # both arrive at both: whoever has the state of its own arrival waits for that phase
        swap = (
            "mbarrier.arrive.shared.b64 %d8, {at}; L{k}: mbarrier.try_wait.shared.b64 %p3, {at}, %d8; @!%p3 bra L{k};"
        )
        start = start.replace("32;", "64;")
        parts |= {
            "empty_wait": "",
            "full_arrive": filled(swap, {"at": full, "k": "0"}) + filled(swap, {"at": empty, "k": "2"}),
            "full_wait": filled(swap, {"at": full, "k": "1"}), "empty_arrive": filled(swap, {"at": empty, "k": "3"}),
        }  # fmt: skip
    body = start + filled(PRODUCER, parts)
    out = execute(body + STORE, threads=64, module=SHARED, shared=512)
    assert out.tolist() == [0] * 32 + [consumed(lane) for lane in range(32)]
    for broken in ("empty_arrive", "full_arrive") if kind != "state" else ():
        with pytest.raises(Fault, match=r"deadlock: .* 32 arrivals|does not end"):
            execute_briefly(start + filled(PRODUCER, parts | {broken: ""}) + STORE)
    relaxed = parts["full_arrive"].replace(".release.cta.", ".relaxed.cta.")
    if kind == "parity":
        with pytest.raises(Fault, match="race: read of shared byte"):
            execute(
                start + filled(PRODUCER, parts | {"full_arrive": relaxed}) + STORE,
                threads=64,
                module=SHARED,
                shared=512,
            )


def execute_briefly(body: str) -> None:
    from ptx_emulator.machine import Machine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Machine, "patience", 500)
        execute(body, threads=64, module=SHARED, shared=512)


def test_counts_of_arrivals():
    """One arrival that counts for three; threads that drop out; the next phases need only the others."""
    body = filled(START, {"init": "@!%p0 mbarrier.init.shared::cta.b64 [%r21], 35;"})
    body += (
        "@!%p0 mbarrier.arrive.shared::cta.b64 _, [%r21], 3; mbarrier.arrive_drop.shared::cta.b64 %d5, [%r21];"
        + wait(0)
    )
    body += "setp.lt.u32 %p2, %r1, 3; @%p2 mbarrier.arrive.shared::cta.b64 _, [%r21];" + wait(1)
    body += "@!%p0 mbarrier.arrive.shared::cta.b64 _, [%r21], 3;" + wait(2)
    body += "mbarrier.test_wait.parity.shared::cta.b64 %p4, [%r21], 1; selp.u32 %r10, 1, 2, %p4;"
    assert (execute(body + STORE, module=TILE) == 2).all()


# ---- tensor maps


def boxed(data: np.ndarray, at: tuple[int, ...], box: tuple[int, ...]) -> np.ndarray:
    """The box at coordinates (innermost first) of data (outermost first), zeros outside."""
    result = np.zeros(box[::-1], data.dtype)
    for index in np.ndindex(*result.shape):
        where = tuple(c + i for c, i in zip(at[::-1], index, strict=True))
        if all(0 <= w < n for w, n in zip(where, data.shape, strict=True)):
            result[index] = data[where]
    return result


def permuted(linear: np.ndarray, span: int) -> np.ndarray:
    """Rows of `span` bytes with their 16-byte units where the copy engine puts them: unit ^ (place of the row)."""
    if not span:
        return linear
    units, rows = span // 16, len(linear) // span
    result = np.empty_like(linear)
    for row in range(rows):
        place = {128: row % 8, 64: row // 2 % 4, 32: row // 4 % 2}[span]
        for unit in range(units):
            to = row * span + 16 * (unit ^ place)
            result[to : to + 16] = linear[row * span + 16 * unit : row * span + 16 * unit + 16]
    return result


SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}  # the driver's numbers: bytes
MAPS = [  # shape (outermost first), type, box (innermost first), swizzle, coordinates
    ((64,), np.uint32, (16,), 0, [(0,), (60,), (-5,)]),
    ((100,), np.uint8, (32,), 3, [(80,), (-7,)]),
    ((10, 64), np.uint16, (64, 8), 1, [(0, 0), (32, 5), (-3, -2), (200, 0)]),
    ((20, 80), np.uint8, (64, 16), 2, [(0, 3), (40, 10), (-16, -5)]),
    ((9, 48), np.uint8, (32, 9), 3, [(0, 0), (20, 2)]),
    ((33, 36), np.float32, (32, 24), 1, [(0, 0), (8, 20), (-2, 40)]),
    ((5, 12, 32), np.uint16, (64, 4, 3), 1, [(0, 0, 0), (-10, 10, 3), (0, -3, -1)]),
    ((3, 6, 16), np.uint16, (8, 3, 2), 0, [(4, 2, 1), (12, 5, 2)]),
]
LOAD = (
    START.replace("{init}", INIT) + EXPECT + "mov.b64 %d4, map; cvta.param.u64 %d4, %d4; @!%p0 cp.async.bulk.tensor."
    "{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes [%r20], [%d4, {at}], [%r21];" + wait(0) + DUMP
)


def map_of(data: np.ndarray, box, swizzle):
    return lambda source, out: TensorMap(source, data.shape[::-1], data.strides[-2::-1], box, swizzle, data.itemsize)


@pytest.mark.parametrize("shape,dtype,box,swizzle,places", MAPS)
def test_tensor_loads(shape, dtype, box, swizzle, places):
    bits = RNG.integers(0, 256, (*shape, np.dtype(dtype).itemsize)).astype(np.uint8)
    data = bits.view(dtype).reshape(shape)
    size = int(np.prod(box)) * data.itemsize
    for at in places:
        text = "{" + ", ".join(map(str, at)) + "}"
        body = filled(LOAD, {"bytes": str(size), "rank": str(len(box)), "at": text})
        out = execute(body, given=data, n=size // 4, words=size // 4, module=TILE, tensor=map_of(data, box, swizzle))
        wanted = permuted(np.ascontiguousarray(boxed(data, at, box)).view(np.uint8).reshape(-1), SWIZZLES[swizzle])
        assert np.array_equal(out.view(np.uint8), wanted), at
    for wrong in (size - 16, size + 16):
        with pytest.raises(Fault, match=r"deadlock: .*16 bytes are missing"):
            body = filled(LOAD, {"bytes": str(wrong), "rank": str(len(box)), "at": text})
            execute(body, given=data, n=1, module=TILE, tensor=map_of(data, box, swizzle), complete=False)


FILL = """mov.u32 %r20, tile; mov.u32 %r40, %r1; F: setp.ge.u32 %p9, %r40, %r0; @%p9 bra G;
mad.lo.u32 %r41, %r40, 4, %r20; mad.wide.u32 %d20, %r40, 4, %d0;
ld.global.u32 %r42, [%d20];
st.shared.u32 [%r41], %r42; add.u32 %r40, %r40, 32; bra F; G: fence.proxy.async;
bar.sync 0;
mov.b64 %d4, map; cvta.param.u64 %d4, %d4; setp.ne.u32 %p0, %r1, 0; @%p0 bra END;
cp.async.bulk.tensor.{rank}d.global.shared::cta.bulk_group [%d4, {at}], [%r20];
cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0; END:"""


@pytest.mark.parametrize("shape,dtype,box,swizzle,places", [case for case in MAPS if np.prod(case[2]) % 4 == 0])
def test_tensor_stores(shape, dtype, box, swizzle, places):
    """What lies outside of the tensor is not written."""
    itemsize = np.dtype(dtype).itemsize
    size, whole = int(np.prod(box)) * itemsize, int(np.prod(shape)) * itemsize
    for at in places:
        given = RNG.integers(1, 256, size).astype(np.uint8)
        strides = np.zeros(shape, dtype).strides[-2::-1]
        body = filled(FILL, {"rank": str(len(box)), "at": "{" + ", ".join(map(str, at)) + "}"})
        out = execute(
            body, given=given, n=size // 4, words=-(-whole // 4), module=TILE, mode="update",
            tensor=lambda source, out, s=strides: TensorMap(out, shape[::-1], s, box, swizzle, itemsize),
        )  # fmt: skip
        linear = permuted(given, SWIZZLES[swizzle])  # its own inverse
        wanted = np.zeros(whole, np.uint8).view(dtype).reshape(shape)
        block = linear.view(dtype).reshape(box[::-1])
        for index in np.ndindex(*block.shape):
            where = tuple(c + i for c, i in zip(at[::-1], index, strict=True))
            if all(0 <= w < n for w, n in zip(where, shape, strict=True)):
                wanted[where] = block[index]
        assert np.array_equal(out.view(np.uint8)[:whole], wanted.view(np.uint8).reshape(-1)), at


def test_maps_that_the_driver_would_refuse():
    good = TensorMap(0x1000, (64, 8), (128,), (32, 8), 2, 2)
    assert TensorMap.decode(good.encode()) == good
    for wrong, text in (
        ({"base": 0x1008}, "base"), ({"strides": (120,)}, "strides"), ({"box": (512, 1)}, "box"),
        ({"dims": (0, 8)}, "dims"),
        ({"box": (64, 8)}, "swizzled in 64"), ({"box": (4, 8)}, "no multiple of 16"), ({"strides": ()}, "ranks"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            TensorMap(**(vars(good) | wrong)).encode()


# ---- clusters

MULTICAST = (
    "mov.u32 %r2, %cluster_ctarank; setp.eq.u32 %p4, %r2, 0;"
    + START.replace("{init}", INIT).replace("bar.sync 0;", "barrier.cluster.arrive; barrier.cluster.wait;")
    + EXPECT.replace("{bytes}", "256")
    + """@%p0 bra GO; @!%p4 bra GO; mov.b64 %d4, map; cvta.param.u64 %d4, %d4; mov.u16 %h0, 3;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
    [%r20], [%d4, {0, 1}], [%r21], %h0; GO:"""
    + wait(0)
    + "mad.lo.u32 %r41, %r1, 4, %r20; ld.shared.u32 %r10, [%r41]; mov.u32 %r4, %ctaid.x; mad.lo.u32 %r4, %r4, 64, %r1;"
    "mad.wide.u32 %d3, %r4, 4, %d1;" + STORE + "barrier.cluster.arrive; barrier.cluster.wait;"
)


def test_multicast():
    data = RNG.integers(0, 1 << 32, (6, 16)).astype(np.uint32)
    options = {
        "threads": 64,
        "grid": 4,
        "cluster": 2,
        "given": data,
        "module": TILE,
        "tensor": map_of(data, (16, 4), 0),
    }
    out = execute(MULTICAST, **options)
    assert np.array_equal(out.reshape(4, 64), np.tile(data[1:5].reshape(-1), (4, 1)))
    with pytest.raises(Fault, match="copy to block 2 of a cluster of 2"):
        execute(MULTICAST.replace("mov.u16 %h0, 3", "mov.u16 %h0, 7"), **options)
    with pytest.raises(Fault, match=r"deadlock: .*block 1, .*256 bytes are missing"):
        execute(MULTICAST.replace("mov.u16 %h0, 3", "mov.u16 %h0, 1"), **options)


def test_an_mbarrier_of_the_other_block():
    """Block 1 writes into block 0's shared memory and arrives there; block 0 waits, and reads."""
    body = """mov.u32 %r2, %cluster_ctarank; setp.ne.u32 %p4, %r2, 0; mov.u32 %r20, tile; mov.u32 %r21, bar;
    setp.ne.u32 %p0, %r1, 0;
    @!%p0 mbarrier.init.shared::cta.b64 [%r21], 64; fence.mbarrier_init.release.cluster; barrier.cluster.arrive;
    barrier.cluster.wait;
    mad.lo.u32 %r22, %r1, 4, %r20; mov.u32 %r10, 0; @!%p4 bra READ; mapa.shared::cluster.u32 %r23, %r22, 0;
    add.u32 %r5, %r1, 100; st.shared::cluster.u32 [%r23], %r5; mapa.shared::cluster.u32 %r24, %r21, 0;
    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r24]; bra END; READ: """
    unread = body + "END: "
    body += wait(0).replace("try_wait.parity", "try_wait.parity.acquire.cluster") + "ld.shared.u32 %r10, [%r22]; END: "
    store = "mov.u32 %r4, %ctaid.x; mad.lo.u32 %r4, %r4, 64, %r1; mad.wide.u32 %d3, %r4, 4, %d1;" + STORE
    last = "barrier.cluster.arrive; barrier.cluster.wait;"
    options = {"threads": 64, "grid": 2, "cluster": 2, "module": TILE}
    expected = np.concatenate([lanes(64) + 100, 0 * lanes(64)])
    assert np.array_equal(execute(body + store + last, **options), expected)
    assert np.array_equal(execute(body + store, **options), expected), "block 0 ends after all has come"
    with pytest.raises(Fault, match=r"block 0 (of the cluster, which has|may have) ended"):
        execute(unread + store, **options)
    relaxed = body.replace("barrier.cluster.arrive;", "barrier.cluster.arrive.relaxed;")  # the fence releases the init
    assert np.array_equal(execute(relaxed + store + last, **options), expected)
    with pytest.raises(Fault, match="used without a barrier behind its init"):
        execute(relaxed.replace("fence.mbarrier_init.release.cluster;", "") + store + last, **options)
    with pytest.raises(Fault, match="race: read of shared byte"):
        execute(body.replace("arrive.release", "arrive.relaxed") + store + last, **options)
