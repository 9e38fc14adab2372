"""Ready-made recipes, and what they are made of.

    W8A8           int8 weights and activations, folds and scales from calibration batches; the fastest
    W8A8_DYNAMIC   int8 weights and activations, one scale per token found at run time; needs no data
    W8A16          int8 weights, float activations: a quarter of the memory at float speed

A sum of recipes, A + B, offers each module to A first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from pyvit_accel import adapters, calibrate
from pyvit_accel.adapters import ATTENTIONS, BLOCKS, MLPS, PATCH_EMBEDS, Adapter
from pyvit_accel.convert import Recipe, Replacement, Rule
from pyvit_accel.modules import QuantPatchEmbed, WeightOnlyLinear, build
from pyvit_accel.modules.build import Scheme

CLASSIFIERS = ("head", "head.*", "heads.*", "head_dist", "classifier", "*.classifier", "cls_classifier", "fc")
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


def _integer(name: str, scheme: Scheme, needs_calibration: bool = True) -> Recipe:
    """Integer weights and activations at every depth."""

    def built(make: Callable[[Any, Scheme], nn.Module]) -> Callable[..., nn.Module]:
        return lambda parts, observed: make(parts, replace(scheme, observed=observed if needs_calibration else None))

    rules = (
        _rule("BLOCKS", built(build.quant_block)),
        _rule("ATTENTIONS", built(build.quant_attention)),
        _rule("MLPS", built(build.quant_mlp)),
        _rule("PATCH_EMBEDS", lambda parts, observed: QuantPatchEmbed.from_parts(parts)),
        Rule("*", LINEAR, partial(_plain, built(build.quant_linear)), exact=True),
    )
    return Recipe(name, rules, calibrate.observe, needs_calibration, adapters.unpack_attention)


def integer(
    w_bits: int,
    x_bits: int,
    head_bits: int = 8,
    layers: Iterable[tuple[str, int, int]] = (),
    observer: str = "minmax",
    granularity: str = "token",
    bias_correction: bool = True,
) -> Recipe:
    """Integer weights of w_bits and activations of x_bits, 2 to 8; the arguments are those of modules.build.Scheme.

    The classifier has 8 bits, unless `layers` says otherwise, and so has the patch embedding.
    """
    choices = (*layers, *(((name, 8, 8)) for name in CLASSIFIERS))
    scheme = Scheme(w_bits, x_bits, head_bits, choices, None, observer, granularity, bias_correction)
    return _integer(f"W{w_bits}A{x_bits}", scheme)


def weight_only(w_bits: int, group_size: int = 0) -> Recipe:
    """Integer weights and float activations, in every nn.Linear; groups of inputs with a scale each, or 0 for none."""
    make = partial(_plain, lambda linear, observed: WeightOnlyLinear.from_linear(linear, w_bits, group_size))
    return Recipe(f"W{w_bits}A16", (Rule("*", LINEAR, make, exact=True),))


W8A8, W6A6, W4A8, W4A4, W3A3 = integer(8, 8), integer(6, 6), integer(4, 8), integer(4, 4), integer(3, 3)
W8A8_DYNAMIC = _integer("W8A8_DYNAMIC", Scheme(), needs_calibration=False)
W8A16, W4A16 = weight_only(8), weight_only(4, group_size=64)
RECIPES = {recipe.name: recipe for recipe in (W8A8, W8A8_DYNAMIC, W6A6, W4A8, W4A4, W3A3, W8A16, W4A16)}
