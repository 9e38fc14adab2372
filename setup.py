"""Builds the CPU kernels, pyvit_accel._C, and the CUDA ones, pyvit_accel/libpyvit_accel_cuda.so.

PYVIT_ACCEL_EXT=auto|cpu|cuda|off   auto (default) builds what this machine can and says what it could not; cpu builds
                                    the CPU kernels alone, and must; cuda must build the CUDA kernels, else as auto.
                                    Kernels of an earlier build that an install does not build anew are removed;
                                    cpu, into a source tree, leaves those of build_cuda there.

The CUDA kernels need nvcc of CUDA 12.8 or newer, on the PATH or under CUDA_HOME, and neither torch nor a GPU:
`python setup.py build_cuda` builds them alone, into the source tree.
"""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.build import build

ROOT = Path(__file__).parent
WANTED = os.environ.get("PYVIT_ACCEL_EXT", "auto")
if WANTED not in ("auto", "cpu", "cuda", "off"):
    sys.exit(f"PYVIT_ACCEL_EXT={WANTED!r} is not one of auto, cpu, cuda, off")


def say(text):
    print(f"pyvit_accel: {text}", flush=True)


class OpsUnit:
    """One source that includes those of all ops: torch's headers take most of the time that each would take alone."""

    path = ROOT / "build" / "ops.cpp"
    parts = sorted(p for p in (ROOT / "csrc" / "cpu").glob("*.cpp") if not p.name.startswith(("isa", "probe")))

    @classmethod
    def write(cls):
        text = "".join(f'#include "../{part.relative_to(ROOT).as_posix()}"\n' for part in cls.parts)
        cls.path.parent.mkdir(exist_ok=True)
        if not cls.path.exists() or cls.path.read_text() != text:
            cls.path.write_text(text)


def extension():
    """The extension modules and the build command, or nothing when torch is not importable at build time."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        if WANTED == "cpu":
            raise
        say("torch is not importable here, so no CPU kernels; use pip install --no-build-isolation")
        return [], {}

    class BuildCpu(BuildExtension):
        def run(self):
            OpsUnit.write()
            try:
                super().run()
            except Exception as error:  # whatever a missing or broken compiler raises: auto may skip, and says so
                if WANTED == "cpu":
                    raise
                say(f"no CPU kernels were built, the reference will run instead: {error}")

    csrc = ROOT / "csrc"
    alone = [p for p in (csrc / "cpu").glob("*.cpp") if p not in OpsUnit.parts]
    sources = [csrc / "module.cpp", *alone, OpsUnit.path]
    cpu = CppExtension(
        "pyvit_accel._C",
        sorted(str(p.relative_to(ROOT)) for p in sources),
        depends=sorted(str(p.relative_to(ROOT)) for p in [*csrc.glob("*.*"), *(csrc / "cpu").glob("*.*")]),
        # Without contraction every float operation rounds as written, so all instruction sets give the same bits.
        # Compiled for OpenMP, for at::parallel_for, but not linked with it: torch brings the one that must be used.
        extra_compile_args=[
            *("-O3", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"),
            "-g0",  # Python asks for -g, a third of the time and nine tenths of the file
            *(["-fopenmp"] if sys.platform == "linux" else []),
        ],
    )
    cpu.optional = WANTED != "cpu"
    return [cpu], {"build_ext": BuildCpu}


CUDA_LIBRARY = "pyvit_accel/libpyvit_accel_cuda.so"
CUDA_FLAGS = (
    *("-O3", "-std=c++20", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", f"--threads={os.cpu_count()}"),
    "-fmad=false",  # every float operation rounds as written: the reference's bits
)
# Of each source, by the end of its name; kernels come as machine code and as the PTX it was made of.
CUDA_TARGETS = {"_sm80": ("80", "89", "90a", "100a"), "_sm90": ("90a",), "": ("80",)}


def includes(rule):
    """The files that a compiler's dependency rule names, and this one."""
    names = rule.read_text().partition(":")[2].replace("\\\n", " ").split() if rule.exists() else []
    return [Path(__file__), *map(Path, names)]


def is_old(output, inputs):
    """Whether the output is missing, or older than an input, or an input is gone."""
    if not output.exists() or not all(p.exists() for p in inputs):
        return True
    return output.stat().st_mtime < max(p.stat().st_mtime for p in inputs)


def find_nvcc():
    """The path of nvcc, under CUDA_HOME or else on the PATH, or None."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


def run_nvcc(command):
    """Fails as well where ptxas says that it makes wgmma wait for each other: the kernel would be right, and slow."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode or "wgmma.mma_async instructions are serialized" in done.stdout:
        Path(command[-1]).unlink(missing_ok=True)  # or it would be up to date
        raise subprocess.CalledProcessError(done.returncode, command)


class BuildCuda(Command):
    """Compiles csrc/cuda into one shared library of the source tree; what did not change is not compiled again."""

    description = "build the CUDA kernels with nvcc, in the source tree"
    user_options: ClassVar[list] = []

    def initialize_options(self):
        self.folder = ROOT

    def finalize_options(self):
        self.library = Path(self.folder) / CUDA_LIBRARY

    def run(self):
        nvcc = find_nvcc()
        if nvcc is None:
            return self.fail("there is no nvcc on the PATH or under CUDA_HOME")
        try:
            self.compile(nvcc)
        except subprocess.CalledProcessError as error:
            self.fail(f"{' '.join(error.cmd)} failed")

    def fail(self, why):
        sys.exit(f"pyvit_accel: no CUDA kernels were built, {why}; they need the CUDA toolkit, 12.8 or newer")

    def compile(self, nvcc):
        began, folder, csrc = time.monotonic(), ROOT / "build" / "cuda", ROOT / "csrc" / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        sources, commands = sorted(csrc.glob("*.cu")), []
        objects = [folder / f"{source.stem}.o" for source in sources]
        for source, output in zip(sources, objects, strict=True):
            if is_old(output, includes(output.with_suffix(".d"))):
                archs = next(archs for end, archs in CUDA_TARGETS.items() if source.stem.endswith(end))
                codes = [f"-gencode=arch=compute_{a},code=[sm_{a},compute_{a}]" for a in archs]
                files = ["-MMD", "-MF", str(output.with_suffix(".d")), "-c", str(source), "-o", str(output)]
                commands.append([nvcc, *CUDA_FLAGS, *codes, *files])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run_nvcc, commands))
        if commands or is_old(self.library, objects):
            self.library.parent.mkdir(parents=True, exist_ok=True)
            new = f"{self.library}.new"
            subprocess.run([nvcc, "-shared", "-cudart=static", *map(str, objects), "-o", new], check=True)
            os.replace(new, self.library)  # a process that has loaded the old one keeps it
        say(f"{self.library}: {len(commands)} of {len(sources)} files compiled, {time.monotonic() - began:.0f} s")


class BuildCudaStep(BuildCuda):
    """The same as a step of `build`: into the package that is built, and auto may skip it."""

    editable_mode = False

    def finalize_options(self):
        if not self.editable_mode:
            self.folder = self.get_finalized_command("build").build_lib
        super().finalize_options()

    def fail(self, why):
        if WANTED == "cuda":
            super().fail(why)
        say(f"no CUDA kernels were built, GPUs run the Triton ones: {why}")

    def get_source_files(self):
        return [str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cuda").rglob("*.*")]

    def get_outputs(self):
        return [str(self.library)] if self.library.exists() else []

    def get_output_mapping(self):
        return {}


class DropKernels(Command):
    """Removes the kernels that an earlier build left where this one puts its own: what it skips must not run."""

    user_options: ClassVar[list] = []
    editable_mode = False

    def initialize_options(self):
        self.folder = ROOT

    def finalize_options(self):
        if not self.editable_mode:
            self.folder = Path(self.get_finalized_command("build").build_lib)

    def run(self):
        keeps_cuda = self.editable_mode and WANTED == "cpu"
        for path in [*self.folder.glob("pyvit_accel/_C*.so"), *([] if keeps_cuda else self.folder.glob(CUDA_LIBRARY))]:
            path.unlink()
            say(f"removed {path}, of an earlier build")


class Build(build):
    sub_commands = (
        ("drop_kernels", None),
        *build.sub_commands,
        ("build_cuda_step", lambda self: WANTED in ("auto", "cuda")),
    )


class Platform(Distribution):
    """A distribution whose wheels are of one platform when they hold CUDA kernels, with CPU kernels or without."""

    def has_ext_modules(self):
        return super().has_ext_modules() or WANTED == "cuda" or (WANTED == "auto" and find_nvcc() is not None)


ext_modules, cmdclass = ([], {}) if WANTED == "off" else extension()

setup(
    name="pyvit_accel",
    version="0.1.0",
    description="Low-bit kernels for vision transformers, as drop-in torch.nn modules",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["pyvit_accel*"]), "pyvit_accel.kernels"],
    package_dir={"pyvit_accel.kernels": "kernels"},
    package_data={"pyvit_accel.models": ["*.safetensors"]},
    install_requires=["torch>=2.11", "numpy", "safetensors"],
    extras_require={
        "cli": ["tqdm", "matplotlib", "pillow", "scikit-learn"],
        "gpu": ["triton>=3.6"],
        "test": ["pytest", "pytest-benchmark", "pytest-xdist", "ruff"],
    },
    entry_points={"console_scripts": ["pyvit-accel = pyvit_accel.cli:main"]},
    ext_modules=ext_modules,
    cmdclass={
        **cmdclass,
        "build": Build,
        "build_cuda": BuildCuda,
        "build_cuda_step": BuildCudaStep,
        "drop_kernels": DropKernels,
    },
    distclass=Platform,
)
