"""y = (x @ w.T) * w_scale + bias, x float, w int8 codes.

x         (M, K)  float32
w_packed  W8 v1   uint8, formats/packed.py; holds (N, K) int8
w_scale   (N,)    float32
bias      (N,)    float32 or None
returns   (M, N)  float32, accumulated in float32
"""

from __future__ import annotations

from torch import Tensor

from pyvit_accel.formats import packed


def weight_only_linear(x: Tensor, w_packed: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    y = (x @ packed.unpack_w8(w_packed, w_scale.shape[0], x.shape[1]).to(x.dtype).T) * w_scale
    return y if bias is None else y + bias
