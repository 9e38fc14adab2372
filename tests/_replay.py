"""Replay: the parts that an adapter found, put together again in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit_accel.adapters import find
from pyvit_accel.errors import Unsupported
from pyvit_accel.modules.parts import AttentionParts, BlockParts, MlpParts

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def attention(parts: AttentionParts, x: Tensor, mask: Tensor | None = None) -> Tensor:
    qkv = torch.cat([linear(x) for linear in parts.qkv], dim=-1)
    q, k, v = (t.unflatten(-1, (parts.num_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
    q = q if parts.q_norm is None else parts.q_norm(q)
    k = k if parts.k_norm is None else parts.k_norm(k)
    logits = parts.scale * q @ k.transpose(-2, -1)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    return parts.proj((logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


def mlp(parts: MlpParts, x: Tensor) -> Tensor:
    return parts.fc2(ACTIVATIONS[parts.activation](parts.fc1(x)))


def block(parts: BlockParts, x: Tensor, mask: Tensor | None = None) -> Tensor:
    scale1 = 1 if parts.layer_scale1 is None else parts.layer_scale1
    scale2 = 1 if parts.layer_scale2 is None else parts.layer_scale2
    x = x + scale1 * attention(parts.attention, parts.norm1(x), mask)
    return x + scale2 * mlp(parts.mlp, parts.norm2(x))


class Replay(nn.Module):
    """Stands for an accelerated module: forward(x, attn_mask=None) over the parts of a block or an attention."""

    def __init__(self, parts: BlockParts | AttentionParts) -> None:
        super().__init__()
        self.parts, self.calls = parts, 0

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        self.calls += 1
        run = block if isinstance(self.parts, BlockParts) else attention
        return run(self.parts, x, attn_mask)


def replace(model: nn.Module, table: dict) -> list[Replay]:
    """Every module that `table` knows and does not refuse becomes a wrapped Replay of its parts."""
    replays = []
    for name, module in list(model.named_modules()):
        adapter = find(table, module)
        if adapter is None:
            continue
        try:
            replay = Replay(adapter.parts(module))
        except Unsupported:
            continue
        model.set_submodule(name, adapter.wrap(replay, module))
        replays.append(replay)
    return replays


def randomize(model: nn.Module) -> nn.Module:
    """Weights with which no part is the identity, zero or small enough to go unnoticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            size = 0.3 if parameter.ndim > 1 else 1.0
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def matches(a: Tensor, b: Tensor) -> bool:
    """Equal but for fp32 rounding in another order of operations."""
    return a.shape == b.shape and (a - b).abs().max().item() <= 1e-5 * max(1.0, b.abs().max().item())
