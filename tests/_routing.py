"""Float and quantised blocks, gates and masks for the tests of blocks on selected tokens."""

from __future__ import annotations

import functools

import torch
from _vits import pixels, spread, vit
from torch.utils._python_dispatch import TorchDispatchMode

from pyvit_accel import accelerate, recipes
from pyvit_accel.models.vit import Block, ViTConfig
from pyvit_accel.tokens.dyt import Adapter
from pyvit_accel.tokens.ia_red2 import InterpretedGroups, Interpreter
from pyvit_accel.tokens.routing import TokenGate

B, N, C = 3, 17, 64
ORDER = [2, 0, 1]  # of permuted images
STATIC, DYNAMIC = recipes.W8A8, recipes.W8A8_DYNAMIC


class FloatBlock(Block):
    """With attn_mask, as timm's where its attention is not fused: a query that sees no key gets NaN."""

    def forward(self, x, attn_mask=None):
        def attend(y):
            q, k, v = self.attn.qkv(y).unflatten(-1, (3, self.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            scores = self.attn.scale * q @ k.mT
            scores = scores if attn_mask is None else scores.masked_fill(~attn_mask, -torch.inf)
            return self.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

        x = x + attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def float_blocks(depth=3):
    return [spread(FloatBlock(ViTConfig(dim=C, num_heads=2))).requires_grad_(False) for _ in range(depth)]


@functools.cache
def quant_blocks(recipe=STATIC, depth=3, **options):
    """Shared: tests do not change them."""
    return tuple(accelerate(vit(depth=depth, **options), recipe, [pixels()])[0].blocks)


def blocks_for(mode):
    return quant_blocks() if mode == "packed" else float_blocks()


def tokens(seed=0):
    return torch.randn(B, N, C, generator=torch.Generator().manual_seed(seed))


def some(seed=0):
    """A mask of which one image has some, one none and one all."""
    mask = torch.rand(B, N, generator=torch.Generator().manual_seed(seed)) > 0.5
    mask[1], mask[2] = False, True
    return mask


def gate(prefix=1, bias=0.0):
    torch.manual_seed(5)
    new = TokenGate(C, prefix).requires_grad_(False)
    new.router.bias.fill_(bias)
    return new.eval()


def adapter():
    return spread(Adapter(C, 8)).requires_grad_(False)


class NoSync(TorchDispatchMode):
    """Raises for what has to wait for a device to know a number or a shape."""

    WAITS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "is_nonzero",
        "equal",
        "repeat_interleave.Tensor",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        by_mask = name.startswith("index.") and any(t is not None and t.dtype == torch.bool for t in args[1])
        if by_mask or name.startswith(self.WAITS):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def groups(mode, threshold=0.5, **options):
    torch.manual_seed(7)
    interpreters = [spread(Interpreter(C, 4)).requires_grad_(False) for _ in range(2)]
    blocks = blocks_for(mode)
    return InterpretedGroups([blocks[:1], blocks[1:]], interpreters, threshold, 1, mode, **options)


def alone(blocks, x, mask):
    """Every image's selected tokens through the blocks as if there were no others."""
    y = x.clone()
    for b in range(len(x)):
        part = x[b : b + 1, mask[b]]
        for block in blocks:
            part = block(part) if part.shape[1] else part
        y[b, mask[b]] = part[0]
    return y
