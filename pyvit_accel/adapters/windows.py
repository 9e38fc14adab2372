"""Windows and relative position, as timm, torchvision and transformers have them: what the adapters of Swin share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IN_WINDOWS = "its tokens move into windows between norm and attention; attention and MLP are replaced one by one"
HIDDEN = -100.0  # what Swin adds to the scores of tokens that the shift brought together


def relative_bias(table: Tensor, index: Tensor) -> Tensor:
    """table (positions, H), index of N x N pairs: (H, N, N)."""
    N = math.isqrt(index.numel())
    return table.detach()[index.flatten()].view(N, N, -1).permute(2, 0, 1)


def continuous_bias(mlp: nn.Module, coordinates: Tensor, index: Tensor) -> Tensor:
    """Swin V2: the table comes from an MLP on coordinates (1, .., 2)."""
    with torch.no_grad():
        return 16 * torch.sigmoid(relative_bias(mlp(coordinates).flatten(0, -2), index))


def cosine(logit_scale: Tensor) -> dict:
    """Swin V2: the fields of AttentionParts, scale among them, for cosine attention; logit_scale (H, 1, 1)."""
    return {"scale": 1.0, "gain": logit_scale.detach().clamp(max=math.log(100.0)).exp().flatten()}


def tile_mask(mask: Tensor | None, windows: int) -> Tensor | None:
    """A mask per window of an image, (nW, N, N), for all B nW windows of a batch: (B nW, 1, N, N)."""
    return None if mask is None else mask.repeat(windows // mask.shape[0], 1, 1)[:, None]


class Windows(nn.Module):
    """An accelerated attention that is called with windows (B nW, N, C) and a mask (nW, N, N), added to the scores."""

    def __init__(self, accelerated: nn.Module, original: nn.Module) -> None:
        super().__init__()
        self.accelerated = accelerated

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.accelerated(x, tile_mask(mask, x.shape[0]))


class ShiftedWindows(nn.Module):
    """An accelerated attention (B nW, N, C) that pads, shifts and cuts maps (B, H, W, C) into windows by itself."""

    def __init__(self, accelerated: nn.Module, original: nn.Module) -> None:
        super().__init__()
        self.accelerated = accelerated
        self.window_size, self.shift_size = tuple(original.window_size), tuple(original.shift_size)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        h, w = self.window_size
        x = F.pad(x, (0, 0, 0, -W % w, 0, -H % h))
        B, rows, columns, C = x.shape
        sizes = zip((rows, columns), self.window_size, self.shift_size, strict=True)
        shift = tuple(0 if n <= window else s for n, window, s in sizes)
        x = x.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else x
        mask = tile_mask(self.mask((rows, columns), shift, x), B * (rows // h) * (columns // w))
        x = x.view(B, rows // h, h, columns // w, w, C).transpose(2, 3).reshape(-1, h * w, C)
        x = self.accelerated(x, mask)
        x = x.view(B, rows // h, columns // w, h, w, C).transpose(2, 3).reshape(B, rows, columns, C)
        x = x.roll(shift, (1, 2)) if any(shift) else x
        return x[:, :H, :W].contiguous()

    def mask(self, size: Sequence[int], shift: Sequence[int], like: Tensor) -> Tensor | None:
        """(nW, N, N): tokens of a window that were no neighbours before the shift hide from each other."""
        if not any(shift):
            return None
        bands = []
        for n, window, s in zip(size, self.window_size, shift, strict=True):
            at = torch.arange(n, device=like.device)
            bands.append((at >= n - window).long() + (at >= n - s).long() if s else torch.zeros_like(at))
        h, w = self.window_size
        region = 3 * bands[0][:, None] + bands[1]
        region = region.view(size[0] // h, h, size[1] // w, w).transpose(1, 2).reshape(-1, h * w)
        apart = region[:, None] != region[:, :, None]
        return torch.zeros(apart.shape, dtype=like.dtype, device=like.device).masked_fill_(apart, HIDDEN)
