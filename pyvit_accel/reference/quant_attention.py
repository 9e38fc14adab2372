"""softmax(q k^T * scales + bias) v on integer codes, P as 15-bit integers relative to each row's maximum.

    S = (q k^T) * (q_scale softmax_scale k_scale) + bias + key_bias          q k^T exact, then float32
    p = 2^((S - max S) log2 e),  c = rint(p p_max),  p_max = min(32767, (2^31 - 1) / (128 Nk))
    out = (sum_j c'_j v_j) (v_max / sum_j c_j),  c' = rint(p (v_scale / v_max) p_max),  v_max = max_j v_scale_j

p_max is the largest for which no sum of codes leaves int32. v_max is taken over all keys, masked ones too. A
row whose keys are all masked (-inf) gives zeros.

q         (B, H, Nq, D)      int8
k, v      (B, H, Nk, D)      int8
q_scale   (B, H, Nq)         float32; k_scale, v_scale (B, H, Nk)
bias      (B, H, Nq, Nk)     float32 or None
key_bias  (B, Nk)            float32 or None
out_scale (1,) | (H D,)      float32 or None
returns   (B, Nq, H D)       float32, or int8 when out_scale is given
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel.formats import affine

from .scalar import LOG2_E, exp2


def largest_code(num_keys: int) -> int:
    return min(32767, (2**31 - 1) // (128 * max(num_keys, 1)))


def quant_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    softmax_scale: float,
    bias: Tensor | None,
    key_bias: Tensor | None,
    out_scale: Tensor | None,
) -> Tensor:
    B, H, Nq, D = q.shape
    Nk = k.shape[2]
    if Nk == 0:
        out = q.new_zeros(B, Nq, H * D, dtype=torch.float32)
        return out if out_scale is None else affine.quantize(out, out_scale)
    s = (q.double() @ k.double().mT).float() * ((q_scale * softmax_scale)[..., None] * k_scale[:, :, None])
    if bias is not None:
        s = s + bias
    if key_bias is not None:
        s = s + key_bias[:, None, None]
    top = s.amax(dim=-1, keepdim=True)
    masked = top == -torch.inf
    p_max = float(largest_code(Nk))
    p = exp2(((s - top.masked_fill(masked, 0)) * LOG2_E).clamp_min(-100))
    codes = torch.round(p * p_max).masked_fill(masked, 0)
    v_max = v_scale.amax(dim=-1)
    ratio = v_scale / v_max.clamp_min(affine.MIN_SCALE)[..., None]
    weighted = torch.round(p * ratio[:, :, None] * p_max).masked_fill(masked, 0)
    total = codes.double().sum(dim=-1).float()
    scale = torch.where(total > 0, v_max[..., None] / total, 0.0)
    out = (weighted.double() @ v.double()).float() * scale[..., None]
    out = out.transpose(1, 2).reshape(B, Nq, H * D)
    return out if out_scale is None else affine.quantize(out, out_scale)
