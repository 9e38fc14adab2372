"""Adapters of timm, torchvision, nn.MultiheadAttention and models/vit.py: the parts, put together, are the module."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial

import _replay
import pytest
import torch
from _replay import Replay, matches, randomize, replace
from _torchvision_stub import import_timm
from torch import nn

from pyvit_accel.adapters import ATTENTIONS, BLOCKS, MLPS, PATCH_EMBEDS, find, multihead, unpack_attention
from pyvit_accel.errors import Unsupported

C, H, N = 32, 4, 9


def tokens(batch=2):
    return torch.randn(batch, N, C, generator=torch.Generator().manual_seed(1))


def bool_mask():
    mask = torch.rand(2, 1, N, N, generator=torch.Generator().manual_seed(2)) > 0.4
    return mask | torch.eye(N, dtype=torch.bool)


@pytest.fixture
def timm():
    return import_timm()


@pytest.fixture
def torchvision(timm):
    import torchvision

    return torchvision


def timm_block(timm, **kwargs):
    return randomize(timm.models.vision_transformer.Block(C, H, **kwargs))


def parts_of(module, table=BLOCKS):
    return find(table, module).parts(module)


def timm_activations(timm):
    return [timm.layers.get_act_layer(name) for name in ("gelu", "gelu_tanh", "quick_gelu")] + [
        nn.GELU,
        partial(nn.GELU, approximate="tanh"),
    ]


@torch.no_grad()
@pytest.mark.parametrize(
    "kwargs",
    [
        {"qkv_bias": True},
        {"qkv_bias": False, "proj_bias": False},
        {"qkv_bias": True, "init_values": 0.1, "drop_path": 0.5, "attn_drop": 0.5, "proj_drop": 0.5},
        {"qk_norm": True},
    ],
)
@pytest.mark.parametrize("mask", [None, bool_mask(), bool_mask().float() * 3])
def test_timm_block(timm, kwargs, mask):
    block = timm_block(timm, **kwargs)
    assert matches(_replay.block(parts_of(block), tokens(), mask), block(tokens(), attn_mask=mask))
    assert matches(_replay.attention(parts_of(block.attn, ATTENTIONS), tokens(), mask), block.attn(tokens(), mask))
    assert matches(_replay.mlp(parts_of(block.mlp, MLPS), tokens()), block.mlp(tokens()))


@torch.no_grad()
def test_timm_activations_and_norms(timm):
    for activation in timm_activations(timm):
        block = timm_block(timm, act_layer=activation)
        assert matches(_replay.block(parts_of(block), tokens()), block(tokens()))
    for norm in (nn.LayerNorm, partial(nn.LayerNorm, bias=False), partial(nn.LayerNorm, elementwise_affine=False)):
        block = timm_block(timm, norm_layer=norm, qk_norm=True)
        parts = parts_of(block)
        assert parts.norm1.weight is not None and parts.attention.q_norm.bias is not None
        assert matches(_replay.block(parts, tokens()), block(tokens()))


def test_parts_are_the_modules_own(timm):
    """Observation and folding need the very Linears of the model, not copies."""
    block = timm_block(timm, init_values=0.1)
    parts = parts_of(block)
    assert parts.attention.qkv == (block.attn.qkv,) and parts.mlp.fc1 is block.mlp.fc1 and parts.norm1 is block.norm1
    assert parts.layer_scale2 is block.ls2.gamma


def test_timm_refuses(timm):
    vit, layers = timm.models.vision_transformer, timm.layers

    def reason(module, table=BLOCKS):
        with pytest.raises(Unsupported) as error:
            parts_of(module, table)
        return str(error.value)

    assert "post-norm" in reason(vit.ResPostBlock(C, H))
    assert "parallel" in reason(vit.ParallelScalingBlock(C, H))
    assert "parallel" in reason(vit.ParallelThingsBlock(C, H))
    assert "rotary" in reason(timm.models.eva.EvaBlock(C, H))
    assert "norm between attention and proj" in reason(
        timm.models.eva.EvaAttention(C, H, norm_layer=nn.LayerNorm), ATTENTIONS
    )
    assert "relative position" in reason(timm.models.beit.Block(C, H))
    assert "gated MLP" in reason(timm_block(timm, mlp_layer=layers.SwiGLU))
    assert "gated MLP" in reason(timm_block(timm, mlp_layer=layers.SwiGLUPacked))
    assert "gated MLP" in reason(layers.GluMlp(C, 2 * C), MLPS)
    assert "scale_attn_norm" in reason(timm_block(timm, scale_attn_norm=True))
    assert "scale_mlp_norm" in reason(timm_block(timm, scale_mlp_norm=True))
    assert reason(timm_block(timm, norm_layer=layers.RmsNorm)) == "norm1 is RmsNorm, not LayerNorm"
    assert "activation ReLU" in reason(timm_block(timm, act_layer=nn.ReLU))

    block = timm_block(timm)
    block.attn.qkv = nn.Sequential(block.attn.qkv)
    assert reason(block) == "qkv is Sequential, not nn.Linear"
    block = timm_block(timm)
    block.attn.proj = nn.Linear(C, C + 1)
    assert "expected 96 and 32" in reason(block)
    block = timm_block(timm)
    block.norm1 = nn.LayerNorm((N, C))
    assert "norm1 is over (9, 32)" in reason(block)

    class Louder(vit.Block):
        def forward(self, x, attn_mask=None):
            return 2 * super().forward(x, attn_mask)

    assert reason(Louder(C, H)) == "Louder overrides the forward of Block"
    block = timm_block(timm)
    block.forward = lambda x: x
    assert "replaced on the instance" in reason(block)
    block = timm_block(timm)
    block.attn = nn.MultiheadAttention(C, H)
    assert "MultiheadAttention is not a Attention" in reason(block)


@torch.no_grad()
@pytest.mark.parametrize("table", [BLOCKS, ATTENTIONS])
def test_timm_model(timm, table):
    model = randomize(timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=C, num_heads=H, depth=3))
    images = torch.randn(2, 3, 32, 32)
    expected, features = model(images), model.get_intermediate_layers(images, n=2)
    replays = replace(model, table)
    assert matches(model(images), expected) and [replay.calls for replay in replays] == [1, 1, 1]
    assert all(map(matches, model.get_intermediate_layers(images, n=2), features))
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    assert not matches(model(images, attn_mask=mask), expected)


def test_timm_is_causal():
    """Newer timm passes is_causal, whether or not a mask is used."""
    from pyvit_accel.adapters.timm import wrap

    class Newer(nn.Module):
        def forward(self, x, attn_mask=None, is_causal=False):
            return x

    wrapped = wrap(nn.Bilinear(1, 1, 1), Newer())
    with pytest.raises(ValueError, match="is_causal=True"):
        wrapped(tokens(), None, is_causal=True)


@torch.no_grad()
def test_timm_patch_embed(timm):
    model = randomize(timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=C, num_heads=H, depth=1))
    adapter = find(PATCH_EMBEDS, model)
    parts = adapter.parts(model)
    assert parts.conv is model.patch_embed.proj
    assert parts.mean == model.pretrained_cfg["mean"] and parts.std == model.pretrained_cfg["std"]
    assert adapter.parts(model, mean=(0.1, 0.2, 0.3)).mean == (0.1, 0.2, 0.3)
    images = torch.randn(2, 3, 32, 32)
    expected, features = model(images), model.forward_intermediates(images)
    embed = model.get_submodule(adapter.path)
    model.set_submodule(adapter.path, adapter.wrap(copy.deepcopy(embed), embed))
    assert torch.equal(model(images), expected)
    assert torch.equal(model.forward_intermediates(images)[1][0], features[1][0])

    for kwargs, reason in [({"dynamic_img_size": True}, "dynamic image size"), ({}, "mean and std")]:
        bare = timm.models.VisionTransformer(img_size=32, embed_dim=C, num_heads=H, depth=1, **kwargs)
        with pytest.raises(Unsupported, match=reason):
            parts_of(bare, PATCH_EMBEDS)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"layer_scale": True, "qk_norm": True, "activation": "gelu_tanh"}])
def test_own_vit(options):
    from pyvit_accel.models.vit import create_vit

    small = {"image_size": 32, "dim": C, "num_heads": H, "depth": 2, "num_classes": 5}
    model = randomize(create_vit("deit_tiny_patch16_224", **small, **options))
    block, images = model.blocks[0], torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert matches(_replay.block(parts_of(block), tokens()), block(tokens()))
    assert matches(_replay.attention(parts_of(block.attn, ATTENTIONS), tokens()), block.attn(tokens()))
    assert parts_of(model, PATCH_EMBEDS).mean == (0.485, 0.456, 0.406)
    expected = model(images)
    replays = replace(model, BLOCKS)
    assert matches(model(images), expected) and [replay.calls for replay in replays] == [1, 1]


def torchvision_model(torchvision):
    kwargs = {"image_size": 32, "patch_size": 16, "num_layers": 2, "num_heads": H, "hidden_dim": C, "mlp_dim": 48}
    return randomize(torchvision.models.VisionTransformer(**kwargs, num_classes=7, dropout=0.5))


@torch.no_grad()
def test_torchvision(torchvision):
    model, images = torchvision_model(torchvision), torch.randn(2, 3, 32, 32)
    block, expected = model.encoder.layers[0], model(images)
    assert matches(_replay.block(parts_of(block), tokens()), block(tokens()))
    assert matches(_replay.mlp(parts_of(block.mlp, MLPS), tokens()), block.mlp(tokens()))

    adapter = find(PATCH_EMBEDS, model)
    with pytest.raises(Unsupported, match="pass mean= and std="):
        adapter.parts(model)
    parts = adapter.parts(model, mean=[0.5] * 3, std=[0.25] * 3)
    assert parts.conv is model.conv_proj and parts.std == (0.25, 0.25, 0.25)
    embed = nn.Sequential(copy.deepcopy(model.conv_proj), nn.Flatten(2))
    embed.forward = lambda images, layers=list(embed): layers[1](layers[0](images)).transpose(1, 2)
    model.set_submodule(adapter.path, adapter.wrap(embed, model.conv_proj))
    assert matches(model(images), expected)

    replays = replace(model, BLOCKS)
    assert matches(model(images), expected) and [replay.calls for replay in replays] == [1, 1]


def test_torchvision_refuses(torchvision):
    block = torchvision_model(torchvision).encoder.layers[0]
    block.mlp[1] = nn.ReLU()
    with pytest.raises(Unsupported, match="activation ReLU"):
        parts_of(block)
    stem = [torchvision.models.vision_transformer.ConvStemConfig(8, 3, 2)]
    kwargs = {"image_size": 32, "patch_size": 16, "num_layers": 1, "num_heads": H, "hidden_dim": C, "mlp_dim": 48}
    with pytest.raises(Unsupported, match="convolutional stem"):
        parts_of(torchvision.models.VisionTransformer(**kwargs, conv_stem_configs=stem), PATCH_EMBEDS)


@torch.no_grad()
def test_unpacked_attention_is_observed_and_put_back(torchvision):
    """in_proj is a bare parameter: without unpacking, no hook would see what enters or leaves it."""
    model, images = torchvision_model(torchvision), torch.randn(2, 3, 32, 32)
    names, expected = dict(model.named_modules()), model(images)
    with unpack_attention(model):
        block, seen = model.encoder.layers[1], []
        parts = parts_of(block)
        for linear in (*parts.attention.qkv, parts.attention.proj):
            linear.register_forward_hook(lambda linear, args, y: seen.append(tuple(y.shape)))
        assert matches(model(images), expected)
        assert seen == [(2, 5, 3 * C), (2, 5, C)]
        assert parts_of(block.self_attention, ATTENTIONS).qkv == parts.attention.qkv
        assert parts.attention.qkv[0].weight is names["encoder.layers.encoder_layer_1.self_attention"].in_proj_weight
    assert dict(model.named_modules()) == names


def multihead_attention(**kwargs):
    return randomize(nn.MultiheadAttention(C, H, **kwargs))


MASKS = {
    "none": {},
    "attn bool": {"attn_mask": torch.ones(N, N, dtype=torch.bool).triu(1)},
    "attn float, causal": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(N), "is_causal": True},
    "attn per head": {"attn_mask": torch.randn(2 * H, N, N)},
    "padding": {"key_padding_mask": torch.arange(N).expand(2, N) >= torch.tensor([[N], [5]])},
}
MASKS["bool and bool"] = MASKS["attn bool"] | MASKS["padding"]
MASKS["float and bool"] = MASKS["attn per head"] | MASKS["padding"]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_multihead(masks, batch_first, bias):
    attention = multihead_attention(batch_first=batch_first, bias=bias)
    x = tokens() if batch_first else tokens().transpose(0, 1)
    expected, _ = attention(x, x, x, need_weights=False, **masks)
    wrapped = multihead.MultiheadSelfAttention(Replay(multihead.attention_parts(attention)), attention)
    output, weights = wrapped(x, x, x, **masks)
    assert weights is None and matches(output, expected)


@torch.no_grad()
def test_multihead_unbatched_and_errors():
    attention, x = multihead_attention(), tokens()[0]
    wrapped = multihead.MultiheadSelfAttention(Replay(multihead.attention_parts(attention)), attention)
    assert matches(wrapped(x, x, x, need_weights=False)[0], attention(x, x, x)[0])
    with pytest.raises(ValueError, match="use need_weights=False"):
        wrapped(x, x, x, need_weights=True)
    with pytest.raises(ValueError, match="must be the same tensor"):
        wrapped(x, x + 1, x)
    with pytest.raises(ValueError, match="pass the causal mask"):
        wrapped(x, x, x, is_causal=True)


@torch.no_grad()
def test_multihead_refuses():
    cases = {"kdim=8": {"kdim": 8}, "add_bias_kv": {"add_bias_kv": True}, "add_zero_attn": {"add_zero_attn": True}}
    for reason, kwargs in cases.items():
        with pytest.raises(Unsupported, match=reason):
            multihead.attention_parts(nn.MultiheadAttention(C, H, **kwargs))

    holder, x = nn.ModuleDict({"a": multihead_attention(batch_first=True)}), tokens()
    with pytest.raises(Unsupported, match="may be cross-attention"):
        parts_of(holder["a"], ATTENTIONS)
    calls = {
        "not reached": lambda attention: None,
        "not the same tensor": lambda attention: attention(x[:, :1], x, x),
        "weights are asked for": lambda attention: attention(x, x, x, need_weights=True),
    }
    for reason, call in calls.items():
        expected = call(holder["a"])
        with unpack_attention(holder):
            output = call(holder["a"])
            assert expected is None or torch.equal(output[0], expected[0])
            with pytest.raises(Unsupported, match=reason):
                parts_of(holder["a"], ATTENTIONS)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_transformer_encoder_does_not_go_past_the_replacement(norm_first, padded):
    """In eval, nn.TransformerEncoder reads self_attn.in_proj_weight and runs a fused kernel of its own."""
    layer = nn.TransformerEncoderLayer(C, H, 48, activation="gelu", batch_first=True, norm_first=norm_first)
    model = randomize(nn.TransformerEncoder(layer, 2))
    padding = MASKS["padding"]["key_padding_mask"] if padded else None
    keep = ~padding if padded else torch.ones(2, N, dtype=torch.bool)
    expected = model(tokens(), src_key_padding_mask=padding)
    with unpack_attention(model):
        model(tokens(), src_key_padding_mask=padding)
        replays = replace(model, ATTENTIONS)
    for candidate in (model, copy.deepcopy(model)):
        assert matches(candidate(tokens(), src_key_padding_mask=padding)[keep], expected[keep])
    assert [replay.calls for replay in replays] == [1, 1]


def test_adapters_import_no_foreign_library():
    code = "import sys, pyvit_accel.adapters; print(sorted({'timm', 'transformers', 'torchvision'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_find_is_none_for_a_stranger():
    assert find(BLOCKS, nn.Linear(2, 2)) is None
