"""TokenBlock: a float pre-norm block that can leave tokens out, and what it shares with QuantBlock: ReducingBlock."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .exp_free_attention import ExpFreeAttention
from .parts import BlockParts
from .token_step import Heads, Lists, TokenState, TokenStep

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class ReducingBlock(nn.Module):
    """A block in four parts, with a TokenStep between them.

    step      None: the block leaves the tokens as they are
    state     shared by the blocks of a model; None: nothing is reduced anywhere
    is_first  it starts the state; restores: it gives back all tokens there were
    """

    def __init__(self) -> None:
        super().__init__()
        self.reduce(None, None)

    def reduce(
        self, step: TokenStep | None, state: TokenState | None, is_first: bool = False, restores: bool = False
    ) -> None:
        self.step, self.state, self.is_first, self.restores = step, state, is_first, restores

    def step_for(self, x: Tensor) -> TokenStep | None:
        """The step, unless it would do nothing to x (B, N, C)."""
        idle = self.step is None or self.step.idle(x.shape[1], self.state.num_prefix_tokens)
        return None if idle else self.step

    def heads(self, x: Tensor) -> Heads:
        raise NotImplementedError

    def attend(self, heads: Heads, index: Tensor | None) -> Tensor:
        """The attention's output of all queries or those of index (B, K): (B, K, H D) float."""
        raise NotImplementedError

    def project(self, attended: Tensor, x: Tensor, index: Tensor | None, lists: Lists | None) -> Tensor:
        """x + layer_scale1 proj(attended), of the rows of x in index, or of the means of both by lists."""
        raise NotImplementedError

    def feed_forward(self, y: Tensor) -> Tensor:
        """y + layer_scale2 mlp(norm2(y))."""
        raise NotImplementedError

    def reduced(self, x: Tensor, tokens: int | None = None) -> Tensor:
        """(B, N, C) to (B, M, C). tokens: only the first ones are wanted.

        Of the prefix that is: no step after attention changes it, so there is none.
        """
        state, step = self.state, self.step_for(x)
        if self.is_first:
            state.start(x)
        if step is not None:
            x = step.before(x, state)
        heads = self.heads(x)
        if tokens is not None and not self.restores and (state is None or tokens <= state.num_prefix_tokens):
            index = _first(tokens, x)
            return self.feed_forward(self.project(self.attend(heads, index), x, index, None))
        index = lists = None
        if step is not None:
            index = step.prune(heads, x, state)
            lists = step.merge(heads, x, state) if index is None else None
        y = self.project(self.attend(heads, index), x, index, lists)
        y = self.feed_forward(y if step is None else step.settle(y, state))
        return (state.restore(y) if self.restores else y)[:, :tokens]


def _first(tokens: int, x: Tensor) -> Tensor:
    return torch.arange(tokens, dtype=torch.int32, device=x.device).expand(x.shape[0], tokens).contiguous()


class FloatHeads:
    """key_bias (B, N): of the sizes that tokens had when q, k and v were made."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, key_bias: Tensor | None) -> None:
        self.q, self.k, self.v, self.scale, self.key_bias = q, k, v, scale, key_bias

    @property
    def bias(self) -> Tensor | None:
        return None if self.key_bias is None else self.key_bias[:, None, None].to(self.q.dtype)

    def class_row(self) -> Tensor:
        scores = (self.q[:, :, :1].float() @ self.k.float().mT)[:, :, 0] * self.scale
        if self.key_bias is not None:
            scores = scores + self.key_bias[:, None]
        return scores.softmax(-1).mean(1)

    def mean_key(self) -> Tensor:
        return self.k.float().mean(1)

    def floats(self) -> tuple[Tensor, Tensor]:
        return self.q.float(), self.k.float()


class TokenBlock(ReducingBlock):
    """x (B, N, C) float in and out: a block of foreign parts, computed in floats, with a step of tokens/ inside.

    Its Linears are the block's own, or what took their place; exp_free takes the place of its attention.
    """

    computes_first_tokens = True

    def __init__(
        self,
        parts: BlockParts,
        replaced: Mapping[nn.Module, nn.Module] | None = None,
        exp_free: ExpFreeAttention | None = None,
    ) -> None:
        super().__init__()
        self.exp_free = exp_free
        new = {} if replaced is None else replaced
        attention, mlp = parts.attention, parts.mlp
        self.norm1, self.norm2 = parts.norm1, parts.norm2
        self.qkv = nn.ModuleList(new.get(linear, linear) for linear in attention.qkv)
        self.proj, self.fc1, self.fc2 = (new.get(x, x) for x in (attention.proj, mlp.fc1, mlp.fc2))
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.num_heads, self.scale, self.activation = attention.num_heads, attention.scale, mlp.activation
        self.layer_scale1, self.layer_scale2 = parts.layer_scale1, parts.layer_scale2

    def heads(self, x: Tensor) -> FloatHeads:
        B, N, _ = x.shape
        y = self.norm1(x)
        qkv = torch.cat([linear(y) for linear in self.qkv], -1) if len(self.qkv) > 1 else self.qkv[0](y)
        head_dim = qkv.shape[2] // (3 * self.num_heads)
        q, k, v = qkv.view(B, N, 3, self.num_heads, head_dim).permute(2, 0, 3, 1, 4)
        q, k = (t if norm is None else norm(t) for t, norm in ((q, self.q_norm), (k, self.k_norm)))
        return FloatHeads(q, k, v, self.scale, None if self.state is None else self.state.key_bias)

    def attend(self, heads: FloatHeads, index: Tensor | None) -> Tensor:
        q = heads.q
        if index is not None:
            q = q.gather(2, index.long()[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        attention = F.scaled_dot_product_attention if self.exp_free is None else self.exp_free
        out = attention(q, heads.k, heads.v, heads.bias, scale=self.scale)
        return out.transpose(1, 2).flatten(2)

    def project(self, attended: Tensor, x: Tensor, index: Tensor | None, lists: Lists | None) -> Tensor:
        if index is not None:
            x = x.gather(1, index.long()[..., None].expand(-1, -1, x.shape[2]))
        if lists is not None:
            attended, x = lists.mean(attended), lists.mean(x)
        return self._add(x, self.proj(attended), self.layer_scale1)

    def feed_forward(self, y: Tensor) -> Tensor:
        hidden = ACTIVATIONS[self.activation](self.fc1(self.norm2(y)))
        return self._add(y, self.fc2(hidden), self.layer_scale2)

    @staticmethod
    def _add(x: Tensor, y: Tensor, layer_scale: Tensor | None) -> Tensor:
        return x + (y if layer_scale is None else layer_scale * y)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, tokens: int | None = None) -> Tensor:
        """Raises ValueError for a mask: after a reduction it would not fit."""
        if attn_mask is not None:
            raise ValueError("TokenBlock: attn_mask came to a block whose tokens are reduced; call the model without")
        return self.reduced(x, tokens)
