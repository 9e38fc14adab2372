"""import_timm: timm beside a torch that its installed torchvision was not built for.

torchvision registers fake kernels for its operators at import, which fails when the compiled operators are missing.
Declaring the two operators without a kernel is enough for timm, which never calls them.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

_library = None  # the declarations live as long as this object


def _declare_operators() -> None:
    global _library
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor a, Tensor b, float c) -> Tensor")
    _library.define("qnms(Tensor a, Tensor b, float c, float d, int e) -> Tensor")


def import_timm() -> ModuleType:
    """timm, or skip the test with the reason."""
    for name in ("timm", "torchvision"):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declare_operators()
    import timm

    return timm
