"""match_tokens, merge_pairs, mean_heads: who is like whom, with no matrix of similarities in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel import reference

from ._library import define
from .select_tokens import FLOATS, check_prefix, check_rows_of

METRICS = ("cosine", "dot", "l2")

_match = define(
    "match_tokens",
    "(Tensor a, Tensor b, str metric, int topk, int first, Tensor? exclude) -> (Tensor, Tensor)",
    reference.match_tokens,
    lambda a, b, metric, topk, *rest: (
        a.new_empty(*a.shape[:2], topk, dtype=torch.float32), a.new_empty(*a.shape[:2], topk, dtype=torch.int32)
    ),
)  # fmt: skip
_pairs = define(
    "merge_pairs",
    "(Tensor value, Tensor index, int num_tokens, int merges, int num_prefix_tokens) -> Tensor",
    reference.merge_pairs,
    lambda value, index, num_tokens, *rest: index.new_empty(value.shape[0], num_tokens),
)
_mean_heads = define(
    "mean_heads",
    "(Tensor x, Tensor scale) -> Tensor",
    reference.mean_heads,
    lambda x, scale: x.new_empty(x.shape[0], *x.shape[2:], dtype=torch.float32),
)


def match_tokens(
    a: Tensor, b: Tensor, metric: str = "cosine", topk: int = 1, first: int = 0, exclude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The topk tokens of b that are nearest to each token of a, in the same image.

    a, b     (B, Na, D), (B, Nb, D)  float; any strides over contiguous D, so x[:, ::2] fits
    metric   "cosine" | "dot", largest first; "l2", squared, smallest first
    first    only tokens j >= first of b take part: the prefix does not
    exclude  (B, Na)                 int32: one j that i is not matched with, itself for example; -1 for none
    returns  value (B, Na, topk)     float32
             index (B, Na, topk)     int32, -1 (value -inf, l2: inf) where fewer are left

    Equal values in the order of j, NaN last. Norms below 1e-12 count as 1e-12: a zero row is like nothing. Raises
    TypeError and ValueError for what does not fit. No gradient. Reference: reference/match_tokens.py.
    """
    for name, t in (("a", a), ("b", b)):
        check_rows_of("match_tokens", name, t, FLOATS, 3)
    if a.dtype != b.dtype or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[2]:
        raise ValueError(f"match_tokens: a {a.dtype} {tuple(a.shape)} and b {b.dtype} {tuple(b.shape)} do not fit")
    if metric not in METRICS:
        raise ValueError(f"match_tokens: metric={metric!r} is not one of {', '.join(METRICS)}")
    if not 1 <= topk <= max(b.shape[1], 1):
        raise ValueError(f"match_tokens: topk={topk}, but b has {b.shape[1]} tokens")
    if not 0 <= first <= b.shape[1]:
        raise ValueError(f"match_tokens: first={first} is outside 0..{b.shape[1]}, the tokens of b")
    if exclude is not None:
        check_rows_of("match_tokens", "exclude", exclude, (torch.int32,))
        if exclude.shape != a.shape[:2]:
            raise ValueError(f"match_tokens: exclude {tuple(exclude.shape)} must be (B, Na) = {tuple(a.shape[:2])}")
    return _match(a, b, metric, topk, first, exclude)


def merge_pairs(value: Tensor, index: Tensor, num_tokens: int, merges: int, num_prefix_tokens: int = 0) -> Tensor:
    """Where each token goes when the `merges` most similar (even, odd) pairs become one token each: ToMe's step.

    value    (B, Na)  float32: of the tokens 0, 2, 4, ..., the similarity to their best of the tokens 1, 3, 5, ...
    index    (B, Na)  int32: which, counted among those; checked on the CPU only, where they merge
    merges   at most the even tokens that are not prefix, none where no odd token is left to merge with
    returns  (B, N)   int32: the new row of each of N = num_tokens, for group_tokens of N - merges groups

    New rows: the prefix, then the even tokens that stay, ascending (without a prefix by descending value), then the odd
    ones. Raises TypeError and ValueError for what does not fit. No gradient. Reference: reference/match_tokens.py.
    """
    check_rows_of("merge_pairs", "value", value, (torch.float32,))
    check_rows_of("merge_pairs", "index", index, (torch.int32,))
    N, even = num_tokens, (num_tokens + 1) // 2
    if value.shape != index.shape or value.shape[1] != even:
        shapes = f"value {tuple(value.shape)}, index {tuple(index.shape)}"
        raise ValueError(f"merge_pairs: {shapes}; of {N} tokens {even} are even")
    check_prefix("merge_pairs", num_prefix_tokens, N)
    partners = N // 2 - num_prefix_tokens // 2
    most = even - (num_prefix_tokens + 1) // 2 if partners > 0 else 0
    if not 0 <= merges <= most:
        raise ValueError(f"merge_pairs: merges={merges}; {N} tokens with a prefix of {num_prefix_tokens} have {most}")
    return _pairs(value, index, N, merges, num_prefix_tokens)


def mean_heads(x: Tensor, scale: Tensor) -> Tensor:
    """The mean over the heads of x scale: ToMe's features, of the codes of k.

    x        (B, H, N, D)  int8 codes or floats, any strides over contiguous D
    scale    float32, broadcastable to (B, H, N)
    returns  (B, N, D)     float32

    Raises TypeError and ValueError for what does not fit. No gradient. Reference: reference/match_tokens.py.
    """
    check_rows_of("mean_heads", "x", x, (torch.int8, *FLOATS), 4)
    if scale.dtype != torch.float32:
        raise TypeError(f"mean_heads: scale must be float32, got {scale.dtype}")
    try:
        scale = scale.expand(x.shape[:3])
    except RuntimeError:
        shape = tuple(x.shape[:3])
        raise ValueError(f"mean_heads: scale {tuple(scale.shape)} does not broadcast to {shape}") from None
    return _mean_heads(x, scale)
