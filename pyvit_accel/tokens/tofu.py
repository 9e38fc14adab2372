"""ToFu: ToMe's pairs, of which the first blocks drop one and the others merge both without shortening them.

Early rows are not linear enough in what follows for a mean to stand for two of them. A dropped token's partner stays as
it is, so nothing is attended from the dropped one. The merged row is the mean, made as long as the longest of its
group: not linear, so it is made of the rows after attention and residual.

Kim et al., Token Fusion, arXiv:2312.01026.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyvit_accel import ops
from pyvit_accel.modules.token_step import Heads, Lists, Rows, TokenState

from ._index import rest_of
from .schedule import Steps, method
from .tome import MergePairs, match, per_block


class DropPairs(MergePairs):
    """r of the even tokens vanish, those most like an odd one; the others are in ToMe's order."""

    drops = True

    def rows(self, N: int, num_prefix_tokens: int) -> Rows:
        out = super().rows(N, num_prefix_tokens).out
        return Rows(N, out, out, out)

    def prune(self, heads: Heads, x: Tensor, state: TokenState) -> Tensor | None:
        N, p = x.shape[1], state.num_prefix_tokens
        r = self.merges(N, p)
        if r == 0:
            return None
        assign = ops.merge_pairs(*match(heads, p), N, r, p).long()
        token = torch.arange(N, dtype=torch.int32, device=x.device).expand_as(assign)
        # A row has one even token, or an odd one and its partners: written second, the odd one is the row's.
        index = torch.empty(x.shape[0], N - r, dtype=torch.int32, device=x.device)
        index.scatter_(1, assign[:, ::2], token[:, ::2]).scatter_(1, assign[:, 1::2], token[:, 1::2])
        dropped, inverse = rest_of(index, N)
        state.keep(index, inverse, dropped, x)
        return index

    def merge(self, heads: Heads, x: Tensor, state: TokenState) -> Lists | None:
        return None


class FusePairs(MergePairs):
    """ToMe's pairs become the mean of their rows, as long as the longest. proportional: sizes weigh the attention."""

    def __init__(self, r: int, proportional: bool = True, exact: bool = False) -> None:
        super().__init__(r, proportional, exact)
        self._assign: Tensor | None = None

    def rows(self, N: int, num_prefix_tokens: int) -> Rows:
        return Rows(N, N, N, super().rows(N, num_prefix_tokens).out)

    def merge(self, heads: Heads, x: Tensor, state: TokenState) -> Lists | None:
        N, p = x.shape[1], state.num_prefix_tokens
        r = self.merges(N, p)
        self._assign = ops.merge_pairs(*match(heads, p), N, r, p) if r else None
        return None

    def settle(self, y: Tensor, state: TokenState) -> Tensor:
        assign, self._assign = self._assign, None
        if assign is None:
            return y
        M = y.shape[1] - self.merges(y.shape[1], state.num_prefix_tokens)
        ptr, col, weight, size = ops.group_tokens(assign, M)
        if state.size is not None:
            *_, size = ops.group_tokens(assign, M, state.size)
        state.move(assign, size if self.proportional else None)
        return ops.mix_tokens(y, col, ptr, weight, reduce="mlerp")


@method
def tofu(
    r: int | Sequence[int], switch: int = 6, inflect: float = 0.0, proportional: bool = True
) -> Callable[[int], Steps]:
    """ToMe's r; blocks below `switch`, counted from 0, drop, the others merge. Half the depth is the paper's best."""
    if switch < 0:
        raise ValueError(f"ToFu: switch={switch}; use the first block that merges, 0 or more")

    def steps(depth: int) -> Steps:
        each = enumerate(per_block(r, inflect, depth))
        exact = not isinstance(r, int)
        return [
            (DropPairs if layer < switch else FusePairs)(n, proportional, exact or layer == 0) if n else None
            for layer, n in each
        ]

    return steps
