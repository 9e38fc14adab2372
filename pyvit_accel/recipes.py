"""Ready-made recipes, and what they are made of.

    W8A8           int8 weights and activations, folds and scales from calibration batches; the fastest
    W8A8_DYNAMIC   int8 weights and activations, one scale per token found at run time; needs no data
    W8A16          int8 weights, float activations: a quarter of the memory at float speed

A sum of recipes, A + B, offers each module to A first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from pyvit_accel import adapters, calibrate
from pyvit_accel.adapters import ATTENTIONS, BLOCKS, MLPS, PATCH_EMBEDS, Adapter
from pyvit_accel.convert import Recipe, Replacement, Rule
from pyvit_accel.modules import QuantPatchEmbed, WeightOnlyLinear, build
from pyvit_accel.modules.build import Scales

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


def _w8a8(name: str, make_scales: Callable[[Any], Scales], needs_calibration: bool) -> Recipe:
    """int8 weights and activations at every depth; make_scales(observed) says where activation scales come from."""

    def built(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        return lambda parts, observed: make(parts, make_scales(observed))

    rules = (
        _rule("BLOCKS", built(build.quant_block)),
        _rule("ATTENTIONS", built(build.quant_attention)),
        _rule("MLPS", built(build.quant_mlp)),
        _rule("PATCH_EMBEDS", lambda parts, observed: QuantPatchEmbed.from_parts(parts)),
        Rule("*", LINEAR, partial(_plain, lambda linear, observed: build.quant_linear(linear)), exact=True),
    )
    return Recipe(name, rules, calibrate.observe, needs_calibration, adapters.unpack_attention)


def w8a8(observer: str = "minmax", granularity: str = "token", bias_correction: bool = True) -> Recipe:
    """W8A8 with other choices than the default ones; the arguments are those of modules.build.Scales."""
    choices = Scales(None, observer, granularity, bias_correction)
    return _w8a8("W8A8", lambda observed: replace(choices, observed=observed), needs_calibration=True)


W8A8 = w8a8()
W8A8_DYNAMIC = _w8a8("W8A8_DYNAMIC", lambda observed: Scales(), needs_calibration=False)
W8A16 = Recipe(
    "W8A16",
    (Rule("*", LINEAR, partial(_plain, lambda linear, observed: WeightOnlyLinear.from_linear(linear)), exact=True),),
)
RECIPES = {recipe.name: recipe for recipe in (W8A8, W8A8_DYNAMIC, W8A16)}
