"""The recipe SPARSE24: Linears whose weights are 2:4, where that pays on a GPU, alone or with int8 of other recipes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyvit_accel.convert import Layer, Recipe, Replacement, Rule
from pyvit_accel.errors import Unsupported
from pyvit_accel.modules import Sparse24Linear
from pyvit_accel.modules.quant_linear import check_weight
from pyvit_accel.planning import progress
from pyvit_accel.sparsity import METHODS, Pruned, gate, pair_of, prune
from pyvit_accel.sparsity.moments import calls, hooked

KINDS = frozenset({"torch.nn.modules.linear.Linear", "pyvit_accel.modules.sparse24_training.Sparse24Training"})
CLASSIFIERS = ("head", "head.*", "heads.*", "head_dist", "classifier", "*.classifier", "cls_classifier", "fc")
DENSE_CLASSIFIER = "a classifier reads one row per image, too few for 2:4 to pay"


@dataclass(frozen=True)
class Sparse24:
    """What a recipe asks for: arguments of recipes.SPARSE24."""

    mask: str = "sparsegpt"
    dtype: str | None = None
    layers: tuple[str, ...] = ("*",)
    rows: int = gate.ROWS
    target: int | None = None
    permute: bool = True

    def __post_init__(self) -> None:
        if self.mask not in METHODS:
            raise ValueError(f"SPARSE24: mask={self.mask!r} is not one of {', '.join(METHODS)}")
        if self.rows < 1:
            raise ValueError(f"SPARSE24: rows={self.rows}; a call has at least one, 197 for an image of ViT-B/16")

    def check(self, linear: nn.Linear) -> None:
        """Raise Unsupported for a layer that cannot be 2:4 or is faster dense."""
        check_weight(linear)
        capability = self.capability(linear.weight.device)
        if capability is not None:
            gate.check(self.rows, linear.out_features, linear.in_features, capability, self.dtype == "int8")

    def capability(self, device: torch.device) -> int | None:
        """Of the GPU the layers are for; None where there is none, and all are converted for their accuracy."""
        if self.target is None and device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            return 10 * major + minor
        return self.target

    def note(self, device: torch.device) -> str:
        """What the report says of how fast this is."""
        capability = self.capability(device)
        if device.type != "cuda":
            for_gpu = "" if capability is None else f", layers chosen for sm_{capability} and {self.rows} rows a call"
            return f"2:4: {device.type} has no sparse units, these layers run dense: this shows accuracy{for_gpu}"
        return f"2:4: layers chosen for sm_{capability} and {self.rows} rows a call; the gate is modelled, not measured"


@dataclass(frozen=True)
class Found:
    """The pruned layers, and why others are not, by the layers of the model."""

    layers: Mapping[nn.Module, tuple[nn.Linear, Pruned]]
    reasons: Mapping[nn.Module, str]


def _candidates(rules: Iterable[Rule], spec: Sparse24, model: nn.Module) -> list[str]:
    """Names of the float Linears that are to be pruned."""
    names = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear and any(rule.applies(name, module) for rule in rules):
            try:
                spec.check(module)
            except Unsupported:
                continue
            names.append(name)
    return names


def _observe(rules: Iterable[Rule], spec: Sparse24, model: nn.Module, batches: Any) -> Found:
    """Prune a copy of the model on the batches."""
    batches = [batches] if isinstance(batches, (Tensor, Mapping)) else list(batches)
    names = _candidates(rules, spec, model)
    reached: set[nn.Module] = set()
    layers = {name: model.get_submodule(name) for name in names}
    with hooked({module: lambda module, *_: reached.add(module) for module in layers.values()}):
        for args, kwargs in calls(model, batches):
            model(*args, **kwargs)
    missed = {name: module for name, module in layers.items() if module not in reached}
    reasons = {m: f"no calibration batch reached {name}; it has no statistics" for name, m in missed.items()}
    names = [name for name in names if name not in missed]
    if not names:
        return Found({}, reasons)
    pruned = copy.deepcopy(model).requires_grad_(False)
    permute = spec.permute and _can_permute(model, names)
    done = prune(pruned, names, batches, spec.mask, permute=permute, progress=progress)
    return Found({layers[one.name]: (pruned.get_submodule(one.name), one) for one in done}, reasons)


def _can_permute(model: nn.Module, names: list[str]) -> bool:
    """Whether every layer that changes with a permutation is among the layers that are replaced."""
    for name in names:
        try:
            producer = pair_of(model, name).producer
        except Unsupported:
            continue
        if producer not in names:
            return False
    return True


def _convert(spec: Sparse24, linear: nn.Linear, found: Found | None) -> Replacement:
    spec.check(linear)
    error, mask, source = None, getattr(linear, "mask", spec.mask), linear
    if isinstance(mask, str) and found is not None:
        if linear in found.reasons:
            raise Unsupported(found.reasons[linear])
        source, done = found.layers[linear]
        error, mask = done.output_error, source.weight != 0
    new = Sparse24Linear.from_linear(source, mask, dtype=spec.dtype)
    layer = Layer("", *new.formats(), new.weight_bytes(), 2 * new.in_features * new.out_features, error)
    record = {"class": type(new).__name__, "config": new.config(), "adapter": None}
    return Replacement(new, spec=record, layers=(layer,), note=spec.note(linear.weight.device))


@dataclass(frozen=True)
class Sparse24Recipe(Recipe):
    """Called with other arguments, another one; added to a recipe of int8 codes, the 2:4 weights are int8 as well."""

    spec: Sparse24 = field(default_factory=Sparse24)

    def __call__(self, mask: str | None = None, **options) -> Sparse24Recipe:
        """As sparse24, with this recipe's arguments where they are not given."""
        given = options if mask is None else options | {"mask": mask}
        return sparse24(**({name: getattr(self.spec, name) for name in self.spec.__dataclass_fields__} | given))

    def __add__(self, other: Recipe) -> Recipe:
        if other.code_bits is None or self.spec.dtype == "int8":
            return _both(self, other)
        if other.code_bits != (8, 8) or self.spec.dtype is not None:
            kind = self.spec.dtype or "{} x {} bits".format(*other.code_bits)
            raise ValueError(
                f"{self.name} + {other.name}: sparse units multiply 16-bit floats, or int8 by int8, not {kind}; add "
                "W8A8 or W8A8_DYNAMIC, and leave dtype out"
            )
        return replace(_both(self(dtype="int8"), other), name=f"{self.name} + {other.name}")

    def __radd__(self, other: Recipe) -> Recipe:
        return _both(other, self)


def sparse24(
    mask: str = "sparsegpt",
    dtype: str | None = None,
    layers: str | Iterable[str] = "*",
    rows: int = gate.ROWS,
    target: int | None = None,
    permute: bool = True,
) -> Sparse24Recipe:
    """2:4 weights in the Linears that `layers` (globs) names, classifiers apart.

    mask     "sparsegpt" | "wanda", which need calibration batches, or "magnitude", which reads none
    dtype    "float16" | "bfloat16" | "int8"; None: of the weights, float16 for float32
    rows     of a call, tokens times images: where too few for 2:4 to pay on the GPU, a layer stays dense
    target   compute capability of that GPU, 90 for sm_90; None: of the model's own, and on a CPU all are converted
    permute  order inputs so that more is kept, where the layers before can follow; not with "magnitude"

    Layers that were trained 2:4 (Sparse24Training) keep their masks.
    """
    globs = (layers,) if isinstance(layers, str) else tuple(layers)
    spec = Sparse24(mask, dtype, globs, rows, target, permute)
    convert = partial(_convert, spec)
    rules = tuple(
        Rule(glob, KINDS, convert, exact=True, unless=CLASSIFIERS, unless_reason=DENSE_CLASSIFIER) for glob in globs
    )
    name = "SPARSE24" if spec == Sparse24() else f"SPARSE24({mask}{'' if dtype is None else f', {dtype}'})"
    reads = mask != "magnitude"
    return Sparse24Recipe(name, rules, partial(_observe, rules, spec) if reads else None, reads, spec=spec)


def _both(first: Recipe, second: Recipe) -> Recipe:
    """The sum, each with what it observed itself."""
    added = Recipe.__add__(first, second)
    rules = tuple(
        replace(rule, convert=partial(_seen_by, i, rule.convert))
        for i, recipe in enumerate((first, second)) for rule in recipe.rules
    )
    return replace(added, rules=rules, observe=partial(_observe_both, first, second))


def _seen_by(i: int, convert: Any, module: nn.Module, found: tuple | None) -> Replacement:
    return convert(module, None if found is None else found[i])


def _observe_both(first: Recipe, second: Recipe, model: nn.Module, batches: Any) -> tuple:
    batches = [batches] if isinstance(batches, (Tensor, Mapping)) else list(batches)
    return tuple(None if recipe.observe is None else recipe.observe(model, batches) for recipe in (first, second))
