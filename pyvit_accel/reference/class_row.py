"""The class token's row of attention, the mean over the heads:

    t[b, h, j] = (q[b, h, 0] . k[b, h, j]) q_scale[b, h, 0] k_scale[b, h, j] softmax_scale + key_bias[b, j]
    row[b, j]  = mean over h of e^t[b, h, j] / sum_i e^t[b, h, i],  0 where no key is seen

Computed in float64. Arguments: ops/class_row.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def class_row(
    q: Tensor, k: Tensor, q_scale: Tensor, k_scale: Tensor, softmax_scale: float, key_bias: Tensor | None
) -> Tensor:
    products = (q[:, :, :1].double() @ k.double().mT)[:, :, 0]
    scores = products * (q_scale[:, :, :1].double() * k_scale.double() * softmax_scale)
    if key_bias is not None:
        scores = scores + key_bias[:, None].double()
    unseen = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return scores.softmax(dim=-1).masked_fill(unseen, 0).mean(dim=1).float()
