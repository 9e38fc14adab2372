"""Registration shared by the ops.

Library.define/impl instead of custom_op: around the same C++ kernel, in Python, 4.6 against 10.9 us a call under
no_grad and 4.0 against 6.4 us under inference_mode (AMD EPYC, torch 2.13); registered from C++, as here, 2.2 us.
The price is that a backward has to be refused by hand: the extension does it (module.cpp), and finish() does it here
where there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from pyvit_accel import backends

LIBRARY = torch.library.Library("pyvit_accel", "DEF")
EVERYWHERE: dict[str, Callable] = {}  # what runs on devices without a kernel of their own, by op


def check_rows(op: str, x: Tensor) -> int:
    """The length K of the rows of x (..., K)."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; it needs a last dimension of at least 1")
    return x.shape[-1]


def check_vector(op: str, name: str, t: Tensor | None, *lengths: int) -> None:
    """Raise unless t is None, or float32 of shape (n,) for one of the lengths."""
    if t is None:
        return
    if t.dtype != torch.float32:
        raise TypeError(f"{op}: {name} must be float32, got {t.dtype}")
    if t.dim() != 1 or t.shape[0] not in lengths:
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; use {' or '.join(f'({n},)' for n in lengths)}")


def check_index(op: str, name: str, index: Tensor | None, *lengths: int) -> None:
    """Raise unless index is None, or int32 (M,), of one of the lengths if there are some."""
    if index is None:
        return
    if index.dtype != torch.int32:
        raise TypeError(f"{op}: {name} must be int32, got {index.dtype}")
    if index.dim() != 1 or (lengths and index.shape[0] not in lengths):
        wanted = " or ".join(f"({n},)" for n in lengths) or "(M,), one for each row of the result"
        raise ValueError(f"{op}: {name} has shape {tuple(index.shape)}; use {wanted}")


def check_bits(op: str, bits: int, name: str = "bits") -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"{op}: {name}={bits}; codes have 2 to 8 bits")


def check_clip(op: str, clip: float) -> None:
    if not 0 < clip <= 1:
        raise ValueError(f"{op}: clip={clip} is outside 0..1; 1 spans the whole range of a row")


def check_table(op: str, table: Tensor | None, bits: int) -> None:
    if table is None:
        return
    if table.dtype != torch.int8 or table.shape != (256,):
        raise ValueError(f"{op}: table must be int8 (256,), got {table.dtype} {tuple(table.shape)}")
    if bits != 8:
        raise ValueError(f"{op}: a table replaces codes of 8 bits, got bits={bits}")


def define(name: str, schema: str, reference: Callable, fake: Callable) -> Callable:
    """Define an op whose meaning, on any device without a kernel of its own, is the reference. Returns its overload."""
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    EVERYWHERE[name] = reference
    torch.library.register_fake(f"pyvit_accel::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.pyvit_accel, name).default


def _refuse(op: Callable, keyset: torch._C.DispatchKeySet, *args) -> None:
    """The Autograd kernel of an op that writes into an argument: it refuses at once, for there is no result to do so.

    torch.library has no register_autograd for such ops, and what C++ has for ops without a gradient lets them pass.
    """
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        raise RuntimeError(f"derivative for {op.name()} is not implemented: integer codes have no gradient")
    written = [a for a, s in zip(args, op._schema.arguments, strict=False) if s.is_write]
    torch.autograd.graph.increment_version(written)
    op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _launcher(name: str, otherwise: Callable) -> Callable:
    """What runs on CUDA: the CUDA C++ kernels where they are installed and own the call, else the other launcher."""
    if backends.HAS_CUDA_LIBRARY and name == "lowbit_linear":
        from pyvit_accel.cuda.lowbit_linear import before

        return before(otherwise)
    return otherwise


def finish() -> None:
    """Register the kernels this install has, after every op is defined."""
    if backends.HAS_TRITON:
        from pyvit_accel import kernels

        for name in kernels.__all__:
            LIBRARY.impl(name, _launcher(name, getattr(kernels, name)), "CUDA")
    elif backends.HAS_CUDA_LIBRARY:
        LIBRARY.impl("lowbit_linear", _launcher("lowbit_linear", EVERYWHERE["lowbit_linear"]), "CUDA")
    if backends.HAS_CUDA_LIBRARY:
        from pyvit_accel.cuda.sparse24_linear import before

        LIBRARY.impl("sparse24_linear", before(EVERYWHERE["sparse24_linear"]), "CUDA")
    if backends.HAS_CPU_KERNELS:
        from pyvit_accel import _C  # noqa: F401 - importing it registers the CPU kernels, and refuses their backwards

    for name in backends.OPS:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"pyvit_accel::{name}", "Autograd"):
            continue
        op = getattr(torch.ops.pyvit_accel, name).default
        if op._schema.is_mutable:
            LIBRARY.impl(name, partial(_refuse, op), "Autograd", with_keyset=True)
            continue

        def backward(ctx, *grads, name=name) -> NoReturn:
            raise RuntimeError(f"derivative for pyvit_accel::{name} is not implemented: integer codes have no gradient")

        torch.library.register_autograd(f"pyvit_accel::{name}", backward, lib=LIBRARY)
