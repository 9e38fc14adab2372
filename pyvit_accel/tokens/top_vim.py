"""ToP-ViM: tokens of a state-space model go without changing the order of the others, which is the order of its scan.

    importance   sum over the channels of max(0, y)
    K            ceil((N - 1) rate), or one more where that is even: the class token in the middle, and pairs around it

A causal scan of the tokens that are left is the scan in which a dropped token holds the state: held gives the state at
every place. A scan of all places whose dropped inputs are zero is another thing: there the state decays on.

Zhan et al., Exploring Token Pruning in Vision State Space Models, arXiv:2409.18962.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyvit_accel import ops

from ._index import rest_of


def importance(y: Tensor) -> Tensor:
    """(B, N) float32 of the scan's output y (B, N, D)."""
    return y.float().clamp(min=0).sum(2)


def keep_count(N: int, rate: float) -> int:
    """K of N tokens, the class token in both."""
    if not 0 < rate <= 1 or N < 1:
        raise ValueError(f"ToP-ViM: N={N}, rate={rate}; use 1 token or more, a rate above 0 and at most 1")
    K = math.ceil((N - 1) * rate)
    return K + 1 - K % 2


def select_in_order(scores: Tensor, keep: int, class_token: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The class token and the keep - 1 others with the largest scores, ascending, half of them on each side of it.

    scores       (B, N) float; the class token's is not read
    class_token  its place; None: there is none, and all are ranked
    returns      index (B, keep), dropped (B, N - keep), inverse (B, N), as ops.select_tokens; ops.mix_tokens(x, index)
                 gathers the hidden state, the residual and whatever belongs to the tokens
    """
    N = scores.shape[1]
    if class_token is None:
        return ops.select_tokens(scores, keep, order="index")
    if not 0 <= class_token < N:
        raise ValueError(f"ToP-ViM: class_token={class_token} is outside 0..{N - 1}, the tokens there are")
    if not 1 <= keep <= N:
        raise ValueError(f"ToP-ViM: keep={keep} of {N} tokens, the class token in both; use 1..{N}")
    B, i = scores.shape[0], torch.arange(N, dtype=torch.int32, device=scores.device)
    first = torch.where(i == 0, class_token, torch.where(i <= class_token, i - 1, i))  # then all others, ascending
    index, *_ = ops.select_tokens(scores[:, first.long()], keep - 1, 1, "index")
    patches = first.expand(B, N).gather(1, index[:, 1:].long())
    middle = (keep - 1) // 2
    index = torch.cat([patches[:, :middle], i.new_full((B, 1), class_token), patches[:, middle:]], 1)
    return index, *rest_of(index, N)


def held(inverse: Tensor) -> Tensor:
    """(B, N) int32: the row of the last token at or before each place that stayed, -1 before the first.

    inverse (B, N) of an ascending index. ops.mix_tokens(h, held(inverse)) are the states (B, N, D) at all places, of
    those h (B, K, D) at the tokens that stayed.
    """
    return inverse.cummax(1).values
