"""Position: how an attention knows where its tokens stand, other than by their embeddings.

    q, k    = gain normalize(q), normalize(k)                          gain: cosine attention
    q, k    = rotated by (cos, sin)                                    rotary
    scores += bias[h, i, j]                                            bias: relative position in a window
    scores += q_i . table_h[y_i - y_j] + q_i . table_w[x_i - x_j]      tables: decomposed relative position

Swin, arXiv:2103.14030 and 2111.09883; RoPE, 2104.09864; MViTv2, 2112.01526.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Position(nn.Module):
    """What happens to float q and k before they are quantised, and what is added to their scores.

    bias    (H, N, N)                          float32 or None
    tables  (2 h - 1, D), (2 w - 1, D)         float32 or None: of h x w tokens; another grid interpolates
    gain    (H,)                               float32 or None: the scale of the scores, then, is 1
    rotary  "half" | "interleaved" | ""        which channels are turned together: d and d + D / 2, or 2 d and 2 d + 1
    """

    def __init__(
        self, bias: Tensor | None = None, tables: Sequence[Tensor] | None = None, gain: Tensor | None = None,
        rotary: str = "",
    ) -> None:  # fmt: skip
        super().__init__()
        self.rotary = rotary
        self.register_buffer("bias", bias)
        self.register_buffer("table_h", None if tables is None else tables[0])
        self.register_buffer("table_w", None if tables is None else tables[1])
        self.register_buffer("gain", gain)

    @property
    def reads_heads(self) -> bool:
        """Whether it needs q and k as floats: then the qkv matmul cannot write their codes."""
        return bool(self.rotary) or self.gain is not None or self.table_h is not None

    def heads(self, q: Tensor, k: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """q and k (B, H, N, D) as they are multiplied. rotary: cos and sin, broadcastable to (B, H, n, D), of the last
        n tokens; those before them have no place on the grid. None: there are none."""
        if self.gain is not None:
            q, k = F.normalize(q, dim=-1) * self.gain[:, None, None], F.normalize(k, dim=-1)
        if rotary is not None:
            q, k = (_rotate(x, *rotary, half=self.rotary == "half") for x in (q, k))
        return q, k

    def grid_bias(self, q: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """q (B, H, h w, D) times the tables: (B, H, h w, h), (B, H, h w, w), for the rows and columns of keys."""
        if self.table_h is None:
            return None
        if len(grid) != 2:
            raise ValueError("decomposed relative position: tokens came as (B, N, C); pass them as (B, h, w, C)")
        q = q.unflatten(2, tuple(grid))
        rows = torch.einsum("bnhwd,hkd->bnhwk", q, _between(self.table_h, grid[0]))
        columns = torch.einsum("bnhwd,wkd->bnhwk", q, _between(self.table_w, grid[1]))
        return rows.flatten(2, 3), columns.flatten(2, 3)

    def add_bias(self, bias: Tensor | None) -> Tensor | None:
        """bias, broadcastable to (B, H, N, N), with its own added."""
        if self.bias is None or bias is None:
            return bias if self.bias is None else self.bias
        return self.bias + bias

    def config(self) -> dict:
        shapes = {name: None if t is None else list(t.shape) for name, t in self._buffers.items()}
        return {"rotary": self.rotary, **shapes}

    @classmethod
    def from_config(cls, config: dict) -> Position:
        names = ("bias", "table_h", "table_w", "gain")
        bias, *tables, gain = (None if config[name] is None else torch.zeros(config[name]) for name in names)
        return cls(bias, None if tables[0] is None else tables, gain, config["rotary"])

    def extra_repr(self) -> str:
        kinds = {
            "relative bias": self.bias is not None, "decomposed relative": self.table_h is not None,
            f"rotary {self.rotary}": bool(self.rotary), "cosine": self.gain is not None,
        }  # fmt: skip
        return ", ".join(name for name, there in kinds.items() if there)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, half: bool) -> Tensor:
    before, x = x.split((x.shape[2] - cos.shape[-2], cos.shape[-2]), dim=2)
    if half:
        a, b = x.chunk(2, dim=-1)
        turned = torch.cat((-b, a), dim=-1)
    else:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return torch.cat((before, x * cos + turned * sin), dim=2)


def _between(table: Tensor, size: int) -> Tensor:
    """(size, size, D): the row of the table for query i and key j."""
    if table.shape[0] != 2 * size - 1:
        table = F.interpolate(table.T[None], size=2 * size - 1, mode="linear")[0].T
    at = torch.arange(size, device=table.device)
    return table[at[:, None] - at + size - 1]
