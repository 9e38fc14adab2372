"""Pictures of the patches that are left: what is dark, what shares a colour, and what the counts say."""

from __future__ import annotations

import pytest
import torch
from _vits import pixels, vit
from torch import nn

from pyvit_accel import TokenSchedule, accelerate, recipes, reduce_tokens, token_state
from pyvit_accel.models import VisionTransformer
from pyvit_accel.show_tokens import DARK, LEAST_SIDE, OUTLINE, token_pictures

SIDE = 32  # of an image, 4 x 4 patches of 8
WHITE = torch.tensor(OUTLINE, dtype=torch.uint8)


def model_with(schedule: TokenSchedule, **overrides) -> VisionTransformer:
    return reduce_tokens(vit(depth=3, **overrides), schedule)


def patches(picture) -> torch.Tensor:
    """(16, s, s, 3)."""
    s = picture.pixels.shape[0] // 4
    return picture.pixels.view(4, s, 4, s, 3).transpose(1, 2).flatten(0, 1)


def test_dropped_patches_are_dark():
    schedule = TokenSchedule("evit", {"rate": 0.5, "layers": [1]})
    model, image = model_with(schedule), pixels(1)
    first, last = token_pictures(model, image[0])
    origin = token_state(model).origin()[0, 1:]
    assert (first.block, first.tokens, first.dropped, first.merged) == (-1, 17, 0, 0)
    assert (last.block, last.tokens, last.dropped, last.merged) == (1, 9, 8, 0)
    before, after = patches(first), patches(last)
    assert before.shape == (16, LEAST_SIDE, LEAST_SIDE, 3)
    assert torch.equal(after[origin >= 0], before[origin >= 0])
    dark = (before[origin < 0].float() * DARK).round().to(torch.uint8)
    assert torch.equal(after[origin < 0], dark)


@pytest.mark.parametrize("make", [lambda m, x: m, lambda m, x: accelerate(m, recipes.W8A8, [x])[0]], ids=["f", "W8A8"])
def test_merged_patches_share_their_mean_colour(make):
    image = pixels(2)
    model = reduce_tokens(make(vit(depth=3), image), TokenSchedule("tome", {"r": [4, 0, 3]}))
    pictures = token_pictures(model, image[:1])
    assert [(p.block, p.tokens) for p in pictures] == [(-1, 17), (0, 13), (2, 10)]
    origin = token_state(model).origin()[0, 1:]
    before, after = patches(pictures[0]).float(), patches(pictures[-1])
    sizes = origin.bincount(minlength=17)[origin]
    assert int((sizes > 1).sum()) == pictures[-1].merged > 0
    for token in origin.unique():
        members = origin == token
        inside = after[members][:, 1:-1, 1:-1]
        if members.sum() == 1:
            assert torch.equal(after[members], before[members].to(torch.uint8))
        else:
            colour = before[members].mean((0, 1, 2)).round()
            assert ((inside.float() - colour).abs() <= 1).all()


def test_outline_goes_around_a_group():
    """Between two patches of one group there is no line; towards other tokens, and at the image's edge, there is."""
    from pyvit_accel.show_tokens import _canvas, _picture

    row = torch.tensor([[3, 3, 0], [2, 4, 5]])  # the last of the first row went into the class token
    picture = _picture(0, 6, row, 1, _canvas(torch.zeros(3, 32, 48, dtype=torch.uint8), 2, 3))
    assert (picture.dropped, picture.merged) == (1, 2)
    s = LEAST_SIDE
    white = (picture.pixels == WHITE).all(-1)
    assert white[0, : 2 * s].all() and white[s - 1, : 2 * s].all() and white[:s, 0].all() and white[:s, 2 * s - 1].all()
    assert not white[1 : s - 1, s - 1 : s + 1].any() and not white[s:].any() and not white[:, 2 * s :].any()


@pytest.mark.parametrize("prefix", [5, 2])
def test_prefix_tokens_are_not_drawn(prefix):
    overrides = {5: {"num_registers": 4, "no_embed_class": True}, 2: {"distilled": True}}[prefix]
    model = model_with(TokenSchedule("evit", {"rate": 0.25, "layers": [0]}), **overrides)
    last = token_pictures(model, pixels(1))[-1]
    assert (last.tokens, last.dropped) == (prefix + 4, 12) and last.pixels.shape == (4 * LEAST_SIDE, 4 * LEAST_SIDE, 3)


class Wide(nn.Module):
    """Blocks of ours on 2 x 6 patches of 4, without a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.blocks = nn.Conv2d(3, 64, 4, 4), vit(depth=2).blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


def test_grid_follows_the_image():
    torch.manual_seed(0)
    model = reduce_tokens(Wide().eval(), TokenSchedule("tome", {"r": [3, 0]}), restore=False)
    image = torch.rand(3, 8, 24)
    first, last = token_pictures(model, image)
    assert first.pixels.shape == (2 * LEAST_SIDE, 6 * LEAST_SIDE, 3) and last.tokens == 9
    right_top = first.pixels[0, -1]
    assert torch.equal(right_top, (255 * image[:, 0, -1]).round().to(torch.uint8))
    with pytest.raises(ValueError, match=r"a grid of 3 x 5 for 12 patches; pass grid=\(rows, columns\)"):
        token_pictures(model, image, grid=(3, 5))


def test_shown_is_drawn_instead():
    model = model_with(TokenSchedule("tome", {"r": 0}))
    normalised = pixels(1).float() / 64 - 2
    shown = torch.full((1, SIDE, SIDE), 77, dtype=torch.uint8)
    assert token_pictures(model, normalised, shown)[0].pixels.unique().tolist() == [77]
    stretched = token_pictures(model, normalised)[0].pixels
    assert (stretched.min(), stretched.max()) == (0, 255)


def test_what_cannot_be_shown():
    with pytest.raises(ValueError, match="call reduce_tokens first"):
        token_pictures(vit(), pixels(1))
    model = model_with(TokenSchedule("tome", {"r": 2}))
    with pytest.raises(ValueError, match=r"image \(2, 3, 32, 32\); pass one"):
        token_pictures(model, pixels(2))
    with pytest.raises(ValueError, match=r"\(2, 32, 32\) cannot be shown"):
        token_pictures(model, pixels(1), shown=torch.zeros(2, SIDE, SIDE))
    before = len(model.blocks[0]._forward_hooks)
    assert before == 0  # also after the errors


def test_figure(tmp_path):
    pytest.importorskip("matplotlib")
    from pyvit_accel.show_tokens import show_tokens

    model = model_with(TokenSchedule("tome", {"r": [2, 2, 2]}))
    figure = show_tokens(model, pixels(1)[0], tmp_path / "t.png")
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[0] == "all: 17 tokens" and titles[-1].startswith("block 2: 11 tokens\n")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
