"""Attentions that know where tokens stand, put together from their parts in plain PyTorch, N x N scores and all."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from _replay import matches
from _vits import relative_error, spread
from torch import Tensor, nn

from pyvit_accel import accelerate, load, save
from pyvit_accel.adapters import ATTENTIONS, find
from pyvit_accel.modules import QuantAttention
from pyvit_accel.modules.build import Scheme, quant_attention
from pyvit_accel.modules.parts import AttentionParts


def rotated(x: Tensor, rotary: tuple[Tensor, Tensor], half: bool) -> Tensor:
    """As complex numbers: channels (a, b) are a + i b, turned by cos + i sin."""
    cos, sin = rotary
    x, before = x[:, :, -cos.shape[-2] :], x[:, :, : -cos.shape[-2]]
    D = x.shape[-1]
    pairs = torch.arange(D).view(2, D // 2) if half else torch.arange(D).view(D // 2, 2).T
    z = torch.complex(x[..., pairs[0]], x[..., pairs[1]])
    z = z * torch.complex(cos[..., pairs[0]], sin[..., pairs[0]])
    y = torch.empty_like(x)
    y[..., pairs[0]], y[..., pairs[1]] = z.real, z.imag
    return torch.cat([before, y], dim=2)


def decomposed(q: Tensor, tables: tuple[Tensor, Tensor], grid: tuple[int, int]) -> Tensor:
    """(B, H, N, N), one pair of tokens after the other."""
    h, w = grid
    B, H, N, _ = q.shape
    scores = torch.zeros(B, H, N, N)
    for i in range(N):
        for j in range(N):
            row = tables[0][i // w - j // w + h - 1] + tables[1][i % w - j % w + w - 1]
            scores[:, :, i, j] = q[:, :, i] @ row
    return scores


class Replay(nn.Module):
    """Called as QuantAttention is."""

    def __init__(self, parts: AttentionParts) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, rotary=None) -> Tensor:
        parts, grid, shape = self.parts, x.shape[1:-1], x.shape
        x = x.flatten(1, -2)
        qkv = torch.cat([linear(x) for linear in parts.qkv], dim=-1)
        q, k, v = (t.unflatten(-1, (parts.num_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        q = q if parts.q_norm is None else parts.q_norm(q)
        k = k if parts.k_norm is None else parts.k_norm(k)
        added = 0 if parts.bias is None else parts.bias[None]
        if parts.tables is not None:
            added = added + decomposed(q, parts.tables, grid)
        if parts.gain is not None:
            q, k = F.normalize(q, dim=-1) * parts.gain[None, :, None, None], F.normalize(k, dim=-1)
        if rotary is not None:
            q, k = (rotated(t, rotary, parts.rotary == "half") for t in (q, k))
        scores = parts.scale * q @ k.mT + added
        if attn_mask is not None:
            boolean = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if boolean else scores + attn_mask
        return parts.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)).view(shape)


def parts_of(module: nn.Module) -> AttentionParts:
    return find(ATTENTIONS, module).parts(module)


def replayed(module: nn.Module) -> nn.Module:
    return find(ATTENTIONS, module).wrap(Replay(parts_of(module)), module)


def accelerated(module: nn.Module, *, forget: bool = False) -> nn.Module:
    """forget: what the position adds to the scores."""
    parts = parts_of(module)
    if forget:
        parts = replace(parts, bias=None, tables=None)
    return find(ATTENTIONS, module).wrap(quant_attention(parts, Scheme()), module).eval()


# Measured relative errors of W8A8 on random weights: attentions 0.012 to 0.026, whole models 0.007 to 0.033.
# Without what the position adds an attention is off by 0.18 to 0.63.
QUANTISED, FORGOTTEN = 0.04, 0.15


def output(result: object) -> Tensor:
    """Of a module or a model."""
    if isinstance(result, Tensor):
        return result
    return result[0] if isinstance(result, tuple) else result.last_hidden_state


@torch.no_grad()
def check_attention(module: nn.Module, *args, position: bool = True) -> None:
    """Its parts are the module; in 8 bits it is close, and would not be without what the position adds."""
    module = spread(module)
    expected = output(module(*args))
    assert matches(output(replayed(module)(*args)), expected)
    new = accelerated(module)
    actual = new(*args)
    assert type(actual) is type(module(*args)) and relative_error(output(actual), expected) < QUANTISED
    if position:
        assert relative_error(output(accelerated(module, forget=True)(*args)), expected) > FORGOTTEN


@torch.no_grad()
def check_model(model: nn.Module, recipe, count: int, size: int, path) -> dict[str, str]:
    """All attentions are replaced and the report says so, it is as accurate as 8 bits are, and is saved and loaded.

    Returns why the modules that are left were kept."""
    model = spread(model)
    blank = copy.deepcopy(model)
    for tensor in blank.parameters():
        tensor.zero_()
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    expected = output(model(images))
    fast, report = accelerate(model, recipe, [images] if recipe.needs_calibration else None)
    assert sum(isinstance(module, QuantAttention) for module in fast.modules()) == count
    attentions = [entry for entry in report.replaced if entry.became == "QuantAttention"]
    assert len(attentions) == count and all("Attention" in entry.kind for entry in attentions)
    assert [layer.name for layer in attentions[0].layers] == ["qkv", "proj"]
    actual = output(fast(images))
    assert relative_error(actual, expected) < QUANTISED
    save(fast, path)
    assert torch.equal(output(load(path, blank)(images)), actual)
    return {entry.name: entry.reason for entry in report.kept}
