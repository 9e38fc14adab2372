"""STViT: attention among super tokens, one per cell of the grid, that the tokens are softly assigned to.

    s     = the mean of every cell
    Q     = softmax over the 3 x 3 cells around a token's own of  x s scale;  s = Q^T x / sum Q,  `iterations` times
    s'    = attention(s),  x'_i = sum of Q_im s'_m

Cells outside the grid are zero vectors that take their share of the softmax, as in the published code: tokens at the
border are given less than their mass, and come back smaller.

Huang et al., Vision Transformer with Super Token Sampling, arXiv:2211.11167.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from pyvit_accel import ops

WINDOW = 3


class SuperTokens(NamedTuple):
    """values (B, M, C) dtype of x; weight (B, N, 9) float32 and index (B, N, 9) int32, -1 outside: whose tokens are."""

    values: Tensor
    weight: Tensor
    index: Tensor

    def spread(self, values: Tensor) -> Tensor:
        """What has become of the super tokens, (B, M, C), as tokens (B, N, C)."""
        width = self.index.shape[2]
        return ops.mix_tokens(values, self.index.flatten(1), weight=self.weight.flatten(1), width=width)


def sample(x: Tensor, cell: tuple[int, int], iterations: int = 1, scale: float | None = None) -> SuperTokens:
    """The super tokens of x (B, h, w, C), one per cell of cell[0] x cell[1] tokens; scale None: C ** -0.5.

    Raises ValueError for a grid that is not whole cells. No gradient.
    """
    _, h, w, C = x.shape
    if min(cell) < 1 or h % cell[0] or w % cell[1]:
        raise ValueError(f"sample: a grid of {h} x {w} tokens is not whole cells of {cell[0]} x {cell[1]}; pad it")
    centres = F.avg_pool2d(x.float().permute(0, 3, 1, 2), cell).permute(0, 2, 3, 1).contiguous()
    scale = C**-0.5 if scale is None else scale
    weight, index, centres = ops.local_assign(x, centres.to(x.dtype), WINDOW, "dot", scale, iterations, border="zero")
    return SuperTokens(centres.flatten(1, 2).to(x.dtype), weight, index)


class SuperTokenAttention(nn.Module):
    """x (B, h, w, C) to the same; attention is any module of (B, M, C), and all there is with cells of one token."""

    def __init__(
        self, attention: nn.Module, cell: tuple[int, int], iterations: int = 1, scale: float | None = None
    ) -> None:
        super().__init__()
        if min(cell) < 1 or iterations < 1:
            raise ValueError(f"SuperTokenAttention: cell={cell}, iterations={iterations}; all must be at least 1")
        self.attention, self.cell, self.iterations, self.scale = attention, cell, iterations, scale

    def forward(self, x: Tensor) -> Tensor:
        if self.cell == (1, 1):
            return self.attention(x.flatten(1, 2)).view(x.shape)
        tokens = sample(x, self.cell, self.iterations, self.scale)
        return tokens.spread(self.attention(tokens.values)).view(x.shape)

    def extra_repr(self) -> str:
        return f"cell={self.cell}, iterations={self.iterations}, scale={self.scale}"
