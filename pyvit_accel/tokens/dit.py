"""Dynamic token routing: every token passes through a block, or past it, as a gate of its own says.

    out[selected] = block(x[selected]),  out[others] = x[others]

Selected tokens attend to each other only. No code of the paper was published: this is our own reading of its row gate,
without its scale gate, and claims none of its numbers.

Ma et al., Dynamic Token Routing, arXiv:2308.03409.
"""

from __future__ import annotations

from torch import Tensor, nn

from .routing import Runner, TokenGate


class RoutedBlock(nn.Module):
    """x (B, N, C) float in and out. block, mode and capacity as in Runner; "packed" needs a QuantBlock.

    In training all tokens are computed, and `selection` (B, N) is what the gate drew, with its gradient.
    """

    def __init__(self, gate: TokenGate, block: nn.Module, mode: str = "packed", capacity: float = 1.0) -> None:
        super().__init__()
        self.gate, self.block, self.runner = gate, block, Runner(mode, capacity)
        self.runner.check([block])
        self.selection: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.selection = self.gate.sample(x)
            seen = (self.selection > 0.5)[:, None, None]
            y = self.block(x, attn_mask=seen | ~seen.any(-1, keepdim=True))  # keys for who is not selected either
            return x + self.selection[..., None].to(x.dtype) * (y - x)
        self.selection = None
        logits = self.gate.logits(x)
        return self.runner([self.block], x, logits > 0, logits)

    def extra_repr(self) -> str:
        return f"mode={self.runner.mode!r}, capacity={self.runner.capacity}"
