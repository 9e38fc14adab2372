"""y = x @ w.T + bias, x float, w codes with a scale per output feature, or scale and zero point per group of inputs.

    w_scale (N,):    y = (x @ q.T) * w_scale + bias
    w_scale (N, G):  y = x @ w.T + bias,  w[n, k] = (q[n, k] - w_zero_point[n, g]) * w_scale[n, g],  g = k // (K / G)

x             (M, K)         float32; float16 and bfloat16 are computed in float32 too
w_packed      packed         uint8, formats/packed.py; holds (N, K) codes of 2, 3, 4, 5, 6 or 8 bits
w_scale       (N,) | (N, G)  float32
w_zero_point  (N, G) | None  float32, integer-valued
bias          (N,) | None    float32
returns       (M, N)         dtype of x, accumulated in float32
"""

from __future__ import annotations

from torch import Tensor

from pyvit_accel.formats import packed


def weight_only_linear(
    x: Tensor, w_packed: Tensor, w_scale: Tensor, w_zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    dtype, x = x.dtype, x.float() if x.dtype.itemsize == 2 else x
    q = packed.unpack(w_packed, w_scale.shape[0], x.shape[1]).to(x.dtype)
    if w_scale.dim() == 1:
        y = (x @ q.T) * w_scale
    else:
        groups = q.view(*w_scale.shape, -1)
        if w_zero_point is not None:
            groups = groups - w_zero_point[..., None]
        y = x @ (groups * w_scale[..., None]).flatten(1).T
    return (y if bias is None else y + bias).to(dtype)
