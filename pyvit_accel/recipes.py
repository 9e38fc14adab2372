"""Ready-made recipes, and what they are made of.

    W8A8           int8 weights and activations, static scales from calibration batches; the fastest
    W8A8_DYNAMIC   int8 weights and activations, one scale per token found at run time; needs no data
    W8A16          int8 weights, float activations: a quarter of the memory at float speed

A sum of recipes, A + B, offers each module to A first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from pyvit_accel import adapters, calibrate
from pyvit_accel.adapters import ATTENTIONS, BLOCKS, MLPS, PATCH_EMBEDS, Adapter
from pyvit_accel.convert import Recipe, Replacement, Rule
from pyvit_accel.modules import QuantPatchEmbed, WeightOnlyLinear, build

LINEAR = frozenset({"torch.nn.modules.linear.Linear"})
TABLES = {"BLOCKS": BLOCKS, "ATTENTIONS": ATTENTIONS, "MLPS": MLPS, "PATCH_EMBEDS": PATCH_EMBEDS}


def _adapted(table: str, make: Callable[..., nn.Module], module: nn.Module, observed: Any) -> Replacement:
    """Read a foreign module into parts, build ours from them, and wrap it to be called as the foreign one is."""
    adapter: Adapter = adapters.find(TABLES[table], module)
    new = make(adapter.parts(module), observed)
    spec = {"class": type(new).__name__, "config": new.config(), "adapter": table}
    original = module.get_submodule(adapter.path)
    return Replacement(adapter.wrap(new, original), adapter.path, spec)


def _plain(make: Callable[..., nn.Module], module: nn.Module, observed: Any) -> Replacement:
    new = make(module, observed)
    return Replacement(new, spec={"class": type(new).__name__, "config": new.config(), "adapter": None})


def _rule(table: str, make: Callable[..., nn.Module]) -> Rule:
    return Rule("*", frozenset(TABLES[table]), partial(_adapted, table, make))


def _static(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Built from what calibration saw."""
    return lambda parts, observed: make(parts, observed)


def _dynamic(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Built from the weights alone."""
    return lambda parts, observed: make(parts, None)


def _w8a8(scales: Callable[..., Callable[..., nn.Module]]) -> tuple[Rule, ...]:
    return (
        _rule("BLOCKS", scales(build.quant_block)),
        _rule("ATTENTIONS", scales(build.quant_attention)),
        _rule("MLPS", scales(build.quant_mlp)),
        _rule("PATCH_EMBEDS", lambda parts, observed: QuantPatchEmbed.from_parts(parts)),
        Rule("*", LINEAR, partial(_plain, scales(build.quant_linear)), exact=True),
    )


W8A8 = Recipe("W8A8", _w8a8(_static), calibrate.observe, needs_calibration=True, prepare=adapters.unpack_attention)
W8A8_DYNAMIC = Recipe("W8A8_DYNAMIC", _w8a8(_dynamic), calibrate.observe, prepare=adapters.unpack_attention)
W8A16 = Recipe(
    "W8A16",
    (Rule("*", LINEAR, partial(_plain, lambda linear, observed: WeightOnlyLinear.from_linear(linear)), exact=True),),
)
RECIPES = {recipe.name: recipe for recipe in (W8A8, W8A8_DYNAMIC, W8A16)}
