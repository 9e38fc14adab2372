"""The implementations of the ops that this machine has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import pytest
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pyvit_accel import backends

ISAS = ("avx512_vnni", "avx2", "portable")


@dataclass(frozen=True)
class Implementation:
    """Runs a public op, impl(ops.quantize, x, scale): tensors go to the implementation's device, results come back."""

    active: Callable[[], AbstractContextManager]
    device: str = "cpu"

    def __call__(self, op, *args, **kwargs):
        args, kwargs = tree_map_only(Tensor, lambda t: t.to(self.device), (args, kwargs))
        with self.active():
            return tree_map_only(Tensor, lambda t: t.cpu(), op(*args, **kwargs))


IMPLEMENTATIONS = {
    "reference": Implementation(backends.use_reference),
    **{isa: Implementation(partial(backends.use_isa, isa)) for isa in ISAS},
}


def available(name: str) -> Implementation:
    try:
        with IMPLEMENTATIONS[name].active():
            return IMPLEMENTATIONS[name]
    except ValueError as missing:
        pytest.skip(str(missing))
