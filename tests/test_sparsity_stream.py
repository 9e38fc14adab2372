"""sparsity/stream.py: which models are a chain of blocks, and what is seen of those that are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyvit_accel import sparsity
from pyvit_accel.models.vit import VisionTransformer, ViTConfig
from pyvit_accel.sparsity.stream import Stream


def test_a_chain_is_run_once():
    """But for the first batch, no further than to the first block; then each block on what the one before it gave."""
    config = ViTConfig(32, 8, 3, 10, dim=16, depth=3, num_heads=2)
    model = VisionTransformer(config).eval().requires_grad_(False)
    runs = dict.fromkeys(["patch_embed", "blocks.0", "blocks.2", "head"], 0)
    for name in runs:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: runs.update({name: runs[name] + 1}))
    names = [f"blocks.{i}.mlp.fc1" for i in range(3)]
    batches = torch.randn(4, 2, 3, 32, 32).unbind()
    stream = Stream(model, batches, names, True, True)
    assert stream.chain and runs == {"patch_embed": 4, "blocks.0": 1, "blocks.2": 1, "head": 1}
    for (block, _), name in zip(stream.groups, names, strict=True):
        found = stream.moments(block, [name])[name]
        assert torch.isfinite(found.gram).all()
        stream.advance(block)
    assert runs == {"patch_embed": 4, "blocks.0": 9, "blocks.2": 9, "head": 1}


class Told(nn.Module):
    """Blocks that are told something more."""

    def __init__(self, told, named):
        super().__init__()
        self.told, self.named, self.blocks = told, named, nn.ModuleList(Add() for _ in range(2))

    def forward(self, x):
        for block, told in zip(self.blocks, self.told, strict=True):
            x = block(x, told=told) if self.named else block(x, told)
        return x


class Add(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x, told):
        return x + self.fc(x * told)


TOLD = {"alike": (1.5, 1.5), "numbers": (1.0, 9.0), "tensors": (torch.ones(8), 9 * torch.ones(8))}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("told", TOLD.values(), ids=TOLD)
def test_what_each_block_is_told(told, named):
    model, x = Told(told, named).eval(), torch.randn(64, 8)
    names = ["blocks.0.fc", "blocks.1.fc"]
    stream = Stream(model, [x], names, True, True)
    assert stream.chain == (told[0] is told[1])
    stream.advance("blocks.0")
    found = stream.moments("blocks.1", names[1:])[names[1]]
    assert torch.allclose(found.mean, sparsity.observe(model, x, names)[names[1]].mean, atol=1e-5)


class Seldom(nn.Module):
    """A second layer that reads wide batches only."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        x = self.blocks[0](x)
        return self.blocks[1](x) if len(x) > 5 else x


def test_layers_that_some_batches_reach():
    model, batches = Seldom().eval(), [torch.randn(n, 8) for n in (4, 5, 30, 3, 20)]
    expected = sparsity.observe(model, [batches[2], batches[4]], ["blocks.1"])["blocks.1"]
    stream = Stream(model, batches, ["blocks.0", "blocks.1"], True, True)
    stream.moments("blocks.0", ["blocks.0"])
    stream.advance("blocks.0")
    found = stream.moments("blocks.1", ["blocks.1"])["blocks.1"]
    assert found.count == expected.count == 50 and torch.allclose(found.gram, expected.gram, atol=1e-6)


class Twice(nn.Module):
    """The same blocks, two times over."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        for block in (*self.blocks, *self.blocks):
            x = block(x)
        return x


def test_blocks_that_run_twice():
    model, batches, names = Twice().eval(), torch.randn(3, 20, 8).unbind(), ["blocks.0", "blocks.1"]
    stream = Stream(model, batches, names, True, True)
    found, expected = stream.moments(names[0], names[:1])[names[0]], sparsity.observe(model, batches, names)[names[0]]
    assert not stream.chain and found.count == expected.count == 120
    assert torch.allclose(found.gram, expected.gram, atol=1e-6)
