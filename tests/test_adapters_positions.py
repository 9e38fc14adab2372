"""Adapters of attention with decomposed, rotary and relative position, norms of q and k, and masks."""

from __future__ import annotations

import importlib
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from _positions import FORGOTTEN, QUANTISED, accelerated, check_attention, check_model, output, parts_of
from _replay import matches
from _torchvision_stub import import_timm
from _vits import relative_error, spread
from torch import nn

from pyvit_accel.adapters import ATTENTIONS, BLOCKS, MLPS, find
from pyvit_accel.errors import Unsupported
from pyvit_accel.modules import QuantAttention
from pyvit_accel.modules.build import Scheme, quant_attention
from pyvit_accel.modules.position import Position
from pyvit_accel.recipes import W8A8, W8A8_DYNAMIC

C, H, GRID, PREFIX = 96, 3, (8, 6), 1
N = GRID[0] * GRID[1] + PREFIX
RECIPES = pytest.mark.parametrize("recipe", [W8A8, W8A8_DYNAMIC], ids=lambda recipe: recipe.name)
SMALL = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}


@pytest.fixture
def timm():
    return import_timm()


@pytest.fixture
def transformers(timm):
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    return importlib.import_module("transformers")


def tokens(*shape):
    return torch.randn(2, *(shape or (N, C)), generator=torch.Generator().manual_seed(1))


def angles(half, heads=()):
    """cos and sin (..., N - 1, D) of any angles, each for two channels."""
    angle = 3 * torch.randn(*heads, N - PREFIX, C // H // 2, generator=torch.Generator().manual_seed(2))
    angle = torch.cat([angle, angle], dim=-1) if half else angle.repeat_interleave(2, dim=-1)
    return angle.cos(), angle.sin()


def rope(half, heads=()):
    """As timm passes it."""
    return torch.cat(angles(half, heads)[::-1], dim=-1)


def added():
    return torch.randn(1, H, N, N, generator=torch.Generator().manual_seed(3))


def vision_class(transformers, folder, name):
    return getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), name)


# The windows of ViT-B, and small global grids.
@pytest.mark.parametrize(("C", "H", "grid"), [(768, 12, (14, 14)), (96, 3, (5, 9)), (96, 3, (1, 6))])
@pytest.mark.parametrize("kwargs", [{}, {"qk_norm": True}, {"qkv_bias": False}])
def test_timm_sam_attention(timm, C, H, grid, kwargs):
    attention = timm.models.vision_transformer_sam.Attention(C, H, use_rel_pos=True, input_size=grid, **kwargs)
    check_attention(attention, tokens(*grid, C))


def test_timm_sam_without_tables(timm):
    sam = timm.models.vision_transformer_sam
    check_attention(sam.Attention(C, H), tokens(*GRID, C), position=False)
    rotary = timm.layers.RotaryEmbeddingCat(C // H, in_pixels=False, feat_shape=GRID, ref_feat_shape=GRID)
    check_attention(sam.Attention(C, H, rope=rotary), tokens(*GRID, C), position=False)


@pytest.mark.parametrize("name", ["SamVisionAttention", "SamVisionSdpaAttention", "SamHQVisionSdpaAttention"])
@pytest.mark.parametrize("window", [14, 0])
def test_transformers_sam_attention(transformers, name, window):
    folder = "sam_hq" if "HQ" in name else "sam"
    sizes = {"hidden_size": 768, "num_attention_heads": 12} if window else {"hidden_size": C, "num_attention_heads": H}
    config = getattr(transformers, f"{name.split('Vision')[0]}VisionConfig")(**sizes, image_size=96, patch_size=16)
    grid = (14, 14) if window else (6, 6)
    check_attention(vision_class(transformers, folder, name)(config, window), tokens(*grid, sizes["hidden_size"]))


def test_transformers_vitdet_attention(transformers):
    config = transformers.VitDetConfig(hidden_size=C, num_attention_heads=H, use_relative_position_embeddings=True)
    check_attention(vision_class(transformers, "vitdet", "VitDetAttention")(config, GRID), tokens(*GRID, C))


@torch.no_grad()
def test_tables_of_another_grid(timm):
    """They are interpolated, as the original does."""
    attention = spread(timm.models.vision_transformer_sam.Attention(C, H, use_rel_pos=True, input_size=GRID))
    x = tokens(5, 9, C)
    assert relative_error(accelerated(attention)(x), attention(x)) < QUANTISED
    assert relative_error(accelerated(attention, forget=True)(x), attention(x)) > FORGOTTEN
    q = torch.randn(2, H, 45, C // H)
    original = timm.models.vision_transformer_sam.get_decomposed_rel_pos_bias
    expected = original(q.flatten(0, 1), attention.rel_pos_h, attention.rel_pos_w, (5, 9), (5, 9))
    rows, columns = Position(tables=(attention.rel_pos_h.data, attention.rel_pos_w.data)).grid_bias(q, (5, 9))
    assert (rows.shape, columns.shape) == ((2, H, 45, 5), (2, H, 45, 9))
    assert matches((rows[..., :, None] + columns[..., None, :]).flatten(3).flatten(0, 1), expected)
    with pytest.raises(ValueError, match=r"pass them as \(B, h, w, C\)"):
        accelerated(attention).accelerated(x.flatten(1, 2))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("heads", [(), (H,)])
@pytest.mark.parametrize(
    "kwargs", [{}, {"qkv_fused": False}, {"qk_norm": True, "norm_layer": nn.LayerNorm}, {"qkv_bias": False}]
)
def test_timm_rotary_attention(timm, half, heads, kwargs):
    attention = timm.layers.AttentionRope(C, H, rotate_half=half, **kwargs)
    check_attention(attention, tokens(), rope(half, heads), position=False)
    check_attention(attention, tokens(), rope(half, heads), added(), position=False)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"qkv_fused": False}, {"qkv_bias_separate": True}, {"qkv_bias": False}])
def test_timm_eva_attention(timm, half, kwargs):
    attention = timm.models.eva.EvaAttention(C, H, rotate_half=half, scale_norm=False, **kwargs)
    check_attention(attention, tokens(), rope(half), position=False)
    check_attention(attention, tokens(), position=False)


@torch.no_grad()
@pytest.mark.parametrize("half", [False, True])
def test_rotation_matters(timm, half):
    attention = spread(timm.layers.AttentionRope(C, H, rotate_half=half))
    expected = attention(tokens(), rope(half))
    new = accelerated(attention)
    assert relative_error(new(tokens(), rope(half)), expected) < QUANTISED
    assert relative_error(new(tokens()), expected) > FORGOTTEN
    assert "rotary" in repr(new)


@pytest.mark.parametrize("half", [False, True])
def test_scores_of_rotated_tokens_depend_on_their_distance(half):
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    frequency = torch.tensor([1.0, 0.3, 0.1, 0.03])

    def turned(x, at):
        angle = frequency * at
        angle = (torch.cat([angle, angle]) if half else angle.repeat_interleave(2))[None]
        return Position(rotary="half" if half else "interleaved").heads(x, x, (angle.cos(), angle.sin()))[0]

    def score(i, j):
        return (turned(q, i) * turned(k, j)).sum()

    assert torch.allclose(score(7, 3), score(24, 20), atol=1e-5)
    assert not torch.allclose(score(7, 3), score(7, 4), atol=1e-3)


def test_transformers_dinov3_attention(transformers):
    config = transformers.DINOv3ViTConfig(hidden_size=C, num_attention_heads=H, attn_implementation="eager")
    attention = vision_class(transformers, "dinov3_vit", "DINOv3ViTAttention")(config)
    check_attention(attention, tokens(N + 4, C), None, angles(True), position=False)


def test_timm_beit_attention(timm):
    attention = partial(timm.models.beit.Attention, C, H)
    for kwargs in ({"qkv_bias": True}, {"qkv_bias": True, "qkv_bias_separate": True}, {}):
        check_attention(attention(window_size=GRID, **kwargs), tokens())
    check_attention(attention(window_size=GRID), tokens(), added())
    check_attention(attention(qkv_bias=True), tokens(), added(), position=False)


def test_timm_relative_attention(timm):
    layers, attention = timm.layers, timm.models.vision_transformer_relpos.RelPosAttention
    bias = partial(layers.RelPosBias, window_size=GRID, prefix_tokens=PREFIX)
    check_attention(attention(C, H, rel_pos_cls=bias, qk_norm=True), tokens())
    check_attention(attention(C, H, rel_pos_cls=bias), tokens(), added())  # its own bias hides the shared one
    check_attention(attention(C, H, rel_pos_cls=partial(layers.RelPosMlp, window_size=(7, 7))), tokens())
    check_attention(attention(C, H), tokens(), added(), position=False)


def head_norms(timm):
    rms_norm = timm.layers.RmsNorm
    return [nn.LayerNorm, nn.RMSNorm, partial(nn.RMSNorm, eps=0.5), rms_norm, partial(rms_norm, affine=False)]


@torch.no_grad()
@pytest.mark.parametrize("i", range(5))
def test_head_norms_and_masks(timm, i):
    attention = timm.layers.Attention(C, H, qk_norm=True, norm_layer=head_norms(timm)[i])
    mask = torch.rand(2, 1, N, N, generator=torch.Generator().manual_seed(4)) > 0.4
    for attn_mask in (None, mask | torch.eye(N, dtype=torch.bool), added()):
        check_attention(attention, tokens(), attn_mask, position=False)
    bare = accelerated(attention)
    bare.q_norm = bare.k_norm = None
    assert relative_error(bare(tokens()), attention(tokens())) > QUANTISED


@pytest.mark.parametrize("norm", ["LayerNorm", "RMSNorm"])
def test_config_and_state(timm, norm):
    """What save writes rebuilds every kind of position and norm."""
    parts = [
        parts_of(timm.layers.AttentionRope(C, H, qk_norm=True, norm_layer=getattr(nn, norm), rotate_half=True)),
        parts_of(timm.models.vision_transformer_sam.Attention(C, H, use_rel_pos=True, input_size=GRID)),
        parts_of(timm.models.swin_transformer_v2.WindowAttention(C, (7, 7), H)),
    ]
    for part in parts:
        new = quant_attention(part, Scheme())
        again = QuantAttention.from_config(new.config())
        again.load_state_dict(new.state_dict())
        assert again.config() == new.config() and repr(again) == repr(new)
        assert (type(again.q_norm).__name__ == norm) == (part.q_norm is not None)


def test_files_of_before_have_no_position():
    attention = import_timm().layers.Attention(C, H, qk_norm=True, norm_layer=nn.LayerNorm)
    config = quant_attention(parts_of(attention), Scheme()).config()
    del config["position"], config["rms_norms"]
    new = QuantAttention.from_config(config)
    assert new.position is None and isinstance(new.q_norm, nn.LayerNorm)


SAM = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 72, "patch_size": 8}


@RECIPES
def test_transformers_sam_model(transformers, recipe, tmp_path):
    """A map of 9 x 9 in windows of 4, padded, and a global layer."""
    config = transformers.SamVisionConfig(
        **SAM, window_size=4, global_attn_indexes=[1], output_channels=16, mlp_dim=128
    )
    kept = check_model(transformers.SamVisionModel(config), recipe, 2, 72, tmp_path / "sam.safetensors")
    assert any("tokens move into windows" in reason for reason in kept.values())


@RECIPES
def test_transformers_vitdet_model(transformers, recipe, tmp_path):
    config = transformers.VitDetConfig(
        **SAM, window_size=4, window_block_indices=[0], use_relative_position_embeddings=True
    )
    check_model(transformers.VitDetModel(config), recipe, 2, 72, tmp_path / "vitdet.safetensors")


@RECIPES
def test_transformers_dinov3_model(transformers, recipe, tmp_path):
    config = transformers.DINOv3ViTConfig(**SAM | {"image_size": 32}, intermediate_size=128)
    model = transformers.DINOv3ViTModel(config)
    kept = check_model(model, recipe, 2, 32, tmp_path / "dinov3.safetensors")
    assert any("rotary position embedding" in reason for reason in kept.values())


@RECIPES
@pytest.mark.parametrize("position", [{"use_rel_pos": True}, {"use_rope": True}])
def test_timm_sam_model(timm, recipe, position, tmp_path):
    size = {"img_size": 72 if "use_rel_pos" in position else 64, "window_size": 4, "global_attn_indexes": (1,)}
    model = timm.models.VisionTransformerSAM(**SMALL, **size, **position)
    check_model(model, recipe, 2, size["img_size"], tmp_path / "sam.safetensors")


@RECIPES
@pytest.mark.parametrize(
    "kwargs",
    [
        {"use_rot_pos_emb": True, "use_abs_pos_emb": False},
        {"use_rot_pos_emb": True, "attn_type": "rope", "rope_rotate_half": True},
        {"use_rot_pos_emb": True, "attn_type": "rope", "rope_type": "mixed"},
    ],
)
def test_timm_rotary_model(timm, recipe, kwargs, tmp_path):
    check_model(timm.models.Eva(img_size=32, **SMALL, **kwargs), recipe, 2, 32, tmp_path / "eva.safetensors")


@RECIPES
@pytest.mark.parametrize("kwargs", [{}, {"use_rel_pos_bias": True}, {"use_shared_rel_pos_bias": True}])
def test_timm_relative_model(timm, recipe, kwargs, tmp_path):
    cls = timm.models.Beit if kwargs else timm.models.vision_transformer_relpos.VisionTransformerRelPos
    check_model(cls(img_size=32, **SMALL, **kwargs), recipe, 2, 32, tmp_path / "model.safetensors")


@torch.no_grad()
def test_mlps(transformers):
    """Of the layers whose attention is replaced by itself."""
    sam = transformers.SamVisionModel(transformers.SamVisionConfig(**SAM, mlp_dim=128))
    dinov3 = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SAM, intermediate_size=128))
    vitdet = transformers.VitDetModel(transformers.VitDetConfig(**SAM))
    for model in (sam, dinov3, vitdet):
        mlp = next(module for module in spread(model).modules() if find(MLPS, module))
        parts, x = find(MLPS, mlp).parts(mlp), torch.randn(2, 5, 64)
        assert parts.activation == "gelu"
        assert matches(parts.fc2(nn.functional.gelu(parts.fc1(x))), mlp(x))
    gated = transformers.DINOv3ViTConfig(**SAM, intermediate_size=128, use_gated_mlp=True)
    model = transformers.DINOv3ViTModel(gated)
    assert not [module for module in model.modules() if find(MLPS, module)]


def test_refuses(timm, transformers):
    def reason(module, table=ATTENTIONS):
        with pytest.raises(Unsupported) as error:
            find(table, module).parts(module)
        return str(error.value)

    rope = timm.layers.AttentionRope
    assert reason(rope(C, H, scale_norm=True, norm_layer=nn.LayerNorm)) == "norm between attention and proj"
    assert "wide inside" in reason(rope(C, H, attn_head_dim=16))
    simple = timm.layers.Attention(C, H, qk_norm=True, norm_layer=timm.layers.SimpleNorm)
    assert reason(simple) == "q_norm is SimpleNorm, neither LayerNorm nor RMSNorm"
    sam = timm.models.vision_transformer_sam
    attention = sam.Attention(C, H)
    attention.forward = lambda x: x
    assert "replaced on the instance" in reason(attention)
    assert "tokens move into windows" in reason(sam.Block(C, H), BLOCKS)
    assert "rotary" in reason(timm.models.eva.EvaBlock(C, H), BLOCKS)
    config = transformers.SamVisionConfig(**SAM)
    layer = vision_class(transformers, "sam", "SamVisionAttention")(config, 4)
    new = accelerated(spread(layer))
    with pytest.raises(ValueError, match="output_attentions=True"):
        new(tokens(4, 4, 64), output_attentions=True)
    assert output(new(hidden_states=tokens(4, 4, 64))).shape == (2, 4, 4, 64)
