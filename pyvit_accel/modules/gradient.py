"""A backward through an accelerated module raises, instead of being silently wrong."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> NoReturn:
        raise RuntimeError("an accelerated layer has no derivative, integer codes have none; train the float model")


def refuse_gradient(y: Tensor, x: Tensor) -> Tensor:
    """y, through which a backward raises. Codes cut x off from y, and a residual beside y would hide that."""
    return _NoGradient.apply(y, x) if x.requires_grad and torch.is_grad_enabled() else y
