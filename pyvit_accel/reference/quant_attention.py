"""softmax(q k^T * scales + bias) v on integer codes, P as bytes relative to each row's maximum.

    S = (q k^T) * (q_scale softmax_scale k_scale) + bias + key_bias          q k^T exact, then float32
    p = 2^((S - max S) log2 e),  f = rint(p 65280),  f' = rint(p (v_scale / v_max) 65280)        16 bits: 255 * 256
    c_j = (f'_j + r_j) >> 8,  r_{j + 16} = (f'_j + r_j) & 255,  r_0 .. r_15 = 128                      8 bits
    out = (sum_j c_j v_j) (v_max / (sum_j f_j / 256)),  v_max = max_j v_scale_j

What the byte c_j drops goes to the key 16 further on (error diffusion), so the bytes of a long tail of small
probabilities, each below half a step, still add up to their share. Plain rounding loses them: with it the squared logit
error of W8A8 is a third to a half larger (DeiT-Ti, ViT-Ti). v_max is taken over all keys, masked ones too. A row whose
keys are all masked (-inf) gives zeros.

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
import torch.nn.functional as F
from torch import Tensor

from pyvit_accel.formats import affine

from .scalar import LOG2_E, exp2

STEP = 16  # keys between the one that drops a remainder and the one that takes it: the lanes of a vector


def diffuse(f: Tensor) -> Tensor:
    """16-bit codes (..., Nk) to bytes, both as float64."""
    wide = F.pad(f, (0, -f.shape[-1] % STEP)).unflatten(-1, (-1, STEP))
    upto = wide.cumsum(dim=-2) + 128  # of a lane: what its keys so far should have added up to, 256 times
    taken = torch.floor(upto / 256)
    return taken.diff(dim=-2, prepend=torch.zeros_like(taken[..., :1, :])).flatten(-2)[..., : f.shape[-1]]


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
    p = exp2(((s - top.masked_fill(masked, 0)) * LOG2_E).clamp_min(-100))
    v_max = v_scale.amax(dim=-1)
    ratio = v_scale / v_max.clamp_min(affine.MIN_SCALE)[..., None]
    total = torch.round(p * 65280).masked_fill(masked, 0).double().sum(dim=-1).float()
    weighted = diffuse(torch.round(p * ratio[:, :, None] * 65280).masked_fill(masked, 0).double())
    scale = torch.where(total > 0, v_max[..., None] / (total / 256), 0.0)
    out = (weighted @ v.double()).float() * scale[..., None]
    out = out.transpose(1, 2).reshape(B, Nq, H * D)
    return out if out_scale is None else affine.quantize(out, out_scale)
