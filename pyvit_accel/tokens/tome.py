"""ToMe: in every block the r most similar pairs of tokens become one, weighted by their sizes.

Even and odd tokens are matched by the cosine of their keys, the mean over the heads; sizes enter the next attention as
log size. Decided from the keys alone, so the merge comes before the projection, which is linear.

Bolya et al., Token Merging, arXiv:2210.09461.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from pyvit_accel import ops
from pyvit_accel.modules.token_step import Heads, Lists, Rows, TokenState, TokenStep

from .schedule import Steps, method


def match(heads: Heads, prefix: int) -> tuple[Tensor, Tensor]:
    """value and index (B, Na) of the even tokens' best odd ones."""
    key = heads.mean_key()
    value, index = ops.match_tokens(key[:, ::2], key[:, 1::2], first=prefix // 2)
    return value[..., 0], index[..., 0]


class MergePairs(TokenStep):
    """r merges, at most half of what is no prefix; rows are averaged by their sizes.

    proportional   sizes weigh the attention as well
    exact          more than half raises in `rows`, instead of being cut to half as in the last blocks of a constant r
    """

    def __init__(self, r: int, proportional: bool = True, exact: bool = False) -> None:
        super().__init__()
        if r < 0:
            raise ValueError(f"ToMe: r={r}; a block merges 0 or more pairs")
        self.r, self.proportional, self.exact = r, proportional, exact

    def merges(self, N: int, prefix: int) -> int:
        return min(self.r, (N - prefix) // 2)

    def rows(self, N: int, num_prefix_tokens: int) -> Rows:
        half = (N - num_prefix_tokens) // 2
        if self.exact and self.r > half:
            came = f"r={self.r} merges of {N} tokens, {num_prefix_tokens} of them prefix"
            raise ValueError(f"ToMe: {came}; at most half of the others, {half}, can merge")
        out = N - self.merges(N, num_prefix_tokens)
        return Rows(N, N, out, out)

    def merge(self, heads: Heads, x: Tensor, state: TokenState) -> Lists | None:
        N, p = x.shape[1], state.num_prefix_tokens
        r = self.merges(N, p)
        if r == 0:
            return None
        assign = ops.merge_pairs(*match(heads, p), N, r, p)
        size = state.size if self.proportional else _counted(state, N)
        ptr, col, weight, size = ops.group_tokens(assign, N - r, size)
        state.move(assign, size if self.proportional else None)
        return Lists(ptr, col, weight)

    def config(self) -> dict:
        return {"r": self.r, "proportional": self.proportional, "exact": self.exact}


def _counted(state: TokenState, N: int) -> Tensor | None:
    """(B, N) float32: of how many of the first tokens each of N is made, when the state does not hold their sizes."""
    if not state.moves:
        return None
    *_, size = ops.group_tokens(state.origin(), N)
    return size


def linear_schedule(r: int, inflect: float, depth: int) -> list[int]:
    """r at every layer, or falling to 0 (inflect -1) or rising from 0 (1) on a line with about the same sum."""
    start = int(r * (1 - inflect))
    step = (2 * r - start - start) / max(depth - 1, 1)
    return [int(start + step * layer) for layer in range(depth)]


def per_block(r: int | Sequence[int], inflect: float, depth: int) -> list[int]:
    """linear_schedule of a number; a list as it is."""
    if isinstance(r, int):
        return linear_schedule(r, inflect, depth)
    if not isinstance(r, Sequence):
        raise ValueError(f"ToMe: r={r} is neither a count nor one per block")
    if len(r) != depth:
        raise ValueError(f"ToMe: r has {len(r)} entries, the model {depth} blocks; pass one per block")
    return list(r)


@method
def tome(r: int | Sequence[int], inflect: float = 0.0, proportional: bool = True) -> Callable[[int], Steps]:
    """r pairs in every block, or as many as its list says; inflect: -1 falls to 0 on a line, 1 rises from 0."""

    def steps(depth: int) -> Steps:
        listed = not isinstance(r, int)
        each = enumerate(per_block(r, inflect, depth))
        return [MergePairs(n, proportional, exact=listed or layer == 0) if n else None for layer, n in each]

    return steps
