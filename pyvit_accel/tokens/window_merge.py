"""Merging for models on grids (Swin, SAM): in each window the most similar tokens share one pass through the MLP.

Window attention adds a bias per pair of places, shifts its windows and hands a full grid on, so tokens can be merged
neither for it nor for good. The MLP, two thirds of a block's multiply-adds, is per token: in every window equally many
pairs become their mean, go through it once, and both get its output.

    y = unmerge(mlp(merge(x)))

The matching is ToMe's, on the MLP's own input: Bolya et al., Token Merging, arXiv:2210.09461.
"""

from __future__ import annotations

from torch import Tensor, nn

from pyvit_accel import ops

MOST = 16  # tokens on a side of the windows that are chosen when none is given


class MergedMlp(nn.Module):
    """x (B, h, w, C), or (B, N, C) of a grid, float in and out, for an MLP that takes any leading shape.

    ratio   the part of a window's tokens that merge, 0 to 0.5
    window  tokens on a side, which must divide h and w; None: the largest common divisor up to 16
    grid    rows and columns of x (B, N, C); None: it is square
    """

    def __init__(
        self, mlp: nn.Module, ratio: float, window: int | None = None, grid: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        check_ratio(ratio, window)
        self.mlp, self.ratio, self.window, self.grid = mlp, ratio, window, grid

    def forward(self, x: Tensor) -> Tensor:
        B, h, w = _grid(x, self.grid)
        side = _window(h, w, self.window)
        C, T = x.shape[-1], side * side
        merges = int(self.ratio * T)
        if merges == 0:
            return self.mlp(x)
        windows = x.reshape(B, h // side, side, w // side, side, C).transpose(2, 3)
        tokens = windows.reshape(-1, T, C)
        value, index = ops.match_tokens(tokens[:, ::2], tokens[:, 1::2])
        assign = ops.merge_pairs(value[..., 0], index[..., 0], T, merges, 0)
        ptr, col, weight, _ = ops.group_tokens(assign, T - merges)
        y = ops.mix_tokens(self.mlp(ops.mix_tokens(tokens, col, ptr, weight, reduce="mean")), assign)
        return y.view(windows.shape).transpose(2, 3).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}, window={self.window}"


def check_ratio(ratio: float, window: int | None) -> None:
    if not 0 <= ratio <= 0.5:
        raise ValueError(f"window merge: ratio={ratio}; at most half of a window's tokens can merge, use 0 to 0.5")
    if window is not None and window < 2:
        raise ValueError(f"window merge: window={window}; use 2 or more tokens on a side")


def _grid(x: Tensor, grid: tuple[int, int] | None) -> tuple[int, int, int]:
    if x.dim() == 4:
        return tuple(x.shape[:3])
    if x.dim() == 3 and grid is not None and grid[0] * grid[1] == x.shape[1]:
        return x.shape[0], *grid
    side = round(x.shape[1] ** 0.5) if x.dim() == 3 else 0
    if side * side != (x.shape[1] if x.dim() == 3 else -1):
        raise ValueError(f"window merge: x has shape {tuple(x.shape)}; expected (B, h, w, C), or N = h h tokens")
    return x.shape[0], side, side


def _window(h: int, w: int, window: int | None) -> int:
    if window is None:
        return next(n for n in range(min(h, w, MOST), 0, -1) if h % n == 0 and w % n == 0)
    if h % window or w % window:
        fitting = ", ".join(str(n) for n in range(2, min(h, w) + 1) if h % n == 0 and w % n == 0)
        raise ValueError(f"window merge: windows of {window} do not tile {h} x {w} tokens; use one of {fitting}")
    return window
