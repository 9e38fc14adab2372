"""quant_block: a whole pre-norm transformer block in one call, so that nothing between its steps is dispatched."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel import reference

from ._library import check_bits, check_table, define
from ._weights import Weight, choose
from .lowbit_linear import ACTIVATIONS


def _composed(*args) -> Tensor:
    """The block from the other ops: what runs on a device that has kernels for them and none for the whole."""
    return reference.quant_block(*args, ops=torch.ops.pyvit_accel)


_op = define(
    "quant_block",
    "(Tensor x, Tensor norm1_weight, Tensor norm1_bias, float norm1_eps, Tensor? qkv_x_scale, int qkv_x_bits, "
    "float qkv_x_clip, Tensor qkv_w, Tensor qkv_w_scale, Tensor? qkv_bias, int num_heads, float softmax_scale, "
    "Tensor? head_scale, int head_bits, Tensor? p_values, float p_steps, str p_operand, "
    "int proj_x_bits, float proj_x_clip, Tensor proj_w, Tensor proj_w_scale, "
    "Tensor? proj_bias, Tensor? layer_scale1, Tensor norm2_weight, Tensor norm2_bias, float norm2_eps, "
    "Tensor? fc1_x_scale, int fc1_x_bits, float fc1_x_clip, Tensor fc1_w, Tensor fc1_w_scale, Tensor? fc1_bias, "
    "str activation, Tensor? fc2_x_scale, int fc2_x_bits, float fc2_x_clip, int fc2_x_zero_point, "
    "float? fc2_x_minimum, Tensor? fc2_x_table, Tensor fc2_w, Tensor fc2_w_scale, Tensor? fc2_bias, "
    "Tensor? layer_scale2, int tokens) -> Tensor",
    _composed,
    lambda x, *rest: x.new_empty(x.shape[0], rest[-1], x.shape[2]),
)


def quant_block(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm1_eps: float,
    qkv_x_scale: Tensor | None,
    qkv_x_bits: int,
    qkv_x_clip: float,
    qkv_w: Weight,
    qkv_w_scale: Tensor,
    qkv_bias: Tensor | None,
    num_heads: int,
    softmax_scale: float,
    head_scale: Tensor | None,
    head_bits: int,
    p_values: Tensor | None,
    p_steps: float,
    p_operand: str,
    proj_x_bits: int,
    proj_x_clip: float,
    proj_w: Weight,
    proj_w_scale: Tensor,
    proj_bias: Tensor | None,
    layer_scale1: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    norm2_eps: float,
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
    layer_scale2: Tensor | None,
    tokens: int | None = None,
) -> Tensor:
    """y = x + layer_scale1 proj(attention(norm1(x))); y + layer_scale2 fc2(activation(fc1(norm2(y)))).

    x                     (B, N, C)          float32
    norm*_weight, _bias   (C,)               float32
    *_w                   packed             as in ops.lowbit_linear: qkv (3 H D, C), proj (C, H D), fc1 (F, C) ...
    *_w_scale, *_bias     (N,)               float32, N the features of *_w
    *_x_scale             (1,) | (K,) | None float32: of the codes the matmul reads, static; in its weights when (K,).
                                             None: one per row, found on the way
    head_scale            (3, H, 1) | None   float32, static scales of q, k, v; None: one per token and head
    *_x_bits, head_bits   2 to 8             of the codes a matmul reads, and of those of q, k, v
    p_values, p_steps, p_operand             of a formats/softmax.py anchored at the maximum, without thresholds;
                                             None: diffused bytes
    *_x_clip              of scales per row: the part of its range that the codes span
    fc2_x_zero_point      the code of zero; with fc2_x_scale None, -2^(bits-1) goes with a minimum and 0 with none
    fc2_x_table           (256,) | None      int8: what takes the place of the 8-bit codes of the activation
    fc2_x_minimum         a lower bound of the activation, from which codes found at run time start
    layer_scale*          (C,) | None        float32
    tokens                only the first ones of every image are wanted; None: all
    returns               (B, tokens, C)     float32

    The same bits as the ops it consists of. Raises ValueError or TypeError for what does not fit together. No gradient.
    Reference: reference/quant_block.py.
    """
    if x.dim() != 3 or x.dtype != torch.float32:
        raise ValueError(f"quant_block: x must be float32 (B, N, C), got {x.dtype} {tuple(x.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"quant_block: activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if tokens is None:
        tokens = x.shape[1]
    if not 0 <= tokens <= x.shape[1]:
        raise ValueError(f"quant_block: tokens={tokens}, but x has {x.shape[1]} tokens")
    for name, bits in (("qkv", qkv_x_bits), ("proj", proj_x_bits), ("fc1", fc1_x_bits), ("fc2", fc2_x_bits)):
        check_bits("quant_block", bits, f"{name}_x_bits")
    check_bits("quant_block", head_bits, "head_bits")
    check_table("quant_block", fc2_x_table, fc2_x_bits)
    return choose(_op, reference.quant_block, qkv_w, proj_w, fc1_w, fc2_w)(
        x, norm1_weight, norm1_bias, norm1_eps, qkv_x_scale, qkv_x_bits, qkv_x_clip, qkv_w, qkv_w_scale, qkv_bias,
        num_heads, softmax_scale, head_scale, head_bits, p_values, p_steps, p_operand, proj_x_bits,
        proj_x_clip, proj_w, proj_w_scale, proj_bias,
        layer_scale1, norm2_weight, norm2_bias, norm2_eps, fc1_x_scale, fc1_x_bits, fc1_x_clip, fc1_w, fc1_w_scale,
        fc1_bias, activation, fc2_x_scale, fc2_x_bits, fc2_x_clip, fc2_x_zero_point, fc2_x_minimum, fc2_x_table,
        fc2_w, fc2_w_scale, fc2_bias, layer_scale2, tokens,
    )  # fmt: skip
