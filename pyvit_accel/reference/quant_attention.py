"""softmax(q k^T scale + bias) v on integer codes, P in a format of formats/softmax.py or as bytes of the maximum.

With p_values, in steps of which an octave has p_steps (1 when there are thresholds):

    a = (q_scale C) k_scale,  C = softmax_scale log2(e) steps
    t = (q k^T) a + clip(b log2(e) steps, -16320, 16320)                                   q k^T exact, then float32
    b = bias + (grid_bias_h + grid_bias_w) + key_bias, those there are, in this order
    lse = max t + steps log2(sum_j e_j / 65280),  e_j = rint(65280 2^((t_j - max t) / steps))
    k = rint(anchor - t + p_shift)         anchor is max t, where p_shift is 0, or lse
        #(p_thresholds > t - anchor)       where there are thresholds
    P = p_values[k] + p_offset             0 for k >= L, and for a key that is not seen
    out = (P v) (v_scale / sum_j P),  or (P v) (v_scale p_unit) when not normalised

Integer P on int8 v of one scale a head: P = 256 P1 + P0, the products of both with v are exact, out = (P1 v) (256 s) +
(P0 v) s in float32. Everything else is summed in float64 here, in float32 by kernels.

Without p_values:

    S = (q k^T) (q_scale softmax_scale k_scale) + bias + (grid_bias_h + grid_bias_w) + key_bias
    p = 2^((S - max S) log2 e),  f = rint(p 65280),  f' = rint(p (v_scale / v_max) 65280)        16 bits: 255 * 256
    c_j = (f'_j + r_j) >> 8,  r_{j + 16} = (f'_j + r_j) & 255,  r_0 .. r_15 = 128                      8 bits
    out = (sum_j c_j v_j) (v_max / (sum_j f_j / 256)),  v_max = max_j v_scale_j

What the byte c_j drops goes to the key 16 further on (error diffusion), so the bytes of a long tail of small
probabilities, each below half a step, still add up to their share. Plain rounding loses them: with it the squared logit
error of W8A8 is a third to a half larger (DeiT-Ti, ViT-Ti). v_max is taken over all keys, masked ones too.

A row that sees no key gives zeros, as do those beyond the last packed sequence. Arguments: ops/quant_attention.py.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit_accel.formats import affine

from .scalar import LOG2_E, exp2, log2

STEP = 16  # keys between the one that drops a remainder and the one that takes it: the lanes of a vector
LIMIT = 16320  # of biases in steps: a finite one hides no key, however large, if all have it
FULL = 65280  # the 16-bit code of p = 1
LN2 = 0.693147180559945


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
    grid_bias_h: Tensor | None,
    grid_bias_w: Tensor | None,
    out_scale: Tensor | None,
    p_values: Tensor | None,
    p_thresholds: Tensor | None,
    p_steps: float,
    p_shift: float,
    p_unit: float,
    p_offset: float,
    p_operand: str,
    p_anchor: str,
    p_normalize: bool,
    v_bits: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen: int,
    emit_cls: bool,
    emit_lse: bool,
    emit_columns: bool,
    q_index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if q_index is not None:
        rows = q_index.long()[:, None].expand(-1, q.shape[1], -1)
        q, q_scale = q.gather(2, rows[..., None].expand(*rows.shape, q.shape[3])), q_scale.gather(2, rows)
    wanted = (True, emit_cls, emit_lse, emit_columns)
    form = (p_values, p_thresholds, p_steps, p_shift, p_unit, p_offset, p_anchor, p_normalize)

    def attend(rows: slice, keys: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scales = (q_scale[..., rows], k_scale[..., keys], v_scale if v_scale.shape[2] == 1 else v_scale[..., keys])
        biases = [] if bias is None else [bias]
        if grid_bias_h is not None:
            biases.append((grid_bias_h[..., :, None] + grid_bias_w[..., None, :]).flatten(3))
        if key_bias is not None:
            biases.append(key_bias[:, None, None, keys])
        return _attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], *scales, softmax_scale, biases, *form)

    if cu_seqlens_q is None:
        parts = [attend(slice(None), slice(None))]
    else:
        q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        pairs = zip(pairwise(q_ends), pairwise(k_ends), strict=True)
        parts = [attend(slice(*rows), slice(*keys)) for rows, keys in pairs]
        if q_ends[-1] < q.shape[2] or k_ends[-1] < k.shape[2]:
            parts.append(_no_keys(q[:, :, q_ends[-1] :], k.shape[2] - k_ends[-1]))
    out, cls, lse, columns = (
        torch.cat([part[i] for part in parts], dim=dim) if wanted[i] else _not_wanted(q)
        for i, dim in enumerate((1, 1, 2, 2))
    )
    return out if out_scale is None else affine.quantize(out, out_scale), cls, lse, columns


def _not_wanted(q: Tensor) -> Tensor:
    return q.new_empty(0, dtype=torch.float32)


def _no_keys(q: Tensor, Nk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of queries that see none of Nk keys."""
    B, H, Nq, D = q.shape
    empty = q.new_zeros(B, Nq, H * D, dtype=torch.float32)
    return empty, empty.new_zeros(B, Nk), empty.new_full((B, H, Nq), -torch.inf), empty.new_zeros(B, H, Nk)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor, softmax_scale: float,
    biases: list[Tensor], p_values: Tensor | None, *form,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(B, Nq, H D), CLS row (B, Nk), log-sum-exp (B, H, Nq), column sums (B, H, Nk), all float32."""
    B, H, Nq, D = q.shape
    Nk = k.shape[2]
    if Nk == 0:
        return _no_keys(q, 0)
    s = (q.double() @ k.double().mT).float()
    if p_values is None:
        octave = 1 / LOG2_E
        t = s * ((q_scale * softmax_scale)[..., None] * k_scale[:, :, None])
        for bias in biases:
            t = t + bias
    else:
        p_thresholds, p_steps = form[:2]
        octave = p_steps if p_thresholds is None else 1.0
        c = torch.tensor(softmax_scale * LOG2_E * octave, dtype=torch.float32)
        t = s * ((q_scale * c)[..., None] * k_scale[:, :, None])
        if biases:
            offset = biases[0]
            for bias in biases[1:]:
                offset = offset + bias
            b = offset * torch.tensor(LOG2_E * octave, dtype=torch.float32)
            t = t + b.clamp(-LIMIT, LIMIT).masked_fill(offset == -torch.inf, -torch.inf)
    top = t.amax(dim=-1, keepdim=True)
    none = top == -torch.inf
    inverse = torch.tensor(1 / octave, dtype=torch.float32)
    p = exp2(((t - top.masked_fill(none, 0)) * inverse).clamp_min(-100))
    f = torch.round(p * FULL).masked_fill(none, 0).double()
    if p_values is None:
        weights, lse, out = _bytes(p, f, none, v, v_scale)
        lse = lse + top[..., 0]
    else:
        weights, lse, out = _coded(t, top, f, v, v_scale, octave, p_values, *form)
    exact = p[:, :, :1].double().masked_fill(t[:, :, :1] == -torch.inf, 0)
    cls = (exact / exact.sum(dim=-1, keepdim=True).clamp_min(1e-30)).mean(dim=1).sum(dim=1)
    return out.transpose(1, 2).reshape(B, Nq, H * D), cls.float(), lse.float(), weights.sum(dim=2).float()


def _bytes(p: Tensor, f: Tensor, none: Tensor, v: Tensor, v_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (B, H, Nq, Nk), log-sum-exp less the maximum, and (B, H, Nq, D)."""
    v_max = v_scale.amax(dim=-1)
    ratio = v_scale / v_max.clamp_min(affine.MIN_SCALE)[..., None]
    total = f.sum(dim=-1).float()
    weighted = diffuse(torch.round(p * ratio[:, :, None] * FULL).masked_fill(none, 0).double())
    scale = torch.where(total > 0, v_max[..., None] / (total / 256), 0.0)
    out = (weighted @ v.double()).float() * scale[..., None]
    return f / total.clamp_min(1)[..., None], (total / FULL).log(), out


def diffuse(f: Tensor) -> Tensor:
    """16-bit codes (..., Nk) to bytes, both as float64."""
    wide = F.pad(f, (0, -f.shape[-1] % STEP)).unflatten(-1, (-1, STEP))
    upto = wide.cumsum(dim=-2) + 128  # of a lane: what its keys so far should have added up to, 256 times
    taken = torch.floor(upto / 256)
    return taken.diff(dim=-2, prepend=torch.zeros_like(taken[..., :1, :])).flatten(-2)[..., : f.shape[-1]]


def _coded(
    t: Tensor, top: Tensor, f: Tensor, v: Tensor, v_scale: Tensor, octave: float, p_values: Tensor,
    p_thresholds: Tensor | None, p_steps: float, p_shift: float, p_unit: float, p_offset: float, p_anchor: str,
    p_normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Weights (B, H, Nq, Nk), log-sum-exp, and (B, H, Nq, D)."""
    anchor = top
    if p_anchor == "lse":
        share = f.sum(dim=-1, keepdim=True).float() * torch.tensor(1 / FULL, dtype=torch.float32)
        anchor = top + log2(share.clamp_min(1)) * octave
    k = codes(t, anchor, p_thresholds, p_shift, p_values.numel())
    table = F.pad((p_values + p_offset).double(), (0, 1))
    values = table[k]
    total = values.sum(dim=-1, keepdim=True)
    weights = values / total.masked_fill(total <= 0, torch.inf) if p_normalize else values * p_unit
    if p_normalize:
        scale = torch.where(total > 0, v_scale.amax(dim=-1)[..., None, None] / total.float(), 0.0)
    else:
        scale = (v_scale.amax(dim=-1)[..., None, None] * p_unit).expand_as(total)
    if v.dtype == torch.int8 and v_scale.shape[2] == 1 and not p_values.is_floating_point():
        high = torch.floor(values / 256)
        low = values - 256 * high
        out = (high @ v.double()).float() * (scale * 256) + (low @ v.double()).float() * scale
    else:
        out = (weights @ (v.double() * v_scale.double()[..., None])).float()
    octaves = anchor[..., 0].double() / octave
    lse = octaves + (total[..., 0] * p_unit).log2() if p_anchor == "max" else octaves
    return weights, lse * LN2, out


def codes(t: Tensor, anchor: Tensor, p_thresholds: Tensor | None, p_shift: float, L: int) -> Tensor:
    """k = 0 .. L, int64; unseen keys are L."""
    unseen = t == -torch.inf
    t, anchor = t.masked_fill(unseen, 0), anchor.masked_fill(anchor == -torch.inf, 0)
    if p_thresholds is not None:
        k = torch.bucketize(-(t - anchor).contiguous(), -p_thresholds, right=False)
    else:
        k = torch.round(anchor - t + torch.tensor(p_shift, dtype=torch.float32))
    return k.clamp(0, L).long().masked_fill(unseen, L)
