"""quant_project: attention's projection and its residual, rows gathered or merged on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel import reference

from ._library import check_bits, check_clip, define
from ._weights import Weight, choose
from .lowbit_linear import check_weight
from .select_tokens import check_rows_of


def _composed(*args) -> Tensor:
    """From the other ops: what runs on a device that has kernels for them and none for the whole."""
    return reference.quant_project(*args, ops=torch.ops.pyvit_accel)


def _fake(x, residual, col, ptr, *rest):
    M = residual.shape[1] if col is None else col.shape[1] if ptr is None else ptr.shape[1] - 1
    return residual.new_empty(residual.shape[0], M, residual.shape[2])


_op = define(
    "quant_project",
    "(Tensor x, Tensor residual, Tensor? col, Tensor? ptr, Tensor? weight, int x_bits, float x_clip, Tensor w, "
    "Tensor w_scale, Tensor? bias, Tensor? layer_scale) -> Tensor",
    _composed,
    _fake,
)


def quant_project(
    x: Tensor,
    residual: Tensor,
    w: Weight,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    col: Tensor | None = None,
    ptr: Tensor | None = None,
    weight: Tensor | None = None,
    x_bits: int = 8,
    x_clip: float = 1.0,
    layer_scale: Tensor | None = None,
) -> Tensor:
    """residual + layer_scale proj(x), x quantised with a scale per row.

    x                 (B, Nx, K)  float32
    residual          (B, N, C)   float32
    w, w_scale, bias              as in ops.lowbit_linear, of K to C features
    col               (B, M)      int32, alone: residual[b, col[b, m]] belongs to row m of x, Nx = M
    col, ptr, weight              lists as in ops.mix_tokens, reduce "mean": rows of x and of residual are their means
    x_bits, x_clip                of the codes of x
    layer_scale       (C,)        float32
    returns           (B, M, C)   float32; M = N without col

    The same bits as the ops it consists of. Raises ValueError or TypeError for what does not fit together. No gradient.
    Reference: reference/quant_project.py.
    """
    for name, t in (("x", x), ("residual", residual)):
        check_rows_of("quant_project", name, t, (torch.float32,), 3)
    check_bits("quant_project", x_bits, "x_bits")
    check_clip("quant_project", x_clip)
    C = check_weight("quant_project", w, w_scale, bias, x.shape[2])
    if residual.shape[0] != x.shape[0] or residual.shape[2] != C:
        shapes = f"x {tuple(x.shape)}, residual {tuple(residual.shape)}"
        raise ValueError(f"quant_project: {shapes} and a weight of {C} features do not fit")
    for name, t, dtype in (("col", col, torch.int32), ("ptr", ptr, torch.int32), ("weight", weight, torch.float32)):
        if t is not None:
            check_rows_of("quant_project", name, t, (dtype,))
    if (ptr is None) != (weight is None) or (ptr is not None and col is None):
        raise ValueError("quant_project: lists are col, ptr and weight; a gather is col alone")
    expected = residual.shape[1] if col is None or ptr is not None else col.shape[1]
    if x.shape[1] != expected:
        raise ValueError(f"quant_project: x has {x.shape[1]} rows, expected {expected}")
    project = choose(_op, reference.quant_project, w)
    return project(x, residual, col, ptr, weight, x_bits, x_clip, w, w_scale, bias, layer_scale)
