"""Expedit: blocks in the middle of a dense model run on a few cluster centres, and all tokens come back at the end.

    c   = the mean of every cell of a coarse grid, moved `iterations` times by k-means with soft, local assignments
    c'  = the blocks of the centres
    x'_i = sum over the k centres m nearest to x_i of w_im c'_m,  w = exp(-tau |x_i - c_m|^2), divided by its norm

The distances of the second step are of what went into the first one. norm "l2" is the published code: such weights do
not add up to 1, k equal ones give sqrt(k) times their centre, and all are 0 where tau D is beyond float32's exponent.
"l1" are means, of exp(-tau (D - D_min)). Exactly k centres count; of equally near ones those that come first.

Liang et al., Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning, arXiv:2210.01035.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit_accel import ops

NORMS = ("l2", "l1")
TINY = 1e-12  # least norm that weights are divided by


@dataclass(frozen=True)
class Clusters:
    """centres (B, M, C) dtype of x; x (B, N, C): the tokens they are of."""

    centres: Tensor
    x: Tensor

    def labels(self) -> Tensor:
        """(B, N) int32: the centre nearest to each token, wherever it is."""
        return ops.match_tokens(self.x, self.centres, "l2")[1][..., 0]


def cluster(
    x: Tensor, h: int, w: int, gh: int, gw: int, window: int = 5, tau: float = 0.01, iterations: int = 5
) -> Clusters:
    """gh x gw centres of the tokens x (B, h w, C) of a grid.

    window  odd: a token takes part in the centres at most window // 2 cells from its own, in y and in x
    tau     of the softmax over -tau |x - c|^2

    Raises ValueError for tokens that are no h x w grid and what ops.local_assign refuses. No gradient.
    """
    B, N, C = x.shape
    if h * w != N:
        raise ValueError(f"cluster: x has {N} tokens, a grid of {h} x {w} has {h * w}; leave the prefix out")
    grid = x.view(B, h, w, C)
    centres = F.adaptive_avg_pool2d(grid.float().permute(0, 3, 1, 2), (gh, gw)).permute(0, 2, 3, 1).contiguous()
    centres = ops.local_assign(grid, centres.to(x.dtype), window, "l2", tau, iterations)[2]
    return Clusters(centres.view(B, gh * gw, C).to(x.dtype), x)


def reconstruct(centres: Tensor, clusters: Clusters, tau: float = 0.01, k: int = 20, norm: str = "l2") -> Tensor:
    """The tokens (B, N, C) of what has become of the centres (B, M, C). k above M is M. No gradient."""
    if norm not in NORMS:
        raise ValueError(f"reconstruct: norm={norm!r} is not one of {', '.join(NORMS)}")
    if k < 1 or centres.shape[:2] != clusters.centres.shape[:2]:
        came = f"k={k}, centres {tuple(centres.shape)}"
        raise ValueError(f"reconstruct: {came}; expected k >= 1 and centres like {tuple(clusters.centres.shape)}")
    k = min(k, centres.shape[1])
    distance, index = ops.match_tokens(clusters.x, clusters.centres, "l2", k)
    if norm == "l1":
        distance = distance - distance[..., :1]
    weight = F.normalize(torch.exp(-tau * distance), p=int(norm[1]), dim=-1, eps=TINY)
    return ops.mix_tokens(centres, index.flatten(1), weight=weight.flatten(1), width=k)


class ClusteredBlocks(nn.Module):
    """Blocks one after the other, those from alpha to before beta on cluster centres: for dense models, untrained.

    x (B, p + h w, C) to the same; the prefix goes through all blocks beside the tokens or the centres. A block must
    take any number of tokens: one with a position of its own in the attention does not.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        alpha: int,
        beta: int,
        grid: tuple[int, int],
        clusters: tuple[int, int],
        *,
        window: int = 5,
        tau: float = 0.01,
        iterations: int = 5,
        k: int = 20,
        norm: str = "l2",
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        if not 0 <= alpha < beta <= len(self.blocks):
            depth = len(self.blocks)
            raise ValueError(f"ClusteredBlocks: alpha={alpha}, beta={beta}; expected 0 <= alpha < beta <= {depth}")
        if not (1 <= clusters[0] <= grid[0] and 1 <= clusters[1] <= grid[1]):
            raise ValueError(f"ClusteredBlocks: {clusters} clusters of a grid of {grid}; use at most as many each way")
        if norm not in NORMS:
            raise ValueError(f"ClusteredBlocks: norm={norm!r} is not one of {', '.join(NORMS)}")
        self.alpha, self.beta, self.grid, self.clusters = alpha, beta, grid, clusters
        self.window, self.tau, self.iterations, self.k, self.norm = window, tau, iterations, k, norm
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        p = self.num_prefix_tokens
        for block in self.blocks[: self.alpha]:
            x = block(x)
        clusters = cluster(x[:, p:].contiguous(), *self.grid, *self.clusters, self.window, self.tau, self.iterations)
        x = torch.cat([x[:, :p], clusters.centres], 1)
        for block in self.blocks[self.alpha : self.beta]:
            x = block(x)
        tokens = reconstruct(x[:, p:].contiguous(), clusters, self.tau, self.k, self.norm)
        x = torch.cat([x[:, :p], tokens], 1)
        for block in self.blocks[self.beta :]:
            x = block(x)
        return x

    def extra_repr(self) -> str:
        where = f"blocks {self.alpha}..{self.beta}, grid={self.grid}, clusters={self.clusters}, window={self.window}"
        return f"{where}, tau={self.tau}, iterations={self.iterations}, k={self.k}, norm={self.norm!r}"
