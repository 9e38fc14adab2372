"""Mixed precision: how many bits the weights of each layer get, under a budget of bytes or of time.

    recipe = search(model, images, max_mib=3.0)
    fast, report = accelerate(model, recipe, images)

A layer's loss at some bits is measured: the squared error of the model's output when that layer alone has them. So is
its cost in time: our matmul, on this machine, at the shapes of the model. The assignment is calibrate.allocate's.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pyvit_accel import adapters, calibrate, ops
from pyvit_accel.adapters import BLOCKS
from pyvit_accel.calibrate import allocate
from pyvit_accel.calibrate.observers import call_arguments
from pyvit_accel.convert import Recipe
from pyvit_accel.errors import Unsupported
from pyvit_accel.formats import affine, packed
from pyvit_accel.planning import progress
from pyvit_accel.recipes import integer

METHODS = ("least_loss", "greedy", "relevance")
ROUNDS = 15


@dataclass(frozen=True)
class Found:
    """bits of the weights by layer; cost and budget in `unit`; loss: the sum of the layers', each measured alone.

    loss is NaN where it was not measured, with method="relevance".
    """

    recipe: Recipe
    bits: Mapping[str, int]
    cost: float
    budget: float
    unit: str
    loss: float

    def __str__(self) -> str:
        counts = ", ".join(f"{n} of {b} bits" for b, n in sorted(Counter(self.bits.values()).items()))
        return f"{self.recipe.name}: {counts}; {self.cost:.3f} of {self.budget:g} {self.unit}"


def search(
    model: nn.Module,
    calibration: Tensor | Mapping | Iterable,
    *,
    max_mib: float | None = None,
    max_ms: float | None = None,
    x_bits: int = 8,
    bits: tuple[int, ...] = (3, 4, 5, 6, 8),
    method: str = "least_loss",
    images: int = 16,
    **options: Any,
) -> Found:
    """The recipe that gives every block's layers the bits of weights that lose least within the budget.

    calibration  batches as for accelerate; the losses are measured on the first `images` of them
    max_mib      of the packed weights of the blocks, scales included; or
    max_ms       of their matmuls for one image, on this machine as it is now
    method       "least_loss": the least sum of measured losses; "greedy": step by step, after MPTQ-ViT; "relevance":
                 the greatest sum of relevance * bits, after LRP-QViT, which measures no losses
    options      of recipes.integer

    Raises ValueError for a budget that the cheapest bits exceed, or not exactly one budget; Unsupported when no block
    of the model can be replaced.
    """
    if (max_mib is None) == (max_ms is None):
        raise ValueError(f"search: give one of max_mib and max_ms, got max_mib={max_mib} and max_ms={max_ms}")
    if method not in METHODS:
        raise ValueError(f"search: method {method!r} is not one of {', '.join(METHODS)}")
    for b in bits:
        packed.check_bits("search", b)
    batches = [calibration] if isinstance(calibration, (Tensor, Mapping)) else list(calibration)
    layers = _layers(model)
    if not layers:
        raise Unsupported(f"search: no block of this {type(model).__name__} can be replaced")
    budget = max_mib * 2**20 if max_ms is None else max_ms / 1e3
    costs = _bytes(layers, bits) if max_ms is None else _seconds(model, layers, bits, batches)
    unit, size = ("MiB", 2.0**-20) if max_ms is None else ("ms an image", 1e3)
    least = sum(min(of.values()) for of in costs.values())
    if least > budget:
        given = f"max_mib={max_mib}" if max_ms is None else f"max_ms={max_ms}"
        raise ValueError(f"search: {given} is below {least * size:.3f}, the least that bits {bits} take; raise it")
    if method == "relevance":
        relevance = calibrate.relevance(model, batches, [linear for group in layers.values() for linear in group])
        names = {module: name for name, module in model.named_modules()}
        share = {layer: sum(relevance[names[linear]] for linear in group) for layer, group in layers.items()}
        chosen, loss = allocate.by_relevance(costs, share, budget), float("nan")
    else:
        losses = _losses(model, layers, bits, batches, images)
        chosen = (allocate.greedy if method == "greedy" else allocate.least_loss)(costs, losses, budget)
        loss = sum(losses[layer][b] for layer, b in chosen.items())
    cost = sum(costs[layer][b] for layer, b in chosen.items())
    recipe = integer(8, x_bits, layers=[(layer, b, x_bits) for layer, b in chosen.items()], **options)
    weights = {layer: sum(linear.weight.numel() for linear in group) for layer, group in layers.items()}
    mean = sum(b * weights[layer] for layer, b in chosen.items()) / sum(weights.values())
    recipe = replace(recipe, name=f"W{mean:.1f}A{x_bits}")
    return Found(recipe, chosen, cost * size, budget * size, unit, loss)


def _layers(model: nn.Module) -> dict[str, tuple[nn.Linear, ...]]:
    """The matmuls of the blocks, by the dotted name of their first Linear: q, k and v are one."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, tuple[nn.Linear, ...]] = {}
    for module in names:
        adapter = adapters.find(BLOCKS, module)
        if adapter is None:
            continue
        try:
            parts = adapter.parts(module)
        except Unsupported:
            continue
        for group in (parts.attention.qkv, (parts.attention.proj,), (parts.mlp.fc1,), (parts.mlp.fc2,)):
            found[names[group[0]]] = group
    return found


def _shape(group: tuple[nn.Linear, ...]) -> tuple[int, int]:
    return sum(linear.out_features for linear in group), group[0].in_features


def _bytes(layers: dict[str, tuple[nn.Linear, ...]], bits: tuple[int, ...]) -> dict[str, dict[int, float]]:
    costs: dict[str, dict[int, float]] = {}
    for layer, group in layers.items():
        N, K = _shape(group)
        shapes = {b: packed.packed_shape(N, K, b) for b in bits}
        costs[layer] = {b: float(rows * width + 4 * N) for b, (rows, width) in shapes.items()}
    return costs


def _seconds(
    model: nn.Module, layers: dict[str, tuple[nn.Linear, ...]], bits: tuple[int, ...], batches: list
) -> dict[str, dict[int, float]]:
    """Of the matmul on the tokens of one image: the fastest of some rounds, all shapes and bits in turn."""
    observed = calibrate.observe(model, batches[:1], [group[0] for group in layers.values()], rows=1)
    images = _images(call_arguments(batches[0], 0, torch.device("cpu")))
    rows = {layer: observed.input(group[0]).count // images for layer, group in layers.items()}
    calls = {}
    for layer, group in layers.items():
        N, K = _shape(group)
        for b in bits:
            q = torch.randint(-(2 ** (b - 1)), 2 ** (b - 1), (N, K), dtype=torch.int8)
            x = torch.randint(-128, 128, (rows[layer], K), dtype=torch.int8)
            calls.setdefault((rows[layer], N, K, b), (x, torch.ones(1), packed.pack(q, b), torch.ones(N)))
    fastest = dict.fromkeys(calls, float("inf"))
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for key, args in calls.items():
                start = time.perf_counter()
                ops.lowbit_linear(*args)
                fastest[key] = min(fastest[key], time.perf_counter() - start)
    return {layer: {b: fastest[(rows[layer], *_shape(group), b)] for b in bits} for layer, group in layers.items()}


@torch.no_grad()
def _losses(
    model: nn.Module, layers: dict[str, tuple[nn.Linear, ...]], bits: tuple[int, ...], batches: list, images: int
) -> dict[str, dict[int, float]]:
    """|y_hat - y|^2 / |y|^2 of the model's output when one layer's weight has so many bits."""
    device = next(model.parameters()).device
    few, left = [], images
    for i, batch in enumerate(batches):
        if left > 0:
            few.append(_cut(call_arguments(batch, i, device), left))
            left -= _images(few[-1])

    def outputs() -> Tensor:
        return torch.cat([_output(model(*args, **kwargs)).double().flatten(1) for args, kwargs in few])

    truth = outputs()
    losses: dict[str, dict[int, float]] = {}
    for layer, group in progress(layers.items(), "losses of the layers"):
        losses[layer] = {}
        saved = [linear.weight.detach().clone() for linear in group]
        try:
            for b in bits:
                for linear, w in zip(group, saved, strict=True):
                    codes, scale = affine.quantize_weight(w, b)
                    linear.weight.copy_(affine.dequantize(codes, scale[:, None]))
                losses[layer][b] = float((outputs() - truth).square().sum() / truth.square().sum())
        finally:
            for linear, w in zip(group, saved, strict=True):
                linear.weight.copy_(w)
    return losses


def _images(call: tuple[tuple, dict]) -> int:
    args, kwargs = call
    return next(t.shape[0] for t in (*args, *kwargs.values()) if isinstance(t, Tensor))


def _cut(call: tuple[tuple, dict], images: int) -> tuple[tuple, dict]:
    args, kwargs = call

    def cut(t: Any) -> Any:
        return t[:images] if isinstance(t, Tensor) else t

    return tuple(cut(t) for t in args), {name: cut(t) for name, t in kwargs.items()}


def _output(y: Any) -> Tensor:
    """Logits, or what stands first in a tuple or a model output."""
    if isinstance(y, Tensor):
        return y
    return y["logits"] if isinstance(y, Mapping) and "logits" in y else y[0]
