"""PatchDropout: random patches go, what any other method has to beat.

Which ones depends on the seed, the image's place in the batch and the patch alone, so every run and device drops the
same. Liu et al., PatchDropout, arXiv:2208.07220.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyvit_accel import ops
from pyvit_accel.modules.token_step import Rows, TokenState, TokenStep

from .schedule import Steps, at_layers, method

BITS_32 = 0xFFFFFFFF
FAR = 0x9E3779B9  # from any place: seed 3 is not to meet place 3


def _mix(x):
    """A 32-bit hash of integers below 2^32, Python's or int64: multiplications and shifts, each of them invertible."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & BITS_32
    x = (x ^ (x >> 15)) * 0x846CA68B & BITS_32
    return x ^ (x >> 16)


def noise(B: int, N: int, seed: int, device: torch.device | None = None) -> Tensor:
    """(B, N) float32, whole numbers below 2^24: no generator, so it is the same everywhere and compiles."""
    place = torch.arange(B * N, device=device).view(B, N)
    return (_mix(_mix(place) ^ _mix(seed + FAR & BITS_32)) >> 8).float()


class DropRandom(TokenStep):
    """max(1, int(n (1 - prob))) of n patches stay, in random order or by index."""

    drops = True

    def __init__(self, prob: float, seed: int = 0, order: str = "rank") -> None:
        super().__init__()
        if not 0 <= prob < 1:
            raise ValueError(f"PatchDropout: prob={prob}; use the part that goes, 0 or more and below 1")
        if order not in ("rank", "index"):
            raise ValueError(f"PatchDropout: order={order!r}; use 'rank', which is random, or 'index'")
        self.prob, self.seed, self.order = prob, seed, order

    def keep(self, patches: int) -> int:
        return max(1, int(patches * (1 - self.prob)))

    def rows(self, N: int, num_prefix_tokens: int) -> Rows:
        out = num_prefix_tokens + self.keep(N - num_prefix_tokens)
        return Rows(out, out, out, out)

    def before(self, x: Tensor, state: TokenState) -> Tensor:
        (B, N), p = x.shape[:2], state.num_prefix_tokens
        index, dropped, inverse = ops.select_tokens(noise(B, N, self.seed, x.device), self.keep(N - p), p, self.order)
        state.keep(index, inverse, dropped, x)
        return ops.mix_tokens(x, index)

    def config(self) -> dict:
        return {"prob": self.prob, "seed": self.seed, "order": self.order}


@method
def patch_dropout(
    prob: float = 0.25, layers: Sequence[int] = (0,), seed: int = 0, order: str = "rank"
) -> Callable[[int], Steps]:
    """The part `prob` of the patches goes in front of each of the layers, counted from 0, at random from the seed."""
    DropRandom(prob, seed, order)
    return lambda depth: at_layers(layers, depth, lambda stage: DropRandom(prob, seed + stage, order))
