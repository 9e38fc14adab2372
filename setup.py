"""Builds pyvit_accel._C, the CPU kernels. Settings are in the environment:

PYVIT_ACCEL_EXT=auto|cpu|off   auto (default) builds what this machine can and says what it could not; cpu must succeed.
"""

import os
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
WANTED = os.environ.get("PYVIT_ACCEL_EXT", "auto")
if WANTED not in ("auto", "cpu", "off"):
    sys.exit(f"PYVIT_ACCEL_EXT={WANTED!r} is not one of auto, cpu, off")


def extension():
    """The extension modules and the build command, or nothing when torch is not importable at build time."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        if WANTED == "cpu":
            raise
        print("pyvit_accel: torch is not importable here, so no CPU kernels; use pip install --no-build-isolation")
        return [], {}

    class Build(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:  # whatever a missing or broken compiler raises: auto may skip, and says so
                if WANTED == "cpu":
                    raise
                print(f"pyvit_accel: no CPU kernels were built, the reference will run instead: {error}")

    cpu = CppExtension(
        "pyvit_accel._C",
        sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp")),
        depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*")),
        # Without contraction every float operation rounds as written, so all instruction sets give the same bits.
        # Compiled for OpenMP, for at::parallel_for, but not linked with it: torch brings the one that must be used.
        extra_compile_args=[
            *("-O3", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"),
            *(["-fopenmp"] if sys.platform == "linux" else []),
        ],
    )
    cpu.optional = WANTED == "auto"
    return [cpu], {"build_ext": Build}


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
        "test": ["pytest", "pytest-benchmark", "ruff"],
    },
    entry_points={"console_scripts": ["pyvit-accel = pyvit_accel.cli:main"]},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
