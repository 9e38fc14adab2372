"""reduce_tokens: give the blocks of a model, float or accelerated, the steps of a schedule.

    read(model)                 what its blocks are made of, while they are whole
      .apply(model, replaced)   steps into blocks of ours; other blocks become TokenBlocks
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from pyvit_accel import adapters
from pyvit_accel.adapters import BLOCKS, MLPS
from pyvit_accel.adapters.tokens import TokenLayout, token_layout
from pyvit_accel.adapters.windows import IN_WINDOWS
from pyvit_accel.convert import Entry, Report
from pyvit_accel.errors import Unsupported
from pyvit_accel.modules import ExpFreeAttention, QuantMlp
from pyvit_accel.modules.parts import BlockParts
from pyvit_accel.modules.token_block import ReducingBlock, TokenBlock
from pyvit_accel.modules.token_step import TokenState
from pyvit_accel.tokens.schedule import TokenSchedule, macs
from pyvit_accel.tokens.window_merge import MergedMlp, check_ratio


@dataclass(frozen=True)
class Reduction:
    """A schedule, or None, and how it meets a model; what else is None follows from the model (adapters/tokens.py).

    num_prefix_tokens  class, distillation and register tokens, which stay
    restore            whether the last block gives back all tokens: what heads of dense tasks and mean pooling need
    """

    schedule: TokenSchedule | None
    num_prefix_tokens: int | None = None
    restore: bool | None = None

    def read(self, model: nn.Module) -> Reading:
        """Before anything is replaced. Raises ValueError where the counts do not fit the model."""
        layout, blocks = token_layout(model), _blocks(model)
        _check_eval(model, *(block for block, _ in blocks.values()))
        if self.num_prefix_tokens is not None:
            if self.num_prefix_tokens < 0:
                raise ValueError(f"num_prefix_tokens={self.num_prefix_tokens}; use 0 or more")
            layout = replace(layout, num_prefix_tokens=self.num_prefix_tokens)
        if self.schedule is not None:
            self.schedule.steps(len(blocks))
            if layout.num_tokens is not None:
                self.schedule.rows(len(blocks), layout.num_tokens, layout.num_prefix_tokens)
        return Reading(self, layout, blocks)

    def to_dict(self) -> dict:
        """A dictionary that json can write."""
        schedule = None
        if self.schedule is not None:
            schedule = {"method": self.schedule.method, "arguments": self.schedule.arguments}
        return {"schedule": schedule, "num_prefix_tokens": self.num_prefix_tokens, "restore": self.restore}


@dataclass(frozen=True)
class Reading:
    """The blocks of one model by name: parts to make TokenBlocks of, or None for blocks that are ours."""

    reduction: Reduction
    layout: TokenLayout
    blocks: Mapping[str, tuple[nn.Module, BlockParts | None]]

    def apply(self, model: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> list[str]:
        """Change the model in place. replaced: what took the place of modules since. Returns the blocks it replaced."""
        new, names = [], []
        for name, (original, parts) in self.blocks.items():
            block = _reducing(replaced.get(original, original))
            if block is None:
                block = TokenBlock(parts, replaced, _exp_free(original))
                wrapped = adapters.find(BLOCKS, original).wrap(block, original)
                model.set_submodule(name, wrapped.train(original.training))
                names.append(name)
            new.append(block)
        self._set_steps(model, new)
        _record(model, self.reduction)
        return names

    def _set_steps(self, model: nn.Module, blocks: list[ReducingBlock]) -> None:
        schedule, restore = self.reduction.schedule, self.reduction.restore
        if schedule is None:
            for block in blocks:
                block.reduce(None, None)
            return
        steps = schedule.steps(len(blocks))
        if restore is None:
            restore = not self.layout.reads_first
            if restore and any(step is not None and step.drops for step in steps):
                warnings.warn(
                    f"{schedule.name}: the head of {type(model).__name__} may read the patches that are dropped; they "
                    "come back as they were when dropped. Prefer a method that merges, or pass restore=False",
                    stacklevel=4,
                )
        state = TokenState(self.layout.num_prefix_tokens, keeps_dropped=restore)
        for i, (block, step) in enumerate(zip(blocks, steps, strict=True)):
            if step is not None:
                step.train(block.training).to(block.norm1.weight)
            block.reduce(step, state, is_first=i == 0, restores=restore and i == len(blocks) - 1)

    def report(self, report: Report, names: list[str]) -> Report:
        """With the blocks that became TokenBlocks, and a line on the counts."""
        kinds = {name: type(self.blocks[name][0]).__name__ for name in names}
        others = (e for e in report.entries if e.became or not any(e.name.startswith(f"{name}.") for name in names))
        blocks = tuple(Entry(name, kind, TokenBlock.__name__, "") for name, kind in kinds.items())
        return replace(report, entries=(*blocks, *others), notes=(*report.notes, self.describe()))

    def describe(self) -> str:
        """How many tokens leave each block, and what is left of the multiply-adds."""
        layout, schedule = self.layout, self.reduction.schedule
        if layout.num_tokens is None:
            return f"tokens: {schedule.name}"
        N, depth, p = layout.num_tokens, len(self.blocks), layout.num_prefix_tokens
        rows, dim = schedule.rows(depth, N, p), self._dim()
        part = macs(rows, dim) / (depth * macs([type(rows[0])(N, N, N, N)], dim))
        counts = ", ".join(str(r.out) for r in rows)
        return f"tokens: {schedule.name}: {N} to {counts}; {100 * part:.0f} % of the multiply-adds of the blocks"

    def _dim(self) -> int:
        module, parts = next(iter(self.blocks.values()))
        return (module if parts is None else parts).norm1.weight.shape[0]


@dataclass(frozen=True)
class WindowReduction:
    """Pairs of tokens of every window share a pass through the MLP (tokens/window_merge.py): for Swin and SAM."""

    ratio: float
    window: int | None = None

    def __post_init__(self) -> None:
        check_ratio(self.ratio, self.window)

    def read(self, model: nn.Module) -> WindowReading:
        """Before anything is replaced. Raises Unsupported for a model without MLPs that are known."""
        _check_eval(model)
        if any(isinstance(module, MergedMlp) for module in model.modules()):
            raise ValueError(f"{type(model).__name__} merges in windows already; start from the model before")
        names = [name for name, module in model.named_modules() if _is_mlp(module)]
        if not names:
            raise Unsupported(f"{type(model).__name__} has no MLP whose tokens can be merged in windows")
        if prefix := token_layout(model).num_prefix_tokens:
            raise Unsupported(f"{type(model).__name__} has {prefix} tokens that stand in no window; use TOME")
        grids = (getattr(model.get_submodule(name.rpartition(".")[0]), "input_resolution", None) for name in names)
        return WindowReading(self, dict(zip(names, grids, strict=True)))

    def to_dict(self) -> dict:
        """A dictionary that json can write."""
        return {"ratio": self.ratio, "window": self.window}


@dataclass(frozen=True)
class WindowReading:
    reduction: WindowReduction
    names: Mapping[str, tuple[int, int] | None]  # with the grid, where the block around an MLP knows it

    def apply(self, model: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> list[str]:
        """Wrap the MLPs, whatever they have become. Returns their names. Raises Unsupported where a block took one."""
        for name, grid in self.names.items():
            if isinstance(model.get_submodule(name.rpartition(".")[0]), ReducingBlock):
                raise Unsupported(f"{name} became part of a fused block, whose tokens a TokenSchedule reduces")
            merged = MergedMlp(model.get_submodule(name), self.reduction.ratio, self.reduction.window, grid)
            model.set_submodule(name, merged.eval())
        _record(model, self.reduction)
        return list(self.names)

    def report(self, report: Report, names: list[str]) -> Report:
        """With a line on what merges."""
        part = f"{100 * self.reduction.ratio:.0f} % of a window's tokens"
        note = f"tokens: {part} share a pass through the MLP with another, in {len(names)} MLPs"
        return replace(report, notes=(*report.notes, note))


def from_dict(values: dict) -> Reduction | WindowReduction:
    """The inverse of to_dict of both."""
    if "ratio" in values:
        return WindowReduction(**values)
    schedule = None if values["schedule"] is None else TokenSchedule(**values["schedule"])
    return Reduction(schedule, values["num_prefix_tokens"], values["restore"])


def _record(model: nn.Module, reduction: Reduction | WindowReduction) -> None:
    """For save."""
    made = getattr(model, "pyvit_accel", {"recipe": "", "modules": []})
    model.pyvit_accel = made | {"tokens": reduction.to_dict()}


def _exp_free(block: nn.Module) -> ExpFreeAttention | None:
    """What computes the attention of a block instead of softmax, if a recipe put it there."""
    return next((m for m in block.modules() if isinstance(m, ExpFreeAttention)), None)


def _check_eval(*modules: nn.Module) -> None:
    """Dropout and stochastic depth are left out of what takes a block's place."""
    training = [type(module).__name__ for module in modules if module.training]
    if training:
        raise ValueError(f"reduce_tokens: {training[0]} is in training mode; call model.eval() first")


def _is_mlp(module: nn.Module) -> bool:
    return isinstance(module, QuantMlp) or adapters.find(MLPS, module) is not None


def reduce_tokens(
    model: nn.Module,
    schedule: TokenSchedule | None,
    *,
    num_prefix_tokens: int | None = None,
    restore: bool | None = None,
) -> nn.Module:
    """Give a model, float or accelerated, another schedule, in place; None takes the one it has away.

    schedule           of tokens.TokenSchedule
    num_prefix_tokens  class, distillation and register tokens; None: as many as the model has parameters for
    restore            whether the last block gives back all tokens; None: unless the head is known to read the prefix
    returns            the model

    After a forward, token_state(model) has what became of the tokens. Raises ValueError for a schedule that does not
    fit the model's depth or tokens, Unsupported for a model without blocks that can do this.
    """
    Reduction(schedule, num_prefix_tokens, restore).read(model).apply(model, {})
    return model


def token_state(model: nn.Module) -> TokenState:
    """Of the last forward: sizes, and origin(), the row that each of the first tokens is part of. Raises ValueError."""
    for module in model.modules():
        if isinstance(module, ReducingBlock) and module.state is not None:
            return module.state
    raise ValueError(f"token_state: no tokens of this {type(model).__name__} are reduced; call reduce_tokens first")


def _reducing(module: nn.Module) -> ReducingBlock | None:
    """The block of ours that a module is, or wraps."""
    return next((m for m in module.modules() if isinstance(m, ReducingBlock)), None)


def _blocks(model: nn.Module) -> dict[str, tuple[nn.Module, BlockParts | None]]:
    """In the order of the model. Raises Unsupported unless all blocks can leave tokens out."""
    blocks: dict[str, tuple[nn.Module, BlockParts | None]] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{taken}.") for taken in blocks):
            continue
        if isinstance(module, ReducingBlock):
            blocks[name] = module, None
        elif (adapter := adapters.find(BLOCKS, module)) is not None and _reducing(module) is None:
            try:
                blocks[name] = module, adapter.parts(module)
            except Unsupported as reason:
                hint = "; use recipes.WINDOW_MERGE" if IN_WINDOWS in str(reason) else ""
                raise Unsupported(f"{name}: {reason}: its tokens cannot be reduced{hint}") from None
    if not blocks:
        raise Unsupported(f"{type(model).__name__} has no block whose tokens can be reduced")
    chains = list(dict.fromkeys(re.sub(r"\.?\d+(\.[a-z_]+)*$", "", name) for name in blocks))
    if len(chains) > 1:
        raise Unsupported(
            f"{type(model).__name__} has blocks in {', '.join(chains)}; reduce the tokens of one, which is a module of "
            "the model: of its vision tower, for example"
        )
    return blocks
