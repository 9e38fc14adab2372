"""weight_only_linear: float activations x packed int8 weights, for models whose memory matters more than their speed."""

from __future__ import annotations

from torch import Tensor

from pyvit_accel import reference

from ._library import define
from .lowbit_linear import check_packed

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

    Raises ValueError for shapes that disagree. No gradient.
    """
    K, N = x.shape[-1], w_scale.shape[0]
    check_packed("weight_only_linear", w_packed, N, K)
    return _op(x.reshape(-1, K).float(), w_packed, w_scale, bias).reshape(*x.shape[:-1], N).to(x.dtype)
