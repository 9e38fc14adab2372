"""DynamicViT: a small network scores the patches in front of a block, and those with the best scores go in.

    h     = gelu(embed(norm(x)))                     of the patches x (B, n, C)
    h     = [h[:, :, : C / 2], mean over n of h[:, :, C / 2 :]]
    score = log_softmax(score(gelu(hidden2(gelu(hidden1(h))))))[..., 0]

Rao et al., DynamicViT, arXiv:2106.02034.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit_accel import ops
from pyvit_accel.modules.token_step import Rows, TokenState, TokenStep

from .schedule import Steps, at_layers, method


class Predictor(nn.Module):
    """x (B, n, C), patches only, to scores (B, n) float32. dim: C, a multiple of 4."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 4 or dim % 4:
            raise ValueError(f"DynamicViT: dim={dim} must be a positive multiple of 4; use the model's width")
        self.norm = nn.LayerNorm(dim)
        self.embed = nn.Linear(dim, dim)
        self.hidden1 = nn.Linear(dim, dim // 2)
        self.hidden2 = nn.Linear(dim // 2, dim // 4)
        self.score = nn.Linear(dim // 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        local, shared = F.gelu(self.embed(self.norm(x))).chunk(2, dim=2)
        h = torch.cat([local, shared.mean(1, keepdim=True).expand_as(shared)], 2)
        h = F.gelu(self.hidden2(F.gelu(self.hidden1(h))))
        return self.score(h).float().log_softmax(-1)[..., 0]


class KeepPredicted(TokenStep):
    """The `keep` patches with the best scores, by rank, in front of the block."""

    drops = True

    def __init__(self, dim: int, keep: int) -> None:
        super().__init__()
        if keep < 1:
            raise ValueError(f"DynamicViT: keep={keep}; keep 1 patch or more")
        self.dim, self.keep = dim, keep
        self.predictor = Predictor(dim)

    def rows(self, N: int, num_prefix_tokens: int) -> Rows:
        out = num_prefix_tokens + self.keep
        return Rows(out, out, out, out)

    def before(self, x: Tensor, state: TokenState) -> Tensor:
        p = state.num_prefix_tokens
        scores = F.pad(self.predictor(x[:, p:]), (p, 0))
        index, dropped, inverse = ops.select_tokens(scores, self.keep, p)
        state.keep(index, inverse, dropped, x)
        return ops.mix_tokens(x, index)

    def config(self) -> dict:
        return {"dim": self.dim, "keep": self.keep}


@method
def dynamic_vit(
    dim: int, rate: float = 0.7, layers: Sequence[int] = (3, 6, 9), patches: int = 196
) -> Callable[[int], Steps]:
    """int(patches rate^s) patches stay in front of the s-th of the layers, counted from 0 and s from 1.

    dim: the model's width; patches: the model's. The predictors have to be trained: load their weights into the steps.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"DynamicViT: rate={rate}; use a part of the patches, above 0 and at most 1")
    return lambda depth: at_layers(layers, depth, lambda stage: KeepPredicted(dim, int(patches * rate ** (stage + 1))))
