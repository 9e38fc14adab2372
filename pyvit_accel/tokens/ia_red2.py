"""IA-RED2: before every group of blocks a small interpreter says which tokens are informative; the others are dropped.

    I_j = mean over heads of sigmoid(q_h(x_j) . k_h(policy)),  token j stays where I_j >= 0.5

A token that is dropped does not come back: it keeps what it last held, and nothing attends to it. The published code
has no interpreter to run; its sizes, the missing scale of the product and the threshold are our reading. It was trained
by REINFORCE, group after group, which is left to who trains it.

Pan et al., IA-RED2: Interpretability-Aware Redundancy Reduction for Vision Transformers, arXiv:2106.12620.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .routing import Runner


class Interpreter(nn.Module):
    """scores (B, N) float32 in 0..1 of tokens (B, N, C)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"Interpreter: dim={dim} is not a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.q, self.k = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.policy = nn.Parameter(torch.randn(dim) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        q = F.linear(x.float(), self.q.weight.float(), self.q.bias.float()).unflatten(-1, (self.num_heads, -1))
        k = F.linear(self.policy.float(), self.k.weight.float(), self.k.bias.float()).view(self.num_heads, -1)
        return torch.sigmoid((q * k).sum(-1)).mean(-1)


class InterpretedGroups(nn.Module):
    """Groups of blocks with an interpreter before each, x (B, N, C) float in and out, all tokens in their places.

    mode and capacity as in Runner, the capacity of each group in turn; "packed" needs QuantBlocks.
    """

    def __init__(
        self,
        groups: Sequence[Iterable[nn.Module]],
        interpreters: Sequence[nn.Module],
        threshold: float = 0.5,
        num_prefix_tokens: int = 0,
        mode: str = "packed",
        capacity: Sequence[float] = (),
    ) -> None:
        super().__init__()
        if len(groups) != len(interpreters) or len(capacity) not in (0, len(groups)):
            came = f"{len(groups)} groups, {len(interpreters)} interpreters and {len(capacity)} capacities"
            raise ValueError(f"InterpretedGroups: {came}; pass one of each per group, or no capacities")
        self.groups = nn.ModuleList(nn.ModuleList(group) for group in groups)
        self.interpreters = nn.ModuleList(interpreters)
        self.threshold, self.num_prefix_tokens = threshold, num_prefix_tokens
        self.runners = [Runner(mode, part) for part in capacity or (1.0,) * len(groups)]
        for runner, group in zip(self.runners, self.groups, strict=True):
            runner.check(group)

    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens, and which of them (B, N) bool were not dropped."""
        prefix = torch.arange(x.shape[1], device=x.device) < self.num_prefix_tokens
        stays = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        for group, interpreter, runner in zip(self.groups, self.interpreters, self.runners, strict=True):
            scores = interpreter(x).masked_fill(prefix, torch.inf)
            stays = runner.limit(stays & (scores >= self.threshold), scores)
            x = runner(group, x, stays, scores)
        return x, stays

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)[0]

    def extra_repr(self) -> str:
        parts = f"mode={self.runners[0].mode!r}" if self.runners else ""
        return f"threshold={self.threshold}, num_prefix_tokens={self.num_prefix_tokens}, {parts}"
