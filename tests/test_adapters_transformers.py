"""Adapters of Hugging Face transformers: the parts, put together, are the layer, inside the model too."""

from __future__ import annotations

import copy
import pickle
from importlib.util import find_spec

import _replay
import pytest
import torch
from _replay import Replay, matches, randomize, replace
from _torchvision_stub import import_timm
from torch import nn

from pyvit_accel.adapters import ATTENTIONS, BLOCKS, MLPS, find, unpack_attention
from pyvit_accel.errors import Unsupported

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")


@pytest.fixture(autouse=True, scope="module")
def usable_torchvision():
    """transformers imports torchvision where it finds one."""
    if find_spec("torchvision") is not None:
        import_timm()


C, H, N, LAYERS = 32, 4, 9, 2
SIZES = {"hidden_size": C, "num_attention_heads": H, "num_hidden_layers": LAYERS, "image_size": 24, "patch_size": 8}
HIDDEN = {"intermediate_size": 48}
MODELS = {
    "ViT": HIDDEN,
    "ViT, no qkv bias, tanh": HIDDEN | {"qkv_bias": False, "hidden_act": "gelu_new"},
    "DeiT": HIDDEN,
    "ViTMSN": HIDDEN,
    "IJepa": HIDDEN,
    "Dinov2": {"layerscale_value": 0.1, "drop_path_rate": 0.5},
    "Dinov2WithRegisters": {},
    "CLIPVision": HIDDEN | {"hidden_act": "quick_gelu"},
    "CLIPVision, gelu": HIDDEN | {"hidden_act": "gelu"},
    "SiglipVision": HIDDEN | {"hidden_act": "gelu_pytorch_tanh"},
}


def build(name, **options):
    import transformers

    family = name.split(",")[0]
    config = getattr(transformers, f"{family}Config")(**SIZES, **MODELS[name], **options)
    torch.manual_seed(0)
    return randomize(getattr(transformers, f"{family}Model")(config))


def tokens():
    return torch.randn(2, N, C, generator=torch.Generator().manual_seed(1))


def images():
    return torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(2))


def layers(model, table=BLOCKS):
    return [module for module in model.modules() if find(table, module) is not None]


def parts_of(module, table=BLOCKS):
    return find(table, module).parts(module)


def output(module, *args):
    result = module(*args)
    return result[0] if isinstance(result, tuple) else result


def rest(module):
    """What the layers of CLIP in release 4 need after hidden_states."""
    from inspect import Parameter, signature

    parameters = list(signature(type(module).forward).parameters.values())[2:]
    return [None for p in parameters if p.default is Parameter.empty and p.kind is Parameter.POSITIONAL_OR_KEYWORD]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_parts(name):
    layer = layers(build(name))[0]
    assert matches(_replay.block(parts_of(layer), tokens()), output(layer, tokens(), *rest(layer)))
    for module in layer.modules():
        if find(ATTENTIONS, module):
            assert matches(_replay.attention(parts_of(module, ATTENTIONS), tokens()), output(module, tokens()))
        if find(MLPS, module):
            assert matches(_replay.mlp(parts_of(module, MLPS), tokens()), module(tokens()))


@torch.no_grad()
@pytest.mark.parametrize("table", [BLOCKS, ATTENTIONS], ids=["blocks", "attentions"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("already_recorded", [True, False])
def test_model(name, table, already_recorded):
    model = build(name)
    reference = copy.deepcopy(model)
    if already_recorded:  # transformers installs its recording hooks once, at the first request
        model(images(), output_hidden_states=True)
    expected = reference(images(), output_hidden_states=True)
    with unpack_attention(model):
        model(images())
        replays = replace(model, table)
    for candidate in (model, copy.deepcopy(model)):
        actual = candidate(images(), output_hidden_states=True)
        assert matches(actual.last_hidden_state, expected.last_hidden_state)
        assert len(actual.hidden_states) == LAYERS + 1
        assert all(map(matches, actual.hidden_states, expected.hidden_states))
        assert matches(candidate(images(), return_dict=False)[0], expected[0])
    assert [replay.calls for replay in replays] == [2] * LAYERS


@torch.no_grad()
@pytest.mark.parametrize("table", [BLOCKS, ATTENTIONS], ids=["blocks", "attentions"])
def test_classifier_and_pickle(table):
    import transformers

    config = transformers.ViTConfig(**SIZES, **HIDDEN, num_labels=5)
    model = randomize(transformers.ViTForImageClassification(config))
    expected = model(images()).logits
    assert len(replace(model, table)) == LAYERS
    assert matches(model(images()).logits, expected)
    assert matches(pickle.loads(pickle.dumps(model))(images()).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("table", [BLOCKS, ATTENTIONS], ids=["blocks", "attentions"])
@pytest.mark.parametrize("additive", [True, False])
def test_attention_mask(table, additive):
    layer = nn.ModuleDict({"a": layers(build("CLIPVision"))[0]})
    mask = torch.rand(2, 1, N, N, generator=torch.Generator().manual_seed(3)) > 0.4
    mask |= torch.eye(N, dtype=torch.bool)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected = output(layer["a"], tokens(), mask, *rest(layer["a"])[1:])
    assert len(replace(layer, table)) == 1
    assert matches(output(layer["a"], tokens(), mask, *rest(layer["a"])[1:]), expected)


@torch.no_grad()
@pytest.mark.parametrize("table", [BLOCKS, ATTENTIONS], ids=["blocks", "attentions"])
def test_what_an_accelerated_layer_cannot_do(table):
    model = build("CLIPVision", attn_implementation="eager")
    assert len(replace(model, table)) == LAYERS
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(images(), output_attentions=True)
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(images())
    model.config.output_attentions = False

    module = next(module for module in model.modules() if hasattr(module, "accelerated"))
    with pytest.raises(ValueError, match="causal attention"):
        module(hidden_states=tokens(), attention_mask=None, is_causal=True)
    with pytest.raises(ValueError, match="causal attention"):
        module(hidden_states=tokens(), attention_mask=None, causal_attention_mask=torch.zeros(1, 1, N, N))
    with pytest.raises(ValueError, match="head_mask"):
        module(hidden_states=tokens(), attention_mask=None, head_mask=torch.ones(H))
    with pytest.raises(ValueError, match=r"shape \(2, 9\), expected 4-D"):
        module(hidden_states=tokens(), attention_mask=torch.ones(2, N))


@torch.no_grad()
def test_text_tower_of_clip_is_kept():
    import transformers

    sizes = {"hidden_size": C, "num_attention_heads": H, "num_hidden_layers": LAYERS} | HIDDEN
    text = sizes | {"vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 49}
    model = randomize(transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=SIZES | HIDDEN)))
    for layer in layers(model.text_model):
        with pytest.raises(Unsupported, match="causal attention"):
            parts_of(layer)
        with pytest.raises(Unsupported, match="causal attention"):
            parts_of(layer.self_attn, ATTENTIONS)
    ids = torch.randint(0, 50, (2, 6))
    expected = model(input_ids=ids, pixel_values=images())
    assert len(replace(model, BLOCKS)) == LAYERS
    assert matches(model(input_ids=ids, pixel_values=images()).logits_per_image, expected.logits_per_image)


def test_refuses():
    def reason(module, table=BLOCKS):
        with pytest.raises(Unsupported) as error:
            parts_of(module, table)
        return str(error.value)

    import transformers

    swiglu = transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, use_swiglu_ffn=True))
    assert "SwiGLUFFN: gated MLP" in reason(layers(swiglu)[0])
    layer = layers(build("Dinov2"))[0]
    layer.mlp.fc1 = nn.Identity()
    assert reason(layer) == "fc1 is Identity, not nn.Linear"
    layer = layers(build("SiglipVision"))[0]
    layer.layer_norm2 = nn.RMSNorm(C)
    assert reason(layer) == "norm before mlp is RMSNorm, not LayerNorm"
    relu = transformers.ViTModel(transformers.ViTConfig(**SIZES, **HIDDEN, hidden_act="relu"))
    assert "activation ReLU" in reason(layers(relu)[0])

    once = build("ViT")
    assert len(replace(once, BLOCKS)) == LAYERS
    assert "AcceleratedViTLayer overrides the forward of ViTLayer" in reason(layers(once)[0])

    if hasattr(transformers, "DINOv3ViTModel"):
        rope = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SIZES, **HIDDEN))
        assert "rotary position embedding" in reason(layers(rope)[0])
    beit = transformers.BeitModel(transformers.BeitConfig(**SIZES, **HIDDEN))
    assert "relative position" in reason(layers(beit)[0])


@torch.no_grad()
def test_pooling_head_of_siglip_is_kept():
    """Its query is a learned probe: nn.MultiheadAttention, but not self-attention."""
    model = build("SiglipVision")
    with unpack_attention(model):
        expected = model(images()).pooler_output
        attention = next(module for module in model.modules() if hasattr(module, "reason_to_keep"))
        with pytest.raises(Unsupported, match="not the same tensor"):
            parts_of(attention, ATTENTIONS)
    assert torch.equal(model(images()).pooler_output, expected)


def test_replay_is_what_ran():
    """A wrapped module is called in place of the layer, not beside it."""
    model = build("ViT")
    replace(model, BLOCKS)
    assert not [name for name, module in model.named_modules() if "ViTAttention" in type(module).__name__]
    assert sum(isinstance(module, Replay) for module in model.modules()) == LAYERS
