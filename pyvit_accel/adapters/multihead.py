"""nn.MultiheadAttention, used as self-attention: query, key and value are the same tensor.

Its weights are not in an nn.Linear that is ever called: in_proj_weight is a bare parameter, out_proj is only read.
While a model is observed and converted, unpack_attention(model) puts a module with called Linears in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit_accel.adapters._common import Adapter, check_forward, read_attention, read_linear
from pyvit_accel.errors import Unsupported
from pyvit_accel.modules.parts import AttentionParts

MULTIHEAD = "torch.nn.modules.activation.MultiheadAttention"


class _InProjection(nn.Linear):
    """in_proj_weight as a Linear. A class of its own: rules for nn.Linear must not take what the `with` ends."""


def attention_parts(attention: nn.Module) -> AttentionParts:
    """The Linears share their parameters with `attention`; nothing is copied."""
    if isinstance(attention, UnpackedAttention):
        return attention.parts()
    check_forward(attention, (MULTIHEAD,))
    if attention.in_proj_weight is None:
        raise Unsupported(
            f"kdim={attention.kdim} and vdim={attention.vdim} differ from embed_dim={attention.embed_dim}"
        )
    if attention.bias_k is not None or attention.add_zero_attn:
        raise Unsupported("attention to extra keys (add_bias_kv or add_zero_attn)")
    C, bias = attention.embed_dim, attention.in_proj_bias
    qkv = _InProjection(C, 3 * C, bias=bias is not None, device="meta")
    qkv.weight = attention.in_proj_weight
    if bias is not None:
        qkv.bias = bias
    scale = attention.head_dim**-0.5
    return read_attention((qkv,), read_linear(attention.out_proj, "out_proj"), attention.num_heads, scale)


class _FloatAttention(nn.Module):
    """AttentionParts in plain PyTorch, every Linear called."""

    def __init__(self, parts: AttentionParts) -> None:
        super().__init__()
        self.qkv, self.proj = parts.qkv[0], parts.proj
        self.num_heads, self.scale = parts.num_heads, parts.scale

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask, scale=self.scale)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class _NoWeight(Tensor):
    """nn.TransformerEncoder reads the weights of its layers and leaves them alone where they are a tensor subclass."""


class MultiheadSelfAttention(nn.Module):
    """An accelerated module in the place of nn.MultiheadAttention: same arguments, returns (output, None).

    The attention weights are never formed. Asking for them by name, need_weights=True, raises ValueError; a call that
    leaves need_weights at its default gets None for them. Masks mean what they mean in nn.MultiheadAttention.
    """

    # What nn.TransformerEncoderLayer and nn.TransformerEncoder read before they call their own fused kernels, which
    # would go past this module: values with which they decide not to.
    _qkv_same_embed_dim = False
    in_proj_bias = None
    in_proj_weight = torch.empty(0).as_subclass(_NoWeight)
    out_proj = SimpleNamespace(weight=in_proj_weight, bias=None)

    def __init__(self, accelerated: nn.Module, original: nn.Module) -> None:
        super().__init__()
        self.accelerated = accelerated
        self.embed_dim, self.num_heads, self.head_dim = original.embed_dim, original.num_heads, original.head_dim
        self.batch_first = original.batch_first
        self.train(original.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        if query is not key or query is not value:
            raise ValueError(
                "MultiheadSelfAttention: query, key and value must be the same tensor; keep this layer in the recipe"
            )
        if need_weights:
            raise ValueError("MultiheadSelfAttention: attention weights are not formed; use need_weights=False")
        if is_causal and attn_mask is None:
            raise ValueError("MultiheadSelfAttention: is_causal=True came without attn_mask; pass the causal mask")
        x = query if query.ndim == 3 else query[None]
        swap = query.ndim == 3 and not self.batch_first
        x = x.transpose(0, 1) if swap else x
        x = self.accelerated(x, self._merge_masks(x, attn_mask, key_padding_mask))
        x = x.transpose(0, 1) if swap else x
        return (x if query.ndim == 3 else x[0]), None

    def _merge_masks(self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """Both masks as one for scaled_dot_product_attention, where True means look, not look away."""
        masks = []
        if attn_mask is not None:
            masks.append(attn_mask.unflatten(0, (-1, self.num_heads)) if attn_mask.ndim == 3 else attn_mask[None, None])
        if key_padding_mask is not None:
            masks.append(key_padding_mask.reshape(-1, 1, 1, x.shape[1]))
        if len(masks) == 2 and masks[0].dtype != masks[1].dtype:
            masks = [_additive(mask, x.dtype) for mask in masks]
        if not masks:
            return None
        if masks[0].dtype == torch.bool:
            return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
        return masks[0] if len(masks) == 1 else masks[0] + masks[1]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


class UnpackedAttention(MultiheadSelfAttention):
    """nn.MultiheadAttention in float, with Linears that are called and can therefore be observed.

    A call that an accelerated module could not serve runs the original and is remembered as the reason to keep it.
    """

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__(_FloatAttention(attention_parts(original)), original)
        self._original = (original,)  # in a tuple: not a child, its parameters are already here
        self.was_called = False
        self.reason_to_keep = ""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        if query is not key or query is not value:
            self.reason_to_keep = "called with a query, key and value that are not the same tensor"
        elif kwargs.get("need_weights") or (len(args) > 1 and args[1]):
            self.reason_to_keep = "the attention weights are asked for"
        else:
            self.was_called = True
            return super().forward(query, key, value, *args, **kwargs)
        return self._original[0](query, key, value, *args, **kwargs)

    def parts(self) -> AttentionParts:
        attention = self.accelerated
        return AttentionParts((attention.qkv,), attention.proj, attention.num_heads, attention.scale)


def self_attention_parts(attention: nn.Module) -> AttentionParts:
    """attention_parts of a module that was seen at work as self-attention; only its caller decides that it is."""
    parts = attention_parts(attention)
    if not isinstance(attention, UnpackedAttention):
        raise Unsupported("nn.MultiheadAttention may be cross-attention; observe it on calibration batches first")
    if attention.reason_to_keep:
        raise Unsupported(f"nn.MultiheadAttention: {attention.reason_to_keep}")
    if not attention.was_called:
        raise Unsupported("nn.MultiheadAttention was not reached by the calibration batches")
    return parts


@contextmanager
def unpack_attention(model: nn.Module) -> Iterator[nn.Module]:
    """Every nn.MultiheadAttention that attention_parts can read is an UnpackedAttention inside the `with`.

    Those that are still there at the end become again the very modules they were.
    """
    originals: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules()):
        if name and isinstance(module, nn.MultiheadAttention):
            try:
                unpacked = UnpackedAttention(module)
            except Unsupported:
                continue  # it stays as it is, and attention_parts will say why
            originals[unpacked] = module
            model.set_submodule(name, unpacked)
    try:
        yield model
    finally:
        for name, module in list(model.named_modules()):
            if module in originals:
                model.set_submodule(name, originals[module])


ATTENTIONS = {
    MULTIHEAD: Adapter(self_attention_parts, MultiheadSelfAttention),
    "pyvit_accel.adapters.multihead.UnpackedAttention": Adapter(self_attention_parts, MultiheadSelfAttention),
}
