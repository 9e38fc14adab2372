"""Sparse24Training: nn.Linear that learns with a 2:4 weight, and the weight beneath it that stays dense.

    forward   y  = x (W Mf)^T + b
    backward  dx = dy (W Mb)                               Mb = Mf, or what sparse units can read along the rows as well
              dW = dy^T x + decay (1 - Mf) W               dense: weights that are out can come back

    backward="dense"         Mf: two of every four inputs; W Mf is dense to the product for dx
    backward="transposable"  Mf: two of four along inputs and rows, so that both products read the same sparse weight
    backward="bimask"        Mf as in "dense"; Mb: of it, two of every four rows in an order that keeps the most

Masks are found by magnitude, anew every so many steps: a step is a forward pass in training mode, but for those that
checkpointing repeats. Products are dense ones here: this is the form that learns, Sparse24Linear the one that is fast.
Zhou et al., SR-STE, arXiv:2102.04010. Hubara et al., arXiv:2102.08124. Zhang et al., Bi-Mask, arXiv:2302.06058 (its
orders are drawn at random; here they are found by swaps).
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyvit_accel import sparsity
from pyvit_accel.errors import some
from pyvit_accel.formats import sparse24
from pyvit_accel.sparsity.gate import CLASSIFIERS

from .quant_linear import check_weight

BACKWARDS = ("dense", "transposable", "bimask")
ORDER_STEPS = 100  # updates of the masks that an order of rows lasts


class _StraightThrough(torch.autograd.Function):
    """W Mf, whose gradient goes to all of W."""

    @staticmethod
    def forward(ctx, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.decay = decay
        ctx.save_for_backward(*((weight, mask) if decay else ()))
        return weight * mask

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.decay:
            weight, mask = ctx.saved_tensors
            grad = grad + ctx.decay * weight * ~mask
        return grad, None, None


class _TwoWay(torch.autograd.Function):
    """x w^T, whose gradient to x goes through w_back."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, w_back: Tensor) -> Tensor:
        ctx.save_for_backward(x, w_back)
        return F.linear(x, w)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w_back = ctx.saved_tensors
        dx = grad @ w_back if ctx.needs_input_grad[0] else None
        dw = grad.flatten(0, -2).T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return dx, dw, None


class Sparse24Training(nn.Linear):
    """Drop-in for nn.Linear in training; accelerate(model, SPARSE24) makes a Sparse24Linear of it, with its mask.

    backward  "dense" | "transposable" | "bimask": the masks, and what the gradient to x multiplies with, as above:
              with the last two, sparse units could multiply in the backward pass too
    decay     SR-STE: pulls weights that are out towards zero, 2e-4 in the paper
    every     training steps from one choice of masks to the next
    until     steps after which masks stay as they are; None: they never do
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        backward: str = "dense",
        decay: float = 0.0,
        every: int = 1,
        until: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if backward not in BACKWARDS:
            raise ValueError(f"Sparse24Training: backward={backward!r} is not one of {', '.join(BACKWARDS)}")
        if every < 1:
            raise ValueError(f"Sparse24Training: every={every}; masks are chosen every 1 or more steps")
        if decay < 0:
            raise ValueError(f"Sparse24Training: decay={decay} would drive weights away from zero; use 0 or more")
        self.backward_form, self.decay, self.every, self.until = backward, decay, every, until
        self.steps, self.updates = 0, 0
        self.register_buffer("mask", torch.ones(out_features, in_features, dtype=torch.bool, device=device))
        if backward == "bimask":
            self.register_buffer("back_mask", self.mask.clone())
            self.register_buffer("order", torch.arange(out_features, device=device))
        self.update_masks()

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options) -> Sparse24Training:
        """Of the same parameters, so that an optimizer that has them keeps them; options as of the constructor.

        Raises Unsupported for NaN, infinite or empty weights.
        """
        check_weight(linear)
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta", **options)
        for name in ("mask", "back_mask", "order"):
            if name in new._buffers:
                setattr(new, name, torch.zeros_like(getattr(new, name), device=linear.weight.device))
        new.weight, new.bias = linear.weight, linear.bias
        new.update_masks()
        return new.train(linear.training)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "mask" in self._buffers:  # not while nn.Linear is being made
            self.update_masks()

    @torch.no_grad()
    def update_masks(self) -> None:
        """Choose the masks by what the weights are now."""
        if self.weight.is_meta:
            return
        size = self.weight.detach().abs().float()
        if self.backward_form == "bimask":
            found = sparsity.bimask(size, None if self.updates % ORDER_STEPS == 0 else self.order)
            self.mask, self.back_mask, self.order = found.forward, found.backward, found.order
        else:
            choose = sparsity.transposable if self.backward_form == "transposable" else sparsity.largest_two
            self.mask = choose(size)
        self.updates += 1

    @torch.compiler.disable  # which would compile anew for every number of steps
    def _step(self) -> None:
        if torch._C._current_graph_task_id() != -1:
            return  # a checkpoint's second pass, in the backward: masks are those of the first
        if self.steps and self.steps % self.every == 0 and (self.until is None or self.steps <= self.until):
            self.update_masks()
        self.steps += 1

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self._step()
        w = _StraightThrough.apply(self.weight, self.mask, self.decay)
        if self.backward_form != "bimask":
            return F.linear(x, w, self.bias)
        w_back = self.weight.detach() * self.back_mask
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, w, w_back = x.to(dtype), w.to(dtype), w_back.to(dtype)
        y = _TwoWay.apply(x, w, w_back)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def sparse_weight(self) -> Tensor:
        """W Mf (N, K), as it will be packed. Raises ValueError for weights that are not finite."""
        w = self.weight * self.mask
        sparse24.check(w)
        return w

    def to_linear(self) -> nn.Linear:
        """The dense layer with the weight it would be packed with; the bias is this one's."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(self.sparse_weight(), requires_grad=False), self.bias
        return linear.train(self.training)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.steps, self.updates])

    def set_extra_state(self, state: Tensor) -> None:
        self.steps, self.updates = state.tolist()

    def extra_repr(self) -> str:
        until = "" if self.until is None else f" until {self.until}"
        schedule = f"backward={self.backward_form}, decay={self.decay}, masks every {self.every} steps{until}"
        return f"{super().extra_repr()}, {schedule}"


def train_sparse24(model: nn.Module, layers: str | Iterable[str] = "*", **options) -> list[str]:
    """Make a Sparse24Training of every nn.Linear whose dotted name matches `layers` (globs), in place; their names.
    One that has several names stays one under all of them. Classifiers are left out, unless a name stands for one.

    options  backward, decay, every, until of Sparse24Training. Raises ValueError for a glob that matches none.
    """
    globs = [layers] if isinstance(layers, str) else list(layers)
    everything = model.named_modules(remove_duplicate=False)
    linears = {name: module for name, module in everything if type(module) is nn.Linear}
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in linears):
            learn = any(isinstance(module, Sparse24Training) for module in model.modules())
            others = "; others learn 2:4 already" if learn else ""
            raise ValueError(f"train_sparse24: {glob!r} matches no nn.Linear; they are {some(linears)}{others}")
    chosen = {
        module for name, module in linears.items()
        if name in globs or (any(fnmatchcase(name, glob) for glob in globs) and not _is_classifier(name))
    }
    new = {module: Sparse24Training.from_linear(module, **options) for module in chosen}
    names = [name for name, module in linears.items() if module in chosen]
    for name in names:
        model.set_submodule(name, new[linears[name]])
    return names


def _is_classifier(name: str) -> bool:
    return any(fnmatchcase(name, glob) for glob in CLASSIFIERS)
