"""Merging in windows: the matching by hand, whole Swin and SAM models, and what does not tile."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from _torchvision_stub import import_timm
from _vits import relative_error, spread, vit
from torch import nn

from pyvit_accel import accelerate, load, recipes, reduce_tokens, save
from pyvit_accel.errors import Unsupported
from pyvit_accel.recipes import W8A8, W8A16, WINDOW_MERGE
from pyvit_accel.tokens.window_merge import MergedMlp


class Count(nn.Module):
    """An MLP that remembers how many tokens it was given."""

    def forward(self, x):
        self.tokens = x.shape[:-1].numel()
        return torch.tanh(x) + x.square()


def by_hand(x, mlp, ratio, side):
    """(h, w, C), one window after the other, one pair after the other."""
    h, w, C = x.shape
    y = torch.empty_like(x)
    for top in range(0, h, side):
        for left in range(0, w, side):
            tokens = x[top : top + side, left : left + side].reshape(-1, C).double()
            unit = tokens / tokens.norm(dim=1, keepdim=True)
            similarity = unit[::2] @ unit[1::2].T
            best, partner = similarity.max(1)
            merging = best.argsort(descending=True)[: int(ratio * side * side)].tolist()
            groups = {2 * j + 1: [2 * j + 1] for j in range(len(tokens) // 2)}
            groups |= {2 * i: [2 * i] for i in range(len(unit[::2])) if i not in merging}
            for i in merging:
                groups[2 * partner[i].item() + 1].append(2 * i)
            out = torch.empty_like(tokens)
            for group in groups.values():
                out[group] = mlp(tokens[group].mean(0, keepdim=True)).expand(len(group), -1)
            y[top : top + side, left : left + side] = out.reshape(side, side, C).to(x.dtype)
    return y


@pytest.mark.parametrize(("h", "w", "side"), [(6, 4, 2), (9, 3, 3), (8, 8, 4)])
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_pairs_of_a_window_share_a_pass(h, w, side, ratio):
    x, mlp = torch.randn(2, h, w, 24), Count()
    y = MergedMlp(mlp, ratio, side)(x)
    assert mlp.tokens == 2 * (h // side) * (w // side) * (side * side - int(ratio * side * side))
    for image, out in zip(x, y, strict=True):
        torch.testing.assert_close(out, by_hand(image, mlp, ratio, side))


def test_no_merges_and_square_sequences():
    x, mlp = torch.randn(2, 4, 4, 24), Count()
    assert torch.equal(MergedMlp(mlp, 0.0, 2)(x), mlp(x))
    merged = MergedMlp(mlp, 0.5)
    assert torch.equal(merged(x.flatten(1, 2)), merged(x).flatten(1, 2))
    assert mlp.tokens == 2 * 8  # the whole grid is one window


def run(net, images):
    with torch.no_grad():
        y = net(images)
    return y if isinstance(y, torch.Tensor) else y[0]


def swin(library):
    timm = import_timm()
    if library == "timm":
        net = timm.models.swin_transformer.SwinTransformer(
            56, num_classes=5, embed_dim=24, depths=(2, 2), num_heads=(2, 4)
        )
    elif library == "timm v2":
        net = timm.models.swin_transformer_v2.SwinTransformerV2(
            56, num_classes=5, embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=7
        )
    elif library == "timm sam":
        net = timm.models.vision_transformer_sam.VisionTransformerSAM(
            112, 16, embed_dim=48, depth=2, num_heads=2, num_classes=5, window_size=7, global_attn_indexes=(1,)
        )
    else:
        from torchvision.models.swin_transformer import SwinTransformer

        net = SwinTransformer([4, 4], 24, [2, 2], [2, 4], [7, 7], num_classes=5)
    torch.manual_seed(0)
    return spread(net)


@pytest.mark.parametrize("library", ["timm", "timm v2", "timm sam", "torchvision"])
def test_models(tmp_path, library):
    size = 112 if library == "timm sam" else 56
    net, images = swin(library), torch.randn(2, 3, size, size)
    plain = run(net, images)
    merged, _ = accelerate(net, WINDOW_MERGE(0.4))
    assert 1e-4 < relative_error(run(merged, images), plain) < 1
    count = sum(isinstance(m, MergedMlp) for m in merged.modules())
    assert count == (2 if "sam" in library else 4)
    for recipe in (W8A8, W8A16):
        quantized, report = accelerate(net, recipe + WINDOW_MERGE(0.4), [images])
        assert sum(isinstance(m, MergedMlp) for m in quantized.modules()) == count
        assert relative_error(run(quantized, images), run(merged, images)) < 0.3
        assert f"40 % of a window's tokens share a pass through the MLP with another, in {count} MLPs" in str(report)
        save(quantized, tmp_path / "net.safetensors")
        loaded = load(tmp_path / "net.safetensors", swin(library))
        assert torch.equal(run(loaded, images), run(quantized, images))


def test_transformers_sam():
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    import_timm()
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    config = SamVisionConfig(
        hidden_size=48, output_channels=16, num_hidden_layers=2, num_attention_heads=2, image_size=112, patch_size=16,
        window_size=4, global_attn_indexes=[1], mlp_dim=96,
    )  # fmt: skip
    net, images = spread(SamVisionEncoder(config)), torch.randn(1, 3, 112, 112)
    quantized, _ = accelerate(net, W8A8 + WINDOW_MERGE(0.3), [images])
    assert sum(isinstance(m, MergedMlp) for m in quantized.modules()) == 2
    assert run(quantized, images).shape == run(net, images).shape
    assert relative_error(run(quantized, images), run(net, images)) < 0.5


def test_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"ratio=0\.6; at most half of a window's tokens"):
        WINDOW_MERGE(0.6)
    with pytest.raises(ValueError, match=r"windows of 3 do not tile 4 x 8 tokens; use one of 2, 4"):
        MergedMlp(Count(), 0.5, 3)(torch.randn(1, 4, 8, 4))
    with pytest.raises(ValueError, match=r"\(1, 5, 4\); expected \(B, h, w, C\)"):
        MergedMlp(Count(), 0.5)(torch.randn(1, 5, 4))
    with pytest.raises(Unsupported, match=r"Linear has no MLP"):
        accelerate(nn.Linear(4, 4).eval(), WINDOW_MERGE(0.5))
    with pytest.raises(Unsupported, match=r"VisionTransformer has 1 tokens that stand in no window; use TOME"):
        accelerate(vit(), WINDOW_MERGE(0.5))
    timm = import_timm()
    options = {"class_token": False, "global_pool": "avg", "embed_dim": 32, "depth": 2, "num_heads": 2}
    net = timm.models.vision_transformer.VisionTransformer(32, 8, **options).eval()
    with pytest.raises(Unsupported, match=r"became part of a fused block"):
        accelerate(net, W8A8 + WINDOW_MERGE(0.5), [torch.randn(2, 3, 32, 32)])
    once, _ = accelerate(net, WINDOW_MERGE(0.5))
    with pytest.raises(ValueError, match=r"merges in windows already"):
        accelerate(once, WINDOW_MERGE(0.2))


def test_grids_that_are_not_square():
    """Of a sequence, as the block around the MLP knows it."""
    x, mlp = torch.randn(2, 2 * 8, 24), Count()
    y = MergedMlp(mlp, 0.5, 2, (2, 8))(x)
    for image, out in zip(x.view(2, 2, 8, 24), y.view(2, 2, 8, 24), strict=True):
        torch.testing.assert_close(out, by_hand(image, mlp, 0.5, 2))


def test_blocks_in_windows_are_named():
    """Their tokens cannot be reduced for good; the error says what can be done."""
    timm = import_timm()
    net = timm.models.swin_transformer.SwinTransformer(56, num_classes=5, embed_dim=24, depths=(2, 2), num_heads=(2, 4))
    with pytest.raises(Unsupported, match=r"use recipes\.WINDOW_MERGE"):
        reduce_tokens(net.eval(), recipes.TOME(2).tokens.schedule)
