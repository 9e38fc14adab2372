"""Ops of int8 codes whose weights are 2:4: what they run instead of a kernel for packed ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pyvit_accel.formats.sparse24 import Sparse24Operand

Weight = Tensor | Sparse24Operand


def lowbit_linear(
    x, x_scale, w, w_scale, bias, x_zero_point, activation, layer_scale, residual, out_scale, out_zero_point, out_bits,
    index=None,
):  # fmt: skip
    """The op, of either weight."""
    if isinstance(w, Tensor):
        return torch.ops.pyvit_accel.lowbit_linear.default(
            x, x_scale, w, w_scale, bias, x_zero_point, activation, layer_scale, residual, out_scale, out_zero_point,
            out_bits, index,
        )  # fmt: skip
    w.check(w_scale.shape[0], x.shape[1])
    if index is not None:
        rows = index.clamp(min=0)
        x, x_scale = x[rows], x_scale[rows] if x_scale.shape[0] > 1 else x_scale
    y = torch.ops.pyvit_accel.sparse24_linear.default(
        x, w.values, w.meta, bias, w_scale.shape[0], x_scale, w_scale, w.sums, x_zero_point, activation, layer_scale,
        residual, out_scale, out_zero_point, out_bits,
    )  # fmt: skip
    return y if index is None else y.masked_fill_(index[:, None] < 0, 0)


def lowbit_linear_scatter(
    out, out_index, x, x_scale, w, w_scale, bias, x_zero_point, activation, layer_scale, index=None
):
    """The op, of a 2:4 weight."""
    epilogue = (x_zero_point, activation, layer_scale, None, None, 0, 8)
    y = lowbit_linear(x, x_scale, w, w_scale, bias, *epilogue, index).masked_fill_(out_index[:, None] < 0, 0)
    out.index_add_(0, out_index.clamp(min=0), y)


class _Ops:
    """torch.ops.pyvit_accel, where lowbit_linear takes either weight."""

    lowbit_linear = staticmethod(lowbit_linear)

    def __getattr__(self, name: str) -> Callable:
        return getattr(torch.ops.pyvit_accel, name)


OPS = _Ops()


def choose(op: Callable, composed: Callable, *weights: Weight) -> Callable:
    """The op, where all of its weights are packed; else `composed`, a reference, of OPS."""
    return op if all(isinstance(w, Tensor) for w in weights) else partial(composed, ops=OPS)
