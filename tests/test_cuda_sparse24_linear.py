"""The CUDA kernels of sparse24_linear: their PTX, as the library carries it, run on the CPU against the reference.

int8 bit for bit; 16 bits within the bound of float32 sums and one rounding. Launches are planned for two
multiprocessors, so that the blocks of persistent kernels take several tiles. Planted bugs show that checks can fail.
"""

from __future__ import annotations

import re
from importlib import import_module
from itertools import product

import pytest
import torch
from _cuda import SM_COUNT, built, emulate, module_with, need_library, ptx
from ptx_emulator import Fault, load

from pyvit_accel import reference
from pyvit_accel.formats import sparse24
from pyvit_accel.reference.lowbit_linear import finish

need_library()
launcher = import_module("pyvit_accel.cuda.sparse24_linear")

DTYPES = {"s8": torch.int8, "f16": torch.float16, "bf16": torch.bfloat16}
U16 = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Tokens, features, inputs. Tiles are of 32 to 128 tokens and 64 to 256 features, stages of 64 inputs or 128.
SHAPES = [
    (1, 1, 1), (31, 63, 33), (33, 65, 128), (65, 130, 97), (7, 257, 130), (129, 20, 191), (3, 140, 384),
    (130, 136, 65), (20, 300, 40), (66, 36, 513),
]  # fmt: skip
EPILOGUES = [  # activation, x_zero_point, parts, columns of out_scale (0: as many as features), out_bits
    ("none", 0, "", None, 8), ("gelu", 3, "rbl+", 0, 8), ("gelu_tanh", -128, "rb", 1, 4), ("none", 127, "l+", None, 8),
    ("quick_gelu", 0, "b+", 0, 2), ("gelu", 0, "rbl", None, 8), ("none", -7, "r", 1, 8),
]  # fmt: skip
NAMES = ("x", "values", "meta", "bias", "x_scale", "w_scale", "w_sum")


def configs(arch, dtype):
    return [name for name in launcher.OP.configs() if f"_sm{arch}_{dtype}_" in name]


def dtype_of(config):
    return DTYPES[config.split("_")[3]]


def sparse_weight(N, K, dtype):
    """(N, K): of every chunk two anywhere, some chunks with fewer, some zeros negative."""
    w = torch.randint(-128, 128, (N, K + -K % 4)).float() if dtype == torch.int8 else torch.randn(N, K + -K % 4)
    kept = torch.rand(N, w.shape[1] // 4, 4).argsort(-1) < 2
    w = (w.unflatten(1, (-1, 4)) * kept).flatten(1)[:, :K]
    return torch.where(torch.rand(N, K) < 0.1, -0.0, w).to(dtype)


def arguments(M, N, K, dtype, activation="none", x_zero_point=0, parts="", columns=None, out_bits=8, gap=0):
    """Of the reference, random. parts: r a scale per row of x, b bias, l layer scale, + residual with rows apart."""
    torch.manual_seed(M + 7 * N + 31 * K)
    integer, columns = dtype == torch.int8, N if columns == 0 else columns
    w = sparse_weight(N, K, dtype)
    x = torch.randint(-128, 128, (M, K), dtype=torch.int8) if integer else torch.randn(M, K).to(dtype)
    x_scale = 2e-4 * (0.5 + torch.rand(M if "r" in parts else 1)) / K**0.5
    return (
        x, *sparse24.pack(w), torch.randn(N) if "b" in parts else None, N, x_scale if integer else None,
        0.5 + torch.rand(N) if integer else None, w.sum(1, dtype=torch.int32) if integer and x_zero_point else None,
        x_zero_point if integer else 0, activation, torch.randn(N) if "l" in parts else None,
        torch.randn(M, N + gap)[:, :N] if "+" in parts else None,
        None if columns is None else 0.01 + 0.1 * torch.rand(columns), 3 if out_bits < 8 else 0, out_bits,
    )  # fmt: skip


def sparse24_linear(config, *args, loaded=None, capability=0):
    """The CUDA launcher's result of the reference's arguments, by the kernel named."""
    kept = launcher.arguments(*args)
    y = launcher.empty_result(args[0], args[4], args[12])
    given = dict(zip(NAMES, kept[:7], strict=True))
    given |= dict(zip(("layer_scale", "residual", "out_scale"), kept[9:12], strict=True))
    sm = 90 if "_sm90_" in config else 80
    rows = sparse24.rows_of(kept[1]) if "_rows_" in config else None
    given["rows"] = rows
    launch = launcher.OP.plan(launcher.problem(y, *kept, rows), capability or sm, SM_COUNT, config)
    emulate(launch, {name: t for name, t in given.items() if t is not None}, y, loaded, capability)
    return y


def float_bound(x, values, meta, bias, N, *rest):
    """y before it is rounded to its type or coded, of 16 bits, and how far float32 sums and operations may be from it.

    A sum of K products is off by K roundings of its terms, at most; units that truncate double it. An activation adds
    an error of its own, of a few ulp, and stretches what comes in by less than 1.2.
    """
    activation, layer_scale, residual = rest[4:7]
    u, w = 2.0**-24, sparse24.unpack(values, meta, N, x.shape[1])
    y = finish((x.double() @ w.double().T).float(), bias, activation, layer_scale, residual, None, 0, 8)
    size = x.double().abs() @ w.double().abs().T + (0 if bias is None else bias.abs())
    error = 1.2 * (2 * x.shape[1] + 16) * u * size * (1 if layer_scale is None else layer_scale.abs())
    return y.double(), error + 4 * u * (0 if residual is None else residual.abs()) + 2 * u * y.abs()


def assert_reference(config, *args, **kwargs):
    y, truth = sparse24_linear(config, *args, **kwargs), reference.sparse24_linear(*args)
    assert y.dtype == truth.dtype
    if args[0].dtype == torch.int8:
        wrong = y != truth
    else:
        exact, error = float_bound(*args)
        out_scale, zero_point, bits = args[12:]
        if out_scale is None:  # float16 has subnormals
            wrong = (y.double() - exact).abs() > error + U16[y.dtype] * (exact.abs() + error) + 2.0**-25
        else:
            exact = (exact / out_scale + zero_point).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            wrong = (y - exact).abs() > 0.5 + 1e-4 + error / out_scale
    places = wrong.nonzero()
    first = f"first at (token, feature) {places[0].tolist()}" if len(places) else ""
    assert not len(places), f"{config}: {len(places)} of {y.numel()} differ, {first}"


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("i", range(len(SHAPES)), ids=lambda i: "x".join(map(str, SHAPES[i])))
def test_equals_the_reference(i, arch, bits):
    """Configurations, epilogues and the types of 16 bits in turn, so that each meets many shapes."""
    dtype = "s8" if bits == 8 else ("f16", "bf16")[i // 2 % 2]
    of = configs(arch, dtype)
    assert_reference(of[i % len(of)], *arguments(*SHAPES[i], DTYPES[dtype], *EPILOGUES[i % len(EPILOGUES)], gap=3))


@pytest.mark.parametrize("config", launcher.OP.configs())
def test_identity_returns_the_weight(config):
    """x = I: every kept element of the weight comes out where it belongs, of every place of a tile."""
    dtype, N, K = dtype_of(config), 66, 80
    torch.manual_seed(0)
    w = sparse_weight(N, K, dtype)
    scales = (torch.ones(1), torch.ones(N)) if dtype == torch.int8 else (None, None)
    args = (None, N, *scales, None, 0, "none", None, None, None, 0, 8)
    y = sparse24_linear(config, torch.eye(K, dtype=dtype), *sparse24.pack(w), *args)
    assert torch.equal(y.to(dtype), w.T)


@pytest.mark.parametrize("config", ["sparse24_linear_sm80_s8_64x32", "sparse24_linear_sm90_f16_128x32"])
def test_every_epilogue(config):
    """Features four at a time, and one by one."""
    for i, (activation, columns) in enumerate(
        (a, c) for a in ("none", "gelu", "gelu_tanh", "quick_gelu") for c in (None, 1, 0)
    ):
        N, parts = (36, 35)[i % 2], ("rbl+", "", "b", "l", "r+")[i % 5]
        assert_reference(config, *arguments(9, N, 24, dtype_of(config), activation, 3, parts, columns, 3 + i % 6))


@pytest.mark.parametrize("config", configs(80, "s8")[-1:] + configs(90, "s8")[-1:])
def test_extremes(config):
    """Every product at one end, in several rounds of the pipeline, and the largest zero point against them."""
    M, N, K = 18, 40, 1200
    w = torch.full((N, K), 127, dtype=torch.int8)
    w[::2] = -128
    w[:, ::2] = 0
    x = torch.full((M, K), -128, dtype=torch.int8)
    x[::3] = 127
    ones = torch.ones(N)
    args = (None, N, ones[:1], ones, w.sum(1, dtype=torch.int32), 127, "none", None, None, None, 0, 8)
    y = sparse24_linear(config, x, *sparse24.pack(w), *args)
    truth = (x.double() - 127) @ w.double().T
    assert truth.abs().max() > 2**24 and torch.equal(y.double(), truth.float().double())


def test_ada_runs_the_kernels_of_sm_80():
    name = configs(80, "bf16")[-1]
    assert_reference(name, *arguments(35, 66, 100, torch.bfloat16, *EPILOGUES[1]), capability=89)


def test_nothing_is_read_as_if_it_never_changed():
    """A dependent launch begins while the one before may still write: what it reads is not read-only while it runs."""
    texts = {module_with(ptx(90), name) for name in launcher.OP.configs() if "_sm90_" in name}
    assert texts and not any(re.search(r"\bld\.global\S*\.nc\b", text) for text in texts)


def test_inputs_may_lie_anywhere():
    """Rows apart, misaligned, transposed: as they are where 16 bytes allow, else copied."""
    config, args = configs(90, "f16")[-1], arguments(7, 40, 24, torch.float16, parts="b+")
    wide = torch.zeros(7, 48, dtype=torch.float16)
    wide[:, 8:32] = args[0]
    apart = wide[:, 8:32]
    assert launcher.aligned_rows(apart) is apart
    for x in (apart, args[0].T.contiguous().T, torch.cat([wide[:, :1], args[0]], 1)[:, 1:]):
        assert_reference(config, x, *args[1:])


# ---- planted bugs: one edit of the PTX each, and what is said about it

AMPERE, HOPPER = "sparse24_linear_sm80_f16_64x32", "sparse24_linear_sm90_f16_128x32"
WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 p, \[%r\d+\], %r\d+;"
VALUES = r"first at \(token, feature\)"

BUGS = {  # kernel, pattern, new text, which match, what is said
    "the other half of the metadata": (AMPERE, r"(mma\.sp[^;]*), 1;", r"\1, 0;", 0, VALUES),
    "metadata of two lanes on": (AMPERE, r"(ld\.shared\.v2\.u32 [^\[]*\[%r\d+)\]", r"\1+16]", 0, "nothing has written"),
    "one copy too few is waited for": (
        AMPERE, r"cp\.async\.wait_group 2;", "cp.async.wait_group 3;", 0, "which cp.async writes"),
    "no barrier before a stage is overwritten": (AMPERE, r"bar\.sync 0;", "", 0, "race"),
    "sums of other lanes": (HOPPER, r"shfl\.sync\.bfly", "shfl.sync.down", 0, VALUES),
    "the selector of the other tile": (HOPPER, r"(wgmma\.mma_async\.sp[^;]*), 1, (p,)", r"\1, 0, \2", 0, VALUES),
    "a descriptor of the wrong inputs": (HOPPER, "4611686293305294852", "4611686293305294850", 0, VALUES),
    "a stage given back while it is read": (HOPPER, r"wgmma\.wait_group\.sync\.aligned 0;", "", 0, "a wgmma reads"),
    "the producer does not wait": (HOPPER, WAIT, "setp.eq.s32 p, 0, 0;", -1, "race|more than its 1 arrivals"),
    "metadata beyond the weight": (
        HOPPER, r"(ld\.global\.v2\.u32 [^\[]*\[%rd\d+)\]", r"\1+1073741824]", 0, "out-of-bounds"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug):
    kernel, pattern, new, nth, expected = BUGS[bug]
    text = module_with(ptx(80 if "sm80" in kernel else 90), kernel)
    start = text.index(f".entry {kernel}(")
    end = text.find(".entry", start + 6)
    m = list(re.finditer(pattern, text[start:end]))[nth]
    loaded = load(text[: start + m.start()] + m.expand(new) + text[start + m.end() :], kernel)
    with pytest.raises((AssertionError, Fault), match=expected):
        assert_reference(kernel, *arguments(40, 70, 400, torch.float16, *EPILOGUES[5]), loaded=loaded)


# ---- plans


def problem(M=4, N=16, K=32, elements=1, **changes):
    """A valid problem at addresses that nobody reads, changed."""
    at = iter(range(1 << 20, 1 << 30, 1 << 20))
    row = -(-K * (1 if elements == 0 else 2) // 16) * 16
    epilogue = built.Epilogue(y=next(at), M=M, N=N, out_bits=8)
    if elements == 0:
        epilogue.x_scale, epilogue.w_scale, epilogue.w_packed, epilogue.w_stride = next(at), next(at), next(at), 64
    of = launcher.Sparse24Linear(next(at), row, next(at), next(at), next(at), K, elements, epilogue)
    for name, value in changes.items():
        setattr(of if hasattr(of, name) else of.epilogue, name, value)
    return of


WRONG = {
    "elements=3; they are 0 int8, 1 float16 or 2 bfloat16": {"elements": 3},
    "M=0, N=16, K=32; use 1 or more, and K up to 1048576": {"M": 0},
    "M=4, N=16, K=1048577; use 1 or more, and K up to 1048576": {"K": 2**20 + 1},
    "K=131072, x_zero_point=128; int32 sums are exact for K up to 131068": {
        "elements": 0, "K": 2**17, "x_zero_point": 128},
    "meta is null": {"meta": None},
    "x_scale is null": {"elements": 0, "x_scale": None},
    "rows 48 bytes apart; use multiples of 16, at least 64 apart": {"x_stride": 48},
    "rows 72 bytes apart; use multiples of 16, at least 64 apart": {"x_stride": 72},
    "values at 0x100008, meta at ": {"values": (1 << 20) + 8},
    "x_scale, w_scale or x_zero_point with 16-bit floats, which have none": {"x_zero_point": 1},
    "out_bits=1; codes have 2 to 8 bits": {"out_bits": 1, "out_scale": 1 << 30},
    "activation=4; it is 0 none, 1 gelu, 2 gelu_tanh or 3 quick_gelu": {"activation": 4},
    "M=2147483647, N=16 are more tiles of 64 x 32 than a grid has blocks; split the larger": {"M": 2**31 - 1},
    "M=16, N=2147483647 are more tiles of 64 x 32 than a grid has blocks": {"M": 16, "N": 2**31 - 1},
}


@pytest.mark.parametrize("text", WRONG)
def test_what_cannot_be_computed(text):
    with pytest.raises(ValueError, match="^sparse24_linear: .*" + re.escape(text)):
        launcher.OP.plan(problem(**WRONG[text]), 80, 108, None if "elements" in WRONG[text] else AMPERE)


def test_what_cannot_be_chosen():
    with pytest.raises(ValueError, match=r"x_zero_point=3 with the sums of the weights at \(nil\)"):
        launcher.OP.plan(problem(elements=0, x_zero_point=3, w_packed=None), 80, 108)
    with pytest.raises(ValueError, match=r"capability 7.5 with 40 SMs; the kernels need 8.0 or newer, and an SM"):
        launcher.OP.plan(problem(), 75, 40)
    with pytest.raises(ValueError, match="there is no kernel 'fast'; use one of sparse24_linear_sm80_s8_128x128, "):
        launcher.OP.plan(problem(), 80, 108, "fast")
    with pytest.raises(ValueError, match="f16_64x32 is for float16 on capability 80 or newer; got bfloat16 on 80"):
        launcher.OP.plan(problem(elements=2), 80, 108, AMPERE)
    with pytest.raises(ValueError, match="f16_128x32 is for float16 on capability 90; got float16 on 100"):
        launcher.OP.plan(problem(), 100, 148, HOPPER)
    with pytest.raises(ValueError, match="f16_rows_128x128 reads the values row by row; give rows"):
        launcher.OP.plan(problem(rows=None), 90, 132, "sparse24_linear_sm90_f16_rows_128x128")


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_every_plan_can_be_launched(capability):
    """Of every kernel and shape; Hopper's own are chosen where they run, and larger tiles for larger problems."""
    limit = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}[capability] * 1024
    shapes = (1, 1, 1), (1, 768, 768), (197, 768, 3072), (1576, 2304, 768), (12608, 3072, 768), (577, 1000, 1000)
    for (M, N, K), (elements, dtype) in product(shapes, enumerate(DTYPES)):
        for config in (None, *configs(80, dtype), *(configs(90, dtype) if capability == 90 else ())):
            launch = launcher.OP.plan(problem(M, N, K, elements), capability, 132, config)
            name, grid, cluster = launch.kernel.decode(), launch.grid, launch.cluster
            features, tokens = (int(n) for n in name.rpartition("_")[2].split("x"))
            tiles = -(-M // tokens) * -(-N // (features * cluster)) * cluster
            assert config in (None, name) and launch.function and launch.block <= 1024
            assert grid == tiles or (132 <= grid < tiles and grid % cluster == 0), "a persistent grid fills the GPU"
            assert launch.shared_bytes <= limit and launch.param_bytes <= 1024
            if config is None:
                assert ("_sm90_" in name) == (capability == 90)
                assert tokens == 32 if M == 1 else M < 10000 or tokens == 128


def test_weights_come_from_shared_memory_where_blocks_are_alone():
    """On a multiprocessor with one block nobody works while that waits for weights, which go to registers late."""
    for M, N, alone in ((1576, 768, True), (12608, 3072, False)):
        for rows in (1 << 20, None):
            launch = launcher.OP.plan(problem(M, N, 768, rows=rows), 90, 132)
            assert (launch.grid <= 132) == alone
            assert ("_rows_" in launch.kernel.decode()) == (alone and rows is not None), launch.kernel


def test_a_launch_without_a_driver():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    launch = launcher.OP.plan(problem(), 80, 108)
    with pytest.raises(RuntimeError, match=r" \(cudaError\w+\)$"):
        built.check(built.library().pyvit_accel_launch(launch, None))
