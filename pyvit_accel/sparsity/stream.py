"""Calibration of a model that changes on the way: the blocks one after the other, on what the pruned ones before give.

Tokens count by what an error in them does, as in calibrate/refine.py:
  - what is added to the residual stream is divided by its deviation in the next norm: layers that write to the stream
    count a token 1 / variance of the stream behind the block. Else the few tokens of ViT-Ti with activations in the
    hundreds own the sum over all.
  - the first one counts as much as FIRST_TOKEN of all: most classifiers read it, and all attend to it.
"""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor, nn

from pyvit_accel.errors import Unsupported
from pyvit_accel.sparsity.moments import Moments, Sums, calls, hooked

FIRST_TOKEN = 0.15


class _Stop(Exception):
    """Ends a forward pass of which the rest is not needed."""


class Stream:
    """groups: (name of a block or None, names of its layers). Where the blocks are a chain each is run on what the one
    before it gave, two passes over the model in all; else the model is run from its start for each group.

    Raises Unsupported, naming the layer, when no batch reached it: here already, or with the only group.
    """

    def __init__(self, model: nn.Module, batches: list, names: list[str], sequential: bool, weigh: bool) -> None:
        self.model, self.batches, self.weigh = model, batches, weigh
        self.groups: list[tuple[str | None, list[str]]] = [(None, names)]
        self.inputs: list[tuple[tuple, dict]] = []
        self.chain = False
        if sequential and batches:
            self.groups = _groups(model, names)
            self._follow(names)

    def _follow(self, names: list[str]) -> None:
        """Whether the blocks are a chain, and the inputs of the first."""
        missed = {self.model.get_submodule(name): name for name in names}
        blocks = [self.model.get_submodule(block) for block, _ in self.groups]
        apart, last, passed = [], [None], []

        def enter(module, args, kwargs):
            missed.pop(module, None)
            if module is blocks[0]:
                self.inputs.append((args, kwargs))
                if not missed and len(self.inputs) > 1:
                    raise _Stop  # the first batch has shown all but this
            elif module in blocks and not (args and args[0] is last[0] and _same_rest((args, kwargs), self.inputs[-1])):
                apart.append(module)

        def leave(module, args, output):
            last[0] = _first(output)
            passed.append(module)

        handles = [module.register_forward_hook(leave) for module in blocks]
        try:
            with hooked(dict.fromkeys([*blocks, *missed], enter)):
                for args, kwargs in calls(self.model, self.batches):
                    last[0] = None
                    passed.clear()
                    with suppress(_Stop):
                        self.model(*args, **kwargs)
                        apart += [block for block in blocks if passed.count(block) != 1]
        finally:
            for handle in handles:
                handle.remove()
        for name in missed.values():  # before anything is changed
            raise Unsupported(f"no calibration batch reached {name}; it has no statistics")
        self.chain = not apart and len(self.inputs) == len(self.batches) and all(args for args, _ in self.inputs)

    def moments(self, block: str | None, names: list[str]) -> dict[str, Moments]:
        """Of the inputs of a block's layers, in the network as it is now."""
        sums = {name: Sums() for name in names}
        seen: list[tuple[str, Tensor]] = []

        def hook_of(name: str):
            return lambda module, args, kwargs: seen.append((name, args[0] if args else next(iter(kwargs.values()))))

        if not names:
            return {}
        with hooked({self.model.get_submodule(name): hook_of(name) for name in names}):
            module = self.model.get_submodule(block) if self.chain else self.model
            for args, kwargs in self.inputs if self.chain else calls(self.model, self.batches):
                y = _first(module(*args, **kwargs))
                if self.chain and not bool(y.isfinite().all()):
                    raise ValueError(f"the output of {block} is not finite; clean the calibration data, or its weights")
                for name, x in seen:
                    sums[name].add(x, None if name == block else self._importance(self.model.get_submodule(name), x, y))
                seen.clear()
        return {name: found.result(name) for name, found in sums.items()}

    def _importance(self, layer: nn.Linear, x: Tensor, stream: Tensor) -> Tensor | None:
        """What a token of x (B, N, K) counts, (B, N); stream (B, N, C): what comes out of the block."""
        if not (self.weigh and self.chain and x.dim() == stream.dim() == 3 and x.shape[:2] == stream.shape[:2]):
            return None
        tokens = torch.ones(x.shape[:2], device=x.device)
        tokens[:, 0] = max(1.0, FIRST_TOKEN * x.shape[1])
        if layer.out_features == stream.shape[2]:
            tokens /= stream.float().var(-1, correction=0).clamp(min=1e-12)
        return tokens

    def advance(self, block: str | None) -> None:
        if self.chain:
            module = self.model.get_submodule(block)
            self.inputs = [((_first(module(*args, **kwargs)), *args[1:]), kwargs) for args, kwargs in self.inputs]


def _groups(model: nn.Module, names: list[str]) -> list[tuple[str, list[str]]]:
    """Layers by block; where all blocks are children of one module, those without a layer in between too."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(_block(name), []).append(name)
    first, last = next(iter(blocks)), next(reversed(blocks))
    parent = first.rpartition(".")[0]
    if parent and all(block.rpartition(".")[0] == parent for block in blocks):
        children = [f"{parent}.{name}" for name, _ in model.get_submodule(parent).named_children()]
        between = children[children.index(first) : children.index(last) + 1]
        return [(block, blocks.get(block, [])) for block in between]
    return list(blocks.items())


def _block(name: str) -> str:
    """The dotted name up to the first part that ends in a digit: "blocks.3" of "blocks.3.mlp.fc1"; else all of it."""
    parts = name.split(".")
    ends = [i for i, part in enumerate(parts[:-1]) if part[-1:].isdigit()]
    return ".".join(parts[: ends[0] + 1]) if ends else name


def _same_rest(one: tuple[tuple, dict], other: tuple[tuple, dict]) -> bool:
    """Whether two calls (args, kwargs) differ in the first argument alone."""
    if len(one[0]) != len(other[0]) or one[1].keys() != other[1].keys():
        return False
    pairs = [*zip(one[0][1:], other[0][1:], strict=True), *((x, other[1][key]) for key, x in one[1].items())]
    return all(a is b or (isinstance(a, (bool, int, float, str)) and a == b) for a, b in pairs)


def _first(output):
    return output[0] if isinstance(output, (tuple, list)) else output
