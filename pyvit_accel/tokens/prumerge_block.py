"""PruMerge in a block: what leaves it are the prefix, `keep` patches with what is like them, a row for the others.

Keys and the class token's attention, as one head over all channels, are the block's own; the rows are those after its
attention, and its MLP sees the merged ones only. LLaVA merges the rows that come into that block: tokens/prumerge.py
does so with features of any origin.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyvit_accel.modules.token_step import Heads, Rows, TokenState, TokenStep

from .prumerge import class_attention, prumerge
from .schedule import METHODS, Steps, at_layers


class MergeAround(TokenStep):
    """keep + 1 rows for all patches; neighbours, normalize as in prumerge."""

    def __init__(self, keep: int, neighbours: int = 32, normalize: bool = False) -> None:
        super().__init__()
        if keep < 1 or neighbours < 1:
            raise ValueError(f"PruMerge: keep={keep}, neighbours={neighbours}; use 1 or more of both")
        self.num_kept, self.neighbours, self.normalize = keep, neighbours, normalize
        self._seen: tuple[Tensor, Tensor] | None = None

    def rows(self, N: int, num_prefix_tokens: int) -> Rows:
        patches = N - num_prefix_tokens
        if self.num_kept >= patches or num_prefix_tokens < 1:
            came = f"keep={self.num_kept} of {patches} patches behind {num_prefix_tokens} tokens of the prefix"
            raise ValueError(f"PruMerge: {came}; keep fewer than there are, of a model with a class token")
        return Rows(N, N, N, num_prefix_tokens + self.num_kept + 1)

    def prune(self, heads: Heads, x: Tensor, state: TokenState) -> Tensor | None:
        q, k = (t.transpose(1, 2).flatten(2) for t in heads.floats())
        p = state.num_prefix_tokens
        self._seen = k[:, p:], class_attention(q[:, 0], k, num_prefix_tokens=p)
        return None

    def settle(self, y: Tensor, state: TokenState) -> Tensor:
        (keys, attention), self._seen = self._seen, None
        p, K = state.num_prefix_tokens, self.num_kept
        rest = {"neighbours": self.neighbours, "normalize": self.normalize}
        merged = prumerge(y[:, p:], keys, attention, keep=K, **rest)
        assign = torch.full(y.shape[:2], p + K, dtype=torch.int32, device=y.device)  # the row of all that are not kept
        own = torch.arange(p + K, dtype=torch.int32, device=y.device).expand(y.shape[0], -1)
        assign[:, :p] = own[:, :p]
        assign.scatter_(1, merged.kept[:, :K].long() + p, own[:, p:])
        state.move(assign, None)
        return torch.cat([y[:, :p], merged.tokens.to(y.dtype)], 1)

    def config(self) -> dict:
        return {"keep": self.num_kept, "neighbours": self.neighbours, "normalize": self.normalize}


def _in_block(keep: int, layer: int = -1, neighbours: int = 32, normalize: bool = False) -> Callable[[int], Steps]:
    """In one block, counted from 0, or from the end: -1 is the last."""
    MergeAround(keep, neighbours, normalize)

    def steps(depth: int) -> Steps:
        at = layer + depth if layer < 0 else layer
        return at_layers((at,), depth, lambda stage: MergeAround(keep, neighbours, normalize))

    return steps


METHODS["prumerge"] = _in_block
