"""propagate: how important tokens are to each other, A^T applied again and again with A kept on chip."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel import reference

from ._library import define
from .select_tokens import FLOATS, check_rows_of

_op = define(
    "propagate",
    "(Tensor q, Tensor k, Tensor start, float softmax_scale, int iterations, Tensor? key_bias) -> Tensor",
    reference.propagate,
    lambda q, k, start, *rest: start.new_empty(start.shape),
)


def propagate(
    q: Tensor,
    k: Tensor,
    start: Tensor,
    softmax_scale: float,
    iterations: int = 1,
    key_bias: Tensor | None = None,
) -> Tensor:
    """s <- A^T s, `iterations` times, A = softmax(q k^T softmax_scale + key_bias).

    q, k        (B, H, N, D)  float, any strides over contiguous D
    start       (B, H, N)     float32
    iterations  at least 1
    key_bias    (B, N)        float32, or None
    returns     (B, H, N)     float32; its sum over N is that of start

    Raises TypeError and ValueError for what does not fit. No gradient. Reference: reference/propagate.py.
    Wang, Dedhia and Jha, Zero-TPrune, arXiv:2305.17328.
    """
    check_rows_of("propagate", "q", q, FLOATS, 4)
    if k.shape != q.shape or k.dtype != q.dtype:
        raise ValueError(f"propagate: q {q.dtype} {tuple(q.shape)} and k {k.dtype} {tuple(k.shape)} differ")
    check_rows_of("propagate", "start", start, (torch.float32,), 3)
    if start.shape != q.shape[:3]:
        raise ValueError(f"propagate: start {tuple(start.shape)} must be (B, H, N) = {tuple(q.shape[:3])}")
    if iterations < 1:
        raise ValueError(f"propagate: iterations={iterations}; use 1 or more")
    if key_bias is not None:
        check_rows_of("propagate", "key_bias", key_bias, (torch.float32,))
        if key_bias.shape != (q.shape[0], q.shape[2]):
            raise ValueError(f"propagate: key_bias {tuple(key_bias.shape)} must be {(q.shape[0], q.shape[2])}")
    return _op(q, k, start, softmax_scale, iterations, key_bias)
