"""EViT: the tokens that the class token attends to stay; the others vanish, or become one by their attention.

Which they are is decided from the class token's row of probabilities, before the attention: without the fused token the
others are not even attended from. With it they are, because it is their sum after the attention.

Liang et al., Not All Patches Are What You Need, arXiv:2202.07800.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyvit_accel import ops
from pyvit_accel.modules.token_step import Heads, Rows, TokenState, TokenStep, check_class_token

from .schedule import Steps, at_layers, method


class KeepAttended(TokenStep):
    """The ceil(rate (N - p)) tokens that the class token attends to most, by rank.

    fuse: one more at the end, the sum of the dropped rows weighted by that attention, not normalised.
    """

    drops = True

    def __init__(self, rate: float, fuse: bool = False) -> None:
        super().__init__()
        if not 0 < rate <= 1:
            raise ValueError(f"EViT: rate={rate}; use a part of the tokens, above 0 and at most 1")
        self.rate, self.fuse = rate, fuse
        self._chosen: tuple[Tensor, ...] | None = None

    def _keep(self, N: int, prefix: int) -> int:
        return math.ceil(self.rate * (N - prefix))

    def rows(self, N: int, num_prefix_tokens: int) -> Rows:
        check_class_token("EViT", num_prefix_tokens)
        kept = num_prefix_tokens + self._keep(N, num_prefix_tokens)
        return Rows(N, N, N, min(kept + 1, N)) if self.fuse else Rows(N, kept, kept, kept)

    def prune(self, heads: Heads, x: Tensor, state: TokenState) -> Tensor | None:
        row, p = heads.class_row(), state.num_prefix_tokens
        index, dropped, inverse = ops.select_tokens(row, self._keep(x.shape[1], p), p)
        if dropped.shape[1] == 0:
            return None
        if self.fuse:
            self._chosen = row, index, dropped, inverse
            return None
        state.keep(index, inverse, dropped, x)
        return index

    def settle(self, y: Tensor, state: TokenState) -> Tensor:
        if self._chosen is None:
            return y
        (row, index, dropped, inverse), self._chosen = self._chosen, None
        B, K = index.shape
        lists = torch.cat([index, dropped], 1)
        ends = torch.arange(K + 2, dtype=torch.int32, device=y.device)
        ends = torch.where(ends > K, lists.shape[1], ends).int().expand(B, -1)
        weight = torch.cat([torch.ones_like(index, dtype=torch.float32), row.gather(1, dropped.long())], 1)
        state.keep(index, inverse, dropped, y)
        if state.size is not None:
            state.size = torch.cat([state.size, torch.ones_like(state.size[:, :1])], 1)
        return ops.mix_tokens(y, lists, ends.contiguous(), weight)

    def config(self) -> dict:
        return {"rate": self.rate, "fuse": self.fuse}


@method
def evit(rate: float = 0.7, layers: Sequence[int] = (3, 6, 9), fuse: bool = False) -> Callable[[int], Steps]:
    """Keep the part `rate` of the patches in blocks 3, 6 and 9, counted from 0; fuse: and one token for the others."""
    KeepAttended(rate, fuse)
    return lambda depth: at_layers(layers, depth, lambda stage: KeepAttended(rate, fuse))
