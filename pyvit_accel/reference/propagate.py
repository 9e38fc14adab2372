"""s <- A^T s, `iterations` times, A = softmax(q k^T softmax_scale + key_bias): weighted page rank of the tokens.

q, k      (B, H, N, D)  float
start     (B, H, N)     float32
key_bias  (B, N)        float32, or None
returns   (B, H, N)     float32; its sum over N is that of start

Wang, Dedhia and Jha, Zero-TPrune, arXiv:2305.17328.
"""

from __future__ import annotations

import torch
from torch import Tensor


def propagate(
    q: Tensor, k: Tensor, start: Tensor, softmax_scale: float, iterations: int, key_bias: Tensor | None
) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = q.to(dtype) @ k.to(dtype).mT * softmax_scale
    if key_bias is not None:
        scores = scores + key_bias[:, None, None].to(dtype)
    probabilities, s = scores.softmax(dim=-1), start.to(dtype)
    for _ in range(iterations):
        s = (s[:, :, None] @ probabilities)[:, :, 0]
    return s
