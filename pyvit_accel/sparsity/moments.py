"""What masks need to know of a layer's inputs: their second moments over calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyvit_accel.errors import Unsupported

CONSTANT = 1e-6  # of its mean, that the deviation of an input exceeds: float32 knows of none below


@dataclass(frozen=True)
class Moments:
    """centred (K, K), mean (K,) float32: covariance and mean of `count` rows x of the layer's input. The covariance is
    what an error still does once a bias has taken up its mean."""

    centred: Tensor
    mean: Tensor
    count: int

    @classmethod
    def of(cls, x: Tensor, importance: Tensor | None = None) -> Moments:
        """Of one tensor x (..., K); importance (...): what a row counts, 1 when None."""
        sums = Sums()
        sums.add(x, importance)
        return sums.result("x")

    @property
    def norm(self) -> Tensor:
        """Root of the mean square of each input, (K,)."""
        return (self.centred.diagonal() + self.mean.square()).sqrt()

    @property
    def gram(self) -> Tensor:
        """Mean of x x^T, (K, K)."""
        return self.centred + torch.outer(self.mean, self.mean)

    def permuted(self, order: Tensor) -> Moments:
        """Of the inputs in another order."""
        return Moments(self.centred[order][:, order], self.mean[order], self.count)


class Sums:
    """Moments of one tensor as batches come. Sums are of x less the mean of the first batch: float32 would lose the
    covariance of inputs whose mean is a few hundred deviations."""

    def __init__(self) -> None:
        self.products: Tensor | None = None
        self.count = 0

    def add(self, x: Tensor, importance: Tensor | None = None) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        counts = rows.new_ones(len(rows)) if importance is None else importance.detach().reshape(-1).to(rows)
        if not len(rows):
            return
        if self.products is None:
            K, self.shift = rows.shape[1], rows.mean(0)
            self.products, self.total, self.weight = rows.new_zeros(K, K), rows.new_zeros(K, dtype=torch.float64), 0.0
        rows = rows - self.shift
        scaled = rows * counts[:, None]
        self.products.addmm_(scaled.T, rows)
        self.total += scaled.sum(0, dtype=torch.float64)
        self.weight += float(counts.sum(dtype=torch.float64))
        self.count += len(rows)

    def result(self, name: str) -> Moments:
        """Raises Unsupported when nothing came, ValueError when what came is not finite; `name` says where."""
        if not self.count:
            raise Unsupported(f"no calibration batch reached {name}; it has no statistics")
        if not bool(self.products.isfinite().all()):
            raise ValueError(f"the input of {name} is not finite; clean the calibration data, or weights before it")
        mean = self.total / self.weight
        centred = self.products.double() / self.weight - torch.outer(mean, mean)
        mean = mean + self.shift
        constant = centred.diagonal() <= (CONSTANT * mean).square()
        centred[constant], centred[:, constant] = 0, 0
        return Moments(centred.float(), mean.float(), self.count)


def observe(
    model: nn.Module,
    batches: Tensor | Mapping | Iterable,
    layers: Iterable[str],
    progress: Callable[[Iterable, str], Iterable] | None = None,
) -> dict[str, Moments]:
    """Run the model over the batches without gradients; the moments of the inputs of the named layers.

    batches   one batch or an iterable of them: a Tensor, a tuple or list that starts with one, or a mapping of keyword
              arguments; moved to the model's device
    progress  progress(batches, label) iterates the batches

    Raises ValueError for a model in training mode, for no batch and for inputs that are not finite; Unsupported, naming
    the layer, when no batch reached it.
    """
    modules = {name: model.get_submodule(name) for name in layers}
    sums = {module: Sums() for module in modules.values()}  # of which one may have several names

    def add(module, args, kwargs):
        sums[module].add(args[0] if args else next(iter(kwargs.values())))

    with hooked(dict.fromkeys(sums, add)):
        for args, kwargs in calls(model, batches, progress):
            model(*args, **kwargs)
    return {name: sums[module].result(name) for name, module in modules.items()}


class hooked:
    """Forward pre-hooks for the time of a with statement, and no gradients."""

    def __init__(self, hooks: dict[nn.Module, Callable]) -> None:
        self.hooks = hooks

    def __enter__(self) -> None:
        self.grad = torch.no_grad()
        self.grad.__enter__()
        self.handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m, hook in self.hooks.items()]

    def __exit__(self, *error) -> None:
        for handle in self.handles:
            handle.remove()
        self.grad.__exit__(*error)


def calls(model: nn.Module, batches, progress=None) -> Iterable[tuple[tuple, dict]]:
    """(args, kwargs) of model.forward for every batch, on the model's device. Raises as observe."""
    if model.training:
        raise ValueError("sparsity: the model is in training mode, dropout would change the numbers; call model.eval()")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    several = [batches] if isinstance(batches, (Tensor, Mapping)) else batches
    count = 0
    for batch in several if progress is None else progress(several, "calibration"):
        if isinstance(batch, Mapping):
            yield (), {key: x.to(device) if isinstance(x, Tensor) else x for key, x in batch.items()}
        else:
            x = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"sparsity: batch {count} is a {type(batch).__name__}; expected a Tensor, a tuple or list starting "
                    "with one, or a mapping of keyword arguments"
                )
            yield (x.to(device),), {}
        count += 1
    if not count:
        raise ValueError("sparsity: no calibration batches; give at least one (an exhausted generator counts as none)")
