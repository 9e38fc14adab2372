"""show_tokens: which patches survived, drawn over the image after every block that changed something.

A patch that was dropped is dark. Patches that became one token share their mean colour and an outline. The grid of
patches is that of the image; tokens of the prefix are not drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyvit_accel.files import write_whole
from pyvit_accel.modules.token_block import ReducingBlock
from pyvit_accel.output import require
from pyvit_accel.token_reduction import token_state

DARK = 0.22  # of a dropped patch's brightness
LEAST_SIDE = 16  # pixels of a patch: narrower ones are enlarged, for their outlines
OUTLINE = (255, 255, 255)
COLUMNS = 7
INCHES = 2.4


@dataclass(frozen=True)
class TokenPicture:
    """One image after one block.

    block    counted from 0; -1: before the first
    tokens   of the image that are left, the prefix in them
    dropped  patches that are gone; merged: patches that share a token with others
    pixels   (H, W, 3) uint8
    """

    block: int
    tokens: int
    dropped: int
    merged: int
    pixels: Tensor

    @property
    def title(self) -> str:
        parts = [f"{self.tokens} tokens"]
        parts += [f"{self.dropped} dropped"] if self.dropped else []
        parts += [f"{self.merged} merged"] if self.merged else []
        return f"{'all' if self.block < 0 else f'block {self.block}'}: {', '.join(parts)}"


def token_pictures(
    model: nn.Module, image: Tensor, shown: Tensor | None = None, grid: tuple[int, int] | None = None
) -> list[TokenPicture]:
    """Run a model whose tokens are reduced on one image.

    image    (C, H, W) or (1, C, H, W), as the model takes it
    shown    (3 | 1, H, W) to draw on, uint8 or 0..1; None: the image, its values stretched to 0..1 unless uint8
    grid     rows and columns of patches; None: as many as the model has, in the proportion of the image
    returns  the image with all tokens, then one for every block that changed them

    Raises ValueError for a model without a schedule, or patches that do not fill a grid.
    """
    image = image[None] if image.dim() == 3 else image
    if image.dim() != 4 or len(image) != 1:
        raise ValueError(f"show_tokens: image {tuple(image.shape)}; pass one, (C, H, W) or (1, C, H, W)")
    state = token_state(model)
    origins = _origins(model, image)
    prefix = state.num_prefix_tokens
    patches = state.shape[1] - prefix
    rows, columns = grid or _grid(patches, *image.shape[2:])
    if rows * columns != patches:
        raise ValueError(f"show_tokens: a grid of {rows} x {columns} for {patches} patches; pass grid=(rows, columns)")
    canvas = _canvas(image[0] if shown is None else shown, rows, columns)
    N = state.shape[1]
    changes, left = [(-1, torch.arange(N), N)], N
    for block, (origin, tokens) in enumerate(origins):
        changes += [(block, origin, tokens)] if tokens < left else []
        left = tokens
    return [
        _picture(block, tokens, origin[prefix:].view(rows, columns), prefix, canvas)
        for block, origin, tokens in changes
    ]


def show_tokens(model: nn.Module, image: Tensor, path: str | Path | None = None, **options: Any) -> Any:
    """token_pictures(model, image, **options) beside each other, a matplotlib Figure; path: a PNG to write as well."""
    return draw({"": token_pictures(model, image, **options)}, path)


def draw(pictures: dict[str, list[TokenPicture]], path: str | Path | None = None, title: str = "") -> Any:
    """A Figure of the pictures of several images, by name, each on rows of its own."""
    lines = [
        (name if start == 0 else "", of[start : start + COLUMNS])
        for name, of in pictures.items() for start in range(0, len(of), COLUMNS)
    ]  # fmt: skip
    columns = max(len(of) for _, of in lines)
    height, width = lines[0][1][0].pixels.shape[:2]
    size = (INCHES * columns, (INCHES * height / width + 0.5) * len(lines) + (0.4 if title else 0))
    figure = require("matplotlib.figure").Figure(figsize=size, layout="constrained")
    for axes, (name, of) in zip(figure.subplots(len(lines), columns, squeeze=False), lines, strict=True):
        for axis in axes:
            axis.set_axis_off()
        for axis, picture in zip(axes, of, strict=False):
            axis.imshow(picture.pixels.numpy(), interpolation="nearest")
            axis.set_title(picture.title.replace(" tokens, ", " tokens\n"), fontsize=7)
        if name:
            axes[0].text(0, -0.02, name, fontsize=7, transform=axes[0].transAxes, va="top")
    if title:
        figure.suptitle(title, fontsize=9)
    if path is not None:
        write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    return figure


def _origins(model: nn.Module, image: Tensor) -> list[tuple[Tensor, int]]:
    """After every block: the row (N,) that each of the first tokens is part of, and how many rows there are."""
    found: list[tuple[Tensor, int]] = []

    def look(block: ReducingBlock, args: tuple, _: Any) -> None:
        tokens = args[0].shape[1]
        if block.step is not None:
            tokens = block.step.rows(tokens, block.state.num_prefix_tokens).out
        found.append((block.state.origin()[0].cpu(), tokens))

    hooks = [block.register_forward_hook(look) for block in model.modules() if isinstance(block, ReducingBlock)]
    try:
        with torch.inference_mode():
            getattr(model, "forward_features", model)(image)  # where a model computes all tokens of its last block
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _grid(patches: int, height: int, width: int) -> tuple[int, int]:
    rows = max(round(math.sqrt(patches * height / width)), 1)
    return rows, patches // rows


def _canvas(shown: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, s, columns, t, 3) float 0..255: the image, every patch s x t pixels, at least LEAST_SIDE of them."""
    if shown.dim() != 3 or shown.shape[0] not in (1, 3):
        raise ValueError(f"show_tokens: {tuple(shown.shape)} cannot be shown; pass shown=, (3, H, W) or (1, H, W)")
    pixels = shown.detach().float().cpu()
    if shown.dtype == torch.uint8:
        pixels = pixels / 255
    elif pixels.min() < 0 or pixels.max() > 1:
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    sides = [max(math.ceil(length / n), LEAST_SIDE) for length, n in zip(shown.shape[1:], (rows, columns), strict=True)]
    size = (rows * sides[0], columns * sides[1])
    pixels = nn.functional.interpolate(pixels.expand(3, -1, -1)[None], size=size, mode="nearest")[0]
    return (255 * pixels).permute(1, 2, 0).reshape(rows, sides[0], columns, sides[1], 3)


def _picture(block: int, tokens: int, row: Tensor, prefix: int, canvas: Tensor) -> TokenPicture:
    """row (rows, columns): the token that each patch is part of; below prefix: of none that is drawn."""
    pixels, gone = canvas.clone(), row < prefix
    members = torch.where(gone, -1, row)
    sizes = torch.bincount(members[~gone], minlength=1)
    groups = (~gone) & (sizes[members.clamp(min=0)] > 1)
    patch_mean = canvas.mean((1, 3))
    total = torch.zeros(len(sizes), 3).index_add_(0, members[groups], patch_mean[groups])
    mean = total / sizes.clamp(min=1)[:, None]
    flat = pixels.permute(0, 2, 1, 3, 4)  # a view: rows, columns, s, t, 3
    flat[gone] = flat[gone] * DARK
    flat[groups] = mean[members[groups]][:, None, None].expand_as(flat[groups]).clone()
    colour = torch.tensor(OUTLINE, dtype=torch.float32)
    for axis, edges in ((0, (flat[:, :, 0], flat[:, :, -1])), (1, (flat[:, :, :, 0], flat[:, :, :, -1]))):
        differs = members.diff(dim=axis) != 0
        end = torch.ones_like(members.narrow(axis, 0, 1), dtype=torch.bool)
        before, after = torch.cat([end, differs], axis), torch.cat([differs, end], axis)
        for edge, where in zip(edges, (before, after), strict=True):
            edge[where & groups] = colour
    h, s, w, t, _ = pixels.shape
    image = pixels.round().to(torch.uint8).reshape(h * s, w * t, 3)
    return TokenPicture(block, tokens, int(gone.sum()), int(groups.sum()), image)
