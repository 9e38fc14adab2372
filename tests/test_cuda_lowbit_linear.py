"""The CUDA kernels of lowbit_linear: the PTX the library carries, run on the CPU against the reference, bit for bit.

Every launch is planned as for a GPU, of two multiprocessors, so that the blocks of the persistent kernels take several
tiles. The emulator faults on whatever a GPU leaves undefined; planted bugs show that it does, and where it points to.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from _cuda import assert_reference, launcher, lowbit_linear, module_with, need_library, ptx
from ptx_emulator import Fault, load
from test_triton_lowbit_linear import arguments

from pyvit_accel.formats.packed import pack

need_library()

# Tokens, features, inputs. Tiles are of 16 to 176 tokens and 64 to 256 features, stages of 64 and 128 inputs.
SHAPES = [
    (1, 1, 1), (1, 16, 32), (2, 3, 5), (8, 4, 16), (15, 15, 15), (16, 16, 16), (17, 17, 17), (16, 64, 31), (31, 63, 33),
    (32, 64, 48), (33, 65, 63), (7, 66, 64), (63, 127, 65), (64, 128, 95), (65, 129, 96), (5, 130, 97), (64, 100, 127),
    (30, 256, 128), (66, 255, 129), (40, 257, 130), (96, 260, 159), (127, 33, 160), (128, 128, 192), (129, 70, 193),
    (130, 264, 255), (1, 300, 256), (9, 512, 257), (175, 40, 288), (176, 20, 300), (177, 72, 320), (3, 140, 384),
    (197, 50, 200), (257, 24, 144), (48, 80, 511), (12, 44, 512), (20, 68, 513), (33, 132, 640), (4, 96, 768),
    (21, 31, 1000), (353, 9, 64), (6, 520, 40), (250, 130, 70), (70, 7, 1025), (11, 192, 400),
]  # fmt: skip
EPILOGUES = [  # activation, x_zero_point, parts, columns of out_scale (0: as many as features), out_bits
    ("none", 0, "", None, 8), ("gelu", 3, "rbl+", 0, 8), ("gelu_tanh", -128, "rb", 1, 4), ("none", 127, "l+", None, 8),
    ("quick_gelu", 0, "b+", 0, 2), ("gelu", 0, "b", 1, 8), ("none", -7, "r", 1, 8), ("gelu", 0, "rl", None, 8),
    ("quick_gelu", 5, "rb", 1, 6), ("gelu_tanh", 0, "bl+", None, 8), ("none", 0, "rbl+", 0, 5),
]  # fmt: skip


def configs(arch, w_bits):
    return [name for name in launcher.OP.configs() if f"_sm{arch}_w{w_bits}_" in name]


def case(shape, w_bits, epilogue, gap=3):
    activation, x_zero_point, parts, columns, out_bits = epilogue
    columns = shape[1] if columns == 0 else columns
    return arguments(*shape, w_bits, 8, activation, x_zero_point, parts, columns, out_bits, gap)


@pytest.mark.parametrize("w_bits", [8, 4])
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("i", range(len(SHAPES)), ids=lambda i: "x".join(map(str, SHAPES[i])))
def test_equals_the_reference(i, arch, w_bits):
    """Configurations and epilogues in turn, so that each meets many shapes."""
    of = configs(arch, w_bits)
    assert_reference(of[i % len(of)], *case(SHAPES[i], w_bits, EPILOGUES[i % len(EPILOGUES)]))


@pytest.mark.parametrize("out_columns, out_bits", [(None, 8), (1, 8), (0, 3)])
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize("config", ["lowbit_linear_sm80_w4_64x32", "lowbit_linear_sm90_w8_128x32"])
def test_every_epilogue(config, activation, out_columns, out_bits):
    for i, parts in enumerate(("rbl+", "", "b", "l", "r+")):
        shape = (19, (36, 35)[i % 2], 24)  # features four at a time, and one by one
        w_bits = 8 if "_w8_" in config else 4
        assert_reference(config, *case(shape, w_bits, (activation, 3, parts, out_columns, out_bits)))


@pytest.mark.parametrize("config", launcher.OP.configs())
def test_extremes(config):
    """Every product at one end, in several rounds of the pipeline, and the largest zero point against them."""
    w_bits = 8 if "_w8_" in config else 4
    M, N, K = 18, 65, 900
    w = torch.full((N, K), 2 ** (w_bits - 1) - 1, dtype=torch.int8)
    w[::2] = -(2 ** (w_bits - 1))
    x = torch.full((M, K), -128, dtype=torch.int8)
    x[::3] = 127
    ones = torch.ones(N)
    y = lowbit_linear(config, x, ones[:1], pack(w, w_bits), ones, None, 127, "none", None, None, None, 0, 8)
    truth = (x.double() - 127) @ w.double().T
    assert truth.abs().max() > 2**20 and torch.equal(y.double(), truth.float().double())


@pytest.mark.parametrize("w_bits", [8, 4])
def test_ada_runs_the_kernels_of_sm_80(w_bits):
    for name in configs(80, w_bits):
        assert_reference(name, *case((35, 66, 100), w_bits, EPILOGUES[1]), capability=89)


def test_nothing_is_read_as_if_it_never_changed():
    """A dependent launch begins while the one before may still write: what it reads is not read-only while it runs."""
    texts = {module_with(ptx(90), name) for name in configs(90, 4) + configs(90, 8)}
    assert texts and not any(re.search(r"\bld\.global\S*\.nc\b", text) for text in texts)


def test_identity_returns_the_weight():
    """x = I: every code of the weight comes out where it belongs, in every feature's place of a tile."""
    for name in launcher.OP.configs():
        w_bits = 8 if "_w8_" in name else 4
        w = torch.randint(-(2 ** (w_bits - 1)), 2 ** (w_bits - 1), (130, 70), dtype=torch.int8)
        ones, x = torch.ones(130), torch.eye(70, dtype=torch.int8)
        y = lowbit_linear(name, x, ones[:1], pack(w, w_bits), ones, None, 0, "none", None, None, None, 0, 8)
        assert torch.equal(y.T, w.float()), name


# ---- planted bugs: one edit of the PTX each, and what is said about it

AMPERE, HOPPER = "lowbit_linear_sm80_w4_64x32", "lowbit_linear_sm90_w4_128x32"
CLUSTERS = "lowbit_linear_sm90_w4_128x128"  # of two blocks
WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 p, \[%r\d+\], %r\d+;"
ARRIVE = r"@p mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];"
NO_WAIT = "setp.eq.s32 p, 0, 0;"
VALUES = r"first at \(token, feature\)"

# What is edited: kernel, pattern, new text, which match. What is said, and the C++ that the place of the fault names.
BUGS = {
    "no barrier before a stage is overwritten": (
        AMPERE, r"bar\.sync 0;", "", 0, "race: read of shared byte .* thread 4 writes", "load_words"),
    "one copy too few is waited for": (
        AMPERE, r"cp\.async\.wait_group 3;", "cp.async.wait_group 4;", 0, "which cp.async writes", "load_words"),
    "fragments swapped": (
        AMPERE, r"(mma\.sync[^{]*{[^}]*}, {)(%r\d+), (%r\d+)", r"\1\3, \2", 0, VALUES, None),
    "inputs one unit beyond the row": (
        AMPERE, r"setp\.lt\.s64", "setp.le.s64", 8, "out-of-bounds global read of 16 bytes .* of x", "copy_unit"),
    "one stage more than there are": (
        AMPERE, r"(setp\.eq\.s32 %p\d+, %r\d+), 5;", r"\1, 6;", 0, "out-of-bounds shared read", "load_words"),
    "matrices loaded between units": (
        AMPERE, r"(ldmatrix[^\[]*\[%r\d+)\]", r"\1+8]", 0, "misaligned shared read", "load_matrices"),
    "no fence behind the mbarriers' init": (
        HOPPER, r"fence\.mbarrier_init[^;]*;", "", 0, "no fence between the init of the mbarrier", "tma_load"),
    "no barrier behind the mbarriers' init": (
        HOPPER, r"bar\.sync 0;", "", 0, "used without a barrier behind its init", "mbarrier_wait"),
    "more bytes announced than come": (
        HOPPER, r"(arrive\.expect_tx[^,]*, \[%r\d+\], )%r\d+;", r"\g<1>12304;", 0,
        "deadlock: .* 16 bytes are missing", "mbarrier_wait"),
    "the producer does not wait": (
        HOPPER, WAIT, NO_WAIT, -1,
        "race: write of shared byte .* (wgmma reads|a bulk copy writes)|more than its 1 arrivals", "tma_load|arrive"),
    "a consumer does not wait": (HOPPER, WAIT, NO_WAIT, 0, "which nothing has written", "load_weights|load"),
    "a stage given back while it is read": (
        HOPPER, r"wgmma\.wait_group\.sync\.aligned 1;", "", 0, "race: write of shared byte .* wgmma reads", "tma_load"),
    "a stage that is not given back": (HOPPER, ARRIVE, "", 0, "deadlock: .* 1 arrivals", "mbarrier_wait"),
    "weights unpacked over an operand in flight": (
        HOPPER, r"wgmma\.wait_group\.sync\.aligned 0;", "", 1, "write over an operand of wgmma", "nibbles"),
    "no fence before a product": (
        HOPPER, r"wgmma\.fence\.sync\.aligned;", "", 0, "no wgmma.fence before the first wgmma", "WGMMA|multiply"),
    "a descriptor of the wrong inputs": (HOPPER, "4611686293305294848", "4611686293305294850", 0, VALUES, None),
    "the launch before is not awaited": (
        HOPPER, r"griddepcontrol\.wait;", "", 0, "global memory before griddepcontrol.wait", "tma_load"),
    "weights for one block of the cluster": (
        CLUSTERS, r"(multicast::cluster[^;]*), %rs\d+;", r"\1, 1;", 0, "deadlock: ", "mbarrier_wait"),
    "a stage given back to the own block alone": (
        CLUSTERS, r"(mapa[^;]*, )%r\d+;", r"\g<1>0;", 0, "deadlock: |more than its", "mbarrier_wait|arrive"),
    "a block ends while its neighbour arrives there": (
        CLUSTERS, WAIT, NO_WAIT, -1, "block 0 may have ended before this reaches", "arrive"),
}  # fmt: skip


def planted(kernel, pattern, new, nth):
    """The faulty program."""
    text = module_with(ptx(80 if "sm80" in kernel else 90), kernel)
    start = text.index(f".entry {kernel}(")
    end = text.find(".entry", start + 6)
    m = list(re.finditer(pattern, text[start:end]))[nth]
    return load(text[: start + m.start()] + m.expand(new) + text[start + m.end() :], kernel)


def line_of(source):
    """The line of csrc/cuda, or of the function that is inlined there, that "file:12 < file:34" names."""
    lines = []
    for place in source.split(" < "):
        file, _, line = place.partition(":")
        text = (Path(__file__).parents[1] / "csrc" / "cuda" / file).read_text(encoding="utf-8").splitlines()
        lines.append(text[int(line) - 1])
    return "\n".join(lines)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug):
    kernel, pattern, new, nth, expected, place = BUGS[bug]
    args = case((70, 140, 720), 4, EPILOGUES[1], gap=0)
    with pytest.raises(AssertionError if place is None else Fault, match=expected) as caught:
        assert_reference(kernel, *args, loaded=planted(kernel, pattern, new, nth))
    if place is not None:
        assert caught.value.kernel == kernel and re.search(place, line_of(caught.value.source)), caught.value
