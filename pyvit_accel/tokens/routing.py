"""Blocks that run on some tokens only, of which how many there are is data: three ways to the same result.

    masked   all tokens are computed; the others are no keys, and keep what they held. The meaning, and no gain.
    padded   a fixed number of rows is gathered, computed and put back; those that are not wanted are no keys
    packed   the rows of all images one after the other, with offsets; nothing else is computed. QuantBlock only

A token that is not selected passes through unchanged. Nothing here waits for the device: no count becomes a number.
Packed is, bit for bit, the block on the selected tokens of an image alone. So are the others when hidden keys leave no
trace: in probabilities of diffused bytes, QuantAttention's where v has a scale per token, they do, below half a byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit_accel import ops
from pyvit_accel.modules import QuantBlock

from .packed import pack, packed_block

MODES = ("masked", "padded", "packed")


@dataclass(frozen=True)
class Runner:
    """How blocks run on selected tokens.

    mode      "masked", "padded" or "packed"
    capacity  of "padded": the part of the tokens that there is room for; when more are selected those of the lowest
              score are not computed
    """

    mode: str = "packed"
    capacity: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"Runner: mode={self.mode!r} is not one of {', '.join(MODES)}")
        if not 0 < self.capacity <= 1 or (self.capacity < 1 and self.mode != "padded"):
            came = f"capacity={self.capacity} with mode={self.mode!r}"
            raise ValueError(f"Runner: {came}; use a part of the tokens, above 0 and at most 1, and below 1 if padded")

    def check(self, blocks: Iterable[nn.Module]) -> None:
        """Raise ValueError for blocks that cannot run so."""
        for block in blocks if self.mode == "packed" else ():
            if not isinstance(block, QuantBlock):
                name = type(block).__name__
                raise ValueError(f"Runner: mode='packed' came with a {name}; only QuantBlocks can be packed")
            if block.attention.position is not None:
                raise ValueError("Runner: mode='packed' came with attention that has a position; use 'padded'")

    def __call__(self, blocks: Iterable[nn.Module], x: Tensor, mask: Tensor, scores: Tensor | None = None) -> Tensor:
        """The tokens of mask (B, N) through the blocks, all the others as they are.

        x       (B, N, C)  float; blocks take (B, K, C) and attn_mask (B, 1, 1, K) bool
        scores  (B, N)     float: which come first when there is not room for all; None: by their index
        returns (B, N, C)  a new tensor
        """
        if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
            came = f"mask {mask.dtype} {tuple(mask.shape)} of x {tuple(x.shape)}"
            raise ValueError(f"Runner: {came}; expected bool {tuple(x.shape[:2])}")
        if x.numel() == 0:
            return x.clone()
        if self.mode == "packed":
            return _packed(blocks, x, mask)
        if self.mode == "masked":
            return _masked(blocks, x, mask)
        return _padded(blocks, x, *self._rows(mask, scores))

    def limit(self, mask: Tensor, scores: Tensor | None = None) -> Tensor:
        """mask (B, N), without the tokens that there is no room for."""
        return mask if self.mode != "padded" else self._rows(mask, scores)[1] >= 0

    def _rows(self, mask: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        scores = mask.float() if scores is None else scores.float()
        return chosen(mask, scores, math.ceil(self.capacity * mask.shape[1]))


def _masked(blocks: Iterable[nn.Module], x: Tensor, mask: Tensor) -> Tensor:
    for block in blocks:
        x = torch.where(mask[..., None], block(x, attn_mask=mask[:, None, None]), x)
    return x


def _padded(blocks: Iterable[nn.Module], x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    wanted = (inverse >= 0).gather(1, index.long())[:, None, None]
    y = ops.mix_tokens(x, index)
    for block in blocks:
        y = block(y, attn_mask=wanted)
    return torch.where((inverse >= 0)[..., None], ops.mix_tokens(y, inverse), x)


def _packed(blocks: Iterable[nn.Module], x: Tensor, mask: Tensor) -> Tensor:
    B, N, C = x.shape
    rows = x.reshape(B * N, C).to(torch.float32, copy=True)
    packed = pack(mask)
    for block in blocks:
        packed_block(block, rows, packed)
    return rows.view(B, N, C).to(x.dtype)


def chosen(mask: Tensor, scores: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """At most `room` of the tokens in mask (B, N), those of the highest scores.

    returns index   (B, room)  int32: these and, where there are fewer, others; ascending
            inverse (B, N)     int32: the place of a token of mask in index, -1 of all others
    """
    index, _, inverse = ops.select_tokens(scores.masked_fill(~mask, -torch.inf), room, order="index")
    return index, torch.where(mask, inverse, -1)


class TokenGate(nn.Module):
    """Which tokens are worth computing: those with a logit above 0 of a Linear on x itself; the prefix always is.

    In float32: in bfloat16 the sigmoid of small positive logits rounds to 0.5, and 0.5 is not selected.
    """

    def __init__(self, dim: int, num_prefix_tokens: int = 0, tau: float = 5.0) -> None:
        """tau: of the Gumbel sigmoid in training."""
        super().__init__()
        if tau <= 0:
            raise ValueError(f"TokenGate: tau={tau}; use a temperature above 0")
        self.router = nn.Linear(dim, 1)
        self.num_prefix_tokens, self.tau = num_prefix_tokens, tau

    def logits(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N) float32, infinity for the prefix."""
        logits = F.linear(x.float(), self.router.weight.float(), self.router.bias.float())[..., 0]
        prefix = torch.arange(x.shape[1], device=x.device) < self.num_prefix_tokens
        return logits.masked_fill(prefix, torch.inf)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N) bool."""
        return self.logits(x) > 0

    def sample(self, x: Tensor) -> Tensor:
        """(B, N) float32: 0 or 1, drawn with noise, with the gradient of a sigmoid: for training."""
        logits = self.logits(x)
        uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        soft = torch.sigmoid((logits + uniform.log() - (1 - uniform).log()) / self.tau)
        return (soft > 0.5).float() - soft.detach() + soft

    def extra_repr(self) -> str:
        return f"num_prefix_tokens={self.num_prefix_tokens}, tau={self.tau}"
