"""DyT: a gate says which tokens the MLP of a block is for; a small adapter beside it is for all of them.

    out = x + adapter(x),  out[selected] += mlp(norm(x[selected]))

Selected are the prefix and the tokens with router(x) > 0. TokenDispatcher is the float form, that can be trained;
DispatchedBlock, quantised, computes the selected rows only and adds them in place.

Zhao et al., Dynamic Tuning Towards Parameter and Inference Efficiency for ViT Adaptation, arXiv:2403.11808.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit_accel import ops
from pyvit_accel.modules import QuantBlock
from pyvit_accel.modules.gradient import refuse_gradient

from .packed import pack, packed_mlp
from .routing import TokenGate, chosen


class Adapter(nn.Module):
    """scale up(relu(down(x))), x (..., C); up starts at 0, so that a new adapter does nothing."""

    def __init__(self, dim: int, hidden: int = 64, scale: float = 0.1) -> None:
        super().__init__()
        self.down, self.up, self.scale = nn.Linear(dim, hidden), nn.Linear(hidden, dim), scale
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.relu(self.down(x))) * self.scale


class TokenDispatcher(nn.Module):
    """The second half of a float block, x (B, N, C) to the same.

    In training all tokens are computed and `selection` (B, N) is what the gate drew, with its gradient, for
    selection_loss. In inference ceil(capacity N) rows are, the best of those selected; without gradient.
    """

    def __init__(
        self, gate: TokenGate, adapter: nn.Module, norm: nn.Module, mlp: nn.Module, capacity: float = 1.0
    ) -> None:
        super().__init__()
        if not 0 < capacity <= 1:
            raise ValueError(f"TokenDispatcher: capacity={capacity}; use a part of the tokens, above 0 and at most 1")
        self.gate, self.adapter, self.norm, self.mlp, self.capacity = gate, adapter, norm, mlp, capacity
        self.selection: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = x + self.adapter(x)
        if self.training:
            self.selection = self.gate.sample(x)
            return out + self.selection[..., None].to(x.dtype) * self.mlp(self.norm(x))
        self.selection = None
        logits = self.gate.logits(x)
        index, inverse = chosen(logits > 0, logits, math.ceil(self.capacity * x.shape[1]))
        y = self.mlp(self.norm(ops.mix_tokens(x, index)))
        return ops.mix_tokens(y, inverse, base=out)

    def extra_repr(self) -> str:
        return f"capacity={self.capacity}"


class DispatchedBlock(nn.Module):
    """A QuantBlock whose MLP is for the selected tokens only, x (B, N, C) float in and out. Frozen."""

    def __init__(self, block: QuantBlock, gate: TokenGate, adapter: nn.Module) -> None:
        super().__init__()
        self.block, self.gate, self.adapter = block, gate, adapter
        self.requires_grad_(False)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        block, dtype = self.block, x.dtype
        y = x.detach().float().contiguous()
        y = block.project(block.attention.weigh(block.heads(y), attn_mask), y, None, None)
        out = (y + self.adapter(y)).contiguous()
        rows, added = (t.view(-1, t.shape[2]) for t in (y, out))
        packed_mlp(block.norm2, block.mlp, rows, added, pack(self.gate(y)), block.layer_scale2)
        return refuse_gradient(out.to(dtype), x)


def selection_loss(
    selections: Sequence[Tensor], target: float = 0.5, weight: float = 2.0, floor: float = 0.1
) -> Tensor:
    """weight ((mean - target)^2 + what each image lacks, in each block, of selecting the part `floor`).

    selections  one (B, N) per block: TokenDispatcher.selection after a forward in training
    """
    if not selections or any(s is None for s in selections):
        raise ValueError(f"selection_loss: {len(selections)} blocks, not all of which ran in training mode")
    each = torch.stack(list(selections), 1)
    lacking = (floor - each.mean(-1)).clamp(min=0).sum()
    return weight * ((each.mean() - target) ** 2 + lacking)
