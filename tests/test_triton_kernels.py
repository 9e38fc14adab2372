"""The Triton launchers against the references, and their machine code for every architecture, without a GPU.

The check_* functions run on the GPU where there is one, otherwise in a process of their own under Triton's
interpreter, which has to be chosen before triton is imported. Nothing here has a tolerance: the kernels perform the
reference's float32 operations in its order, uncontracted, so results are equal bit for bit. Codes of norm_quant could
differ by one where the mean or rstd lies within a few float64 roundings of a float32 tie; none here does.
"""

from __future__ import annotations

import multiprocessing
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch

from pyvit_accel import reference
from pyvit_accel.formats.packed import pack

triton = pytest.importorskip("triton", reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def run():
    """Calls a check_* function where the kernels can run."""
    if DEVICE == "cuda":
        yield lambda check, *args: check(*args)
        return
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(torch.set_num_threads, 1).result()  # the process starts here and keeps the variable
        yield lambda check, *args: pool.submit(check, *args).result()


def assert_equal(op, *args):
    """The launcher's results are the reference's, bit for bit and in dtype."""
    from pyvit_accel import kernels

    moved = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args]
    results, truths = getattr(kernels, op)(*moved), getattr(reference, op)(*args)
    if isinstance(truths, torch.Tensor):
        results, truths = [results], [truths]
    for result, truth in zip(results, truths, strict=True):
        assert result.dtype == truth.dtype
        assert torch.equal(result.cpu(), truth), f"{(result.cpu() != truth).sum()} of {truth.numel()} differ"


def uniform(*shape):
    return torch.rand(*shape) * 0.02 + 1e-3


# ---- quantize


def check_quantize(M, K, per_column, zero_point):
    torch.manual_seed(0)
    x = torch.randn(M, K + 3)[:, :K]  # rows at a distance
    assert_equal("quantize", x, uniform(K if per_column else 1), zero_point)
    assert_equal("quantize", torch.randn(K, M).T, uniform(K if per_column else 1), zero_point)


def check_ties(zero_point):
    x = torch.arange(-600, 600).reshape(24, 50) / 2
    x = torch.cat([x, torch.tensor([0.0, -0.0, 3e38, -3e38, float("inf"), -float("inf")]).expand(24, 6)], dim=1)
    for scale in (1.0, 1e-30):  # 1e-30 is the scale of a row of zeros
        assert_equal("quantize", x, torch.tensor([scale]), zero_point)


def check_quantize_dynamic(M, K):
    torch.manual_seed(0)
    x = torch.randn(M, K + 3)[:, :K] * torch.logspace(-20, 20, M)[:, None]
    x[M // 2 :][:1] = 0
    assert_equal("quantize_dynamic", x)


def check_minimum(M, K, minimum):
    """The row's largest value is below -minimum, so a tail read as 0 would show; one row is all minimum."""
    torch.manual_seed(0)
    x = minimum + torch.rand(M, K + 3)[:, :K] * torch.logspace(-6, -1, M)[:, None]
    x[M // 2 :][:1] = minimum
    assert_equal("quantize_dynamic", x, minimum)


@pytest.mark.parametrize("zero_point", [0, -128, 37])
@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("M, K", [(1, 1), (37, 53), (130, 300), (0, 8), (8, 0)])
def test_quantize(run, M, K, per_column, zero_point):
    run(check_quantize, M, K, per_column, zero_point)


@pytest.mark.parametrize("zero_point", [0, -128, 127])
def test_quantize_rounds_ties_to_even_and_clips(run, zero_point):
    run(check_ties, zero_point)


@pytest.mark.parametrize("M, K", [(1, 1), (37, 53), (5, 5000), (0, 8)])
def test_quantize_dynamic(run, M, K):
    run(check_quantize_dynamic, M, K)


@pytest.mark.parametrize("minimum", [-0.17, 0.0, -2.0])
@pytest.mark.parametrize("M, K", [(37, 53), (3, 5000)])
def test_quantize_dynamic_spans_from_a_minimum(run, M, K, minimum):
    run(check_minimum, M, K, minimum)


# ---- norm_quant


def check_norm_quant(M, C, eps):
    torch.manual_seed(0)
    x = torch.randn(M, C + 3)[:, :C] * torch.logspace(-6, 3, M)[:, None] + torch.linspace(-50, 50, M)[:, None]
    x[M // 2 :][:1] = 7.0  # a constant row: variance zero
    weight, bias = torch.randn(C), torch.randn(C)
    assert_equal("norm_quant_dynamic", x, weight, bias, eps)
    for columns in (1, C):
        assert_equal("norm_quant", x, weight, bias, uniform(columns), eps)


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
@pytest.mark.parametrize("M, C", [(1, 1), (37, 5), (50, 192), (9, 1000), (3, 1537), (0, 8)])
def test_norm_quant(run, M, C, eps):
    run(check_norm_quant, M, C, eps)


# ---- lowbit_linear

TILES = {"small": (8, 768), "middle": (197, 768), "large": (12608, 768)}  # M, N that choose each tile of the launcher


@contextmanager
def use_tile(tile):
    """The launcher takes this tile at any shape, so that shapes of a few tiles reach every tail."""
    module = import_module("pyvit_accel.kernels.lowbit_linear")
    blocks = module._blocks(*TILES[tile])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_blocks", lambda M, N: blocks)
        yield


def linear_args(M, N, K, activation="none", x_zero_point=0, parts="", out_columns=None):
    """Arguments with the named parts: r x_scale per row, b bias, l layer scale, + residual."""
    xs = torch.randint(-128, 128, (M, K + 5), dtype=torch.int8)[:, :K]
    w = pack(torch.randint(-127, 128, (N, K), dtype=torch.int8))
    return (
        xs, uniform(M if "r" in parts else 1), w, uniform(N), torch.randn(N) if "b" in parts else None, x_zero_point,
        activation, torch.randn(N) if "l" in parts else None, torch.randn(M, N + 2)[:, :N] if "+" in parts else None,
        None if out_columns is None else uniform(out_columns), 0 if out_columns is None else -9,
    )  # fmt: skip


def check_linear(tile, *args):
    torch.manual_seed(0)
    with use_tile(tile):
        assert_equal("lowbit_linear", *linear_args(*args))


def bare_linear(x, w, x_zero_point):
    """The launcher's result with nothing in the epilogue: the integer sums."""
    from pyvit_accel import kernels

    args = (a.to(DEVICE) for a in (x, torch.ones(1), pack(w), torch.ones(w.shape[0])))
    return kernels.lowbit_linear(*args, None, x_zero_point, "none", None, None, None, 0).cpu()


def check_accumulators(tile, x_zero_point):
    """Extreme codes of both signs."""
    M, N, K = 35, 37, 259
    w = torch.full((N, K), 127, dtype=torch.int8)
    w[1::2] = -127
    for code in (-128, 127):
        x = torch.full((M, K), code, dtype=torch.int8)
        truth = (x.double() - x_zero_point) @ w.double().T
        assert truth.abs().max() < 2**24  # so float32 holds it
        with use_tile(tile):
            assert torch.equal(bare_linear(x, w, x_zero_point).double(), truth)


def check_identity():
    """x = I returns the decoded weight, K longer than one block and N not a multiple of 16."""
    torch.manual_seed(0)
    w = torch.randint(-127, 128, (45, 150), dtype=torch.int8)
    assert torch.equal(bare_linear(torch.eye(150, dtype=torch.int8), w, 0).T, w.float())


@pytest.mark.parametrize("x_zero_point", [0, 1, -128])
@pytest.mark.parametrize("tile", TILES)
def test_accumulators_are_exact(run, tile, x_zero_point):
    run(check_accumulators, tile, x_zero_point)


def test_identity_returns_the_weight(run):
    run(check_identity)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (65, 79, 130), (130, 130, 256), (7, 33, 0), (0, 16, 8)])
def test_lowbit_linear_tails(run, tile, M, N, K):
    run(check_linear, tile, M, N, K, "none", -37, "rb+")


@pytest.mark.parametrize("out_columns", [None, 1, 33])
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize("parts", ["", "rbl+", "b", "l", "r+"])
def test_lowbit_linear_epilogue(run, parts, activation, out_columns):
    run(check_linear, "small", 37, 33, 40, activation, 3, parts, out_columns)


def check_many_row_blocks():
    """More row blocks than one group of _GROUP_M, and a last group that is not full."""
    torch.manual_seed(0)
    with use_tile("small"):
        assert_equal("lowbit_linear", *linear_args(32 * 10 + 1, 40, 8))


def test_every_block_is_visited(run):
    run(check_many_row_blocks)


# ---- machine code

ARCHITECTURES = (80, 89, 90, 100)
SMEM_SM89 = 99 * 1024  # bytes a block may have on sm_86, 89 and 120, the least of all
TYPES = {torch.int8: "*i8", torch.int32: "*i32", torch.float32: "*fp32"}


class Recorder:
    """Stands where a kernel stands and keeps what its launcher would have launched."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return self.record

    def record(self, *args, **kwargs):
        """The source specialised as Triton does: None and 1 are constants, multiples of 16 are known to be."""
        from triton.compiler import ASTSource

        params = self.kernel.params
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, attrs = {}, {}, {}
        for i, p in enumerate(params):
            value, fixed = values.pop(p.name), p.do_not_specialize
            if p.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not fixed):
                signature[p.name], constants[p.name] = "constexpr", value
                continue
            tensor = isinstance(value, torch.Tensor)
            signature[p.name] = TYPES[value.dtype] if tensor else "fp32" if isinstance(value, float) else "i32"
            if not isinstance(value, float) and not fixed and (value.data_ptr() if tensor else value) % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
        self.launches.append((ASTSource(self.kernel, signature, constants, attrs), values))


class Code:
    """One compiled kernel: its PTX, its SASS and the resources ptxas gave it."""

    def __init__(self, launch, architecture, tmp_path):
        from triton.backends.compiler import GPUTarget

        source, options = launch
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        self.ptx, self.shared = compiled.asm["ptx"], compiled.metadata.shared
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", str(cubin)]
        self.sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        self.stack, self.local = (int(re.search(rf" {name}:(\d+)", self.sass)[1]) for name in ("STACK", "LOCAL"))

    def assert_sound(self):
        """No spill, fits every GPU, and every float32 operation rounds as written."""
        assert self.stack == self.local == 0, "spills"
        assert self.shared <= SMEM_SM89
        assert not re.search(r"fma\.rn\S*\.f32|\.ftz|div\.(full|approx)|(rcp|sqrt|rsqrt|ex2)\.approx", self.ptx)


def launches(module, kernel, call):
    """What `call` would launch. AOT compilation wants the compiler, so this runs outside the interpreter."""
    module = import_module(f"pyvit_accel.kernels.{module}")
    recorder = Recorder(getattr(module, kernel))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, kernel, recorder)
        call(module)
    return recorder.launches


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Compiles anew: a stale cache must not answer for the source as it is."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def record_rows():
    x, weight, scale = torch.zeros(197, 768), torch.zeros(768), torch.ones(768)
    yield from launches("quantize", "_quantize_kernel", lambda m: m.quantize(x, scale, 3))
    yield from launches("quantize", "_quantize_dynamic_kernel", lambda m: m.quantize_dynamic(x, -0.17))
    yield from launches("norm_quant", "_norm_quant_kernel", lambda m: m.norm_quant_dynamic(x, weight, weight, 1e-6))
    yield from launches("norm_quant", "_norm_quant_kernel", lambda m: m.norm_quant(x, weight, weight, scale, 1e-6))


def record_linear(M, N, K, **kwargs):
    args = list(linear_args(M, N, K, **kwargs))
    (launch,) = launches("lowbit_linear", "_lowbit_linear_kernel", lambda m: m.lowbit_linear(*args))
    return launch


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_row_kernels_compile(architecture, tmp_path):
    for launch in record_rows():
        Code(launch, architecture, tmp_path).assert_sound()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tile", TILES)
def test_lowbit_linear_uses_int8_mma(tile, architecture, tmp_path):
    """The heaviest epilogue: everything at once, GELU, requantised per column."""
    M, N = TILES[tile]
    launch = record_linear(M, N, 768, activation="gelu", x_zero_point=3, parts="rbl+", out_columns=N)
    code = Code(launch, architecture, tmp_path)
    code.assert_sound()
    wgmma = architecture == 90 and tile != "small"  # a wgmma has 64 rows
    assert re.search(r"wgmma\.mma_async\S*\.s32\.s8\.s8" if wgmma else r"mma\.sync\S*\.s32\.s8\.s8\.s32", code.ptx)
    assert "IGMMA" in code.sass if wgmma else "IMMA" in code.sass


@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu"])
def test_other_activations_compile(activation, tmp_path):
    launch = record_linear(*TILES["large"], 768, activation=activation, parts="rbl+", out_columns=1)
    Code(launch, 90, tmp_path).assert_sound()


def test_odd_shapes_compile(tmp_path):
    launch = record_linear(12607, 773, 101, activation="gelu", x_zero_point=3, parts="rbl+", out_columns=773)
    Code(launch, 90, tmp_path).assert_sound()


@pytest.mark.parametrize("architecture", [90, 100])
def test_epilogue_is_not_contracted(architecture, tmp_path):
    """Without a division, whose expansion needs them, the machine code has no fused multiply-add either."""
    if architecture == 100 and triton.__version__.startswith("3.6"):
        pytest.skip("ptxas 12.9 contracts f32x2 pairs against --fmad=false; kernels/_common.py says so")
    code = Code(record_linear(*TILES["middle"], 768, parts="rbl+"), architecture, tmp_path)
    assert "FMUL" in code.sass and "FADD" in code.sass
    assert "FFMA" not in code.sass
