"""Adapters of Swin and Swin V2 in timm, torchvision and transformers: windows, shifts, relative position, masks."""

from __future__ import annotations

import copy
import importlib
from importlib.util import find_spec

import pytest
import torch
from _positions import FORGOTTEN, QUANTISED, accelerated, check_attention, check_model, parts_of
from _replay import matches
from _torchvision_stub import import_timm
from _vits import relative_error, spread
from torch import nn

from pyvit_accel import accelerate
from pyvit_accel.adapters import BLOCKS, find
from pyvit_accel.adapters.windows import ShiftedWindows
from pyvit_accel.errors import Unsupported
from pyvit_accel.recipes import W8A8, W8A8_DYNAMIC

C, H, N = 96, 3, 49  # the first stage of Swin-T
RECIPES = pytest.mark.parametrize("recipe", [W8A8, W8A8_DYNAMIC], ids=lambda recipe: recipe.name)
SIZES = {"embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4)}  # maps of 14 x 14 and 7 x 7 from 56 x 56 pixels


@pytest.fixture
def timm():
    return import_timm()


@pytest.fixture
def torchvision(timm):
    return importlib.import_module("torchvision")


@pytest.fixture
def transformers(timm):
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    return importlib.import_module("transformers")


def windows(batch=2, count=16):
    return torch.randn(batch * count, N, C, generator=torch.Generator().manual_seed(1))


def shifted_mask(timm):
    """(16, 49, 49), 0 and -100: of a map of 28 x 28."""
    block = timm.models.swin_transformer.SwinTransformerBlock(C, (28, 28), num_heads=H, window_size=7, shift_size=3)
    return block.attn_mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("version", ["swin_transformer", "swin_transformer_v2"])
def test_timm_attention(timm, version, masked):
    attention = getattr(timm.models, version).WindowAttention(dim=C, num_heads=H, window_size=(7, 7))
    check_attention(attention, windows(), shifted_mask(timm) if masked else None)


def test_timm_v2_without_bias(timm):
    check_attention(timm.models.swin_transformer_v2.WindowAttention(C, (7, 7), H, qkv_bias=False), windows())


@torch.no_grad()
def test_hidden_neighbours_do_not_matter(timm):
    """Other values in the tokens that -100 hides from it change a token by what their scale of v rounds, no more."""
    mask = shifted_mask(timm)
    new = accelerated(spread(timm.models.swin_transformer.WindowAttention(C, H, window_size=7)))
    x, last = windows(1), 15
    seen = mask[last, 0] == 0
    assert 0 < seen.sum() < N
    other = x.clone()
    other[last, ~seen] += 1.0
    assert relative_error(new(other, mask)[last, seen], new(x, mask)[last, seen]) < QUANTISED / 4
    assert relative_error(new(other)[last, seen], new(x)[last, seen]) > FORGOTTEN


# 28 x 28: whole windows. 25 x 30: padded. 7 x 21 and 21 x 7: one axis is not shifted. 5 x 6: one padded window.
@pytest.mark.parametrize("size", [(28, 28), (25, 30), (7, 21), (21, 7), (5, 6)])
@pytest.mark.parametrize("shift", [[0, 0], [3, 3], [3, 0]])
@pytest.mark.parametrize("version", ["ShiftedWindowAttention", "ShiftedWindowAttentionV2"])
def test_torchvision_attention(torchvision, version, shift, size):
    attention = getattr(torchvision.models.swin_transformer, version)(C, [7, 7], shift, H)
    check_attention(attention, torch.randn(2, *size, C, generator=torch.Generator().manual_seed(1)))


@torch.no_grad()
def test_torchvision_cuts_as_the_original(torchvision):
    """With an attention that returns its input, windows are put back where they came from."""
    attention = torchvision.models.swin_transformer.ShiftedWindowAttention(C, [7, 5], [3, 2], H)
    seen = []

    class Same(nn.Module):
        def forward(self, x, attn_mask=None):
            seen.append((x.shape, attn_mask))
            return x

    x = torch.randn(2, 10, 12, C)
    assert torch.equal(ShiftedWindows(Same(), attention)(x), x)
    shape, mask = seen[0]
    assert shape == (2 * 2 * 3, 35, C) and mask.shape == (12, 1, 35, 35)
    assert set(mask.unique().tolist()) == {-100.0, 0.0}


TRANSFORMERS = {
    "Swin": ("swin", "modeling_swin", 1.0),
    "Swinv2": ("swinv2", "modeling_swinv2", 0.01),  # its mask is added twice; so small, this can be seen
    "DonutSwin": ("donut", "modeling_donut_swin", 1.0),
    "MaskFormerSwin": ("maskformer", "modeling_maskformer_swin", 1.0),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_attention(transformers, timm, name):
    folder, module, size = TRANSFORMERS[name]
    classes = importlib.import_module(f"transformers.models.{folder}.{module}")
    config = getattr(transformers, f"{name}Config")(attn_implementation="eager")
    attention = getattr(classes, f"{name}Attention")(config, C, H, 7)
    check_attention(attention, windows(), size * shifted_mask(timm))
    check_attention(attention, windows())


@RECIPES
@pytest.mark.parametrize("size", [56, 72])  # 72: maps of 18 x 18 and 9 x 9, padded
def test_timm_model(timm, recipe, size, tmp_path):
    model = timm.models.SwinTransformer(img_size=size, num_classes=5, **SIZES)
    kept = check_model(model, recipe, 4, size, tmp_path / "swin.safetensors")
    assert "tokens move into windows" in kept["layers.0.blocks.1"]


@RECIPES
def test_timm_v2_model(timm, recipe, tmp_path):
    model = timm.models.SwinTransformerV2(img_size=56, window_size=7, num_classes=5, **SIZES)
    check_model(model, recipe, 4, 56, tmp_path / "swin.safetensors")


@RECIPES
@pytest.mark.parametrize("version", ["", "V2"])
def test_torchvision_model(torchvision, recipe, version, tmp_path):
    swin = torchvision.models.swin_transformer
    sizes = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": [7, 7], "num_classes": 5}
    block, merging = getattr(swin, f"SwinTransformerBlock{version}"), getattr(swin, f"PatchMerging{version}")
    model = swin.SwinTransformer([4, 4], **sizes, block=block, downsample_layer=merging)
    check_model(model, recipe, 4, 60, tmp_path / "swin.safetensors")


@RECIPES
@pytest.mark.parametrize("name", ["Swin", "Swinv2", "DonutSwin"])
def test_transformers_model(transformers, recipe, name, tmp_path):
    config = getattr(transformers, f"{name}Config")(image_size=56, window_size=7, **SIZES)
    model = getattr(transformers, f"{name}Model")(config)
    check_model(model, recipe, 4, 56, tmp_path / "swin.safetensors")


@torch.no_grad()
def test_static_scales_of_heads(timm):
    """The bias of a window does not need q and k as floats: with calibration the qkv matmul writes their codes."""
    model = spread(timm.models.SwinTransformer(img_size=56, num_classes=5, **SIZES))
    fast, _ = accelerate(model, W8A8, [torch.randn(2, 3, 56, 56)])
    attention = fast.layers[0].blocks[1].attn.accelerated
    assert attention.head_scale.shape == (3, 2, 1) and attention.position.bias.shape == (2, N, N)
    assert "relative bias" in repr(attention)
    assert torch.equal(attention.position.bias, model.layers[0].blocks[1].attn._get_rel_pos_bias()[0])


@torch.no_grad()
def test_dtypes_and_copies(timm):
    attention = spread(timm.models.swin_transformer.WindowAttention(C, H, window_size=7))
    new = accelerated(attention)
    assert new(windows().bfloat16()).dtype == torch.bfloat16
    assert torch.equal(copy.deepcopy(new)(windows()), new(windows()))
    assert matches(accelerated(attention.double())(windows().double()).float(), new(windows()))


def test_refuses(timm, torchvision, transformers):
    def reason(module):
        with pytest.raises(Unsupported) as error:
            parts_of(module)
        return str(error.value)

    swin = timm.models.swin_transformer
    assert "wide inside" in reason(swin.WindowAttention(C, H, head_dim=16, window_size=7))

    class Louder(swin.WindowAttention):
        def forward(self, x, mask=None):
            return 2 * super().forward(x, mask)

    assert reason(Louder(C, H)) == "Louder overrides the forward of WindowAttention"
    attention = torchvision.models.swin_transformer.ShiftedWindowAttention(C, [7, 7], [0, 0], H)
    attention.qkv = nn.Identity()
    assert reason(attention) == "qkv is Identity, not nn.Linear"
    attention = swin.WindowAttention(C, H, window_size=7)
    attention.relative_position_bias_table.data[3] = torch.nan
    with pytest.raises(Unsupported, match="relative position holds 12 NaN"):
        accelerated(attention)
    for block in (
        swin.SwinTransformerBlock(C, (14, 14), H),
        timm.models.swin_transformer_v2.SwinTransformerV2Block(C, (14, 14), H),
        torchvision.models.swin_transformer.SwinTransformerBlock(C, H, [7, 7], [0, 0]),
        transformers.SwinModel(transformers.SwinConfig(image_size=56, **SIZES)).encoder.layers[0].blocks[0],
    ):
        with pytest.raises(Unsupported, match="attention and MLP are replaced one by one"):
            find(BLOCKS, block).parts(block)


@torch.no_grad()
def test_windows_of_another_size(timm):
    new = accelerated(spread(timm.models.swin_transformer.WindowAttention(C, H, window_size=7)))
    with pytest.raises(ValueError, match=r"\(3, 49, 49\) does not broadcast to \(2, 3, 64, 64\)"):
        new(torch.randn(2, 64, C))
