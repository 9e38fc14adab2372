"""What an index of the tokens that stay leaves out."""

from __future__ import annotations

import torch
from torch import Tensor


def rest_of(index: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """index (B, K) int32, of N = num_tokens: dropped (B, N - K) ascending, inverse (B, N) with -1 where dropped."""
    B, K = index.shape
    inverse = torch.full((B, num_tokens), -1, dtype=torch.int32, device=index.device)
    places = torch.arange(K, dtype=torch.int32, device=index.device).expand(B, K)
    inverse.scatter_(1, index.long(), places)
    dropped = (inverse >= 0).int().sort(dim=1, stable=True).indices[:, : num_tokens - K]
    return dropped.int().contiguous(), inverse
