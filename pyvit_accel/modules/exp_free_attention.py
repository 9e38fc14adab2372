"""ExpFreeAttention: F.scaled_dot_product_attention without an exponential, floats in and out, with a gradient.

    q  int8, a scale per token and head
    k  the same, less its mean over the tokens: q mean is one number per query, which no softmax sees, whatever is
       masked. SageAttention, arXiv:2410.02367, 4.2. On DeiT-Ti and ViT-Ti the error is the same without; keys that
       share a large part need it
    v  int8, a scale per image, head and channel
    P  in a format of formats/softmax.py

    y = P v,  P = softmax(q k^T scale + mask) in its format                      reference/quant_attention.py

The gradient is that of softmax attention at the rounded values, rounding taken as the identity: with o = dy . y per row

    dv = P^T dy    dS = P (dy v^T - o)    dq = dS k scale    dk = dS^T q scale    dmask = dS
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit_accel import ops
from pyvit_accel.formats import affine
from pyvit_accel.formats.softmax import DEFAULT_SOFTMAX, SoftmaxFormat, from_description

from .parts import AttentionParts
from .position import Position
from .quant_attention import NORMS
from .softmax_holder import SoftmaxHolder

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Operands(NamedTuple):
    """Codes (B, H, N, W), W = max(D, Dv), the narrower padded with zeros; k and v may have fewer heads.

    q_scale, k_scale (B, H, N), v_scale (B, H, 1, Dv)
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor


class _Added(NamedTuple):
    """To the scores: bias broadcastable to (B, H, Nq, Nk), and h and w as grid_bias of ops.quant_attention; float32."""

    bias: Tensor | None = None
    h: Tensor | None = None
    w: Tensor | None = None


def _per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, N, D) to codes, laid out as x is, and scale (B, H, N)."""
    heads_inside = x.stride(1) < x.stride(2)  # as projections leave them: rows are read in the order they lie in
    x = x.transpose(1, 2) if heads_inside else x
    codes, scale = ops.quantize(x.float())  # first, so that views of half precision are copied once
    scale = scale.view(x.shape[:-1])
    return (codes.transpose(1, 2), scale.transpose(1, 2)) if heads_inside else (codes, scale)


def _per_channel(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, N, D) to codes and scale (B, H, 1, D): one static quantization of rows (N, B H D)."""
    B, H, N, D = x.shape
    rows = x.permute(2, 0, 1, 3).to(torch.float32, memory_format=torch.contiguous_format).reshape(N, B * H * D)
    scale = affine.scale_of(rows.abs().amax(dim=0))
    codes, _ = ops.quantize(rows, scale)
    return codes.view(N, B, H, D).permute(1, 2, 0, 3), scale.view(B, H, 1, D)


def _quantize(query: Tensor, key: Tensor, value: Tensor) -> _Operands:
    W = max(query.shape[-1], value.shape[-1])
    q, q_scale = _per_token(query)
    k, k_scale = _per_token(key - key.mean(dim=2, keepdim=True, dtype=torch.float32))
    v, v_scale = _per_channel(value)
    q, k, v = (F.pad(t, (0, W - t.shape[-1])) if t.shape[-1] < W else t for t in (q, k, v))
    return _Operands(q, k, v, q_scale, k_scale, v_scale)


def _attend(o: _Operands, v: Tensor, added: _Added, scale: float, softmax: SoftmaxFormat) -> Tensor:
    """P v of codes v (B, H, Nk, W), float32 (B, H, Nq, W), a view of (B, Nq, H, W)."""
    (B, H, Nq, W), G = o.q.shape, o.q.shape[1] // o.k.shape[1]
    k, k_scale, v = (t if G == 1 else t.repeat_interleave(G, dim=1) for t in (o.k, o.k_scale, v))
    one = torch.ones(1, device=v.device)
    grid = None if added.h is None else (added.h, added.w)
    scales = o.q_scale, k_scale, one
    out = ops.quant_attention(o.q, k, v, *scales, scale, softmax=softmax, bias=added.bias, grid_bias=grid)
    return out.view(B, Nq, H, W).transpose(1, 2)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, added: _Added, scale: float, softmax: SoftmaxFormat
) -> tuple[Tensor, _Operands]:
    """float32 (B, H, Nq, Dv), and what it was computed from."""
    o = _quantize(query, key, value)
    v_scale = o.v_scale.repeat_interleave(o.q.shape[1] // o.v.shape[1], dim=1)
    return _attend(o, o.v, added, scale, softmax)[..., : value.shape[-1]].mul_(v_scale), o


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, scale: float, softmax: SoftmaxFormat, *added: Tensor | None
    ) -> Tensor:
        y, operands = _forward(query, key, value, _Added(*added), scale, softmax)
        ctx.save_for_backward(y, *operands, *added)
        ctx.scale, ctx.softmax, ctx.dtype, ctx.D = scale, softmax, query.dtype, query.shape[-1]
        return y.to(query.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("exp_free_attention: its gradient has no derivative; leave create_graph out")
        y, *operands = ctx.saved_tensors
        o, added = _Operands(*operands[:6]), _Added(*operands[6:])
        asked = zip(added, ctx.needs_input_grad[-3:], strict=True)
        slopes = _Added(*(torch.zeros_like(t) if asks else None for t, asks in asked))
        heads = _gradients(o, added, ctx.scale, ctx.softmax, y, dy.float(), ctx.D, slopes)
        return *(t.to(ctx.dtype) for t in heads), None, None, *slopes


def _gradients(
    o: _Operands, added: _Added, scale: float, softmax: SoftmaxFormat, y: Tensor, dy: Tensor, D: int, slopes: _Added
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, float32; adds to slopes. W keys at a time, so nothing of Nq x Nk is held.

    P is what the forward multiplied, to a rounding: its own kernel gives the columns of W keys when v are rows of the
    identity.
    """
    W, Hk, Nk, Dv = o.q.shape[-1], *o.k.shape[1:3], y.shape[-1]
    G = o.q.shape[1] // Hk
    q = o.q[..., :D] * (o.q_scale * scale)[..., None]
    k = (o.k[..., :D] * (o.k_scale * scale)[..., None]).repeat_interleave(G, dim=1)
    v = (o.v[..., :Dv] * o.v_scale).repeat_interleave(G, dim=1)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    row = (dy * y).sum(dim=-1, keepdim=True)
    identity = F.pad(torch.eye(W, dtype=torch.int8, device=q.device), (0, 0, Nk, Nk))
    for start in range(0, Nk, W):
        keys = slice(start, min(start + W, Nk))
        columns = identity[Nk - start : 2 * Nk - start].expand(*o.v.shape[:2], Nk, W)
        p = _attend(o, columns, added, scale, softmax)[..., : keys.stop - start]
        dv[:, :, keys] = p.mT @ dy
        ds = p * (dy @ v[:, :, keys].mT - row)
        dq += ds @ k[:, :, keys]
        dk[:, :, keys] = ds.mT @ q
        _add(slopes, added, ds, torch.arange(start, keys.stop, device=q.device))
    return dq, *(t.unflatten(1, (Hk, G)).sum(dim=2) for t in (dk, dv))


def _add(slopes: _Added, added: _Added, ds: Tensor, keys: Tensor) -> None:
    """ds (B, H, Nq, n), of these keys, to the gradients of what was added to their scores."""
    columns = 1 if added.w is None else added.w.shape[-1]
    for t, at in zip(slopes, (keys, keys // columns, keys % columns), strict=True):
        if t is not None:  # modulo: a bias that is one for all keys
            t.index_add_(3, at % t.shape[-1], ds.sum_to_size(*t.shape[:-1], len(keys)))


def exp_free_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    softmax: SoftmaxFormat = DEFAULT_SOFTMAX,
    grid_bias: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """F.scaled_dot_product_attention(query, key, value, ...), its arguments and meaning.

    query       (..., H, Nq, D)    float32, float16 or bfloat16; any strides
    key, value  (..., H, Nk, D | Dv)  the same dtype and leading dimensions
    attn_mask   broadcastable to (..., H, Nq, Nk): bool, False is a key that is not seen, or float, added to the scores
    dropout_p   0.0: probabilities are never formed, so none can be dropped
    is_causal   a query sees the keys up to its own number; makes a mask (Nq, Nk)
    scale       of the scores; None: D^-0.5
    enable_gqa  key and value may have fewer heads, each for H / Hk heads of the query in turn
    softmax     the format of the probabilities, on the device of query
    grid_bias   (..., H, Nq, Kh), (..., H, Nq, Kw)  broadcastable, added to the scores as ops.quant_attention does
    returns     (..., H, Nq, Dv), the dtype of query, a view of (..., Nq, H, Dv): the transposition before a projection
                copies nothing

    With 3, 2, 1, 0 bits of linear mantissa the result is off by 0.033, 0.050, 0.089, 0.17 of its size for normal random
    q, k and v (197 tokens, D = 64).

    A query that sees no key gives zeros, where float attention gives NaN. The padding of masked keys enters the mean
    that k is relieved of and the scales of v: keep it no larger than the rest.

    Raises TypeError for other or mixed dtypes, ValueError for shapes that do not fit, a mask beside is_causal, dropout.
    """
    H, Hk = _check(query, key, value, enable_gqa)
    if dropout_p:
        raise ValueError(f"exp_free_attention: dropout_p={dropout_p}: no probabilities are formed to drop; pass 0.0")
    (Nq, D), (Nk, Dv), leading = query.shape[-2:], value.shape[-2:], query.shape[:-3]
    if is_causal:
        if attn_mask is not None:
            raise ValueError("exp_free_attention: is_causal=True came with an attn_mask; pass one mask of both")
        attn_mask = torch.ones(Nq, Nk, dtype=torch.bool, device=query.device).tril()
    added = _Added(
        None if attn_mask is None else _bias("attn_mask", attn_mask, (*leading, H, Nq, Nk)),
        *(() if grid_bias is None else (_bias("grid_bias", t, (*leading, H, Nq, t.shape[-1])) for t in grid_bias)),
    )
    if 0 in (query.numel(), key.numel(), value.numel()):
        nothing = sum(t[..., :0].sum() for t in (query, key, value))  # which has their gradients
        return query.new_zeros(*query.shape[:-1], Dv) + nothing
    B, scale = prod(leading), D**-0.5 if scale is None else float(scale)
    softmax = softmax if softmax.values.device == query.device else softmax.to(query.device)
    q, k, v = query.reshape(B, H, Nq, D), key.reshape(B, Hk, Nk, D), value.reshape(B, Hk, Nk, Dv)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, *added)):
        y = _StraightThrough.apply(q, k, v, scale, softmax, *added)
    else:
        y = _forward(q, k, v, added, scale, softmax)[0].to(query.dtype)
    return y.reshape(*query.shape[:-1], Dv)


def _check(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, int]:
    """Heads of the query and of key and value."""
    given = query, key, value
    if query.dtype not in DTYPES or any(t.dtype != query.dtype for t in given):
        dtypes = ", ".join(str(t.dtype) for t in given)
        raise TypeError(f"exp_free_attention: query, key, value are {dtypes}; use float32, float16 or bfloat16 for all")
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in zip(("query", "key", "value"), given, strict=True))
    if query.dim() < 2 or any(t.dim() != query.dim() for t in given):
        raise ValueError(f"exp_free_attention: {shapes} must all be (..., H, N, D)")
    H, Hk = (t.shape[-3] if t.dim() > 2 else 1 for t in (query, key))
    fit = all(t.shape[:-3] == query.shape[:-3] for t in given) and key.shape[:-1] == value.shape[:-1]
    if not fit or query.shape[-1] != key.shape[-1] or (Hk == 0 and H) or (Hk and H % Hk):
        raise ValueError(f"exp_free_attention: {shapes} do not fit together")
    if not (enable_gqa or Hk == H):
        raise ValueError(f"exp_free_attention: {H} heads of the query, {Hk} of the key; pass enable_gqa=True")
    return H, Hk


def _bias(name: str, t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What is added to the scores, float32, broadcastable to (B, H, Nq, n); shape (..., H, Nq, n)."""
    try:
        t.expand(shape)
    except RuntimeError:
        came = tuple(t.shape)
        raise ValueError(f"exp_free_attention: {name} {came} does not broadcast to {shape}") from None
    t = _additive(t) if t.dtype == torch.bool else t
    t = t[(None,) * (max(len(shape), 3) - t.dim())]
    if any(n > 1 for n in t.shape[:-3]):
        t = t.expand(*shape[:-3], *t.shape[-3:])
    return t.reshape(prod(t.shape[:-3]), *t.shape[-3:]).float()


def _additive(mask: Tensor) -> Tensor:
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)


class ExpFreeAttention(SoftmaxHolder):
    """exp_free_attention with its format: called as F.scaled_dot_product_attention is, and moved as modules are."""

    def __init__(self, softmax: SoftmaxFormat = DEFAULT_SOFTMAX) -> None:
        super().__init__()
        self.softmax = softmax

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        grid_bias: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As exp_free_attention."""
        given = query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        return exp_free_attention(*given, softmax=self.softmax, grid_bias=grid_bias)

    def config(self) -> dict:
        return {"softmax": self.softmax.describe()}

    @classmethod
    def from_config(cls, config: dict) -> ExpFreeAttention:
        return cls(from_description(config["softmax"]))

    def extra_repr(self) -> str:
        return f"softmax={self.softmax.label}"


class ExpFreeSelfAttention(nn.Module):
    """Multi-head self-attention in floats, but for its softmax and the two matmuls beside that.

    x is (B, N, C) or, a grid of tokens, (B, h, w, C).

    Its Linears and norms hold the parameters of those it was made of, which can be trained, or replaced in turn. Their
    names are those of timm, where the projection is a fused one: state dicts fit each other.
    """

    def __init__(self, parts: AttentionParts, softmax: SoftmaxFormat = DEFAULT_SOFTMAX) -> None:
        super().__init__()
        names = ("qkv",) if len(parts.qkv) == 1 else ("q_proj", "k_proj", "v_proj")
        for name, linear in zip(names, parts.qkv, strict=True):
            setattr(self, name, _plain(linear))
        self.proj, self.q_norm, self.k_norm = _plain(parts.proj), parts.q_norm, parts.k_norm
        self.num_heads, self.scale, self.attention = parts.num_heads, parts.scale, ExpFreeAttention(softmax)
        self.position: Position | None = None
        if parts.has_position:
            tensors = parts.bias, *(parts.tables or (None, None)), parts.gain
            bias, *tables, gain = (None if t is None else t.detach().float().clone() for t in tensors)
            self.position = Position(bias, None if parts.tables is None else tables, gain, parts.rotary)

    @property
    def _fused(self) -> bool:
        return "qkv" in self._modules

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, rotary: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """attn_mask as in F.scaled_dot_product_attention: bool, True is seen, or float, added; (B | 1, H | 1, N, N).

        rotary: cos and sin, as in Position.heads.
        """
        shape, x = x.shape, x.flatten(1, -2)
        qkv = self.qkv(x).chunk(3, dim=-1) if self._fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in qkv)
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        grid_bias = None
        if self.position is not None:
            if self.position.table_h is not None:
                grid_bias = self.position.grid_bias(q.to(self.position.table_h.dtype), shape[1:-1])
            q, k = (t.to(v.dtype) for t in self.position.heads(q, k, rotary))
            boolean = attn_mask is not None and attn_mask.dtype == torch.bool
            attn_mask = self.position.add_bias(_additive(attn_mask) if boolean else attn_mask)
        y = self.attention(q, k, v, attn_mask, scale=self.scale, grid_bias=grid_bias)
        return self.proj(y.transpose(1, 2).flatten(2)).view(shape)

    def config(self) -> dict:
        linears = [self.qkv] if self._fused else [self.q_proj, self.k_proj, self.v_proj]
        norms = {name: getattr(self, name) for name in NORMS}
        return {
            "dim": self.proj.in_features,
            "num_heads": self.num_heads,
            "scale": self.scale,
            "qkv_bias": [linear.bias is not None for linear in linears],
            "proj_bias": self.proj.bias is not None,
            **{name: None if norm is None else norm.eps for name, norm in norms.items()},
            "rms_norms": [name for name, norm in norms.items() if isinstance(norm, nn.RMSNorm)],
            "position": None if self.position is None else self.position.config(),
            **self.attention.config(),
        }

    @classmethod
    def from_config(cls, config: dict) -> ExpFreeSelfAttention:
        C, H, biases, norms = config["dim"], config["num_heads"], config["qkv_bias"], []
        for name in NORMS:
            kind = nn.RMSNorm if name in config["rms_norms"] else nn.LayerNorm
            norms.append(None if config[name] is None else kind(C // H, config[name]))
        qkv = tuple(nn.Linear(C, 3 * C // len(biases), bias=bias) for bias in biases)
        parts = AttentionParts(qkv, nn.Linear(C, C, bias=config["proj_bias"]), H, config["scale"], *norms)
        new = cls(parts, from_description(config["softmax"]))
        if config["position"] is not None:
            new.position = Position.from_config(config["position"])
        return new

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


def _plain(linear: nn.Linear) -> nn.Linear:
    """The same parameters in an nn.Linear itself, which rules for that class take."""
    new = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    new.weight, new.bias = linear.weight, linear.bias
    return new.train(linear.training)
