"""Poison for what an op allocates: a pattern in every new tensor, and margins around it that must stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MARGIN = 4096  # bytes on either side; keeps the alignment of what lies between
NAN, LARGE = 0xFF, 0x7F  # floats that are not numbers, or 3.4e38; integers -1, or the largest
_NEW = ("aten::empty.memory_format", "aten::empty_like", "aten::empty_strided", "aten::new_empty",
        "aten::new_empty_strided")  # fmt: skip


class Guarded(TorchDispatchMode):
    """Within it torch.empty and its kin return poisoned memory between margins; check() looks at the margins."""

    def __init__(self, fill: int) -> None:
        super().__init__()
        self.fill, self._buffers = fill, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.name() not in _NEW or result.dtype == torch.bool or result.numel() == 0:
            return result
        return self._between_margins(result)

    def _between_margins(self, like: Tensor) -> Tensor:
        reach = 1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True))
        size = reach * like.element_size()
        padded = -(-size // 16) * 16
        buffer = torch.full((padded + 2 * MARGIN,), self.fill, dtype=torch.uint8, device=like.device)
        self._buffers.append((buffer, size))
        inside = buffer[MARGIN : MARGIN + padded].view(like.dtype)
        return inside.as_strided(like.shape, like.stride(), inside.storage_offset())

    def place(self, t: Tensor, device: str) -> Tensor:
        """t on the device, its layout kept, between margins too."""
        expanded = any(stride == 0 and n > 1 for n, stride in zip(t.shape, t.stride(), strict=True))
        if t.numel() == 0 or t.dtype == torch.bool or expanded:
            return t.to(device)
        return self._between_margins(t.to(device)).copy_(t)

    def check(self) -> None:
        for buffer, size in self._buffers:
            margins = torch.cat([buffer[:MARGIN], buffer[MARGIN + size :]])
            if not bool((margins == self.fill).all()):
                at = int((margins != self.fill).nonzero()[0])
                raise AssertionError(f"wrote outside a tensor of {size} bytes, at {at} of its {MARGIN}-byte margins")
