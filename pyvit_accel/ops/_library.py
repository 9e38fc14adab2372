"""Registration shared by the ops.

Library.define costs 2 us a call less than custom_op outside inference_mode; the price is that a backward has to be refused
by hand: the extension does it in C++ (module.cpp), and finish() does it here where there is no extension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch

from pyvit_accel import backends

LIBRARY = torch.library.Library("pyvit_accel", "DEF")


def define(name: str, schema: str, reference: Callable, fake: Callable) -> Callable:
    """Define an op whose meaning, on any device without a kernel of its own, is the reference. Returns its overload."""
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyvit_accel::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.pyvit_accel, name).default


def finish() -> None:
    """Register the kernels this install has, after every op is defined."""
    if backends.HAS_TRITON:
        from pyvit_accel import kernels

        for name in kernels.__all__:
            LIBRARY.impl(name, getattr(kernels, name), "CUDA")
    if backends.HAS_CPU_KERNELS:
        from pyvit_accel import _C  # noqa: F401 - importing it registers the CPU kernels

        return

    for name in backends.OPS:

        def backward(ctx, *grads, name=name) -> NoReturn:
            raise RuntimeError(f"derivative for pyvit_accel::{name} is not implemented: integer codes have no gradient")

        torch.library.register_autograd(f"pyvit_accel::{name}", backward, lib=LIBRARY)
