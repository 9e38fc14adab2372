"""Ready-made recipes, and what they are made of.

    W8A8           int8 weights and activations, folds and scales from calibration batches; the fastest
    W8A8_DYNAMIC   int8 weights and activations, one scale per token found at run time; needs no data
    W6A6 .. W3A3   fewer bits of both; levels, rounding and biases searched block by block on calibration batches
    W8A16, W4A16   packed weights, float activations: for memory, at float speed
    FP8            e4m3 weights and activations, a scale per output feature and per token; for GPUs with fp8 units
    POW2           weights are 0 or +-2^0 .. 2^-6 of a scale, 4 bits; int8 activations; published ones are retrained

    SPARSE24       two of four weights are zero, in 16 bits, for sparse tensor cores; SPARSE24(mask="wanda") and other
                   arguments as in sparse_recipe.sparse24. SPARSE24 + W8A8: its Linears in int8

    EXP_FREE_ATTENTION  attention between its float projections: int8 q, k, v and a softmax without an exponential; can
                        be trained. Other recipes convert its projections in a second call of accelerate

A sum of recipes, A + B, offers each module to A first: W8A16 + EXP_FREE_ATTENTION packs the projections of attention
and leaves it, EXP_FREE_ATTENTION + W8A16 takes it whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from pyvit_accel import adapters, calibrate, planning
from pyvit_accel.adapters import ATTENTIONS, BLOCKS, MLPS, PATCH_EMBEDS, Adapter
from pyvit_accel.convert import Layer, Recipe, Replacement, Rule
from pyvit_accel.formats.codebook import Codebook
from pyvit_accel.formats.fp8 import fp8
from pyvit_accel.formats.pow2 import ps_weight
from pyvit_accel.formats.softmax import DEFAULT_SOFTMAX, SoftmaxFormat
from pyvit_accel.formats.twin import uniform
from pyvit_accel.modules import CodebookLinear, ExpFreeSelfAttention, QuantPatchEmbed, WeightOnlyLinear, build
from pyvit_accel.modules.build import Scheme
from pyvit_accel.modules.quant_linear import PackedWeight
from pyvit_accel.planning import Calibration, Reconstruction
from pyvit_accel.sparse_recipe import CLASSIFIERS, sparse24
from pyvit_accel.token_reduction import Reduction, WindowReduction
from pyvit_accel.tokens import TokenSchedule

CODEBOOK_ROWS = 2048  # of inputs that roundings are chosen on
LINEAR = frozenset({"torch.nn.modules.linear.Linear"})
TABLES = {"BLOCKS": BLOCKS, "ATTENTIONS": ATTENTIONS, "MLPS": MLPS, "PATCH_EMBEDS": PATCH_EMBEDS}


def _adapted(table: str, make: Callable[..., nn.Module], module: nn.Module, observed: Any) -> Replacement:
    """Read a foreign module into parts, build ours from them, and wrap it to be called as the foreign one is."""
    adapter: Adapter = adapters.find(TABLES[table], module)
    new = make(adapter.parts(module), observed)
    spec = {"class": type(new).__name__, "config": new.config(), "adapter": table}
    original = module.get_submodule(adapter.path)
    return Replacement(adapter.wrap(new, original), adapter.path, spec, _layers(new))


def plain(make: Callable[..., nn.Module], module: nn.Module, observed: Any) -> Replacement:
    """make(module, observed) in place of a module that is called as ours are."""
    new = make(module, observed)
    spec = {"class": type(new).__name__, "config": new.config(), "adapter": None}
    return Replacement(new, spec=spec, layers=_layers(new))


def _layers(new: nn.Module) -> tuple[Layer, ...]:
    return tuple(
        Layer(name, *m.formats(), m.weight_bytes(), 2 * m.in_features * m.out_features)
        for name, m in new.named_modules() if isinstance(m, PackedWeight)
    )


def _rule(table: str, make: Callable[..., nn.Module]) -> Rule:
    return Rule("*", frozenset(TABLES[table]), partial(_adapted, table, make))


def _block(scheme: Scheme, module: nn.Module, found: Calibration | None) -> Replacement:
    """A block as planned with its neighbours, or, where no search reached it, on its own."""
    parts, scheme = adapters.find(BLOCKS, module).parts(module), _seen(scheme, found)
    planned = found is not None and found.scheme == scheme and module in found.plans
    plan = found.plans[module] if planned else build.plan_block(parts, scheme)
    new = _adapted("BLOCKS", lambda parts, _: build.pack_block(plan, parts), module, found)
    errors = build.output_errors(plan)
    return replace(new, layers=tuple(replace(layer, error=errors[layer.name]) for layer in new.layers))


def _seen(scheme: Scheme, found: Calibration | None) -> Scheme:
    return scheme if found is None else scheme.with_observed(found.observed)


def _integer(
    name: str,
    scheme: Scheme,
    needs_calibration: bool = True,
    search: bool = False,
    reconstruction: Reconstruction | None = None,
) -> Recipe:
    """Integer weights and activations at every depth."""
    seen = needs_calibration

    def built(make: Callable[[Any, Scheme], nn.Module]) -> Callable[..., nn.Module]:
        return lambda parts, found: make(parts, _seen(scheme, found if seen else None))

    rules = (
        Rule("*", frozenset(BLOCKS), lambda module, found: _block(scheme, module, found if seen else None)),
        _rule("ATTENTIONS", built(build.quant_attention)),
        _rule("MLPS", built(build.quant_mlp)),
        _rule("PATCH_EMBEDS", lambda parts, found: QuantPatchEmbed.from_parts(parts)),
        Rule("*", LINEAR, partial(plain, built(build.quant_linear)), exact=True),
    )
    observe = partial(planning.calibrated, scheme, search, reconstruction)
    bits = (scheme.w_bits, scheme.x_bits)
    keeps_zeros = bits == (8, 8) and not search and reconstruction is None
    sparse = partial(_integer, name, replace(scheme, sparse24=True), needs_calibration) if keeps_zeros else None
    return Recipe(
        name, rules, observe, needs_calibration, adapters.unpack_attention, code_bits=bits, sparse24=sparse
    )


def integer(
    w_bits: int,
    x_bits: int,
    *,
    head_bits: int = 8,
    layers: Iterable[tuple[str, int, int]] = (),
    observer: str = "minmax",
    granularity: str = "token",
    bias_correction: bool = True,
    softmax: SoftmaxFormat | None = DEFAULT_SOFTMAX,
    search: bool | None = None,
    reconstruction: Reconstruction | None = None,
) -> Recipe:
    """Integer weights of w_bits (2, 3, 4, 5, 6, 8) and activations of x_bits (3 to 8).

    head_bits to softmax  as in modules.build.Scheme; the classifier keeps 8 bits unless `layers` names it
    search          whether codes, clips and biases are searched, block by block (calibrate.refine); None: below 8 bits.
                    The biases of blocks that are searched are corrected in any case
    reconstruction  also learn the rounding, as calibrate.reconstruct does: minutes for a small model
    """
    choices = (*layers, *((name, 8, 8) for name in CLASSIFIERS))
    scheme = Scheme(w_bits, x_bits, head_bits, choices, None, observer, granularity, bias_correction, softmax)
    low = min(w_bits, x_bits, *(min(bits) for _, *bits in layers)) < 8
    search = low if search is None else search
    return _integer(f"W{w_bits}A{x_bits}", scheme, search=search, reconstruction=reconstruction)


def weight_only(w_bits: int, group_size: int = 0) -> Recipe:
    """Integer weights and float activations, in every nn.Linear; groups of inputs with a scale each, or 0 for none."""
    make = partial(plain, lambda linear, observed: WeightOnlyLinear.from_linear(linear, w_bits, group_size))
    return Recipe(f"W{w_bits}A16", (Rule("*", LINEAR, make, exact=True),))


def codebook(name: str, w_format: Codebook, x_format: Codebook | None) -> Recipe:
    """Weights and activations of any levels, in every nn.Linear; a scale per output feature and one per token.

    Calibration batches are not needed; where there are some, rounding and biases make up for errors on them.
    """

    def make(linear: nn.Linear, found: Calibration | None) -> CodebookLinear:
        seen = found.observed.input(linear) if found is not None and linear in found.observed else None
        return CodebookLinear.from_linear(linear, w_format, x_format, seen=seen)

    return Recipe(name, (Rule("*", LINEAR, partial(plain, make), exact=True),), _observe_linears)


def _observe_linears(model: nn.Module, batches: Any) -> Calibration:
    return Calibration(calibrate.observe(model, batches, rows=CODEBOOK_ROWS), Scheme(), {})


def exp_free_attention(name: str, softmax: SoftmaxFormat) -> Recipe:
    """Attention with the probabilities in a format of formats/softmax.py, its projections in floats.

    Calibration batches are needed only where a model has nn.MultiheadAttention: to see that it is self-attention.
    """
    rules = (_rule("ATTENTIONS", lambda parts, found: ExpFreeSelfAttention(parts, softmax)),)
    return Recipe(name, rules, _observe_linears, prepare=adapters.unpack_attention)


def tokens(
    schedule: TokenSchedule, num_prefix_tokens: int | None = None, restore: bool | None = None
) -> Recipe:
    """A schedule of tokens, to be added to any recipe or alone; the arguments are those of reduce_tokens."""
    return Recipe(schedule.name, (), tokens=Reduction(schedule, num_prefix_tokens, restore))


def TOME(r: int | Sequence[int], inflect: float = 0.0) -> Recipe:
    """r pairs of tokens merge in every block; no training needed."""
    return tokens(TokenSchedule("tome", {"r": r, "inflect": inflect}))


def EVIT(rate: float, layers: Sequence[int] = (3, 6, 9), fuse: bool = False) -> Recipe:
    """Keep the part `rate` of the patches, those the class token attends to, in blocks 3, 6 and 9 counted from 0."""
    return tokens(TokenSchedule("evit", {"rate": rate, "layers": list(layers), "fuse": fuse}))


def DIFFRATE(model: str, budget: str) -> Recipe:
    """Prune and merge by the published counts of a model and budget: DIFFRATE("deit-s", "2.9G")."""
    return tokens(TokenSchedule("diffrate", {"model": model, "budget": budget}))


def ZERO_TPRUNE(rate: float | Sequence[float], similar: int = 10, layers: Sequence[int] = (1, 3, 6, 9)) -> Recipe:
    """The part `rate` of the patches stays in each of the layers: by page rank, and none that is like another."""
    return tokens(TokenSchedule("zero_tprune", {"rate": rate, "similar": similar, "layers": list(layers)}))


def PRUMERGE(keep: int, layer: int = -1) -> Recipe:
    """From one block on, by default behind the last, `keep` + 1 rows stand for all patches: for vision towers."""
    return tokens(TokenSchedule("prumerge", {"keep": keep, "layer": layer}), restore=False)


def WINDOW_MERGE(ratio: float, window: int | None = None) -> Recipe:
    """Of every window's tokens the part `ratio`, up to 0.5, shares the MLP with others: for Swin, SAM, ViTDet."""
    return Recipe(f"WINDOW_MERGE({ratio})", (), tokens=WindowReduction(ratio, window))


W8A8, W6A6, W4A8, W4A4, W3A3 = integer(8, 8), integer(6, 6), integer(4, 8), integer(4, 4), integer(3, 3)
W8A8_DYNAMIC = _integer("W8A8_DYNAMIC", Scheme(), needs_calibration=False)
W8A16, W4A16 = weight_only(8), weight_only(4, group_size=64)
FP8 = codebook("FP8", fp8("e4m3"), fp8("e4m3"))
POW2 = codebook("POW2", ps_weight(bits=4), uniform(8, 1.0, zero_point=128))
EXP_FREE_ATTENTION = exp_free_attention("EXP_FREE_ATTENTION", DEFAULT_SOFTMAX)
SPARSE24 = sparse24()
_ALL = (W8A8, W8A8_DYNAMIC, W6A6, W4A8, W4A4, W3A3, W8A16, W4A16, FP8, POW2, SPARSE24, EXP_FREE_ATTENTION)
RECIPES = {recipe.name: recipe for recipe in _ALL}


def named(text: str) -> Recipe:
    """The recipe of RECIPES of this name, or the sum of several, "A + B". Raises KeyError for others."""
    first, *rest = (RECIPES[name.strip()] for name in text.split("+"))
    return sum(rest, first)
