"""accelerate, save and load on the models of timm and of transformers: small, with random weights."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
from _torchvision_stub import import_timm
from _vits import COARSER, linear_class, module_names, pixels, relative_error, spread

from pyvit_accel import accelerate, load, recipes, save

DEPTH = 2
ERROR = 0.06  # of the tokens after the last block, relative; random weights average nothing out
SOME = (recipes.W8A8, recipes.W8A8_DYNAMIC, recipes.W4A4, recipes.W4A16, recipes.FP8)
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": DEPTH, "image_size": 32, "patch_size": 8}
TRANSFORMERS = {
    "ViT": {"intermediate_size": 128},
    "DeiT": {"intermediate_size": 128},
    "Dinov2": {"layerscale_value": 0.5},
    "Dinov2WithRegisters": {"layerscale_value": 0.5},
    "CLIPVision": {"intermediate_size": 128, "hidden_act": "quick_gelu"},
    "SiglipVision": {"intermediate_size": 128, "hidden_act": "gelu_pytorch_tanh"},
}
TIMM = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {"init_values": 0.5},
    "vit_tiny_patch16_224, qk norm, average": {"qk_norm": True, "global_pool": "avg"},
    "vit_base_patch16_clip_224": {},
    "vit_base_patch16_siglip_224": {},
}


def images(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)):
    """Pixels, normalised as the model expects: an accelerated patch embedding maps floats back to them."""
    mean, std = (torch.tensor(t)[:, None, None] for t in (mean, std))
    return (pixels().float() / 255 - mean) / std


def images_of(model):
    cfg = getattr(model, "pretrained_cfg", None)
    return images(cfg["mean"], cfg["std"]) if cfg else images()


def timm_model(name):
    timm, (architecture, *_) = import_timm(), name.split(",")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": DEPTH, "num_heads": 2, "num_classes": 5}
    if "siglip" in name:
        del sizes["num_classes"]
    torch.manual_seed(0)
    return spread(timm.create_model(architecture, pretrained=False, **(sizes | TIMM[name])))


def transformers_model(family):
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    if find_spec("torchvision") is not None:
        import_timm()  # transformers imports torchvision where it finds one
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **TRANSFORMERS[family])
    return spread(getattr(transformers, f"{family}Model")(config))


def timm_tokens(model):
    return model.forward_features(images_of(model))


def transformers_tokens(model):
    return model(pixel_values=images()).last_hidden_state


MODELS = {
    **{f"timm {name}": (timm_model, name, timm_tokens) for name in TIMM},
    **{f"transformers {name}": (transformers_model, name, transformers_tokens) for name in TRANSFORMERS},
}


@pytest.fixture(params=MODELS)
def model_and_tokens(request):
    make, name, tokens = MODELS[request.param]
    return make(name), tokens


@torch.inference_mode()
@pytest.mark.parametrize("recipe", SOME, ids=lambda recipe: recipe.name)
def test_end_to_end(model_and_tokens, recipe, tmp_path):
    model, tokens = model_and_tokens
    before, truth = copy.deepcopy(model), tokens(model)
    new, report = accelerate(model, recipe, [images_of(model)])
    y = tokens(new)
    assert (y.shape, y.dtype) == (truth.shape, truth.dtype)
    error = 0.03 if linear_class(recipe) == "WeightOnlyLinear" else ERROR
    assert relative_error(y, truth) < error * COARSER.get(recipe.name, 1)
    became = [entry.became for entry in report.replaced]
    if linear_class(recipe):
        assert became.count(linear_class(recipe)) >= 4 * DEPTH
    else:
        assert became.count("QuantBlock") == module_names(new).count("QuantBlock") == DEPTH
    assert torch.equal(tokens(model), truth)
    path = tmp_path / "model.safetensors"
    save(new, path)
    loaded = load(path, model=before)
    # What was kept computes in float, where PyTorch may choose another kernel for another memory address.
    assert relative_error(tokens(loaded), y) < 1e-6
    assert all(torch.equal(t, new.state_dict()[name]) for name, t in loaded.state_dict().items())
    assert torch.equal(tokens(copy.deepcopy(loaded)), tokens(loaded))


@torch.inference_mode()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_pixels_of_timm(name):
    """Once the patch embedding is ours, uint8 images do what the floats they are normalised to do."""
    model = timm_model(name)
    floats = images_of(model)
    new, report = accelerate(model, recipes.W8A8, [floats])
    assert "QuantPatchEmbed" in [entry.became for entry in report.replaced]
    assert relative_error(new(pixels()), new(floats)) < 0.03
    assert relative_error(new(pixels()), model(floats)) < ERROR


@torch.inference_mode()
def test_bfloat16_of_transformers():
    model = transformers_model("ViT").bfloat16()
    x = images().bfloat16()
    new, _ = accelerate(model, recipes.W8A8, [{"pixel_values": x}])
    y, truth = new(pixel_values=x).last_hidden_state, model(pixel_values=x).last_hidden_state
    assert y.dtype == torch.bfloat16
    assert relative_error(y.float(), truth.float()) < ERROR


@torch.inference_mode()
def test_hidden_states_of_transformers():
    """Asked for before the first call of the accelerated model and after it."""
    model = transformers_model("Dinov2")
    new, _ = accelerate(model, recipes.W8A8, [images()])
    for _ in range(2):
        states = new(pixel_values=images(), output_hidden_states=True).hidden_states
        truth = model(pixel_values=images(), output_hidden_states=True).hidden_states
        assert len(states) == len(truth) == DEPTH + 1
        assert all(relative_error(a, b) < ERROR for a, b in zip(states, truth, strict=True))
    with pytest.raises(ValueError, match="an accelerated layer forms no attention weights"):
        new.set_attn_implementation("eager")
        new(pixel_values=images(), output_attentions=True)
