"""select_tokens, split_tokens, group_tokens: which tokens stay, as small index arrays; no count leaves the device."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel import reference

from ._library import define

ORDERS = ("rank", "index")


def _ints(t: Tensor, *shape) -> Tensor:
    return t.new_empty(shape, dtype=torch.int32)


_select = define(
    "select_tokens",
    "(Tensor scores, int keep, int num_prefix_tokens, str order) -> (Tensor, Tensor, Tensor)",
    reference.select_tokens,
    lambda s, keep, p, order: (
        _ints(s, s.shape[0], p + keep), _ints(s, s.shape[0], s.shape[1] - p - keep), _ints(s, *s.shape)
    ),
)  # fmt: skip
_split = define(
    "split_tokens",
    "(Tensor mask, int num_prefix_tokens) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.split_tokens,
    lambda m, p: (_ints(m, *m.shape), _ints(m, m.shape[0]), _ints(m, m.shape[0] + 1), _ints(m, m.numel())),
)
_group = define(
    "group_tokens",
    "(Tensor assign, int groups, Tensor? weight) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.group_tokens,
    lambda a, groups, weight: (
        _ints(a, a.shape[0], groups + 1),
        _ints(a, *a.shape),
        a.new_empty(a.shape, dtype=torch.float32),
        a.new_empty(a.shape[0], groups, dtype=torch.float32),
    ),
)


def check_rows_of(op: str, name: str, t: Tensor, dtypes: tuple[torch.dtype, ...], dims: int = 2) -> None:
    """Raise unless t is (B, N, ...) of one of the dtypes."""
    if t.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be {' or '.join(map(str, dtypes))}, got {t.dtype}")
    if t.dim() != dims:
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {dims} dimensions")


def check_prefix(op: str, num_prefix_tokens: int, N: int) -> None:
    if not 0 <= num_prefix_tokens <= N:
        raise ValueError(f"{op}: num_prefix_tokens={num_prefix_tokens} is outside 0..{N}, the tokens there are")


FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def select_tokens(
    scores: Tensor, keep: int, num_prefix_tokens: int = 0, order: str = "rank"
) -> tuple[Tensor, Tensor, Tensor]:
    """The `keep` tokens with the largest scores, after the prefix.

    scores   (B, N)                 float; those of the prefix are not read
    keep     int                    how many besides the prefix
    order    "rank" | "index"       by descending score, equal ones by index; or by index
    returns  index (B, p + keep)    int32: the prefix, then those that stay
             dropped (B, N - p - keep)  int32, ascending
             inverse (B, N)         int32: the place in index, -1 where dropped

    -0.0 equals 0.0, NaN ranks as -inf. Raises ValueError for counts that do not fit N. No gradient.
    Reference: reference/select_tokens.py.
    """
    check_rows_of("select_tokens", "scores", scores, FLOATS)
    N = scores.shape[1]
    check_prefix("select_tokens", num_prefix_tokens, N)
    if not 0 <= keep <= N - num_prefix_tokens:
        raise ValueError(
            f"select_tokens: keep={keep} of {N} tokens, {num_prefix_tokens} of them prefix; "
            f"use 0..{N - num_prefix_tokens}"
        )
    if order not in ORDERS:
        raise ValueError(f"select_tokens: order={order!r} is not one of {', '.join(ORDERS)}")
    return _select(scores, keep, num_prefix_tokens, order)


def split_tokens(mask: Tensor, num_prefix_tokens: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens that stay and tokens that do not, when how many is not known to the host.

    mask         (B, N)    bool, True stays; the prefix stays whatever it says
    returns
      index      (B, N)    int32: those that stay, ascending, then the others, ascending
      count      (B,)      int32: how many stay
      cu_seqlens (B + 1,)  int32: 0 and the running sum of count
      rows       (B N,)    int32: b N + i of all that stay, image after image, then -1

    Raises TypeError and ValueError for what does not fit. No gradient. Reference: reference/select_tokens.py.
    """
    check_rows_of("split_tokens", "mask", mask, (torch.bool,))
    check_prefix("split_tokens", num_prefix_tokens, mask.shape[1])
    return _split(mask, num_prefix_tokens)


def group_tokens(assign: Tensor, groups: int, weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tokens of every group, as the lists that mix_tokens takes: a stable counting sort.

    assign   (B, N)            int32: the group of a token, 0 .. groups - 1, or -1 for none; checked on the CPU only
    weight   (B, N)            float32; None: ones
    returns
      ptr    (B, groups + 1)   int32: group g has the entries ptr[g] .. ptr[g + 1]
      col    (B, N)            int32: its tokens, ascending; -1 beyond the last group
      weight (B, N)            float32, of the entries; 0 beyond
      total  (B, groups)       float32: the sum of a group's weights

    Raises TypeError and ValueError for what does not fit. No gradient. Reference: reference/select_tokens.py.
    """
    check_rows_of("group_tokens", "assign", assign, (torch.int32,))
    if groups < 0:
        raise ValueError(f"group_tokens: groups={groups}; use 0 or more")
    if weight is not None:
        check_rows_of("group_tokens", "weight", weight, (torch.float32,))
        if weight.shape != assign.shape:
            raise ValueError(f"group_tokens: weight {tuple(weight.shape)} must be like assign {tuple(assign.shape)}")
    return _group(assign, groups, weight)
