"""SiT: n patches become K weighted means of all of them, in front of a block; the prefix stays.

    h      = gelu(hidden(norm(x)))                  of the patches x (B, n, C)
    weight = softmax over n of scale slots(h)       (B, n, K)
    y      = weight^T x                             (B, K, C)

Attention with K learned queries, the rows of `slots`: its bias is the same for all patches, so it changes nothing.
Zong et al., Self-slimmed Vision Transformer, arXiv:2111.12624.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit_accel.modules.token_step import Rows, TokenState, TokenStep

from .schedule import Steps, at_layers, method


def slim(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, n, C), logits (B, n, K): y (B, K, C) and the weights (B, n, K) float32, whose sum over n is 1."""
    weight = logits.float().softmax(1)
    return weight.mT.to(x.dtype) @ x, weight


class SlimTokens(TokenStep):
    """keep: K. hidden_dim: half of dim unless given."""

    def __init__(self, dim: int, keep: int, hidden_dim: int | None = None) -> None:
        super().__init__()
        if dim < 2 or keep < 1:
            raise ValueError(f"SiT: dim={dim}, keep={keep}; use the model's width and 1 token or more")
        self.dim, self.keep, self.hidden_dim = dim, keep, hidden_dim or dim // 2
        self.norm = nn.LayerNorm(dim)
        self.hidden = nn.Linear(dim, self.hidden_dim)
        self.slots = nn.Linear(self.hidden_dim, keep)
        self.scale = nn.Parameter(torch.ones(1, 1, 1))

    def rows(self, N: int, num_prefix_tokens: int) -> Rows:
        out = num_prefix_tokens + self.keep
        return Rows(out, out, out, out)

    def idle(self, N: int, num_prefix_tokens: int) -> bool:
        """Never: as many tokens as came are mixtures of them all the same."""
        return False

    def before(self, x: Tensor, state: TokenState) -> Tensor:
        p = state.num_prefix_tokens
        patches = x[:, p:]
        if self.keep > patches.shape[1]:
            raise ValueError(f"SiT: keep={self.keep} of {patches.shape[1]} patches; counts must not grow")
        y, weight = slim(patches, self.scale * self.slots(F.gelu(self.hidden(self.norm(patches)))))
        # Where a patch weighs most is as near as a map of rows to rows comes to a soft assignment.
        prefix = torch.arange(p, device=x.device).expand(x.shape[0], p)
        state.move(torch.cat([prefix, weight.argmax(2) + p], 1).int(), None)
        return torch.cat([x[:, :p], y], 1)

    def config(self) -> dict:
        return {"dim": self.dim, "keep": self.keep, "hidden_dim": self.hidden_dim}


@method
def sit(
    dim: int, rate: float = 0.5, layers: Sequence[int] = (2, 3, 4), patches: int = 196, hidden_dim: int | None = None
) -> Callable[[int], Steps]:
    """int(patches rate^s) tokens in front of the s-th of the layers, counted from 0 and s from 1.

    dim: the model's width; patches: the model's. The weights have to be trained: load them into the steps.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"SiT: rate={rate}; use a part of the patches, above 0 and at most 1")
    return lambda depth: at_layers(
        layers, depth, lambda stage: SlimTokens(dim, int(patches * rate ** (stage + 1)), hidden_dim)
    )
