"""A pre-norm transformer block: what follows from the other ops, run one after the other.

    codes = norm_quant(x);        q, k, v = quantize(qkv(codes)) per head;  a = quant_attention(q, k, v)
    y     = x + layer_scale1 proj(quantize(a))
    codes = norm_quant(y);        h = quantize(activation(fc1(codes)))
    out   = y + layer_scale2 fc2(h)

x            (B, N, C)   float32
*_x_scale    (1,) | (K,) | None   of the codes a matmul reads: static, contained in the weights when (K,); None: per row
*_x_bits, *_x_clip                of these codes, as in quantize.py; clip only of scales per row
fc2_x_table  (256,) int8 | None   as in quantize.py, of codes with a scale per row
head_scale   (3, H, 1) | None     of q, k, v; None: one per token and head
head_bits                         of the codes of q, k, v
p_values, p_steps, p_operand      of the probabilities, anchored at the maximum, as in quant_attention.py; None: bytes
tokens       only the first `tokens` of every image are wanted: queries, projection and MLP leave the others out
returns      (B, tokens, C)  float32
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from .lowbit_linear import lowbit_linear
from .norm_quant import norm_quant, norm_quant_dynamic
from .quant_attention import quant_attention
from .quant_mlp import norm_rows, quant_mlp
from .quantize import quantize_dynamic

REFERENCE = SimpleNamespace(
    lowbit_linear=lowbit_linear,
    norm_quant=norm_quant,
    norm_quant_dynamic=norm_quant_dynamic,
    quant_attention=quant_attention,
    quantize_dynamic=quantize_dynamic,
)


def quant_block(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm1_eps: float,
    qkv_x_scale: Tensor | None,
    qkv_x_bits: int,
    qkv_x_clip: float,
    qkv_w: Tensor,
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
    proj_w: Tensor,
    proj_w_scale: Tensor,
    proj_bias: Tensor | None,
    layer_scale1: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    norm2_eps: float,
    fc1_x_scale: Tensor | None,
    fc1_x_bits: int,
    fc1_x_clip: float,
    fc1_w: Tensor,
    fc1_w_scale: Tensor,
    fc1_bias: Tensor | None,
    activation: str,
    fc2_x_scale: Tensor | None,
    fc2_x_bits: int,
    fc2_x_clip: float,
    fc2_x_zero_point: int,
    fc2_x_minimum: float | None,
    fc2_x_table: Tensor | None,
    fc2_w: Tensor,
    fc2_w_scale: Tensor,
    fc2_bias: Tensor | None,
    layer_scale2: Tensor | None,
    tokens: int,
    ops: Any = REFERENCE,
) -> Tensor:
    """ops: where the steps come from, the references or torch.ops.pyvit_accel."""
    B, N, C = x.shape
    H = num_heads
    inner = qkv_w_scale.shape[0] // 3
    static = head_scale is not None
    D = inner // H

    codes, scale = norm_rows(
        ops, x.reshape(-1, C), norm1_weight, norm1_bias, norm1_eps, qkv_x_scale, qkv_x_bits, qkv_x_clip
    )
    out_scale = None if head_scale is None else head_scale.expand(3, H, D).reshape(-1)
    qkv = ops.lowbit_linear(codes, scale, qkv_w, qkv_w_scale, qkv_bias, 0, "none", None, None, out_scale, 0, head_bits)
    if head_scale is None:
        qkv, head_scale = ops.quantize_dynamic(qkv.reshape(-1, D), None, head_bits, 1.0, None)
        scales = head_scale.view(B, N, 3, H).permute(2, 0, 3, 1)
    else:
        scales = head_scale[:, None].expand(3, B, H, N)
    q, k, v = qkv.view(B, N, 3, H, D).permute(2, 0, 3, 1, 4)
    q_scale, k_scale, v_scale = scales
    v_scale = v_scale if p_values is None or not static else v_scale[..., :1]
    form = (p_values, None, p_steps, 0.0, 1.0, 0.0, p_operand, "max", True)
    attended, *_ = ops.quant_attention(
        q[:, :, :tokens], k, v, q_scale[:, :, :tokens], k_scale, v_scale, softmax_scale, *[None] * 5,
        *form, head_bits, None, None, tokens, False, False, False,
    )  # fmt: skip
    codes, scale = ops.quantize_dynamic(attended.reshape(-1, inner), None, proj_x_bits, proj_x_clip, None)
    residual = x[:, :tokens].reshape(-1, C)
    y = ops.lowbit_linear(codes, scale, proj_w, proj_w_scale, proj_bias, 0, "none", layer_scale1, residual, None, 0, 8)

    out = quant_mlp(
        y, norm2_weight, norm2_bias, norm2_eps, fc1_x_scale, fc1_x_bits, fc1_x_clip, fc1_w, fc1_w_scale, fc1_bias,
        activation, fc2_x_scale, fc2_x_bits, fc2_x_clip, fc2_x_zero_point, fc2_x_minimum, fc2_x_table, fc2_w,
        fc2_w_scale, fc2_bias, layer_scale2, ops,
    )  # fmt: skip
    return out.view(B, tokens, C)
