"""A-ViT: a token stops when the halting scores of the blocks it went through add up to 1.

    h_l = sigmoid(gate_scale x_l[0] - gate_centre),  1 after the last block;  c = sum of h
    stop where c > 1 - eps;  out = sum over blocks of  h_l x_l,  and of  (1 - sum of h before) x_l  where it stops

Tokens that stopped are neither computed nor attended to any more. The published code only masks them.

Yin et al., A-ViT: Adaptive Tokens for Efficient Vision Transformer, arXiv:2112.07658.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .routing import Runner


class Halting:
    """What a forward remembers of tokens (B, N).

    active  bool: they have not stopped
    total   float32: the scores so far
    """

    def __init__(self, B: int, N: int, device: torch.device, eps: float = 0.01) -> None:
        self.eps = eps
        self.active = torch.ones(B, N, dtype=torch.bool, device=device)
        self.total = torch.zeros(B, N, device=device)

    def weigh(self, score: Tensor) -> Tensor:
        """score (B, N) after a block, to its outputs' weights (B, N) float32, 0 of tokens that stopped before."""
        total = self.total + score
        stops = self.active & (total > 1 - self.eps)
        weight = torch.where(stops, 1 - self.total, score).masked_fill(~self.active, 0.0)
        self.total, self.active = total, self.active & ~stops
        return weight


class HaltingBlocks(nn.Module):
    """Blocks one after the other, x (B, N, C) float in, the weighted sum of their outputs out.

    gate_scale, gate_centre  10 and 30 in the published tiny model, 10 and 75 in the small one
    mode                     as in Runner: "packed" needs QuantBlocks, "masked" blocks that take attn_mask (B, 1, 1, N)
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        gate_scale: float = 10.0,
        gate_centre: float = 30.0,
        eps: float = 0.01,
        mode: str = "packed",
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        if not self.blocks:
            raise ValueError("HaltingBlocks: no block came; a token has to go through one at least")
        if not 0 <= eps < 1:
            raise ValueError(f"HaltingBlocks: eps={eps}; use at least 0 and less than 1")
        self.gate_scale, self.gate_centre, self.eps, self.runner = gate_scale, gate_centre, eps, Runner(mode)
        self.runner.check(self.blocks)

    def score(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N) float32."""
        return torch.sigmoid(self.gate_scale * x[..., 0].float() - self.gate_centre)

    def forward(self, x: Tensor) -> Tensor:
        halting = Halting(*x.shape[:2], x.device, self.eps)
        out = torch.zeros_like(x)
        for layer, block in enumerate(self.blocks):
            x = self.runner([block], x, halting.active)
            score = self.score(x)
            weight = halting.weigh(torch.ones_like(score) if layer == len(self.blocks) - 1 else score)
            out = out + weight[..., None].to(x.dtype) * x
        return out

    def extra_repr(self) -> str:
        gate = f"gate_scale={self.gate_scale}, gate_centre={self.gate_centre}, eps={self.eps}"
        return f"{gate}, mode={self.runner.mode!r}"
