"""TokenStep: what happens to the tokens inside one block; TokenState: what blocks tell each other about them.

    heads = q, k, v of norm1(x)
    index = step.prune(heads, state)     only these queries are attended to, projected and kept
    merge = step.merge(heads, state)     or these rows become their weighted mean, before the projection
    y     = x + proj(attention)          of the rows that are left
    y     = step.settle(y, state)        or anything else that needs y
    out   = y + mlp(norm2(y))

Counts are the host's, so every shape is static. A step says what it did by state.keep or state.move.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pyvit_accel import ops


@dataclass(frozen=True)
class Lists:
    """Rows that become one, as ops.mix_tokens takes them: ptr (B, M + 1), col (B, N), weight (B, N)."""

    ptr: Tensor
    col: Tensor
    weight: Tensor

    def mean(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, M, C): the weighted mean of every list."""
        return ops.mix_tokens(x, self.col, self.ptr, self.weight, reduce="mean")


class Rows(NamedTuple):
    """Tokens that one block's parts see."""

    keys: int  # norm1, q, k and v
    queries: int  # attention
    projected: int
    out: int  # the MLP, and what leaves the block


class Heads(Protocol):
    """q, k and v of one block, as floats or as codes."""

    def class_row(self) -> Tensor:
        """(B, N) float32: the first query's probabilities, the mean over heads, sizes in them."""

    def mean_key(self) -> Tensor:
        """(B, N, D) float32: the mean over heads of k."""

    def floats(self) -> tuple[Tensor, Tensor]:
        """q and k (B, H, N, D) float32."""

    scale: float


class TokenState:
    """Of one forward: set by the first block, read by the others. Not for two threads at once.

    num_prefix_tokens  class, distillation and register tokens, which come first and stay
    size               (B, N) float32: how many tokens each one stands for; None: one each
    """

    def __init__(self, num_prefix_tokens: int, keeps_dropped: bool = False) -> None:
        self.num_prefix_tokens, self.keeps_dropped = num_prefix_tokens, keeps_dropped
        self.start(None)

    def __deepcopy__(self, memo: dict) -> TokenState:
        """For a copy of the model: without what a forward left here, which may be part of a graph."""
        return TokenState(self.num_prefix_tokens, self.keeps_dropped)

    def start(self, x: Tensor | None) -> None:
        """x (B, N, C): what the first block reads."""
        self.shape = None if x is None else tuple(x.shape[:2])
        self.size: Tensor | None = None
        self.moves: list[tuple[Tensor, Tensor | None, Tensor | None]] = []

    @property
    def key_bias(self) -> Tensor | None:
        """(B, N) float32: what a key's size adds to its scores, as if it were there that many times."""
        return None if self.size is None else self.size.log()

    def sizes(self, x: Tensor) -> Tensor:
        """(B, N) float32 of tokens x (B, N, ...)."""
        return torch.ones(x.shape[:2], device=x.device) if self.size is None else self.size

    def keep(self, index: Tensor, inverse: Tensor, dropped: Tensor, x: Tensor) -> None:
        """Only index (B, K) stays; inverse (B, N) is each token's new row or -1. x: what dropped (B, N - K) held."""
        if self.size is not None:
            self.size = self.size.gather(1, index.long())
        rows = ops.mix_tokens(x, dropped) if self.keeps_dropped else None
        self.moves.append((inverse, dropped, rows))

    def move(self, assign: Tensor, size: Tensor | None) -> None:
        """assign (B, N): the new row of every token, or -1; size (B, M) of the new ones."""
        self.moves.append((assign, None, None))
        self.size = size

    def origin(self) -> Tensor:
        """(B, N) int32 of the tokens that the first block read: the row they are part of now, or -1.

        Where a model computes only what its head reads of the last block, the step of that block was left out. Raises
        ValueError before the first forward.
        """
        if self.shape is None:
            raise ValueError("TokenState.origin: no forward since the schedule was set; call the model first")
        B, N = self.shape
        row = torch.arange(N, dtype=torch.int32).expand(B, N)
        for assign, _, _ in self.moves:
            row = row.to(assign.device)
            row = torch.where(row < 0, -1, assign.gather(1, row.clamp(min=0).long()))
        return row.contiguous()

    def restore(self, x: Tensor) -> Tensor:
        """(B, M, C) to the (B, N, C) there were: merged tokens get their row, dropped ones what they last held."""
        for assign, dropped, rows in reversed(self.moves):
            x = ops.mix_tokens(x, assign)
            if rows is not None:
                x.scatter_(1, dropped.long()[..., None].expand_as(rows), rows.to(x.dtype))
        return x


def check_class_token(method: str, num_prefix_tokens: int) -> None:
    if num_prefix_tokens < 1:
        raise ValueError(
            f"{method}: 0 tokens of the prefix; it ranks patches by what the class token attends to: use TOME, or "
            "ZERO_TPRUNE with start='uniform'"
        )


class TokenStep(nn.Module):
    """Does nothing; methods of tokens/ override what they need. N is the number of tokens that come in."""

    drops = False  # whether tokens vanish, instead of becoming part of others

    def rows(self, N: int, num_prefix_tokens: int) -> Rows:
        """How many tokens each part of the block sees when N come. Raises ValueError for counts that do not fit."""
        return Rows(N, N, N, N)

    def idle(self, N: int, num_prefix_tokens: int) -> bool:
        """Whether the step does nothing to N tokens, but for their order; the block then runs without it."""
        return self.rows(N, num_prefix_tokens) == Rows(N, N, N, N)

    def before(self, x: Tensor, state: TokenState) -> Tensor:
        """(B, N, C) as it comes into the block, to (B, M, C)."""
        return x

    def prune(self, heads: Heads, x: Tensor, state: TokenState) -> Tensor | None:
        """index (B, K) int32 of the tokens that stay, the prefix first; None: all."""
        return None

    def merge(self, heads: Heads, x: Tensor, state: TokenState) -> Lists | None:
        """Which rows of the attention's output, and of the residual stream, become one; None: none."""
        return None

    def settle(self, y: Tensor, state: TokenState) -> Tensor:
        """Rows (B, K, C) after attention and residual, to (B, M, C)."""
        return y

    def config(self) -> dict:
        """What the constructor needs, JSON-able."""
        return {}
