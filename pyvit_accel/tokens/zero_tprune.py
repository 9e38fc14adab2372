"""Zero-TPrune: without training, drop patches that are like a more important one, then those of least importance.

    importance   s <- A^T s per head, A the block's own attention: tokens vote for those they attend to
    heads        sqrt of the mean of s^2 over the heads whose scores vary neither too little nor too much
    similar      the less important half of the patches by one vote; those of them most like one of the other half go
    stay         the patches of most importance among the rest, after more votes in shallow blocks

It needs q and k only, and what follows is per token: the block attends from the tokens that stay.

Wang, Dedhia and Jha, Zero-TPrune, arXiv:2305.17328; the paper leaves open what is here the keys' concatenation over the
heads, A normalised again without the dropped tokens, and the scores' scale in the test of their variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyvit_accel import ops
from pyvit_accel.modules.token_step import Heads, Rows, TokenState, TokenStep, check_class_token

from ._index import rest_of
from .schedule import Steps, at_layers, method

STARTS = ("class", "uniform")


def start_scores(q: Tensor, start: str = "class") -> Tensor:
    """(B, H, N) float32 of q (B, H, N, D): 1 / N each; "class": sqrt(N) / N of the first token."""
    B, H, N, _ = q.shape
    s = torch.full((B, H, N), 1 / N, device=q.device)
    if start == "class":
        s[..., 0] *= math.sqrt(N)
    return s


def over_heads(s: Tensor, low: float = 0.01, high: float = 0.7, scaled: bool = True) -> Tensor:
    """s (B, H, N) to (B, N): root mean square over the heads whose variance is in low .. high; over all if none is.

    scaled: the variance is that of N s, whose mean is 1. The variance of s itself is below 1 / N.
    """
    variance = (s * s.shape[-1] if scaled else s).var(-1, correction=0)
    counts = (low <= variance) & (variance <= high)
    counts = counts | ~counts.any(1, keepdim=True)
    weight = counts.to(s.dtype)[..., None]
    return ((s.square() * weight).sum(1) / weight.sum(1)).sqrt()


def without_similar(importance: Tensor, keys: Tensor, similar: int, num_prefix_tokens: int) -> Tensor:
    """index (B, N - similar) int32, ascending: without those of the less important half most like one of the other.

    importance (B, N) float32; keys (B, N, D) float. Of an odd number of patches the middle one is important.
    """
    N, p = importance.shape[1], num_prefix_tokens
    index, other, _ = ops.select_tokens(importance, (N - p + 1) // 2, p, "index")
    value, _ = ops.match_tokens(ops.mix_tokens(keys, other), ops.mix_tokens(keys, index), first=p)
    _, different, _ = ops.select_tokens(value[..., 0], similar)
    return torch.cat([index, other.gather(1, different.long())], 1).sort(1).values


class KeepImportant(TokenStep):
    """ceil(rate n) of n patches stay, by index. similar: how many of the others go because they are like one.

    iterations   votes that decide who stays; who is compared with whom is decided by one
    start        "class": the class token's votes count more; "uniform": for models that do not read it
    low, high, scaled   of over_heads
    """

    drops = True

    def __init__(
        self,
        rate: float,
        similar: int = 0,
        iterations: int = 1,
        start: str = "class",
        low: float = 0.01,
        high: float = 0.7,
        scaled: bool = True,
    ) -> None:
        super().__init__()
        if not 0 < rate <= 1:
            raise ValueError(f"Zero-TPrune: rate={rate}; use a part of the patches, above 0 and at most 1")
        if similar < 0 or iterations < 1:
            raise ValueError(f"Zero-TPrune: similar={similar}, iterations={iterations}; use 0 and 1, or more")
        if start not in STARTS:
            raise ValueError(f"Zero-TPrune: start={start!r} is not one of {', '.join(STARTS)}")
        self.rate, self.similar, self.iterations = rate, similar, iterations
        self.start, self.low, self.high, self.scaled = start, low, high, scaled

    def keep(self, patches: int) -> int:
        return math.ceil(self.rate * patches)

    def rows(self, N: int, num_prefix_tokens: int) -> Rows:
        if self.start == "class":
            check_class_token("Zero-TPrune", num_prefix_tokens)
        n = N - num_prefix_tokens
        most = min(n // 2, n - self.keep(n))
        if self.similar > most:
            came = f"similar={self.similar} of {n} patches, {self.keep(n)} of which stay"
            raise ValueError(f"Zero-TPrune: {came}; at most {most} can go, half of them and none that stays")
        out = num_prefix_tokens + self.keep(n)
        return Rows(N, out, out, out)

    def _importance(self, q: Tensor, k: Tensor, scale: float, iterations: int, key_bias: Tensor | None) -> Tensor:
        s = ops.propagate(q, k, start_scores(q, self.start), scale, iterations, key_bias)
        return over_heads(s, self.low, self.high, self.scaled)

    def prune(self, heads: Heads, x: Tensor, state: TokenState) -> Tensor | None:
        N, p = x.shape[1], state.num_prefix_tokens
        keep = self.keep(N - p)
        if keep == N - p:
            return None
        (q, k), key_bias = heads.floats(), state.key_bias
        left = None
        if self.similar:
            once = self._importance(q, k, heads.scale, 1, key_bias)
            left = without_similar(once, k.transpose(1, 2).flatten(2), self.similar, p)
            at = left.long()
            q, k = (t.gather(2, at[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3])) for t in (q, k))
            key_bias = None if key_bias is None else key_bias.gather(1, at)
        importance = self._importance(q, k, heads.scale, self.iterations, key_bias)
        index, dropped, inverse = ops.select_tokens(importance, keep, p, "index")
        if left is not None:
            index = left.gather(1, index.long())
            dropped, inverse = rest_of(index, N)
        state.keep(index, inverse, dropped, x)
        return index

    def config(self) -> dict:
        names = ("rate", "similar", "iterations", "start", "low", "high", "scaled")
        return {name: getattr(self, name) for name in names}


def _each(name: str, value: float | Sequence[float], layers: Sequence[int]) -> list[float]:
    values = [value] * len(layers) if isinstance(value, int | float) else list(value)
    if len(values) != len(layers):
        raise ValueError(f"Zero-TPrune: {name} has {len(values)} entries for {len(layers)} layers; pass one each")
    return values


@method
def zero_tprune(
    rate: float | Sequence[float] = 0.8,
    similar: int | Sequence[int] = 10,
    layers: Sequence[int] = (1, 3, 6, 9),
    iterations: Sequence[int] = (30, 5, 1),
    start: str = "class",
    low: float = 0.01,
    high: float = 0.7,
    scaled: bool = True,
) -> Callable[[int], Steps]:
    """The part `rate` of the patches stays in each of the layers, counted from 0; `similar` of the others are alike.

    iterations: votes in the first three blocks of the model, between, and in the last three.
    """
    rates, counts = _each("rate", rate, layers), _each("similar", similar, layers)
    if len(iterations) != 3:
        raise ValueError(f"Zero-TPrune: iterations={tuple(iterations)}; pass three: first blocks, middle and last")
    made = [KeepImportant(r, n, 1, start, low, high, scaled) for r, n in zip(rates, counts, strict=True)]

    def votes(layer: int, depth: int) -> int:
        return iterations[2 if layer >= depth - 3 else 0 if layer < 3 else 1]

    return lambda depth: at_layers(
        layers,
        depth,
        lambda stage: KeepImportant(**made[stage].config() | {"iterations": votes(layers[stage], depth)}),
    )
