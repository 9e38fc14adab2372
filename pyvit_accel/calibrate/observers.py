"""Watch a float model on calibration batches and keep, per layer, what choosing its number format needs.

min, max, mean  (C,)    float32, over every row seen; C is the last axis of the layer's input or output
sample          (R, C)  float32, at most `rows` rows, evenly spaced over all batches
count           rows seen; a row is one token

Of blocks the inputs themselves can be kept, for searches that run them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyvit_accel.errors import Unsupported


@dataclass(frozen=True)
class Activation:
    """Statistics of one tensor over the calibration batches."""

    min: Tensor
    max: Tensor
    mean: Tensor
    sample: Tensor
    count: int

    @classmethod
    def of(cls, x: Tensor) -> Activation:
        """Statistics of the one tensor x (..., C), all rows kept as the sample."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if rows.numel() == 0:
            raise ValueError(f"Activation.of: x has shape {tuple(x.shape)} and no element; give at least one row")
        lo, hi = rows.aminmax(dim=0)
        return cls(lo, hi, rows.mean(0), rows, rows.shape[0])

    @property
    def amax(self) -> Tensor:
        """Largest magnitude per channel, (C,)."""
        return torch.maximum(self.max, -self.min)


class _Accumulator:
    """Running statistics of one tensor. The sample keeps every stride-th row and, when full, drops every second one:
    evenly spaced over a stream of unknown length, and the same on every run."""

    def __init__(self, rows: int):
        self.rows, self.stride, self.count = rows, 1, 0
        self.kept: list[Tensor] = []
        self.num_kept = 0

    def add(self, x: Tensor) -> bool:
        """Take the rows of x; False when they hold NaN or an infinity."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if rows.shape[0] == 0:
            return True
        lo, hi = rows.aminmax(dim=0)
        if not bool((lo.isfinite() & hi.isfinite()).all()):
            return False
        total = rows.sum(0, dtype=torch.float64)
        if self.count == 0:
            self.lo, self.hi, self.total = lo, hi, total
        else:
            self.lo, self.hi = torch.minimum(self.lo, lo), torch.maximum(self.hi, hi)
            self.total += total
        picked = rows[-self.count % self.stride :: self.stride]  # rows whose running number is a multiple of stride
        self.kept.append(picked.clone())  # a view would keep the whole activation alive
        self.num_kept += picked.shape[0]
        self.count += rows.shape[0]
        while self.num_kept > self.rows:
            self.kept = [torch.cat(self.kept)[::2].clone()]
            self.num_kept = self.kept[0].shape[0]
            self.stride *= 2
        return True

    def result(self) -> Activation:
        mean = (self.total / self.count).float()
        return Activation(self.lo, self.hi, mean, torch.cat(self.kept), self.count)


@dataclass(frozen=True)
class Kept:
    """A block, and its inputs (images, N, C); None: the outputs of the block kept before it."""

    block: nn.Module
    inputs: Tensor | None


class _Keeper:
    """Inputs of blocks over the batches. Where a block's input is the very output of the one before, that is noted in
    place of the tensor: a plain stack of blocks costs the memory of one input."""

    def __init__(self, images: int):
        self.left = images
        self.inputs: dict[nn.Module, list[Tensor]] = {}  # in the order of the first batch
        self.after: dict[nn.Module, nn.Module | None] = {}
        self.refused: set[nn.Module] = set()
        self.called: set[nn.Module] = set()
        self.last: tuple[nn.Module | None, Tensor | None] = None, None

    def hook(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if self.left <= 0:
            return
        x, *others = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)] or [None]
        y = output[0] if isinstance(output, (tuple, list)) else output
        before = self.last[0] if x is not None and x is self.last[1] else None
        alike = isinstance(x, Tensor) and x.dim() == 3 and isinstance(y, Tensor) and y.shape == x.shape
        if not alike or others or module in self.called or self.after.setdefault(module, before) is not before:
            self.refused.add(module)
            return
        self.called.add(module)
        kept = self.inputs.setdefault(module, [])
        if before is None:
            kept.append(x[: self.left].detach().float().clone())
        self.last = module, y

    def end_batch(self) -> None:
        self.left -= max((kept[-1].shape[0] for kept in self.inputs.values() if kept), default=0)
        self.called.clear()
        self.last = None, None

    def result(self) -> tuple[Kept, ...]:
        found: dict[nn.Module, Kept] = {}
        for module, inputs in self.inputs.items():
            before = self.after[module]
            if module not in self.refused and (before is None or before in found):
                found[module] = Kept(module, torch.cat(inputs) if before is None else None)
        return tuple(found.values())


class Observed:
    """What `observe` saw: `input(layer)` and `output(layer)` give an Activation. blocks: those that were kept."""

    def __init__(self, names: dict[nn.Module, str], inputs: dict, outputs: dict, blocks: tuple[Kept, ...] = ()):
        self._names, self._inputs, self._outputs, self.blocks = names, inputs, outputs, blocks

    def input(self, layer: nn.Module) -> Activation:
        return self._get(self._inputs, layer)

    def output(self, layer: nn.Module) -> Activation:
        return self._get(self._outputs, layer)

    def name(self, layer: nn.Module) -> str:
        """The dotted name of a watched layer."""
        return self._names[self._known(layer)]

    def __contains__(self, layer: nn.Module) -> bool:
        return layer in self._inputs

    def _known(self, layer: nn.Module) -> nn.Module:
        if layer not in self._names:
            raise Unsupported(f"this {type(layer).__name__} was not observed; name it in observe(modules=...)")
        return layer

    def _get(self, seen: dict, layer: nn.Module) -> Activation:
        if self._known(layer) not in seen:
            raise Unsupported(f"no calibration batch reached {self._names[layer]}; it has no statistics")
        return seen[layer]


def observe(
    model: nn.Module,
    batches: Tensor | Mapping | Iterable,
    modules: Iterable[nn.Module] | None = None,
    rows: int = 512,
    keep: Callable[[nn.Module], bool] | None = None,
    images: int = 64,
) -> Observed:
    """Run the float model over the batches without gradients and collect statistics of the layers' inputs and outputs.

    batches: an iterable of batches, or one batch. A batch is a Tensor, a tuple or list whose first element is the
    input (a DataLoader with labels), or a mapping of keyword arguments. It is moved to the model's device.
    modules: which layers to watch; every nn.Linear when None. rows: the most sample rows kept per tensor.
    keep: of which modules to keep the inputs (B, N, C), of at most so many images. A module that also got a mask, or
    ran more than once a batch, is left out.
    """
    if model.training:
        raise ValueError("observe: the model is in training mode, dropout would change the numbers; call model.eval()")
    if rows < 1:
        raise ValueError(f"observe: rows={rows} keeps no sample; use at least 1")
    names = {module: name or "the model itself" for name, module in model.named_modules()}
    watched = [m for m in names if isinstance(m, nn.Linear)] if modules is None else list(modules)
    for module in watched:
        if module not in names:
            raise ValueError(f"observe: a {type(module).__name__} in modules is not part of the model")
    watched_names = {module: names[module] for module in watched}
    inputs = {module: _Accumulator(rows) for module in watched_names}
    outputs = {module: _Accumulator(rows) for module in watched_names}
    batch_index = 0
    keeper = _Keeper(images)

    def hook(module, args, kwargs, output):
        x = args[0] if args else next(iter(kwargs.values()))
        y = output[0] if isinstance(output, (tuple, list)) else output
        for what, tensor, seen in (("input", x, inputs), ("output", y, outputs)):
            if not seen[module].add(tensor):
                where = f"the {what} of {names[module]}"
                raise ValueError(f"observe: {where} holds NaN or an infinity in batch {batch_index}")

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in watched_names]
    if keep is not None:
        handles += [m.register_forward_hook(keeper.hook, with_kwargs=True) for m in names if keep(m)]
    num_batches = 0
    try:
        with torch.no_grad():
            for batch_index, batch in enumerate([batches] if isinstance(batches, (Tensor, Mapping)) else batches):
                args, kwargs = call_arguments(batch, batch_index, device)
                model(*args, **kwargs)
                keeper.end_batch()
                num_batches += 1
    finally:
        for handle in handles:
            handle.remove()
    if num_batches == 0:
        raise ValueError("observe: no calibration batches; give at least one (an exhausted generator counts as none)")
    return Observed(
        watched_names,
        {module: seen.result() for module, seen in inputs.items() if seen.count},
        {module: seen.result() for module, seen in outputs.items() if seen.count},
        keeper.result(),
    )


def call_arguments(batch, batch_index: int, device: torch.device) -> tuple[tuple, dict]:
    """The batch as (args, kwargs) of model.forward, on its device, with every floating tensor finite."""
    if isinstance(batch, Mapping):
        args, kwargs = (), dict(batch)
    elif isinstance(batch, (tuple, list)) and len(batch) and isinstance(batch[0], Tensor):
        args, kwargs = (batch[0],), {}
    elif isinstance(batch, Tensor):
        args, kwargs = (batch,), {}
    else:
        raise TypeError(
            f"observe: batch {batch_index} is a {type(batch).__name__}; "
            "expected a Tensor, a tuple or list starting with one, or a mapping of keyword arguments"
        )
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    for x in tensors:
        if x.numel() == 0:
            raise ValueError(f"observe: batch {batch_index} is empty, shape {tuple(x.shape)}; give at least one image")
        if x.is_floating_point() and not bool((~x.isnan() if kwargs else x.isfinite()).all()):  # a mask may hold -inf
            raise ValueError(f"observe: batch {batch_index} holds NaN or an infinity; clean the calibration data")
    kwargs = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in kwargs.items()}
    return tuple(x.to(device) for x in args), kwargs
