"""weight_only_linear: float activations x packed int8 weights, for models whose memory matters more than speed."""

from __future__ import annotations

from torch import Tensor

from pyvit_accel import reference

from ._library import check_rows, define
from .lowbit_linear import check_weight

_op = define(
    "weight_only_linear",
    "(Tensor x, Tensor w_packed, Tensor w_scale, Tensor? bias) -> Tensor",
    reference.weight_only_linear,
    lambda x, w_packed, w_scale, bias: x.new_empty(x.shape[0], w_scale.shape[0]),
)


def weight_only_linear(x: Tensor, w_packed: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """(x @ w.T) * w_scale + bias.

    x         (..., K)  float; computed in float32, returned in its dtype
    w_packed  W8 v1     uint8, formats/packed.py; holds (N, K) int8
    w_scale   (N,)      float32
    bias      (N,)      float32 or None
    returns   (..., N)  dtype of x

    Raises ValueError for shapes that disagree, TypeError for dtypes. No gradient.
    """
    K = check_rows("weight_only_linear", x)
    N = check_weight("weight_only_linear", w_packed, w_scale, bias, K)
    if not x.is_floating_point():
        raise TypeError(f"weight_only_linear: x must be float, got {x.dtype}; integer codes go to lowbit_linear")
    return _op(x.reshape(-1, K).float(), w_packed, w_scale, bias).reshape(*x.shape[:-1], N).to(x.dtype)
