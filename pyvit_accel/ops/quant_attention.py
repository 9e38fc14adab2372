"""quant_attention: attention on int8 q and k, probabilities without an exponential, no N x N tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel import reference
from pyvit_accel.formats.softmax import SoftmaxFormat

from ._library import check_vector, define

MAX_KEYS = 65536  # of 255 * 128 each, the largest sum of products that is an int32
EMITS = ("cls", "lse", "columns")
FLOATS = (torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32)


def _fake(q, k, v, *rest):
    B, H, Nq, D = q.shape
    Nk = k.shape[2]
    emit_cls, emit_lse, emit_columns, *index = rest[22:]
    Nq = Nq if not index or index[0] is None else index[0].shape[1]
    none = q.new_empty(0, dtype=torch.float32)
    return (
        q.new_empty(B, Nq, H * D, dtype=torch.float32 if rest[8] is None else torch.int8),
        q.new_empty(B, Nk, dtype=torch.float32) if emit_cls else none,
        q.new_empty(B, H, Nq, dtype=torch.float32) if emit_lse else none.clone(),
        q.new_empty(B, H, Nk, dtype=torch.float32) if emit_columns else none.clone(),
    )


_op = define(
    "quant_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor q_scale, Tensor k_scale, Tensor v_scale, float softmax_scale, Tensor? bias, "
    "Tensor? key_bias, Tensor? grid_bias_h, Tensor? grid_bias_w, "
    "Tensor? out_scale, Tensor? p_values, Tensor? p_thresholds, float p_steps, float p_shift, "
    "float p_unit, float p_offset, str p_operand, str p_anchor, bool p_normalize, int v_bits, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, int max_seqlen, bool emit_cls, bool emit_lse, bool emit_columns, "
    "Tensor? q_index=None) -> (Tensor, Tensor, Tensor, Tensor)",
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
    softmax: SoftmaxFormat | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    grid_bias: tuple[Tensor, Tensor] | None = None,
    out_scale: Tensor | None = None,
    v_bits: int = 8,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    q_index: Tensor | None = None,
    emit: tuple[str, ...] = (),
) -> Tensor | tuple[Tensor, ...]:
    """softmax(q k^T q_scale k_scale softmax_scale + bias + key_bias) v v_scale.

    q                 (B, H, Nq, D)     int8; k (B, H, Nk, D) int8. Any strides over contiguous D, so views of qkv fit
    v                 (B, H, Nk, D)     int8; with a `softmax` format also float8_e4m3fn, float16, bfloat16, float32
    q_scale, k_scale, v_scale           float32, broadcastable to (B, H, N): (1,), (H, 1) or (B, H, N)
    softmax           the format of the probabilities, of formats/softmax.py; None: diffused bytes, with an exponential
    bias              broadcastable to (B, H, Nq, Nk), float, added to the scaled scores
    mask              the same shape, bool, False: this key is not seen. A query that sees none gives zeros
    key_bias          (B | 1, Nk)       float, added for every query: the log of a merged token's size
    grid_bias         (B, H, Nq, Kh), (B, H, Nq, Kw)  broadcastable, float, Kh Kw = Nk: the key in row y and column x of
                                        its grid gets h[..., y] + w[..., x]; SAM's decomposed relative position
    out_scale         (1,) | (H D,)     float32; None: the result is float32
    v_bits            2 to 8            of int8 v: up to 4, tensor cores multiply it once instead of twice
    cu_seqlens        (S + 1,)          int32: q, k, v are S sequences one after the other, B is 1, sequence s is the
                                        tokens cu_seqlens[s] .. cu_seqlens[s + 1]; cu_seqlens_k: of k and v, if others.
                                        What lies beyond the last is capacity: not read, and zeros in the result
    max_seqlen        the most queries of a sequence; None: Nq. On a GPU blocks beyond it are not started
    q_index           (B, Nq)           int32: the rows of q and q_scale that attend, instead of all; checked on the CPU
                                        only. Nq elsewhere here is how many they are
    emit              of "cls", "lse", "columns": returned after the result, in this order
    returns           (B, Nq, H D)      float32, or int8 codes when out_scale is given
        cls           (B, Nk)           float32: mean over the heads of the first query's probabilities, not quantised
        lse           (B, H, Nq)        float32: log-sum-exp of the scores, of the values summed when there are some
        columns       (B, H, Nk)        float32: what each key got from all queries

    No gradient. Raises TypeError for wrong dtypes, ValueError for shapes that disagree, offsets that do not ascend
    (read on the CPU only) and more than 65536 keys. Reference: reference/quant_attention.py.
    """
    if not q.dtype == k.dtype == torch.int8 or v.dtype not in (torch.int8, *(FLOATS if softmax else ())):
        raise TypeError(f"quant_attention: q, k, v must be int8 codes, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"quant_attention: q {tuple(q.shape)} and k {tuple(k.shape)} must be (B, H, N, D)")
    B, H, rows, D = q.shape
    Nq, Nk = rows if q_index is None else q_index.shape[-1], k.shape[2]
    if k.shape != (B, H, Nk, D) or v.shape != k.shape:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"quant_attention: {shapes} do not fit together")
    if Nk > MAX_KEYS:
        raise ValueError(f"quant_attention: {Nk} keys; sums are exact for at most {MAX_KEYS}")
    if not 2 <= v_bits <= 8:
        raise ValueError(f"quant_attention: v_bits={v_bits}; codes have 2 to 8 bits")
    unknown = set(emit) - set(EMITS)
    if unknown:
        raise ValueError(f"quant_attention: emit {sorted(unknown)} is not of {', '.join(EMITS)}")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"quant_attention: mask must be bool, got {mask.dtype}; pass additive masks as bias")
        hidden = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
        bias = hidden if bias is None else bias + hidden
    check_vector("quant_attention", "out_scale", out_scale, 1, H * D)
    if q_index is not None and (q_index.dtype != torch.int32 or q_index.shape != (B, Nq) or cu_seqlens is not None):
        came = f"{q_index.dtype} {tuple(q_index.shape)}"
        raise ValueError(f"quant_attention: q_index must be int32 (B, Nq), without packed sequences; got {came}")
    if cu_seqlens is not None:
        cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        if B != 1 or bias is not None or grid_bias is not None:
            raise ValueError(f"quant_attention: packed sequences need B=1, no bias and no mask; got B={B}")
        _check_packed((cu_seqlens, Nq), (cu_seqlens_k, Nk))
    elif cu_seqlens_k is not None:
        raise ValueError("quant_attention: cu_seqlens_k came without cu_seqlens; pass both")
    if bias is not None:
        bias = _expand("bias or mask", bias.float(), B, H, Nq, Nk)
    if key_bias is not None:
        key_bias = _expand("key_bias", key_bias.float(), B, Nk)
    grid_h = grid_w = None
    if grid_bias is not None:
        Kh, Kw = (t.shape[-1] for t in grid_bias)
        if Kh * Kw != Nk:
            raise ValueError(f"quant_attention: grid_bias is of {Kh} x {Kw} keys, k has {Nk}")
        grid_h, grid_w = (_expand("grid_bias", t.float(), B, H, Nq, t.shape[-1]) for t in grid_bias)
    per_key = softmax is None or (v_scale.dim() > 0 and v_scale.shape[-1] != 1)
    results = _op(
        q, k, v, _expand("q_scale", q_scale, B, H, rows), _expand("k_scale", k_scale, B, H, Nk),
        _expand("v_scale", v_scale, B, H, Nk if per_key else 1), softmax_scale, bias, key_bias, grid_h, grid_w,
        out_scale, *((None, None, 0.0, 0.0, 1.0, 0.0, "", "max", True) if softmax is None else softmax.arguments()),
        v_bits, cu_seqlens, cu_seqlens_k, Nq if max_seqlen is None else max_seqlen,
        *(name in emit for name in EMITS), q_index,
    )  # fmt: skip
    wanted = [r for r, name in zip(results[1:], EMITS, strict=True) if name in emit]
    return (results[0], *wanted) if wanted else results[0]


def _check_packed(*pairs: tuple[Tensor, int]) -> None:
    """Of q and of k: where the sequences end, and how many tokens there are."""
    if pairs[0][0].shape != pairs[1][0].shape:
        shapes = " and ".join(str(tuple(ends.shape)) for ends, _ in pairs)
        raise ValueError(f"quant_attention: cu_seqlens and cu_seqlens_k have shapes {shapes}; they must be equal")
    for ends, tokens in pairs:
        if ends.dtype != torch.int32 or ends.dim() != 1 or ends.numel() < 2:
            raise TypeError(f"quant_attention: cu_seqlens must be int32 (S + 1,), got {ends.dtype} {tuple(ends.shape)}")
        if ends.device.type == "cpu":
            at = ends.tolist()
            if at[0] != 0 or at[-1] > tokens or sorted(at) != at:
                raise ValueError(f"quant_attention: cu_seqlens {at} must ascend from 0 to at most {tokens}")
