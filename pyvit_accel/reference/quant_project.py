"""residual + layer_scale proj(x), the projection of attention; on the way rows are gathered or become means.

x         (B, Nx, K)  float32, quantised with a scale per row
residual  (B, N, C)   float32
col, ptr, weight      None: Nx = N. Only col (B, M): the rows of the residual that belong to the M = Nx rows of x.
                      All three: lists as in mix_tokens.py, whose weighted means take the place of rows of both
returns   (B, M, C)   float32
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from .lowbit_linear import lowbit_linear
from .mix_tokens import mix_tokens
from .quantize import quantize_dynamic

REFERENCE = SimpleNamespace(lowbit_linear=lowbit_linear, mix_tokens=mix_tokens, quantize_dynamic=quantize_dynamic)


def quant_project(
    x: Tensor,
    residual: Tensor,
    col: Tensor | None,
    ptr: Tensor | None,
    weight: Tensor | None,
    x_bits: int,
    x_clip: float,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    ops: Any = REFERENCE,
) -> Tensor:
    """ops: where the steps come from, the references or torch.ops.pyvit_accel."""
    if ptr is not None:
        x = ops.mix_tokens(x, col, ptr, weight, None, 1, "mean")
    if col is not None:
        residual = ops.mix_tokens(residual, col, ptr, weight, None, 1, "sum" if ptr is None else "mean")
    B, M, C = residual.shape
    codes, scale = ops.quantize_dynamic(x.flatten(0, 1), None, x_bits, x_clip, None)
    rows = residual.reshape(B * M, C)
    y = ops.lowbit_linear(codes, scale, w, w_scale, bias, 0, "none", layer_scale, rows, None, 0, 8)
    return y.view(B, M, C)
