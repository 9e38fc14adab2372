"""quant_mlp: the second half of a block in one call, a panel of rows at a time in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel import reference

from ._library import check_bits, check_rows, check_table, define
from ._weights import Weight, choose
from .lowbit_linear import ACTIVATIONS


def _composed(*args) -> Tensor:
    """From the other ops: what runs on a device that has kernels for them and none for the whole."""
    return reference.quant_mlp(*args, ops=torch.ops.pyvit_accel)


_op = define(
    "quant_mlp",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, float norm_eps, Tensor? fc1_x_scale, int fc1_x_bits, "
    "float fc1_x_clip, Tensor fc1_w, Tensor fc1_w_scale, Tensor? fc1_bias, str activation, Tensor? fc2_x_scale, "
    "int fc2_x_bits, float fc2_x_clip, int fc2_x_zero_point, float? fc2_x_minimum, Tensor? fc2_x_table, Tensor fc2_w, "
    "Tensor fc2_w_scale, Tensor? fc2_bias, Tensor? layer_scale) -> Tensor",
    _composed,
    lambda x, *rest: x.new_empty(x.shape),
)


def quant_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_eps: float,
    fc1_x_scale: Tensor | None,
    fc1_x_bits: int,
    fc1_x_clip: float,
    fc1_w: Weight,
    fc1_w_scale: Tensor,
    fc1_bias: Tensor | None,
    activation: str,
    fc2_x_scale: Tensor | None,
    fc2_x_bits: int,
    fc2_x_clip: float,
    fc2_x_zero_point: int,
    fc2_x_minimum: float | None,
    fc2_x_table: Tensor | None,
    fc2_w: Weight,
    fc2_w_scale: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None = None,
) -> Tensor:
    """x + layer_scale fc2(activation(fc1(norm(x)))); arguments as in ops.quant_block.

    x        (..., C)  float32
    returns  (..., C)  float32

    The same bits as the ops it consists of. Raises ValueError or TypeError for what does not fit together. No gradient.
    Reference: reference/quant_mlp.py.
    """
    C = check_rows("quant_mlp", x)
    if x.dtype != torch.float32:
        raise TypeError(f"quant_mlp: x must be float32, got {x.dtype}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"quant_mlp: activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    for name, bits in (("fc1", fc1_x_bits), ("fc2", fc2_x_bits)):
        check_bits("quant_mlp", bits, f"{name}_x_bits")
    check_table("quant_mlp", fc2_x_table, fc2_x_bits)
    return choose(_op, reference.quant_mlp, fc1_w, fc2_w)(
        x.reshape(-1, C), norm_weight, norm_bias, norm_eps, fc1_x_scale, fc1_x_bits, fc1_x_clip, fc1_w, fc1_w_scale,
        fc1_bias, activation, fc2_x_scale, fc2_x_bits, fc2_x_clip, fc2_x_zero_point, fc2_x_minimum, fc2_x_table, fc2_w,
        fc2_w_scale, fc2_bias, layer_scale,
    ).reshape(x.shape)  # fmt: skip
