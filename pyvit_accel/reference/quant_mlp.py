"""x + layer_scale fc2(activation(fc1(norm(x)))): what follows from the other ops, run one after the other.

x            (M, C)      float32
*_x_scale    (1,) | (K,) | None   of the codes a matmul reads: static, contained in the weights when (K,); None: per row
*_x_bits, *_x_clip                of these codes, as in quantize.py; clip only of scales per row
fc2_x_table  (256,) int8 | None   as in quantize.py, of codes with a scale per row
returns      (M, C)      float32
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .lowbit_linear import lowbit_linear
from .norm_quant import norm_quant, norm_quant_dynamic
from .quantize import quantize_dynamic

REFERENCE = SimpleNamespace(
    lowbit_linear=lowbit_linear,
    norm_quant=norm_quant,
    norm_quant_dynamic=norm_quant_dynamic,
    quantize_dynamic=quantize_dynamic,
)


def quant_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_eps: float,
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
    layer_scale: Tensor | None,
    ops: Any = REFERENCE,
) -> Tensor:
    """ops: where the steps come from, the references or torch.ops.pyvit_accel."""
    codes, scale = norm_rows(ops, x, norm_weight, norm_bias, norm_eps, fc1_x_scale, fc1_x_bits, fc1_x_clip)
    hidden = ops.lowbit_linear(
        codes,
        scale,
        fc1_w,
        fc1_w_scale,
        fc1_bias,
        0,
        activation,
        None,
        None,
        fc2_x_scale,
        fc2_x_zero_point,
        fc2_x_bits,
    )
    if fc2_x_scale is None:
        hidden, scale = ops.quantize_dynamic(hidden, fc2_x_minimum, fc2_x_bits, fc2_x_clip, fc2_x_table)
    else:
        scale = of_codes(fc2_x_scale)
    return ops.lowbit_linear(
        hidden, scale, fc2_w, fc2_w_scale, fc2_bias, fc2_x_zero_point, "none", layer_scale, x, None, 0, 8
    )


def norm_rows(
    ops: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None, bits: int, clip: float
) -> tuple[Tensor, Tensor]:
    """Codes of LayerNorm(x), and the scale that a matmul of them multiplies with."""
    if scale is None:
        return ops.norm_quant_dynamic(x, weight, bias, eps, bits, clip)
    return ops.norm_quant(x, weight, bias, scale, eps, bits), of_codes(scale)


def of_codes(scale: Tensor) -> Tensor:
    """The scale a matmul multiplies with: 1 when its weights contain one per channel."""
    return scale if scale.shape[0] == 1 else torch.ones_like(scale[:1])
