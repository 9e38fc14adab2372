"""The recipe SPARSE24: Linears whose weights are 2:4, where that pays on a GPU, alone or with int8 of other recipes."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyvit_accel.convert import Layer, Recipe, Replacement, Rule, nested
from pyvit_accel.errors import Unsupported, some
from pyvit_accel.modules import Sparse24Linear, Sparse24Training
from pyvit_accel.modules.quant_linear import check_weight
from pyvit_accel.modules.sparse24_linear import DTYPES
from pyvit_accel.planning import progress
from pyvit_accel.sparsity import METHODS, Pruned, gate, pair_of, prune
from pyvit_accel.sparsity.gate import CLASSIFIERS
from pyvit_accel.sparsity.moments import calls, hooked

KINDS = frozenset({"torch.nn.modules.linear.Linear", "pyvit_accel.modules.sparse24_training.Sparse24Training"})
# The layers of an nn.MultiheadAttention as adapters.unpack_attention shows them; they become part of what replaces it.
IN_ATTENTION = frozenset(
    {"pyvit_accel.adapters.multihead._InProjection", "torch.nn.modules.linear.NonDynamicallyQuantizableLinear"}
)
DENSE_CLASSIFIER = "a classifier reads one row per image, too few for 2:4 to pay"
NOT_NAMED = "layers= does not name it"
NEEDS_IMAGES = (
    "chooses weights on calibration images; pass calibration=[batch, ...], 128 of them or more, or use "
    'SPARSE24(mask="magnitude"), which reads none'
)


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
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"SPARSE24: dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.target is not None and (type(self.target) is not int or self.target < 50):
            raise ValueError(f"SPARSE24: target={self.target!r}; use 10 major + minor of the capability, 90 for sm_90")
        if not self.layers:
            raise ValueError('SPARSE24: layers is empty; give globs of names, "*" for all Linears but classifiers')
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


Layers = Mapping[nn.Module, tuple[nn.Linear, Pruned]]  # those of a model, and what became of their copies


@dataclass(frozen=True)
class Found:
    """The pruned layers, and why others are not, by the layers of the model."""

    layers: Layers
    reasons: Mapping[nn.Module, str]
    note: str


@dataclass(frozen=True)
class Twins:
    """What a recipe of integer codes converts instead of the modules of a model: those of a pruned copy.

    seen  what that recipe observed of the copy; note: a line of the report
    """

    of: Mapping[nn.Module, nn.Module]
    seen: Any
    note: str


def _listed(batches: Any) -> list:
    return [batches] if isinstance(batches, (Tensor, Mapping)) else list(batches)


def _candidates(rules: Iterable[Rule], spec: Sparse24, model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Names of the float Linears that are to be pruned, and why others that are meant are not."""
    names, refused = [], {}
    for name, module in model.named_modules():
        if not isinstance(module, Sparse24Training) and any(rule.applies(name, module) for rule in rules):
            try:
                spec.check(module)
            except Unsupported as reason:
                refused[name] = str(reason)
            else:
                names.append(name)
    return names, refused


def _pruned(
    rules: Iterable[Rule], spec: Sparse24, model: nn.Module, batches: list
) -> tuple[nn.Module, Layers, dict[str, str]]:
    """A copy of the model, what was pruned in it, and the reasons of the layers that were not, by name."""
    names, refused = _candidates(rules, spec, model)
    if batches:
        reached: set[nn.Module] = set()
        layers = {name: model.get_submodule(name) for name in names}
        with hooked({module: lambda module, *_: reached.add(module) for module in layers.values()}):
            for args, kwargs in calls(model, batches):
                model(*args, **kwargs)
                if len(reached) == len(layers):
                    break
        missed = [name for name, module in layers.items() if module not in reached]
        refused |= {name: f"no calibration batch reached {name}; it has no statistics" for name in missed}
        names = [name for name in names if name not in missed]
    copied = copy.deepcopy(model).requires_grad_(False)
    if not names:
        return copied, {}, refused
    permute = _movable(model, names) if spec.permute and spec.mask != "magnitude" else False
    done = prune(copied, names, batches, spec.mask, permute=permute, progress=progress)
    return copied, {model.get_submodule(one.name): (copied.get_submodule(one.name), one) for one in done}, refused


def _observe(rules: Iterable[Rule], spec: Sparse24, model: nn.Module, batches: Any) -> Found:
    """Prune a copy of the model on the batches."""
    _, layers, refused = _pruned(rules, spec, model, _listed(batches))
    reasons = {model.get_submodule(name): reason for name, reason in refused.items()}
    return Found(layers, reasons, "\n".join(_summary(spec, _device(model), layers)))


def _observe_twins(rules: Iterable[Rule], spec: Sparse24, codes: Recipe, model: nn.Module, batches: Any) -> Twins:
    """Prune a copy, and let the recipe of codes see it; batches: None where there are none."""
    batches = None if batches is None else _listed(batches)
    copied, layers, refused = _pruned(rules, spec, model, batches or [])
    trained = [(name, module) for name, module in copied.named_modules() if isinstance(module, Sparse24Training)]
    for name, module in trained:
        copied.set_submodule(name, module.to_linear())
    seen = codes.seen(copied, batches)
    twins = dict(copied.named_modules(remove_duplicate=False))
    of = {module: twins[name] for name, module in model.named_modules()}
    device = _device(model)
    kept = (f"2:4: {len(trained)} layers keep the masks they were trained with",) if trained else ()
    return Twins(of, seen, "\n".join((spec.note(device), *kept, *_summary(spec, device, layers), *_refusals(refused))))


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _summary(spec: Sparse24, device: torch.device, layers: Layers) -> Iterator[str]:
    """Lines of the report: what the pruned layers lost, and what they are to gain."""
    errors = sorted((one.output_error, one.name) for _, one in layers.values() if one.output_error is not None)
    if errors:
        median, (worst, name) = errors[len(errors) // 2][0], errors[-1]
        yield f"2:4: {len(layers)} layers pruned, output error {median:.2g} (median), at most {worst:.2g} ({name})"
    capability = spec.capability(device)
    if capability is not None and layers:
        shapes = {(linear.out_features, linear.in_features) for linear in layers}
        gains = [gate.speed_up(spec.rows, *shape, capability, spec.dtype == "int8") for shape in shapes]
        yield f"2:4: modelled at {min(gains):.2f} to {max(gains):.2f} times the speed of the dense layers"


def _refusals(refused: Mapping[str, str]) -> Iterator[str]:
    """Lines of the report: why layers stay dense, those alike in one."""
    alike = Counter((re.sub(r"(?<=\.)\d+(?=\.)", "*", name), reason) for name, reason in refused.items())
    for (pattern, reason), count in alike.items():
        yield f"2:4: {pattern} ({count}) dense: {reason}"


def _convert_twin(convert: Any, module: nn.Module, found: Twins) -> Replacement:
    new = convert(found.of[module], found.seen)
    return replace(new, note="\n".join(filter(None, (new.note, found.note))))


def _movable(model: nn.Module, names: list[str]) -> set[str]:
    """Layers whose inputs may come in another order: the layer that makes them is replaced too."""
    found = set()
    for name in names:
        with suppress(Unsupported):
            if pair_of(model, name).producer in names:
                found.add(name)
    return found


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
    note = "\n".join(filter(None, (spec.note(linear.weight.device), found and found.note)))
    record = {"class": type(new).__name__, "config": new.config(), "adapter": None}
    return Replacement(new, spec=record, layers=(layer,), note=note)


class Paired(Recipe):
    """A recipe whose rules read what it observed itself, in sums too."""

    def __add__(self, other: Recipe) -> Recipe:
        return _both(self, other)

    def __radd__(self, other: Recipe) -> Recipe:
        return _both(other, self)


@dataclass(frozen=True, repr=False)
class Sparse24Recipe(Paired):
    """2:4 weights. SPARSE24(mask="wanda", layers="*.mlp.*", ...) is one with other arguments, those of
    recipes.sparse24; SPARSE24 + W8A8 has them in the modules of W8A8."""

    spec: Sparse24 = field(default_factory=Sparse24)

    def __call__(self, mask: str | None = None, **options) -> Sparse24Recipe:
        """As recipes.sparse24 (mask, dtype, layers, rows, target, permute), this recipe's arguments where not given."""
        given = options if mask is None else options | {"mask": mask}
        return sparse24(**({name: getattr(self.spec, name) for name in self.spec.__dataclass_fields__} | given))

    def __add__(self, other: Recipe) -> Recipe:
        if other.sparse24 is not None and self.spec.dtype in (None, "int8"):
            return self._with_codes(other.sparse24())
        if other.code_bits is None or self.spec.dtype == "int8":
            return super().__add__(other)
        if other.sparse24 is not None:
            name = f"{self.name} + {other.name}"
            raise ValueError(f"{name}: the sum is int8 by int8; leave dtype={self.spec.dtype!r} out")
        kind = "{} x {} bits".format(*other.code_bits)
        if other.code_bits == (8, 8):
            kind = "8 bits that a search chose, which fills the zeros"
        raise ValueError(
            f"{self.name} + {other.name}: sparse units multiply 16-bit floats, or int8 by int8, not {kind}; add "
            "W8A8 or W8A8_DYNAMIC"
        )

    def __radd__(self, other: Recipe) -> Recipe:
        if other.code_bits is not None:
            raise ValueError(
                f"{other.name} + {self.name}: {other.name} comes first and takes every Linear; put SPARSE24 first"
            )
        return super().__radd__(other)

    def _with_codes(self, codes: Recipe) -> Recipe:
        """The recipe of codes, on a pruned copy of the model."""
        spec = replace(self.spec, dtype="int8")
        rules = tuple(
            replace(
                rule,
                convert=partial(_convert_twin, rule.convert),
                kinds=rule.kinds | KINDS if rule.kinds & KINDS else rule.kinds,
            )
            for rule in codes.rules
        )
        return Paired(
            f"{self.name} + {codes.name}",
            rules,
            partial(_observe_twins, tuple(replace(r, kinds=r.kinds | IN_ATTENTION) for r in self.rules), spec, codes),
            self.needs_calibration or codes.needs_calibration,
            nested(codes.prepare, self.prepare),
            codes.tokens,
            codes.code_bits,
            self.needs if self.needs_calibration else codes.needs,
            reads_weights=True,
        )


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
    if "*" not in globs:
        rules += (Rule("*", KINDS, convert, exact=True, unless=("*",), unless_reason=NOT_NAMED),)
    name = "SPARSE24" if spec == Sparse24() else f"SPARSE24({mask}{'' if dtype is None else f', {dtype}'})"
    reads = mask != "magnitude"
    observe, prepare = partial(_observe, rules, spec) if reads else None, partial(_prepared, spec)
    return Sparse24Recipe(name, rules, observe, reads, prepare, needs=NEEDS_IMAGES, spec=spec)


@contextmanager
def _prepared(spec: Sparse24, model: nn.Module) -> Iterator[nn.Module]:
    """Raises ValueError for a glob that names no layer; at the end what still learns is dense, with its mask."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for glob in spec.layers:
        if glob != "*" and not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(f"SPARSE24: layers={glob!r} names no nn.Linear of the model; they are {some(names)}")
    yield model
    for name, module in list(model.named_modules()):
        if name and isinstance(module, Sparse24Training):
            model.set_submodule(name, module.to_linear())


def _both(first: Recipe, second: Recipe) -> Recipe:
    """The sum, each with what it observed itself."""
    added = Recipe.__add__(first, second)
    rules = tuple(
        replace(rule, convert=partial(_seen_by, i, rule.convert))
        for i, recipe in enumerate((first, second)) for rule in recipe.rules
    )
    fields = {name: getattr(added, name) for name in Recipe.__dataclass_fields__}
    reads = first.reads_weights or second.reads_weights
    observe = partial(_observe_both, first, second)
    return Paired(**fields | {"rules": rules, "observe": observe, "reads_weights": reads, "sparse24": None})


def _seen_by(i: int, convert: Any, module: nn.Module, found: tuple | None) -> Replacement:
    return convert(module, None if found is None else found[i])


def _observe_both(first: Recipe, second: Recipe, model: nn.Module, batches: Any) -> tuple:
    batches = None if batches is None else _listed(batches)
    return tuple(recipe.seen(model, batches) for recipe in (first, second))
