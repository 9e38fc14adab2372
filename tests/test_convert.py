"""accelerate: what is replaced, what is kept and why, and what it refuses."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from _vits import COARSER, VARIANTS, linear_class, module_names, pixels, relative_error, spread, vit
from torch import nn

from pyvit_accel import Recipe, Rule, Unsupported, accelerate, recipes
from pyvit_accel.convert import Replacement
from pyvit_accel.modules import QuantLinear, WeightOnlyLinear
from pyvit_accel.recipes import LINEAR, RECIPES, W8A8, W8A8_DYNAMIC, W8A16

NAN = float("nan")
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))


class Foreign(nn.Module):
    """A model no adapter knows: Linears, self- and cross-attention, and a branch that is never taken."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(32, 4, batch_first=True)
        self.probe = nn.Parameter(torch.zeros(1, 2, 32))
        self.unused = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        probe = self.probe.expand(len(x), -1, -1)
        return self.head(self.norm(self.cross(probe, x, x, need_weights=False)[0]))


def foreign():
    return spread(Foreign()), torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(1))


def kept(report):
    return {entry.name: entry.reason for entry in report.kept}


def replaced(report):
    return {entry.name: entry.became for entry in report.replaced}


@torch.inference_mode()
@every_recipe
@pytest.mark.parametrize("variant", VARIANTS)
def test_our_vit(variant, recipe):
    options = VARIANTS[variant]
    model, images = vit(**options), pixels(channels=options.get("in_channels", 3))
    new, report = accelerate(model, recipe, [images])
    y, truth = new(images), model(images)
    assert y.dtype == truth.dtype
    # The mean over patches averages the signal away, and less so the error.
    error = (0.1 if variant == "average pool" else 0.07) * COARSER.get(recipe.name, 1)
    assert relative_error(y, truth) < error
    names = module_names(new)
    if recipe.name == "EXP_FREE_ATTENTION":
        assert replaced(report) == dict.fromkeys(("blocks.0.attn", "blocks.1.attn"), "ExpFreeSelfAttention")
    elif linear_class(recipe):
        classifiers = 0 if recipe.name == "SPARSE24" else names.count("VisionTransformer") * len(heads(model))
        assert names.count(linear_class(recipe)) == 2 * 4 + classifiers
    else:
        assert names.count("QuantBlock") == 2 and names.count("QuantPatchEmbed") == 1
        expected = {"patch_embed": "QuantPatchEmbed", "blocks.0": "QuantBlock", "blocks.1": "QuantBlock"}
        assert replaced(report) == expected | dict.fromkeys(heads(model), "QuantLinear")
    assert recipe.name in ("EXP_FREE_ATTENTION", "SPARSE24") or "Linear" not in names
    model, new = model.bfloat16(), accelerate(model.bfloat16(), recipe, [images])[0]
    assert new(images).dtype == torch.bfloat16
    assert relative_error(new(images).float(), truth) < 0.1 * COARSER.get(recipe.name, 1)


def heads(model):
    return [name for name, module in model.named_children() if isinstance(module, nn.Linear)]


@every_recipe
def test_input_is_unchanged(recipe):
    model, images = vit(), pixels()
    before, y = copy.deepcopy(model.state_dict()), model(images)
    names = module_names(model)
    new, _ = accelerate(model, recipe, [images])
    assert new is not model and module_names(model) == names and not hasattr(model, "pyvit_accel")
    assert not any(module._forward_hooks for module in model.modules())
    assert new.pos_embed.data_ptr() == model.pos_embed.data_ptr()  # not a second copy in memory
    new.half()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(model(images), y) and model.pos_embed.requires_grad


@every_recipe
def test_inplace(recipe):
    model, images = vit(), pixels()
    expected = accelerate(model, recipe, [images])[0](images)
    new, _ = accelerate(model, recipe, [images], inplace=True)
    assert new is model and torch.equal(model(images), expected)
    assert not any(module.training for module in model.modules())


def test_an_error_leaves_an_inplace_model_as_it_was():
    model, x = foreign()
    modules, y = dict(model.named_modules()), model(x)
    for error, arguments in (
        (ValueError, {"recipe": W8A8, "calibration": []}),
        (ValueError, {"recipe": W8A8, "calibration": [x, x * NAN]}),
        (Unsupported, {"recipe": W8A8, "calibration": [x], "strict": True}),
        (RuntimeError, {"recipe": W8A8, "calibration": [x[..., :5]]}),
    ):
        with pytest.raises(error):
            accelerate(model, inplace=True, **arguments)
        assert dict(model.named_modules()) == modules and torch.equal(model(x), y)
        assert not any(module._forward_hooks for module in model.modules())


def test_arguments():
    model, images = vit(), pixels()
    with pytest.raises(ValueError, match=r"recipe W8A8 takes its scales from data; pass calibration=.*W8A8_DYNAMIC"):
        accelerate(model, W8A8)
    with pytest.raises(ValueError, match="no calibration batches; give at least one"):
        accelerate(model, W8A8, iter(()))
    with pytest.raises(ValueError, match="batch 0 is empty"):
        accelerate(model, W8A8, [images[:0]])
    floats = torch.randn(2, 3, 32, 32)
    floats[1, 0, 3, 3] = NAN
    with pytest.raises(ValueError, match="batch 1 holds NaN or an infinity"):
        accelerate(model, W8A8, [images, floats])
    with pytest.raises(TypeError, match="batch 0 is a str"):
        accelerate(model, W8A8, ["images"])
    model.blocks[1].mlp.train()
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp is in training mode; call model\.eval\(\) first"):
        accelerate(model, W8A16)
    with pytest.raises(ValueError, match="the model is in training mode"):
        accelerate(model.train(), W8A16)


def test_calibration_forms_are_equivalent():
    model, images = vit(), pixels()
    labels = torch.zeros(4)
    expected = accelerate(model, W8A8, [images])[0](images)
    for calibration in (images, [images[:1], images[1:]], [(images, labels)], [[images, labels]], [{"images": images}]):
        assert torch.equal(accelerate(model, W8A8, calibration)[0](images), expected)


def test_report():
    model, x = foreign()
    new, report = accelerate(model, W8A8, [x])
    assert relative_error(new(x), model(x)) < 0.03
    assert replaced(report) == {"embed": "QuantLinear", "attention": "QuantAttention", "head": "QuantLinear"}
    assert kept(report) == {
        "(model)": "no rule for it",
        "cross": "nn.MultiheadAttention: called with a query, key and value that are not the same tensor",
        "cross.out_proj": "no rule for it",
        "unused": "nn.MultiheadAttention was not reached by the calibration batches",
        "unused.out_proj": "no rule for it",
        "norm": "no rule for it",
    }
    lines = str(report).splitlines()
    assert lines[0] == "W8A8: 3 modules replaced, 6 kept"
    assert lines[1].split() == ["module", "count", "was", "became"]
    assert any(line.split() == ["attention", "1", "MultiheadAttention", "QuantAttention"] for line in lines)
    assert sum("kept: nn.MultiheadAttention: called with" in line for line in lines) == 1
    table = str(accelerate(vit(), W8A8_DYNAMIC)[1]).splitlines()
    assert any(line.split() == ["blocks.*", "2", "Block", "QuantBlock"] for line in table)
    with pytest.raises(Unsupported, match=r"cross: .* not the same tensor"):
        accelerate(model, W8A8, [x], strict=True)


@pytest.mark.parametrize("layer", ["self", "encoder"])
def test_multihead_attention_anywhere(layer):
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=layer == "self", activation="gelu")
    model = spread(nn.Sequential(nn.Linear(8, 32), nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)))
    x = torch.randn(3, 7, 8)
    new, report = accelerate(model, W8A8, [x])
    assert list(replaced(report).values()).count("QuantAttention") == 2
    assert "MultiheadAttention" not in module_names(new)
    with torch.inference_mode():
        assert relative_error(new(x), model(x)) < 0.03
    # Without data nothing shows that it is self-attention.
    _, report = accelerate(model, W8A8_DYNAMIC)
    assert "QuantAttention" not in replaced(report).values()
    assert relative_error(accelerate(model, W8A8_DYNAMIC, [x])[0](x), model(x)) < 0.03


class LeavesOneOut(nn.Module):
    """Runs the first block of a ViT only."""

    def __init__(self):
        super().__init__()
        self.model = vit()

    def forward(self, images):
        return self.model.blocks[0](self.model.patch_embed(images))


def test_layers_no_batch_reached():
    model, images = LeavesOneOut().eval(), pixels()
    new, report = accelerate(model, W8A8, [images])
    reason = "no calibration batch reached model.blocks.1.attn.qkv; it has no statistics"
    assert kept(report)["model.blocks.1"] == kept(report)["model.blocks.1.attn"] == reason
    assert replaced(report)["model.blocks.0"] == "QuantBlock"
    assert torch.isfinite(new.model.blocks[1](torch.randn(2, 17, 64))).all()
    with pytest.raises(Unsupported, match="no calibration batch reached"):
        accelerate(model, W8A8, [images], strict=True)


@pytest.mark.parametrize("recipe", [W8A8_DYNAMIC, W8A16], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("broken", ["blocks.0.attn.qkv", "blocks.0.mlp.fc2", "head"])
def test_nan_weights_are_kept(recipe, broken):
    model = vit()
    model.get_submodule(broken).weight.data[1, 2] = NAN
    new, report = accelerate(model, recipe)
    reason = "weight holds 1 NaN or infinite values, the first at [1, 2]; repair the checkpoint"
    assert kept(report)[broken] == reason
    assert type(new.get_submodule(broken)) is nn.Linear and len(report.replaced) > 2
    with pytest.raises(Unsupported, match=re.escape(reason)):
        accelerate(model, recipe, strict=True)
    with pytest.raises(ValueError, match=f"the output of {broken} holds NaN or an infinity in batch 0"):
        accelerate(model, W8A8, [pixels()])


@pytest.mark.parametrize("name", ["norm1.weight", "norm2.bias", "ls1.gamma", "attn.q_norm.weight"])
def test_nan_norms_are_kept(name):
    model = vit(layer_scale=True, qk_norm=True)
    model.blocks[1].get_parameter(name).data[3] = NAN
    _, report = accelerate(model, W8A8_DYNAMIC)
    assert "holds 1 NaN or infinite values" in kept(report)["blocks.1"]
    assert replaced(report)["blocks.0"] == "QuantBlock"


def test_deepest_match_wins_and_falls_back():
    model, images = vit(), pixels()
    model.blocks[1].mlp.act = nn.ReLU().eval()
    new, report = accelerate(model, W8A8, [images])
    assert replaced(report) == {
        "patch_embed": "QuantPatchEmbed", "blocks.0": "QuantBlock", "blocks.1.attn": "QuantAttention",
        "blocks.1.mlp.fc1": "QuantLinear", "blocks.1.mlp.fc2": "QuantLinear", "head": "QuantLinear",
    }
    reason = "activation ReLU is not GELU, tanh GELU or quick GELU"
    assert kept(report)["blocks.1"] == kept(report)["blocks.1.mlp"] == reason
    assert relative_error(new(images), model(images)) < 0.03


def linear_rule(match, layer=WeightOnlyLinear):
    def convert(module, observed):
        return Replacement(layer.from_linear(module))

    return Rule(match, LINEAR, convert, exact=True)


@pytest.mark.parametrize("match, expected", [
    ("*", "W" * 9), ("blocks.0.*", "WWWW....."), ("*.mlp.*", "..WW..WW."), ("head", "........W"), ("block", "." * 9),
])
def test_rules_match_dotted_names(match, expected):
    model, _ = accelerate(vit(), Recipe("some", (linear_rule(match),)))
    kinds = {"Linear": ".", "WeightOnlyLinear": "W"}
    assert "".join(kinds.get(name, "") for name in module_names(model)) == expected


def test_sums_of_recipes():
    images = pixels()
    both = Recipe("float16 head", (linear_rule("head"),)) + W8A8
    assert (both.name, both.needs_calibration) == ("float16 head + W8A8", True)
    model, report = accelerate(vit(), both, [images])
    assert replaced(report)["head"] == "WeightOnlyLinear" and replaced(report)["blocks.1"] == "QuantBlock"
    # What the first takes is not offered to the second, nor is what contains it.
    _, report = accelerate(vit(), Recipe("fc1", (linear_rule("blocks.0.mlp.fc1"),)) + W8A8, [images])
    assert replaced(report) == {
        "patch_embed": "QuantPatchEmbed", "blocks.0.attn": "QuantAttention", "blocks.0.mlp.fc1": "WeightOnlyLinear",
        "blocks.0.mlp.fc2": "QuantLinear", "blocks.1": "QuantBlock", "head": "QuantLinear",
    }
    model, report = accelerate(vit(), W8A16 + W8A8, [images])
    assert module_names(model).count("WeightOnlyLinear") == 9 and "QuantBlock" not in module_names(model)
    assert relative_error(model(images), vit()(images)) < 0.02
    with pytest.raises(ValueError, match=r"recipe W8A16 \+ W8A8 takes its scales from data"):
        accelerate(vit(), W8A16 + W8A8)


def test_twice():
    """What the first call left can be given to a second one."""
    images = pixels()
    first, _ = accelerate(vit(), Recipe("head", (linear_rule("head"),)))
    second, report = accelerate(first, W8A8_DYNAMIC)
    assert "head" not in replaced(report) and replaced(report)["blocks.0"] == "QuantBlock"
    assert relative_error(second(images), vit()(images)) < 0.03
    third, report = accelerate(second, W8A8_DYNAMIC)
    assert not report.replaced and torch.equal(third(images), second(images))


def test_every_place_of_a_shared_module():
    layer = nn.Linear(16, 16)
    model = spread(nn.Sequential(layer, nn.GELU(), layer))
    new, report = accelerate(model, W8A8_DYNAMIC)
    assert list(replaced(report)) == ["0", "2"]
    assert module_names(new).count("QuantLinear") == 2
    assert relative_error(new(torch.ones(3, 16)), model(torch.ones(3, 16))) < 0.05


def test_the_model_itself_can_be_replaced():
    linear = spread(nn.Linear(16, 8))
    new, report = accelerate(linear, W8A8_DYNAMIC)
    assert type(new) is QuantLinear and not new.training and replaced(report) == {"": "QuantLinear"}
    assert type(accelerate(linear, W8A8_DYNAMIC, inplace=True)[0]) is QuantLinear
    assert type(linear) is nn.Linear


@torch.inference_mode()
@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_options_of_w8a8(observer, granularity, bias_correction):
    model, images = vit(layer_scale=True), pixels()
    options = {"observer": observer, "granularity": granularity, "bias_correction": bias_correction}
    recipe = recipes.integer(8, 8, **options)
    new, report = accelerate(model, recipe, [images])
    assert len(report.replaced) == 4
    assert relative_error(new(images), model(images)) < 0.05
    static = new.blocks[0].mlp.fc2.x_scale is not None
    assert static == (new.blocks[0].attention.qkv.x_scale is not None) == (granularity == "tensor")


@torch.inference_mode()
def test_options_change_what_they_name():
    model, images = vit(), pixels(30)  # enough for a percentile of 99.999 to leave out a value
    outputs = [
        accelerate(model, recipes.integer(8, 8, granularity="tensor", observer=observer), [images])[0](images)
        for observer in ("minmax", "percentile", "mse")
    ]
    uncorrected = recipes.integer(8, 8, granularity="tensor", bias_correction=False)
    outputs.append(accelerate(model, uncorrected, [images])[0](images))
    outputs.append(accelerate(model, W8A8, [images])[0](images))
    assert len({y.numpy().tobytes() for y in outputs}) == 5
    with pytest.raises(ValueError, match="Scheme: observer='median' is not one of minmax, percentile, mse"):
        recipes.integer(8, 8, observer="median")


def test_calibration_gives_the_same_bits_every_time():
    images = pixels()
    states = [accelerate(vit(), W8A8, [images])[0].state_dict() for _ in range(2)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())


def test_a_sum_says_what_an_earlier_recipe_left_it():
    """W8A16 takes the Linears of attention, so EXP_FREE_ATTENTION cannot take it whole, and says so."""
    _, report = accelerate(vit(), W8A16 + recipes.EXP_FREE_ATTENTION)
    kept = {entry.name: entry.reason for entry in report.kept}
    assert kept["blocks.0.attn"] == "an earlier rule took a part of it"


@pytest.mark.parametrize("recipe", [recipes.W8A16, recipes.W8A8_DYNAMIC, recipes.FP8], ids=lambda recipe: recipe.name)
def test_models_may_read_weights_past_the_layer(recipe):
    """As torchvision's Swin does: F.linear(x, self.qkv.weight, self.qkv.bias)."""
    model = nn.Sequential(nn.Linear(24, 40)).eval()
    fast, _ = accelerate(model, recipe)
    read = fast[0].weight
    assert read.shape == (40, 24) and read.dtype == torch.float32
    assert (read - model[0].weight).norm() < 0.05 * model[0].weight.norm()
