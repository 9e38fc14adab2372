"""DiffRate: in every block drop the least attended tokens, then merge the next ones into those most like them.

Tokens are sorted by the class token's attention; the first `prune` rows stay, and of these the rows from `merge` on are
added to their nearest of the first ones: plain means of the features, sizes added by similarity. Counts have the class
token in them. What is dropped is not attended from; the merge needs the rows after attention and residual.

Chen et al., DiffRate, arXiv:2305.17997, whose searched counts are SCHEDULES.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyvit_accel import ops
from pyvit_accel.modules.token_step import Heads, Rows, TokenState, TokenStep, check_class_token

from .schedule import Steps, method


class SortPruneMerge(TokenStep):
    """prune, merge: rows left after each, the prefix in them. Counts above what comes are no-ops."""

    drops = True

    def __init__(self, prune: int, merge: int) -> None:
        super().__init__()
        self.num_pruned, self.num_merged = prune, merge

    def _counts(self, N: int) -> tuple[int, int]:
        kept = min(self.num_pruned, N)
        return kept, min(self.num_merged, kept)

    def rows(self, N: int, num_prefix_tokens: int) -> Rows:
        check_class_token("DiffRate", num_prefix_tokens)
        kept, merged = self._counts(N)
        if merged < num_prefix_tokens + (kept > merged):
            came = f"{merged} tokens are left of {N}, {num_prefix_tokens} of them prefix"
            raise ValueError(f"DiffRate: {came}; keep more")
        return Rows(N, kept, kept, merged)

    def prune(self, heads: Heads, x: Tensor, state: TokenState) -> Tensor | None:
        p = state.num_prefix_tokens
        index, dropped, inverse = ops.select_tokens(heads.class_row(), self._counts(x.shape[1])[0] - p, p)
        state.keep(index, inverse, dropped, x)
        return index

    def settle(self, y: Tensor, state: TokenState) -> Tensor:
        kept, merged = self._counts(y.shape[1])
        if merged == kept:
            return y
        value, index = ops.match_tokens(y[:, merged:], y[:, :merged], first=state.num_prefix_tokens)
        stay = torch.arange(merged, dtype=torch.int32, device=y.device).expand(y.shape[0], -1)
        assign = torch.cat([stay, index[..., 0]], 1)
        size = state.sizes(y)
        # A source adds its size times its similarity; the rows themselves are averaged whatever their sizes are.
        added = torch.cat([size[:, :merged], size[:, merged:] * value[..., 0]], 1)
        *_, total = ops.group_tokens(assign, merged, added)
        ptr, col, weight, _ = ops.group_tokens(assign, merged)
        # Unlike sources subtract: below 1, as DiffRate clamps it in training, the log would end in -inf or NaN.
        state.move(assign, total.clamp(min=1))
        return ops.mix_tokens(y, col, ptr, weight, reduce="mean")

    def config(self) -> dict:
        return {"prune": self.num_pruned, "merge": self.num_merged}


# (prune, merge) per block, the class token counted. Facts of the paper's compression_rate.json; MAE: ViT trained so.
SCHEDULES: dict[tuple[str, str], tuple[tuple[int, ...], tuple[int, ...]]] = {
    ("deit-t", "0.8G"): (
        (197, 197, 196, 186, 166, 147, 117, 103, 92, 80, 74, 3),
        (197, 196, 190, 172, 154, 125, 107, 96, 84, 78, 70, 3),
    ),
    ("deit-s", "2.9G"): (
        (197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3),
        (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3),
    ),
    ("deit-b", "11.5G"): (
        (197, 197, 197, 188, 170, 154, 139, 123, 107, 72, 43, 3),
        (197, 197, 192, 178, 158, 145, 127, 111, 94, 50, 35, 3),
    ),
    ("mae-b", "11.5G"): (
        (197, 196, 182, 172, 162, 147, 131, 109, 101, 94, 70, 49),
        (197, 192, 178, 164, 150, 133, 115, 101, 96, 82, 49, 49),
    ),
    ("mae-l", "42.3G"): (
        (
            *(197, 197, 197, 195, 194, 193, 191, 187, 182, 180, 173, 149),
            *(142, 134, 125, 121, 111, 106, 91, 87, 77, 39, 38, 32),
        ),
        (
            *(197, 197, 196, 194, 193, 192, 187, 183, 181, 173, 154, 146),
            *(137, 127, 123, 114, 105, 98, 87, 75, 43, 45, 32, 32),
        ),
    ),
    ("mae-h", "103.4G"): (
        (
            *(257, 256, 255, 251, 245, 235, 204, 197, 194, 189, 185, 177, 169, 160, 152, 144),
            *(146, 139, 139, 136, 135, 133, 131, 128, 126, 126, 124, 121, 114, 96, 82, 53),
        ),
        (
            *(257, 256, 253, 247, 238, 211, 201, 195, 193, 185, 179, 171, 162, 154, 150, 145),
            *(141, 138, 137, 135, 134, 133, 130, 127, 125, 125, 122, 114, 101, 90, 53, 53),
        ),
    ),
}


@method
def diffrate(
    model: str = "", budget: str = "", prune: Sequence[int] = (), merge: Sequence[int] = ()
) -> Callable[[int], Steps]:
    """The published counts of a model and budget, ("deit-s", "2.9G"), or counts of your own, one per block."""
    if not prune and not merge:
        if (model, budget) not in SCHEDULES:
            known = ", ".join(f"{name} {size}" for name, size in SCHEDULES)
            came = f"no schedule {model!r} {budget!r}"
            raise ValueError(f"DiffRate: {came}; there are {known}, or pass prune= and merge=")
        prune, merge = SCHEDULES[model, budget]
    if not all(isinstance(count, int) for count in (*prune, *merge)):
        raise ValueError(f"DiffRate: counts {[*prune, *merge]} must be whole numbers of tokens")
    if len(prune) != len(merge):
        raise ValueError(f"DiffRate: {len(prune)} counts to prune to and {len(merge)} to merge to; pass one per block")

    def steps(depth: int) -> Steps:
        if depth != len(prune):
            raise ValueError(f"DiffRate: the schedule has {len(prune)} blocks, the model {depth}")
        return [SortPruneMerge(*counts) for counts in zip(prune, merge, strict=True)]

    return steps


def diffrate_macs(prune: Sequence[int], merge: Sequence[int], dim: int, num_tokens: int, patch_pixels: int) -> float:
    """Multiply-adds as the paper counts them: 4 N C^2 + 2 N^2 C before the cut and 8 N' C^2 after, a patch embedding of
    num_tokens (the class token in them) rows of patch_pixels values, and a classifier of 1000 classes."""
    C, N = dim, num_tokens
    total = num_tokens * patch_pixels * C + 1000 * C
    for kept in (min(p, m) for p, m in zip(prune, merge, strict=True)):
        left = min(kept, N)
        total += 4 * N * C**2 + 2 * N**2 * C + 8 * left * C**2
        N = left
    return float(total)
