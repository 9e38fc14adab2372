"""The import rule and the rows of the design, read from the source files."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from pyvit_accel import backends, ops, reference

ROOT = Path(__file__).parents[1]

# What each layer of pyvit_accel may import of pyvit_accel, and which third-party packages.
BELOW_MODULES = {"formats", "reference", "backends", "ops"}
BELOW_RECIPES = BELOW_MODULES | {"modules", "adapters", "calibrate", "models", "files", "errors"}
COMMANDS = {"commands", "demo", "images", "measure", "output"}
RECIPES = {"recipes", "planning", "sparse_recipe", "mixed_precision", "token_reduction"}
ANYTHING = BELOW_RECIPES | COMMANDS | RECIPES | {"convert", "serialize", "kernels", "cuda", "tokens", "sparsity", "_C"}
LAYERS = {
    "errors": (set(), set()),
    "files": (set(), {"torch", "safetensors"}),
    "formats": (set(), {"torch"}),
    "reference": ({"formats"}, {"torch"}),
    "cuda": ({"errors"}, {"torch"}),
    "backends": ({"formats", "reference", "cuda", "_C"}, {"torch"}),
    "ops": ({"formats", "reference", "backends", "kernels", "cuda", "_C"}, {"torch"}),
    "modules": (BELOW_MODULES | {"calibrate", "sparsity", "errors"}, {"torch"}),
    "adapters": ({"modules", "errors"}, {"torch"}),
    "calibrate": ({"formats", "errors"}, {"torch"}),
    "models": ({"files", "errors"}, {"torch", "numpy", "sklearn"}),
    "convert": ({"errors"}, {"torch"}),
    "tokens": (BELOW_MODULES | {"modules", "errors"}, {"torch"}),
    "sparsity": ({"formats", "errors"}, {"torch"}),
    "planning": ({"adapters", "calibrate", "errors", "modules"}, {"torch", "tqdm"}),
    "token_reduction": ({"adapters", "convert", "errors", "modules", "tokens"}, {"torch"}),
    "sparse_recipe": ({"convert", "errors", "modules", "planning", "sparsity"}, {"torch"}),
    "recipes": (BELOW_RECIPES | {"convert", "planning", "sparse_recipe", "token_reduction", "tokens"}, {"torch"}),
    "imported": (BELOW_RECIPES | {"convert", "recipes"}, {"torch"}),
    "mixed_precision": (BELOW_RECIPES | {"convert", "planning", "recipes"}, {"torch"}),
    "kernels": (set(), {"torch", "triton"}),
}


def sources() -> list[Path]:
    return sorted([*(ROOT / "pyvit_accel").rglob("*.py"), *(ROOT / "kernels").glob("*.py")])


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("pyvit_accel", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts)


def layer_of(module: str) -> str:
    """The first name below pyvit_accel: a folder or a file."""
    return [*module.split("."), "__init__"][1]


def imports_of(path: Path) -> set[str]:
    """Absolute names of everything the file imports, anywhere in it; `from a import b` gives a.b."""
    package = module_of(path).split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def stems(folder: str, pattern: str) -> set[str]:
    return {p.stem for p in (ROOT / folder).glob(pattern) if not p.stem.startswith("_")}


def test_imports_are_read_as_meant():
    """The reader sees imports inside functions, relative ones, and submodules imported from a package."""
    path = ROOT / "pyvit_accel" / "ops" / "__init__.py"
    assert "pyvit_accel.ops._library" in imports_of(path) and "pyvit_accel.ops.quantize.quantize" in imports_of(path)
    path = ROOT / "pyvit_accel" / "backends.py"
    assert {"pyvit_accel._C", "pyvit_accel.reference", "torch"} <= imports_of(path)
    assert layer_of("pyvit_accel.ops.quantize") == "ops" and layer_of("pyvit_accel") == "__init__"


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_imports_point_one_way(path):
    layer = layer_of(module_of(path))
    ours = {layer_of(name) for name in imports_of(path) if name.split(".")[0] == "pyvit_accel"} - {layer, "__init__"}
    others = {name.split(".")[0] for name in imports_of(path)} - {"pyvit_accel"} - sys.stdlib_module_names
    assert not others & {"tests", "bench"}
    if layer in LAYERS:
        allowed, third_party = LAYERS[layer]
        assert ours <= allowed and others <= third_party
    else:
        assert path.parent == ROOT / "pyvit_accel", f"{layer} is a folder that LAYERS does not name"
        assert ours <= ANYTHING | stems("pyvit_accel", "*.py")


def test_kernels_import_siblings_relatively():
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] != "pyvit_accel"


def test_modules_know_no_kernel():
    for path in (ROOT / "pyvit_accel" / "modules").rglob("*.py"):
        assert not any(re.match(r"pyvit_accel\.(kernels|_C)\b", name) for name in imports_of(path))


def test_csrc_includes_aten_or_the_cuda_toolkit_only():
    ours = re.compile(r'"[\w./]+"|<ATen/.*>|<torch/library.h>|<\w+>|<(immintrin|emmintrin|arm_neon).h>')
    toolkit = re.compile(r'"[\w./]+"|<cuda(_runtime)?\.h>|<\w+(\.h)?>')
    files = [p for p in (ROOT / "csrc").rglob("*.*") if p.name != "module.cpp"]
    assert files
    for path in files:
        allowed = toolkit if "cuda" in path.parts else ours
        for include in re.findall(r"^\s*#include\s+(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert allowed.fullmatch(include), f"{path.name} includes {include}"


def test_every_op_has_its_row():
    """A file is named after its op, or after the first of a family that share what they check."""
    rows = stems("pyvit_accel/ops", "*.py")
    assert rows == {getattr(ops, name).__module__.rpartition(".")[2] for name in ops.__all__}
    assert rows <= set(ops.__all__)
    assert stems("pyvit_accel/reference", "*.py") - {"scalar"} == rows
    helpers = {"isa", "isa_avx2", "isa_avx512", "isa_portable", "probe"}
    without_cpp = {"sparse24_linear"}  # CPUs have no sparse units: there it is a dense matmul that others own
    assert stems("csrc/cpu", "*.cpp") - helpers == rows - without_cpp
    assert stems("kernels", "*.py") <= rows
    assert stems("pyvit_accel/cuda", "*.py") - {"library"} <= rows
    assert {re.sub(r"_sm\d+$", "", stem) for stem in stems("csrc/cuda", "*.cu")} - {"library"} <= rows
    assert {f"test_{row}" for row in rows} <= stems("tests", "test_*.py")


def test_every_op_of_the_library_has_a_reference():
    assert set(reference.__all__) == set(backends.OPS)
    assert {re.sub("_dynamic$", "", op) for op in backends.OPS} == set(ops.__all__)
