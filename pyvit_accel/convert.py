"""accelerate: swap the modules of a model once, and say what became what.

A recipe is a tuple of rules, tried in order on every module, largest modules first come first served: what a block rule
took is not offered to the rules for its layers. A rule carries its own function, so nothing here knows our modules.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from pyvit_accel.errors import Unsupported


@dataclass(frozen=True)
class Layer:
    """A matmul of a replaced module.

    weight, activation  their formats, "int4", "float"
    bytes, float_bytes  of the weight, scales included, and in 16-bit floats
    error               |y_hat - y| / |y| of its output on what calibration kept; None: not measured
    """

    name: str
    weight: str
    activation: str
    bytes: int
    float_bytes: int
    error: float | None = None


@dataclass(frozen=True)
class Replacement:
    """module takes the place of `path` below the matched module ("": the module itself).

    spec is a JSON-able record from which saved files rebuild the module. layers: its matmuls, named from there on.
    note: a line of the report, the same one of many modules once.
    """

    module: nn.Module
    path: str = ""
    spec: dict = field(default_factory=dict)
    layers: tuple[Layer, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Rule:
    """What to do with the modules of some classes.

    match    glob on the dotted name, "blocks.*.mlp.*"
    kinds    dotted class names, matched against the module's MRO
    convert  (module, observed) to a Replacement, or raises Unsupported with the reason; observed: what calibration saw
    exact    the class itself, no subclass
    unless   globs of names that it leaves alone, and the reason why
    """

    match: str
    kinds: frozenset[str]
    convert: Callable[[nn.Module, Any], Replacement]
    exact: bool = False
    unless: tuple[str, ...] = ()
    unless_reason: str = ""

    def applies(self, name: str, module: nn.Module) -> bool:
        if any(fnmatchcase(name, glob) for glob in self.unless):
            return False
        return self.means(name, module)

    def means(self, name: str, module: nn.Module) -> bool:
        """applies, whatever `unless` says."""
        classes = type(module).__mro__[:1] if self.exact else type(module).__mro__
        return fnmatchcase(name, self.match) and any(f"{c.__module__}.{c.__qualname__}" in self.kinds for c in classes)


NEEDS_DATA = (
    "takes its scales from data; pass calibration=[batch, ...], a few dozen images as the model sees them, or use "
    "W8A8_DYNAMIC, which needs none"
)


@dataclass(frozen=True, repr=False)
class Recipe:
    """rules, and how to see activations: observe(model, batches) runs the model inside prepare(model).

    tokens  what changes blocks as a whole, whatever the rules made of them (token_reduction.py: Reduction): read before
            they are applied, applied after
    code_bits  of weights and activations, of a recipe that makes both integers
    needs      why calibration, and what to do without, of a recipe that needs it
    reads_weights  observe is called, with None for batches, where there is no calibration too
    sparse24  the recipe that packs 2:4 weights for sparse units and does as this one with the others; None: it cannot
    """

    name: str
    rules: tuple[Rule, ...]
    observe: Callable[[nn.Module, Iterable], Any] | None = None
    needs_calibration: bool = False
    prepare: Callable[[nn.Module], AbstractContextManager] = nullcontext
    tokens: Any = None
    code_bits: tuple[int, int] | None = None
    needs: str = NEEDS_DATA
    reads_weights: bool = False
    sparse24: Callable[[], Recipe] | None = None

    def __repr__(self) -> str:
        return f"Recipe({self.name})"

    def seen(self, model: nn.Module, batches: Any) -> Any:
        """What observe finds on the batches, None where there are none; None where it is not called."""
        called = self.observe is not None and (batches is not None or self.reads_weights)
        return self.observe(model, batches) if called else None

    def __add__(self, other: Recipe) -> Recipe:
        """Both: the rules of the first have the first word. Of their observers, that of the one that needs it."""
        if self.tokens is not None and other.tokens is not None:
            raise ValueError(f"{self.name} + {other.name}: a model has one schedule of tokens; leave one of them out")
        observers = [r.observe for r in sorted((self, other), key=lambda r: not r.needs_calibration) if r.observe]
        return Recipe(
            f"{self.name} + {other.name}",
            self.rules + other.rules,
            observers[0] if observers else None,
            self.needs_calibration or other.needs_calibration,
            nested(self.prepare, other.prepare),
            self.tokens or other.tokens,
            self.code_bits or other.code_bits,
            self.needs if self.needs_calibration else other.needs,
            sparse24=_sparse24_of(self, other),
        )


def nested(outer: Callable, inner: Callable) -> Callable[[nn.Module], AbstractContextManager]:
    """Recipe.prepare of a sum."""
    if outer is inner or inner is nullcontext:
        return outer
    if outer is nullcontext:
        return inner

    @contextmanager
    def both(model: nn.Module) -> Iterator[nn.Module]:
        with outer(model), inner(model):
            yield model

    return both


def _sparse24_of(first: Recipe, second: Recipe) -> Callable[[], Recipe] | None:
    """Recipe.sparse24 of their sum."""
    if first.sparse24 is not None:
        return lambda: first.sparse24() + second
    return None if second.sparse24 is None else lambda: first + second.sparse24()


@dataclass(frozen=True)
class Entry:
    name: str
    kind: str
    became: str  # empty: kept
    reason: str  # why it was kept
    layers: tuple[Layer, ...] = ()


@dataclass(frozen=True)
class Report:
    """What became what. Prints as a table, runs of equal rows (blocks.0, blocks.1, ...) as one."""

    recipe: str
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()

    @property
    def replaced(self) -> list[Entry]:
        return [e for e in self.entries if e.became]

    @property
    def kept(self) -> list[Entry]:
        return [e for e in self.entries if not e.became]

    @property
    def layers(self) -> list[Layer]:
        """Every matmul that was replaced, by its dotted name."""
        return [
            replace(layer, name=".".join(filter(None, (entry.name, layer.name))))
            for entry in self.entries for layer in entry.layers
        ]

    def __str__(self) -> str:
        groups: dict[tuple[str, ...], list[str]] = {}
        for e in self.entries:
            pattern = re.sub(r"\d+", "*", e.name)
            groups.setdefault((pattern, e.kind, e.became, e.reason), []).append(e.name)
        rows = [("module", "count", "was", "became")]
        for (pattern, kind, became, reason), names in groups.items():
            rows.append((names[0] if len(names) == 1 else pattern, str(len(names)), kind, became or f"kept: {reason}"))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join((*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3])) for row in rows]
        layers = self.layers
        if layers:
            formats = Counter(f"{layer.weight} x {layer.activation}" for layer in layers)
            held, floats = (sum(getattr(layer, name) for layer in layers) / 2**20 for name in ("bytes", "float_bytes"))
            lines.append("matmuls, weight x activation: " + ", ".join(f"{n} {name}" for name, n in formats.items()))
            lines.append(f"their weights: {held:.2f} MiB, in 16-bit floats {floats:.2f}")
        lines.extend(self.notes)
        return "\n".join([f"{self.recipe}: {len(self.replaced)} modules replaced, {len(self.kept)} kept", *lines])


def accelerate(
    model: nn.Module, recipe: Recipe, calibration: Iterable | None = None, strict: bool = False, inplace: bool = False
) -> tuple[nn.Module, Report]:
    """Replace what the recipe can replace; the deepest match wins, the rest is kept and listed with its reason.

    model        in eval mode; not changed unless inplace (the copy shares the memory of the tensors that are kept)
    calibration  batches the model can be called with: tensors, (inputs, ...) tuples or keyword dicts
    strict       raise Unsupported instead of keeping a module a rule could not convert
    returns      the accelerated model, and a Report that prints as a table

    Raises ValueError for a model in training mode, or a recipe that needs calibration and got none. Until every module
    is built nothing is swapped, so an error leaves the model as it was.
    """
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"accelerate: {training[0]} is in training mode; call model.eval() first")
    if recipe.needs_calibration and calibration is None:
        raise ValueError(f"accelerate: recipe {recipe.name} {recipe.needs}")
    if not inplace:
        model = copy.deepcopy(model, _shared_tensors(model))
    modules = dict(model.named_modules(remove_duplicate=False))
    reading = None if recipe.tokens is None else recipe.tokens.read(model)
    with recipe.prepare(model):
        observed = recipe.seen(model, calibration)
        plan, refused = _plan(model, recipe, observed)
        if strict and refused:
            name, reason = next(iter(refused.items()))
            raise Unsupported(f"{name}: {reason}")
        report = Report(recipe.name, tuple(_entries(modules, plan, refused)), _notes(plan))
        made = getattr(model, "pyvit_accel", {"recipe": "", "modules": []})  # by an earlier call
        for name, new in plan.items():
            target = _target(name, new)
            new.module.train(False)
            if target:
                model.set_submodule(target, new.module)
            else:
                model = new.module
    if reading is not None:
        replaced = {modules[_target(name, new)]: new.module for name, new in plan.items()}
        report = reading.report(report, reading.apply(model, replaced))
    specs = [{"name": name, "path": new.path, **new.spec} for name, new in plan.items()]
    names = [name for name in (made["recipe"], recipe.name) if name]
    now = getattr(model, "pyvit_accel", {})  # with the schedule of tokens, if there is one
    model.pyvit_accel = now | {"recipe": " + ".join(names), "modules": made["modules"] + specs}
    return model, report


def _shared_tensors(model: nn.Module) -> dict[int, Tensor]:
    """A deepcopy memo: new tensors in the same memory. Moving or converting the copy leaves the model as it was."""
    memo: dict[int, Tensor] = {id(t): nn.Parameter(t.detach(), t.requires_grad) for t in model.parameters()}
    return memo | {id(t): t.detach() for t in model.buffers()}


def _plan(model: nn.Module, recipe: Recipe, observed: Any) -> tuple[dict[str, Replacement], dict[str, str]]:
    """Replacements by the name of the matched module, and the reasons of those that were refused."""
    plan: dict[str, Replacement] = {}
    refused: dict[str, str] = {}
    taken: list[str] = []
    for rule in recipe.rules:
        for name, module in model.named_modules(remove_duplicate=False):
            if not rule.means(name, module) or name in plan or any(_inside(name, t) for t in taken):
                continue
            if not rule.applies(name, module):
                refused.setdefault(name, rule.unless_reason)
                continue
            try:
                new = rule.convert(module, observed)
            except Unsupported as reason:
                refused.setdefault(name, str(reason))
                continue
            target = _target(name, new)
            if any(_inside(t, target) for t in taken):
                refused.setdefault(name, "an earlier rule took a part of it")
                continue
            plan[name] = new
            taken.append(target)
            refused.pop(name, None)
    return plan, refused


def _notes(plan: dict[str, Replacement]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(new.note for new in plan.values() if new.note))


def _target(name: str, new: Replacement) -> str:
    return ".".join(part for part in (name, new.path) if part)


def _inside(name: str, parent: str) -> bool:
    return not parent or name == parent or name.startswith(f"{parent}.")


def _entries(modules: dict[str, nn.Module], plan: dict[str, Replacement], refused: dict[str, str]) -> Iterable[Entry]:
    targets = {_target(name, new): new for name, new in plan.items()}
    for name, module in modules.items():
        kind = type(module).__name__
        if name in targets:
            new = targets[name]
            yield Entry(name, kind, new.spec.get("class", type(new.module).__name__), "", new.layers)
        elif any(_inside(name, t) for t in targets):
            continue
        elif name in refused:
            yield Entry(name, kind, "", refused[name])
        elif next(module.parameters(recurse=False), None) is not None:
            yield Entry(name or "(model)", kind, "", "no rule for it")
