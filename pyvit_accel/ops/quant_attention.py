"""quant_attention: attention on int8 q, k, v; integer probabilities, no N x N tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel import reference

from ._library import check_vector, define

MAX_KEYS = 65536  # of 255 * 128 each, the largest sum of products that is an int32


def _fake(q, k, v, q_scale, k_scale, v_scale, softmax_scale, bias, key_bias, out_scale):
    B, H, N, D = q.shape
    return q.new_empty(B, N, H * D, dtype=torch.float32 if out_scale is None else torch.int8)


_op = define(
    "quant_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor q_scale, Tensor k_scale, Tensor v_scale, float softmax_scale, Tensor? bias, "
    "Tensor? key_bias, Tensor? out_scale) -> Tensor",
    reference.quant_attention,
    _fake,
)


def _expand(name: str, t: Tensor, *shape: int) -> Tensor:
    try:
        return t.expand(shape)
    except RuntimeError:
        raise ValueError(f"quant_attention: {name} {tuple(t.shape)} does not broadcast to {shape}") from None


def quant_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    softmax_scale: float,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T q_scale k_scale softmax_scale + bias + key_bias) v v_scale.

    q                 (B, H, Nq, D)     int8; k, v (B, H, Nk, D). Any strides over contiguous D, so views of qkv fit
    q_scale, k_scale, v_scale           float32, broadcastable to (B, H, N): (1,), (H, 1) or (B, H, N)
    bias              broadcastable to (B, H, Nq, Nk), float, added to the scaled scores
    mask              the same shape, bool, False: this key is not seen. A query that sees none gives zeros
    key_bias          (B | 1, Nk)       float, added for every query: the log of a merged token's size
    out_scale         (1,) | (H D,)     float32; None: the result is float32
    returns           (B, Nq, H D)      float32, or int8 codes when out_scale is given

    Probabilities are bytes relative to the row's maximum, each handing on what it dropped. No gradient. Raises
    TypeError when q, k, v are not int8, ValueError for shapes that disagree and for more than 65536 keys. Reference:
    reference/quant_attention.py.
    """
    if not q.dtype == k.dtype == v.dtype == torch.int8:
        raise TypeError(f"quant_attention: q, k, v must be int8 codes, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"quant_attention: q {tuple(q.shape)} and k {tuple(k.shape)} must be (B, H, N, D)")
    B, H, Nq, D = q.shape
    Nk = k.shape[2]
    if k.shape != (B, H, Nk, D) or v.shape != k.shape:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"quant_attention: {shapes} do not fit together")
    if Nk > MAX_KEYS:
        raise ValueError(f"quant_attention: {Nk} keys; sums are exact for at most {MAX_KEYS}")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"quant_attention: mask must be bool, got {mask.dtype}; pass additive masks as bias")
        hidden = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
        bias = hidden if bias is None else bias + hidden
    check_vector("quant_attention", "out_scale", out_scale, 1, H * D)
    if bias is not None:
        bias = _expand("bias or mask", bias.float(), B, H, Nq, Nk)
    if key_bias is not None:
        key_bias = _expand("key_bias", key_bias.float(), B, Nk)
    return _op(
        q,
        k,
        v,
        _expand("q_scale", q_scale, B, H, Nq),
        _expand("k_scale", k_scale, B, H, Nk),
        _expand("v_scale", v_scale, B, H, Nk),
        softmax_scale,
        bias,
        key_bias,
        out_scale,
    )
