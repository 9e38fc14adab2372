"""The CUDA library without a GPU: what was built, what is said when it was not, and every plan."""

from __future__ import annotations

import ctypes
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _cuda import built, launcher

from pyvit_accel import cuda
from pyvit_accel.formats.packed import pack, packed_shape

CAPABILITIES = (80, 86, 89, 90, 100, 120)
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB of a block
SHARED_OF_SM = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}  # KiB; of which every block takes one more
REGISTERS = 65536  # of an SM
needs_library = pytest.mark.skipif(built.library() is None, reason=f"the CUDA library is {built.status()}")


# What was built.


@needs_library
def test_exports_are_those_of_the_headers():
    headers = [p.read_text() for p in Path(__file__).parents[1].joinpath("csrc", "cuda").glob("*.h")]
    declared = {name for text in headers for name in re.findall(r"^EXPORT .*?(pyvit_accel_\w+)\(", text, re.M)}
    assert {"pyvit_accel_abi_version", "pyvit_accel_launch", "pyvit_accel_lowbit_linear_plan"} <= declared
    assert all(hasattr(built.library(), name) for name in declared)
    if shutil.which("nm"):
        listed = subprocess.run(["nm", "-D", "--defined-only", built.PATH], capture_output=True, text=True, check=True)
        assert {line.split()[-1] for line in listed.stdout.splitlines()} == declared


@needs_library
def test_needs_neither_torch_nor_a_driver():
    if not shutil.which("readelf"):
        pytest.skip("readelf is not installed")
    listed = subprocess.run(["readelf", "-d", built.PATH], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(\w+)", listed))
    assert "libc" in needed and not {n for n in needed if re.match("libtorch|libc10|libcuda", n)}


@needs_library
def test_carries_every_architecture_with_its_ptx():
    triton = pytest.importorskip("triton", reason="triton, whose wheel has the disassembler, is not installed")
    for listing, kind in (("--list-elf", "cubin"), ("--list-ptx", "ptx")):
        command = [triton.knobs.nvidia.cuobjdump.path, listing, str(built.PATH)]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert set(re.findall(rf"\.(sm_\w+)\.{kind}", listed)) >= {"sm_80", "sm_89", "sm_90a", "sm_100a"}, listing


def test_which_nvcc_builds_it(monkeypatch, tmp_path):
    """That of CUDA_HOME, or the one on the PATH where there is none."""
    setup = Path(__file__).parents[1] / "setup.py"
    for folder in ("home/bin", "path"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "nvcc").touch(0o755)
    monkeypatch.setattr(sys, "argv", [str(setup), "--name"])
    monkeypatch.setenv("PYVIT_ACCEL_EXT", "off")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    find = runpy.run_path(str(setup))["find_nvcc"]
    for home, found in (("home", "home/bin/nvcc"), ("nowhere", "path/nvcc")):
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / home))
        assert find() == str(tmp_path / found)
    monkeypatch.delenv("CUDA_HOME")
    assert find() == str(tmp_path / "path/nvcc")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find() is None


@pytest.mark.parametrize(
    ("command", "wanted", "left"), [("build", "off", 0), ("editable_wheel", "off", 0), ("editable_wheel", "cpu", 1)]
)
def test_an_install_keeps_no_kernels_that_it_did_not_build(tmp_path, command, wanted, left):
    """Of an earlier one, in the folder that is installed; an editable install's is the source tree, where cpu leaves
    what build_cuda made."""
    root = Path(__file__).parents[1]
    for name in ("setup.py", "README.md"):
        shutil.copy(root / name, tmp_path)
    for package in ("pyvit_accel", "kernels"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "lib" / "pyvit_accel").mkdir(parents=True)
    folders = [tmp_path / "pyvit_accel", tmp_path / "lib" / "pyvit_accel"]
    for folder in folders:
        for name in ("_C.cpython-311-x86_64-linux-gnu.so", built.PATH.name):
            (folder / name).touch()
    options = ["--build-lib", "lib"] if command == "build" else ["--dist-dir", "dist"]
    made = subprocess.run(
        [sys.executable, "setup.py", "-q", command, *options], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYVIT_ACCEL_EXT": wanted}, check=False,
    )  # fmt: skip
    assert made.returncode == (wanted == "cpu"), made.stderr  # cpu must build, and this tree has no C++
    dropped, other = folders[::-1] if command == "build" else folders
    assert [path.name for path in dropped.glob("*.so")] == [built.PATH.name] * left
    assert len(list(other.glob("*.so"))) == 2
    assert made.stdout.count(", of an earlier build") == 2 - left


# What is said when it was not built, or not for this version.


@pytest.fixture
def anew():
    """The library is looked for again, and once more afterwards."""
    built._load.cache_clear()
    yield
    built._load.cache_clear()


def test_absent(monkeypatch, tmp_path, anew):
    monkeypatch.setattr(built, "PATH", tmp_path / "none.so")
    assert cuda.library() is None
    assert cuda.status() == "not built; python setup.py build_cuda builds it, with nvcc"


@needs_library
def test_of_another_version(monkeypatch):
    monkeypatch.setattr(built, "ABI", built.ABI + 1)
    assert cuda.library() is None
    told = rf"built for ABI version {built.ABI - 1}, this is {built.ABI}; .* builds it, .* anew"
    assert re.fullmatch(told, cuda.status())


@needs_library
def test_abi_version_is_that_of_the_header():
    header = Path(__file__).parents[1] / "csrc" / "cuda" / "launch.h"
    assert f"#define PYVIT_ACCEL_ABI {built.ABI} " in header.read_text()
    assert built.library().pyvit_accel_abi_version() == built.ABI


@needs_library
def test_broken_is_an_error(monkeypatch, tmp_path, anew):
    """Absence is fine, breakage is not."""
    (tmp_path / "broken.so").write_bytes(b"no library")
    monkeypatch.setattr(built, "PATH", tmp_path / "broken.so")
    with pytest.raises(OSError, match=r"broken\.so"):
        cuda.library()


@needs_library
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver():
    """It loads, says why it cannot launch, and a launch is an error, not an abort."""
    assert cuda.status().startswith("yes, but nothing to run it on: ")
    assert cuda.device_error()
    launch = launcher.OP.plan(problem(3, 16, 32), 80, 108)
    with pytest.raises(RuntimeError, match=r"^lowbit_linear_sm80_w8_64x32: .+ \(cudaError\w+\)$"):
        built.check(built.library().pyvit_accel_launch(ctypes.byref(launch), None))


# Plans.


@needs_library
def test_a_launch_lies_where_c_may_store_aligned():
    """The compiler writes parameters by stores that fault elsewhere; memory of Python is at multiples of 16."""
    header = Path(__file__).parents[1] / "csrc" / "cuda" / "launch.h"
    assert f"alignas({built.ALIGNMENT}) uint8_t params[1024];" in header.read_text()
    launches = [launcher.OP.plan(problem(M), 80, 108) for M in range(1, 17)]
    assert not any(ctypes.addressof(launch) % built.ALIGNMENT for launch in launches)
    tokens = [launcher.LowbitLinear.from_buffer(launch.params).epilogue.M for launch in launches]
    assert tokens == list(range(1, 17)), "each in memory of its own"


def problem(M=4, N=16, K=32, w_bits=8, **changes):
    """A valid problem at addresses that nobody reads, changed."""
    at = iter(range(1 << 20, 1 << 30, 1 << 20))
    columns = -(-K // 16) * 16
    of = launcher.LowbitLinear(
        next(at), columns, K, w_bits,
        built.Epilogue(
            x_scale=next(at), w_scale=next(at), y=next(at), w_packed=next(at), M=M, N=N, out_bits=8,
            w_stride=packed_shape(N, K, w_bits)[1],
        ),
    )  # fmt: skip
    return changed(of, **changes)


def changed(of, **changes):
    for name, value in changes.items():
        setattr(of if hasattr(of, name) else of.epilogue, name, value)
    return of


WRONG = {
    "M=0, N=16, K=32; use 1 or more, and K up to 131071": {"M": 0},
    "M=4, N=0, K=32; use 1 or more": {"N": 0},
    "M=4, N=16, K=131072; use 1 or more, and K up to 131071": {"K": 131072},
    "w_bits=5; these kernels have 4 and 8": {"w_bits": 5},
    "K=70000, x_zero_point=-128; int32 sums of 8-bit weights are exact for K up to 65535": {
        "K": 70000, "x_zero_point": -128},
    "w_scale is null": {"w_scale": None},
    "y is null": {"y": None},
    "x at 0x100008 with rows 32 bytes apart; use multiples of 16, at least 32 apart": {"x": (1 << 20) + 8},
    "x at 0x100000 with rows 16 bytes apart; use multiples of 16, at least 32 apart": {"x_stride": 16},
    "x at 0x100000 with rows 40 bytes apart": {"x_stride": 40},
    "with rows of 320 bytes; K=32 codes of 8 bits are 576, at a multiple of 16": {"w_stride": 320},
    "w_packed at 0x500004 with rows of 576 bytes": {"w_packed": 0x500004},
    "out_bits=9; codes have 2 to 8 bits": {"out_bits": 9, "out_scale": 1 << 30},
    "activation=4; it is 0 none, 1 gelu, 2 gelu_tanh or 3 quick_gelu": {"activation": 4},
    "M=2147483647, N=16 are more tiles of 64 x 32 than a grid has blocks; split the larger": {"M": 2**31 - 1},
}


@needs_library
@pytest.mark.parametrize("text", WRONG)
def test_what_cannot_be_computed(text):
    with pytest.raises(ValueError, match="^lowbit_linear: .*" + re.escape(text)):
        launcher.OP.plan(changed(problem(), **WRONG[text]), 80, 108, "lowbit_linear_sm80_w8_64x32")


@needs_library
def test_what_lies_beyond_the_last_tile_is_counted_too():
    """The last tile of a cluster ends up to two tiles beyond M, or one beyond N; int32 holds all of it."""
    config, most = "lowbit_linear_sm90_w8_256x176", 2**31 - 1
    for M, N in ((most - 4 * 176, 16), (16, most - 2 * 256)):
        launcher.OP.plan(problem(M, N, 32), 90, 132, config)
        with pytest.raises(ValueError, match="more tiles of 256 x 176 than a grid has blocks; split the larger"):
            launcher.OP.plan(problem(M + (N == 16), N + (M == 16), 32), 90, 132, config)


@needs_library
def test_what_cannot_be_chosen():
    for capability, sm_count in ((75, 40), (80, 0)):
        got = f"{capability // 10}.{capability % 10} with {sm_count} SMs"
        with pytest.raises(ValueError, match=f"capability {got}; the kernels need 8.0 or newer, and an SM"):
            launcher.OP.plan(problem(), capability, sm_count)
    with pytest.raises(ValueError, match="there is no kernel 'fast'; use one of lowbit_linear_sm80_w8_128x128, "):
        launcher.OP.plan(problem(), 80, 108, "fast")
    with pytest.raises(ValueError, match="w8_64x32 is for 8-bit weights on capability 80 or newer; got 4 bits on 80"):
        launcher.OP.plan(problem(w_bits=4), 80, 108, "lowbit_linear_sm80_w8_64x32")
    for name in launcher.OP.configs():
        if "_sm90_w8_" in name:
            with pytest.raises(ValueError, match=f"{name} is for 8-bit weights on capability 90; got 8 bits on 100"):
                launcher.OP.plan(problem(), 100, 148, name)


def of_name(config):
    """Bits, features and tokens of a block."""
    return tuple(int(n) for n in re.fullmatch(r"lowbit_linear_sm(?:80|90)_w(\d)_(\d+)x(\d+)", config).groups())


SHAPES = [(1, 1, 1), (1, 768, 768), (197, 768, 3072), (1576, 2304, 768), (12608, 3072, 768), (577, 1000, 1000)]


@needs_library
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_plan_can_be_launched(capability):
    """Of every kernel and shape, for GPUs of 1 to 148 multiprocessors; the problem is in the parameters as it came."""
    for config in (c for c in launcher.OP.configs() if capability == 90 or "_sm80_" in c):
        w_bits, features, tokens = of_name(config)
        for M, N, K in SHAPES:
            for sm_count in (1, 20, 108, 132, 148):
                launch = launcher.OP.plan(problem(M, N, K, w_bits), capability, sm_count, config)
                cluster = launch.cluster  # of neighbouring tokens
                tiles = -(-M // (tokens * cluster)) * cluster * -(-N // features)
                assert launch.kernel.decode() == config and launch.function
                assert 1 <= launch.grid <= tiles and launch.grid % cluster == 0
                filled = sm_count // cluster * cluster
                assert launch.grid == tiles or launch.grid >= filled, "a persistent grid fills the GPU"
                assert launch.block % 32 == 0 and 32 <= launch.block <= 1024
                assert launch.shared_bytes <= SHARED_LIMIT[capability] * 1024
                assert launch.param_bytes <= 1024 and launch.num_maps <= 4
                for m in launch.maps[: launch.num_maps]:
                    check_map(m, launch)


def check_map(m, launch):
    """What cuTensorMapEncodeTiled asks of a map."""
    assert 1 <= m.rank <= 5 and m.base % 16 == 0
    assert m.offset % 64 == 0 and m.offset + 128 <= launch.param_bytes
    assert all(1 <= d <= 2**32 for d in m.dims[: m.rank])
    assert all(1 <= b <= 256 for b in m.box[: m.rank])
    assert all(s % 16 == 0 and s < 2**40 for s in m.strides[: m.rank - 1])
    inner = m.box[0] * m.element_bytes
    assert inner % 16 == 0 and (m.swizzle == 0 or inner <= {1: 128, 2: 64, 3: 32}[m.swizzle])


@needs_library
def test_two_blocks_fit_a_multiprocessor():
    """The large tile of an sm_80 kernel, of every architecture it runs on."""
    for capability in CAPABILITIES:
        launch = launcher.OP.plan(problem(12608, 768, 768), capability, 108, "lowbit_linear_sm80_w8_128x128")
        assert 2 * (launch.shared_bytes + 1024) <= SHARED_OF_SM[capability] * 1024


@needs_library
@pytest.mark.parametrize("w_bits", [4, 8])
def test_the_choice(w_bits):
    """The kernels of Hopper on Hopper, small tiles for few tokens, large ones for many."""
    for capability, sm_count in ((80, 108), (89, 142), (90, 132), (100, 148)):
        few = launcher.OP.plan(problem(1, 768, 768, w_bits), capability, sm_count).kernel.decode()
        many = launcher.OP.plan(problem(50432, 3072, 768, w_bits), capability, sm_count).kernel.decode()
        assert f"_sm{90 if capability == 90 else 80}_w{w_bits}_" in few and few.split("_")[:4] == many.split("_")[:4]
        _, features, tokens = of_name(few)
        _, most_features, most_tokens = of_name(many)
        assert tokens <= 32 and most_tokens >= 128 and most_features >= features
    launch = launcher.OP.plan(problem(50432, 3072, 768, w_bits), 80, 108)
    assert launch.kernel.decode().endswith("_128x128") and launch.grid == 394 * 24


@needs_library
def test_vectors_where_everything_allows_it():
    """Four features at a time when N, the residual's rows and all addresses are multiples of four, or of 16 bytes."""

    def vectors(N, **changes):
        launch = launcher.OP.plan(problem(4, N, 32, **changes), 80, 108)
        return launcher.LowbitLinear.from_buffer(launch.params).epilogue.vectors

    assert vectors(20)
    assert not vectors(18)
    for name in ("w_scale", "bias", "layer_scale", "residual", "y"):
        assert vectors(20, **{name: 16}) and not vectors(20, **{name: 24})
    assert vectors(20, residual=16, residual_stride=24) and not vectors(20, residual=16, residual_stride=21)
    assert vectors(20, out_scale=24) and vectors(20, out_scale=24, y=20) and not vectors(20, out_scale=24, y=18)
    assert not vectors(20, out_scale=24, out_scale_per_column=True)


@needs_library
def test_arguments_are_made_fit():
    """x of any stride, address and K is padded with zeros, vectors become contiguous; what fits is not copied."""
    x, w = torch.ones(3, 40, dtype=torch.int8)[:, 1:38], pack(torch.ones(20, 37, dtype=torch.int8))
    scales = torch.ones(20, 2)[:, 0]
    fit = launcher.arguments(x, scales[:1], w, scales, scales, 0, "gelu", None, torch.ones(20, 3).T, None, 0, 8)
    padded, _, w_packed, w_scale, bias, *_, residual, _, _, _, K = fit
    assert padded.shape == (3, 48) and K == 37 and torch.equal(padded[:, :37], x) and not padded[:, 37:].any()
    assert w_packed is w and w_scale.is_contiguous() and bias.is_contiguous() and residual.stride(1) == 1
    x = torch.ones(3, 64, dtype=torch.int8)[:, :48]
    again = launcher.arguments(x, w_scale[:1], w, w_scale, bias, 0, "none", None, None, None, 0, 8)
    assert again[0] is x and again[3] is w_scale and again[4] is bias
    for rows in (x[:1].expand(3, 48), x.as_strided((3, 48), (16, 1))):  # tensor maps have no such strides
        fit_rows = launcher.arguments(rows, w_scale[:1], w, w_scale, bias, 0, "none", None, None, None, 0, 8)[0]
        assert fit_rows.stride() == (48, 1) and torch.equal(fit_rows, rows)
    of = launcher.problem(torch.empty(3, 20), *fit)
    assert (of.x_stride, of.K, of.w_bits) == (48, 37, 8)
    assert (of.epilogue.M, of.epilogue.N, of.epilogue.activation, of.epilogue.residual_stride) == (3, 20, 1, 20)


@needs_library
def test_the_stride_of_a_single_tile_means_nothing():
    x, scale = torch.ones(3, 32, dtype=torch.int8), torch.ones(16)
    w = pack(torch.ones(48, 32, dtype=torch.int8))[::2][:1]
    assert w.is_contiguous() and w.stride(0) == 2 * w.shape[1]
    fit = launcher.arguments(x, scale[:1], w, scale, None, 0, "none", None, None, None, 0, 8)
    launcher.OP.plan(launcher.problem(torch.empty(3, 16), *fit), 90, 132)


def test_tensors_elsewhere_are_refused():
    x, scale = torch.ones(3, 32, dtype=torch.int8), torch.ones(16)
    w = torch.empty(packed_shape(16, 32), dtype=torch.uint8, device="meta")
    with pytest.raises(ValueError, match=r"^lowbit_linear: x is on cpu, .* on meta; move them to"):
        launcher.arguments(x, scale[:1], w, scale, None, 0, "none", None, None, None, 0, 8)


def test_index_is_refused():
    with pytest.raises(ValueError, match="these kernels take no index; select the rows of x first"):
        launcher.lowbit_linear(*[None] * 12, index=torch.zeros(3, dtype=torch.int32))


def test_the_owner_on_a_gpu(monkeypatch):
    """CUDA C++ on capability 9.0, for 4- and 8-bit weights and without an index; else the other launcher."""
    x, ran = torch.ones(2, 32, dtype=torch.int8), []
    monkeypatch.setattr(launcher, "lowbit_linear", lambda *args: ran.append("CUDA C++"))
    monkeypatch.setattr(launcher, "has_driver", lambda: True)
    launch = launcher.before(lambda *args: ran.append("Triton"))
    cases = [(90, 8, None, "CUDA C++"), (90, 4, None, "CUDA C++"), (90, 5, None, "Triton"), (90, 2, None, "Triton")]
    cases += [(90, 8, torch.zeros(1), "Triton"), (80, 8, None, "Triton"), (100, 4, None, "Triton")]
    for capability, bits, index, owner in cases:
        monkeypatch.setattr(launcher, "device", lambda _, capability=capability: (capability, 132))
        launch(x, None, torch.empty(packed_shape(16, 32, bits)), *[None] * 9, index)
        assert ran.pop() == owner, (capability, bits)
    monkeypatch.setattr(launcher, "device", lambda _: (90, 132))
    monkeypatch.setattr(launcher, "has_driver", lambda: False)
    launch(x, None, torch.empty(packed_shape(16, 32)), *[None] * 9, None)
    assert ran.pop() == "Triton", "the driver is older than the library"
