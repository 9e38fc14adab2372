"""What modules with a format of probabilities share."""

from __future__ import annotations

import torch
from torch import nn

from pyvit_accel.formats.softmax import SoftmaxFormat


class SoftmaxHolder(nn.Module):
    """self.softmax, a format or None, follows the module to another device. It is no buffer: half() would round it."""

    softmax: SoftmaxFormat | None

    def _apply(self, fn, recurse: bool = True) -> SoftmaxHolder:
        if self.softmax is not None:
            self.softmax = self.softmax.to(fn(torch.empty_like(self.softmax.values)).device)
        return super()._apply(fn, recurse)
