"""class_row: what the class token attends to, without computing attention."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel import reference

from ._library import define
from .select_tokens import check_rows_of

_op = define(
    "class_row",
    "(Tensor q, Tensor k, Tensor q_scale, Tensor k_scale, float softmax_scale, Tensor? key_bias) -> Tensor",
    reference.class_row,
    lambda q, k, *rest: k.new_empty(k.shape[0], k.shape[2], dtype=torch.float32),
)


def class_row(
    q: Tensor,
    k: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    softmax_scale: float,
    key_bias: Tensor | None = None,
) -> Tensor:
    """The first row of softmax(q k^T q_scale k_scale softmax_scale + key_bias), the mean over the heads.

    q                 (B, H, Nq, D)  int8, of which only the first query is read
    k                 (B, H, N, D)   int8; any strides over contiguous D, so views of qkv fit
    q_scale, k_scale                 float32, broadcastable to (B, H, Nq) and (B, H, N): (1,), (H, 1) or (B, H, N)
    key_bias          (B, N)         float32, added to the scaled scores; -inf: this key is not seen
    returns           (B, N)         float32; zeros for an image of which no key is seen

    What quant_attention(..., emit=("cls",)) emits, within float rounding. No gradient. Raises TypeError for wrong
    dtypes, ValueError for shapes that disagree. Reference: reference/class_row.py.
    """
    for name, t in (("q", q), ("k", k)):
        check_rows_of("class_row", name, t, (torch.int8,), 4)
    B, H, Nq, D = q.shape
    N = k.shape[2]
    if k.shape != (B, H, N, D):
        raise ValueError(f"class_row: q {tuple(q.shape)} and k {tuple(k.shape)} do not fit together")
    if H == 0 or Nq == 0:
        raise ValueError(f"class_row: q {tuple(q.shape)} needs a head and a first query")
    q_scale, k_scale = _scale("q_scale", q_scale, B, H, Nq), _scale("k_scale", k_scale, B, H, N)
    if key_bias is not None:
        check_rows_of("class_row", "key_bias", key_bias, (torch.float32,))
        if key_bias.shape != (B, N):
            raise ValueError(f"class_row: key_bias {tuple(key_bias.shape)} must be (B, N) = {(B, N)}")
    return _op(q, k, q_scale, k_scale, softmax_scale, key_bias)


def _scale(name: str, scale: Tensor, *shape: int) -> Tensor:
    if scale.dtype != torch.float32:
        raise TypeError(f"class_row: {name} must be float32, got {scale.dtype}")
    try:
        return scale.expand(shape)
    except RuntimeError:
        raise ValueError(f"class_row: {name} {tuple(scale.shape)} does not broadcast to {shape}") from None
