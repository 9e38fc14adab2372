"""The accelerated modules: drop-in for what they replace, and as close to it as their steps allow."""

from __future__ import annotations

import copy
import re
from concurrent.futures import ThreadPoolExecutor

import _replay
import pytest
import torch
from _problems import U32
from _vits import SMALL, pixels, relative_error, spread, vit
from torch import nn

from pyvit_accel import Unsupported, accelerate, recipes
from pyvit_accel.adapters import ATTENTIONS, find
from pyvit_accel.backends import use_reference
from pyvit_accel.calibrate import LinearPlan
from pyvit_accel.formats import affine
from pyvit_accel.models.vit import Attention, Block, Mlp, ViTConfig
from pyvit_accel.modules import QuantLinear, QuantPatchEmbed, WeightOnlyLinear, build
from pyvit_accel.modules.parts import PatchEmbedParts
from pyvit_accel.reference.scalar import ACTIVATIONS

C = SMALL["dim"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TENSOR = recipes.integer(8, 8, granularity="tensor")


def tokens(batch=3, N=17):
    # One channel is ten times as large as the others, as in trained models.
    x = torch.randn(batch, N, C, generator=torch.Generator().manual_seed(1))
    return x * torch.ones(C).index_fill_(0, torch.tensor([5]), 10.0)


def part(cls, **options):
    return lambda: spread(cls(ViTConfig(**(SMALL | options))))


# What is replaced, and the recipe that replaces it; with the relative error it may make on tokens().
CASES = {
    "QuantLinear": (lambda: spread(nn.Linear(C, 37)), recipes.W8A8_DYNAMIC, 0.02),
    "QuantLinear, no bias": (lambda: spread(nn.Linear(C, 37, bias=False)), recipes.W8A8_DYNAMIC, 0.02),
    "WeightOnlyLinear": (lambda: spread(nn.Linear(C, 37)), recipes.W8A16, 0.01),
    "CodebookLinear": (lambda: spread(nn.Linear(C, 37)), recipes.FP8, 0.06),
    "CodebookLinear, no bias": (lambda: spread(nn.Linear(C, 37, bias=False)), recipes.POW2, 0.2),
    "QuantMlp": (part(Mlp), recipes.W8A8_DYNAMIC, 0.03),
    "QuantMlp, static": (part(Mlp, activation="gelu_tanh"), TENSOR, 0.03),
    "QuantAttention": (part(Attention), recipes.W8A8_DYNAMIC, 0.05),
    "QuantAttention, static": (part(Attention), recipes.W8A8, 0.05),
    "QuantAttention, qk norm": (part(Attention, qk_norm=True, qkv_bias=False), recipes.W8A8, 0.05),
    "QuantBlock": (part(Block), recipes.W8A8_DYNAMIC, 0.02),
    "QuantBlock, static heads": (part(Block, layer_scale=True), recipes.W8A8, 0.02),
    "QuantBlock, static": (part(Block), TENSOR, 0.02),
    "QuantBlock, qk norm": (part(Block, qk_norm=True, layer_scale=True), TENSOR, 0.02),
    "QuantBlock, 4 bits": (part(Block), recipes.W4A4, 0.12),
    "QuantMlp, 4 bits": (part(Mlp), recipes.W4A8, 0.2),
}


def make(name):
    """The float module, and what takes its place, calibrated on tokens()."""
    build_float, recipe, _ = CASES[name]
    module = build_float()
    new, _ = accelerate(module, recipe, [tokens()])
    assert type(new).__name__ == name.split(",")[0]
    return module, new


@torch.inference_mode()
@pytest.mark.parametrize("name", CASES)
def test_is_drop_in(name):
    module, new = make(name)
    truth = module(tokens())
    y = new(tokens())
    assert (y.shape, y.dtype) == (truth.shape, truth.dtype)
    assert relative_error(y, truth) < CASES[name][2]
    assert new(tokens(0)).shape == module(tokens(0)).shape
    assert not new.training and not any(p.requires_grad for p in new.parameters())
    half = accelerate(module.bfloat16(), CASES[name][1], [tokens().bfloat16()])[0]
    y = half(tokens().bfloat16())
    assert (y.shape, y.dtype) == (truth.shape, torch.bfloat16)
    assert relative_error(y.float(), module(tokens().bfloat16()).float()) < CASES[name][2] + 0.02


@torch.inference_mode()
@pytest.mark.parametrize("name", CASES)
def test_same_bits_as_the_reference(name):
    _, new = make(name)
    y = new(tokens())
    with use_reference():
        truth = new(tokens())
    if name == "WeightOnlyLinear":  # sums floats, in an order of its own
        bound = C * U32 * (tokens().abs() @ new.dequantized_weight().abs().T) + 2 * U32 * truth.abs()
        assert ((y - truth).abs() <= bound).all()
    else:
        assert torch.equal(y, truth)


@torch.inference_mode()
@pytest.mark.parametrize("recipe", [recipes.W8A8_DYNAMIC, TENSOR], ids=["token", "tensor"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_mlp_is_its_layers_one_after_the_other(recipe, activation):
    """With a static scale and zero point fc1 writes the codes: those that fc2 would have found."""
    mlp = accelerate(part(Block, activation=activation)(), recipe, [tokens()])[0].mlp
    mlp.fc1 = QuantLinear.from_linear(spread(nn.Linear(C, 4 * C)))  # reads floats
    assert (mlp.fc2.x_scale is not None) == (recipe is TENSOR)
    hidden = ACTIVATIONS[activation](mlp.fc1(tokens()))
    assert torch.equal(mlp(tokens()), mlp.fc2(hidden))


@pytest.mark.parametrize("name", CASES)
def test_state_dict_round_trip(name):
    _, new = make(name)
    cls, config = type(new), new.config()
    again = cls.from_config(config) if hasattr(cls, "from_config") else cls(**config)
    assert not torch.equal(again(tokens()), new(tokens()))
    again.load_state_dict(new.state_dict())
    assert torch.equal(again.eval()(tokens()), new(tokens()))
    assert again.config() == config
    assert repr(again) == repr(new) and re.search("int8|e4m3", repr(new))
    with pytest.raises(RuntimeError, match="size mismatch"):
        again.load_state_dict({key: t[:-1] if t.numel() > 1 else t for key, t in new.state_dict().items()})


@pytest.mark.parametrize("name", CASES)
def test_copies_modes_and_threads_change_no_bit(name):
    _, new = make(name)
    x = tokens()
    y = new(x)
    assert torch.equal(copy.deepcopy(new)(x), y)
    assert torch.equal(new.train()(x), y)
    with torch.inference_mode():
        assert torch.equal(new.eval()(x), y)
    assert torch.equal(new(x.transpose(0, 1).contiguous().transpose(0, 1)), y)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(result, y) for result in pool.map(new, [x] * 12))


@pytest.mark.parametrize("name", CASES)
def test_compiles_and_exports(name):
    _, new = make(name)
    torch._dynamo.reset()
    with torch.inference_mode():
        y = new(tokens())
        assert torch.equal(torch.compile(new, fullgraph=True, backend="eager")(tokens()), y)
        assert torch.equal(torch.compile(new, fullgraph=True, backend="aot_eager")(tokens()), y)
    assert torch.equal(torch.export.export(new, (tokens(),)).module()(tokens()), y)


@pytest.mark.parametrize("name", CASES)
def test_backward_raises(name):
    """Also where a residual around the module, which has a gradient, would leave a silently partial one."""
    _, new = make(name)
    x = tokens().requires_grad_()
    with pytest.raises(RuntimeError, match=r"derivative for pyvit_accel::.* is not implemented|has no derivative"):
        (x.sum() + new(x).sum()).backward()


def quant_linear(kind, linear, x, w_bits, x_bits):
    """A QuantLinear, and the x and the weight it multiplies (float64), with the largest error of each."""
    weight, bias = linear.weight.detach(), linear.bias
    if kind in ("token", "minimum"):
        low = x.min().item() - 0.01 if kind == "minimum" else None
        new = QuantLinear.from_linear(linear, w_bits, x_bits, low)
        codes, scale = new.quantize(x)
        low, zero_point = (new.x_minimum, -(2 ** (x_bits - 1))) if kind == "minimum" else (0.0, 0)
        scale = scale.view(*x.shape[:-1], 1)
        x_error = affine.error_bound(x - low, scale, zero_point, x_bits)
        x_hat = (codes.double() - zero_point) * scale.double() + low
        folded = torch.ones(())
    else:
        levels = 2**x_bits - 6
        scale = 2 * x.abs().amax((0, 1)) / levels if kind == "channel" else (x.max() - x.min())[None] / levels
        zero_point = 0 if kind == "channel" else -1
        plan = LinearPlan(weight, bias, w_bits, x_bits, x_scale=scale, x_zero_point=zero_point)
        new = QuantLinear.from_plan(plan)
        codes, _ = new.quantize(x)
        x_error = affine.error_bound(x, scale, zero_point, x_bits)
        x_hat = (codes.double() - zero_point) * scale.double()
        folded = scale if scale.numel() > 1 else torch.ones(())
    w_hat = new.dequantized_weight().double() / folded.double()
    w_error = affine.error_bound(weight * folded, new.w_scale[:, None], bits=w_bits) / folded
    return new, x_hat, x_error.double(), w_hat, w_error.double()


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["token", "minimum", "static", "channel"])
@pytest.mark.parametrize("K, N", [(64, 37), (1, 1), (197, 16)])
@pytest.mark.parametrize("w_bits, x_bits", [(8, 8), (4, 8), (4, 4), (6, 6), (3, 3), (2, 5), (5, 3)])
def test_quant_linear_is_within_its_steps(kind, K, N, w_bits, x_bits):
    linear, x = spread(nn.Linear(K, N)), torch.randn(2, 9, K)
    new, x_hat, x_error, w_hat, w_error = quant_linear(kind, linear, x, w_bits, x_bits)
    weight, bias = linear.weight.double(), linear.bias.double()
    y = new(x).double()
    # Against its own codes: an exact sum, rounded once, times two rounded products, plus the bias. With a minimum the
    # bias holds a float32 sum over K of the weights.
    magnitude = x_hat.abs() @ w_hat.abs().T + bias.abs() + 1e-6
    share = abs(new.x_minimum or 0.0) * w_hat.abs().sum(1)
    assert ((y - (x_hat @ w_hat.T + bias)).abs() <= 8 * U32 * (magnitude + share) + K * U32 * share).all()
    # Against the float layer: half a step of every activation and every weight.
    bound = x_error @ weight.abs().T + x.double().abs() @ w_error.T + x_error @ w_error.T
    error = (y - (x.double() @ weight.T + bias)).abs()
    assert (error <= bound + 8 * U32 * (magnitude + share) + K * U32 * share).all()
    assert K == 1 or error.max() > bound.min() / 100  # the bound is not idle


@torch.inference_mode()
@pytest.mark.parametrize("w_bits, group_size", [(8, 0), (4, 0), (4, 20), (3, 60), (2, 1), (8, 12)])
def test_weight_only_linear_is_within_its_steps(w_bits, group_size):
    linear, x = spread(nn.Linear(60, 37)), torch.randn(2, 9, 60)
    new = WeightOnlyLinear.from_linear(linear, w_bits, group_size)
    weight = linear.weight.double()
    if group_size:
        runs = linear.weight.detach().view(37, -1, group_size)
        scales = new.w_scale[..., None], new.w_zero_point[..., None]
        w_error = affine.error_bound(runs, *scales, bits=w_bits).flatten(1).double()
    else:
        w_error = affine.error_bound(linear.weight, new.w_scale[:, None], bits=w_bits).double()
    assert (new.dequantized_weight().double() - weight).abs().le(w_error).all()
    bound = x.double().abs() @ (w_error + 64 * U32 * weight.abs()).T + 4 * U32 * linear.bias.double().abs()
    truth = x.double() @ weight.T + linear.bias.double()
    assert ((new(x).double() - truth).abs() <= bound).all()
    assert new(x.bfloat16()).dtype == torch.bfloat16


def bool_mask(*shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.4
    return mask | torch.eye(shape[-1], dtype=torch.bool)


MASKS = {
    "(N, N)": bool_mask(17, 17),
    "(B, 1, N, N)": bool_mask(3, 1, 17, 17),
    "(1, H, N, N)": bool_mask(1, 2, 17, 17),
    "(B, H, N, N)": bool_mask(3, 2, 17, 17),
}


@torch.inference_mode()
@pytest.mark.parametrize("recipe", [recipes.W8A8, recipes.W8A8_DYNAMIC], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("shape", MASKS)
def test_masks(recipe, shape):
    attention, mask = part(Attention)(), MASKS[shape]
    parts = find(ATTENTIONS, attention).parts(attention)
    new, _ = accelerate(attention, recipe, [tokens()])
    added = torch.randn(mask.shape) * 2
    for given in (mask, added, torch.zeros_like(added).masked_fill(~mask, -torch.inf)):
        truth = _replay.attention(parts, tokens(), given)
        assert relative_error(new(tokens(), given), truth) < 0.05
        assert relative_error(new(tokens()), truth) > 0.1
    assert torch.equal(new(tokens(), mask), new(tokens(), torch.zeros_like(added).masked_fill(~mask, -torch.inf)))
    nothing = torch.zeros(17, 17, dtype=torch.bool)
    assert torch.equal(new(tokens(), nothing), new.proj.bias.expand(3, 17, C))
    block = part(Block)()
    new, _ = accelerate(block, recipe, [tokens()])
    truth = _replay.block(find(recipes.BLOCKS, block).parts(block), tokens(), added)
    assert relative_error(new(tokens(), added), truth) < 0.02
    assert relative_error(new(tokens()), truth) > 0.03


def patch_embed(dtype=torch.float32, bias=True):
    conv = spread(nn.Conv2d(3, 40, 8, stride=8, bias=bias)).to(dtype)
    return conv, QuantPatchEmbed.from_parts(PatchEmbedParts(conv, MEAN, STD))


def normalised(images):
    return (images.float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@torch.inference_mode()
@pytest.mark.parametrize("bias", [True, False])
def test_patch_embed(bias):
    conv, new = patch_embed(bias=bias)
    images = pixels(size=32)
    y = new(images)
    assert torch.equal(new(images.to(memory_format=torch.channels_last)), y)
    floats = 3 * normalised(images)  # whatever they were normalised with, the convolution is the one it was
    assert torch.equal(new(floats), conv(floats).flatten(2).transpose(1, 2))
    # Pixels are exact; what is rounded is the weights of raw pixels, w / (255 std).
    patches = nn.functional.unfold(images.double(), 8, stride=8).mT
    std, mean = (torch.tensor(t, dtype=torch.float64)[:, None, None] for t in (STD, MEAN))
    weight = (conv.weight.double() / (255 * std)).flatten(1)
    offset = -(conv.weight.double() * mean / std).sum((1, 2, 3)) + (conv.bias.double() if bias else 0)
    w_error = affine.error_bound(weight.float(), new.w_scale[:, None], q_min=-127).double()
    bound = patches @ (w_error + 8 * U32 * weight.abs()).T + 8 * U32 * offset.abs()
    assert ((y.double() - (patches @ weight.T + offset)).abs() <= bound).all()
    with use_reference():
        assert torch.equal(new(images), y)
    again = QuantPatchEmbed(**new.config())
    again.load_state_dict(new.state_dict())
    assert torch.equal(again(images), y) and torch.equal(copy.deepcopy(new)(images), y)
    assert torch.equal(torch.compile(new, fullgraph=True, backend="aot_eager")(images), y)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_patch_embed_keeps_the_dtype(dtype):
    _, new = patch_embed(dtype)
    assert new(pixels()).dtype == new(normalised(pixels()).to(dtype)).dtype == dtype
    assert QuantPatchEmbed(**new.config())(pixels()).dtype == dtype


def test_error_texts():
    _, embed = patch_embed()
    with pytest.raises(ValueError, match=r"images have shape \(2, 1, 32, 32\), expected \(B, 3, H, W\)"):
        embed(pixels(2, channels=1))
    with pytest.raises(ValueError, match="sides that are multiples of 8"):
        embed(pixels(size=30))
    linear = QuantLinear.from_linear(nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"QuantLinear: x has shape \(2, 9\), expected \(..., in_features=8\)"):
        linear(torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"WeightOnlyLinear: x has shape \(2, 9\), expected \(..., in_features=8\)"):
        WeightOnlyLinear.from_linear(nn.Linear(8, 4))(torch.zeros(2, 9))
    for option in ({"observer": "median"}, {"granularity": "row"}):
        with pytest.raises(ValueError, match=r"Scheme: \w+='\w+' is not one of"):
            build.Scheme(**option)


@pytest.mark.parametrize("cls", [QuantLinear, WeightOnlyLinear])
def test_unsupported_weights(cls):
    for value in (float("nan"), float("inf")):
        for name in ("weight", "bias"):
            linear = nn.Linear(8, 4)
            getattr(linear, name).data[1] = value
            said = rf"{name} holds \d NaN or infinite values, the first at \[[\d, ]+\]; repair the checkpoint"
            with pytest.raises(Unsupported, match=said):
                cls.from_linear(linear)
    empty = nn.Linear(8, 4)
    empty.weight = nn.Parameter(torch.empty(0, 8))
    with pytest.raises(Unsupported, match=r"weight \(0, 8\) is empty"):
        cls.from_linear(empty)
    with pytest.raises(Unsupported, match="in_features=65536: int32 sums are exact below 65536"):
        cls.from_linear(nn.Linear(65536, 1))
    assert (cls.from_linear(nn.Linear(65535, 1)).w_scale > 0).all()


def test_whole_model_compiles_exports_and_serves_threads():
    images = pixels()
    model, _ = accelerate(vit(layer_scale=True, num_registers=2), recipes.W8A8, [images])
    torch._dynamo.reset()
    with torch.inference_mode():
        y = model(images)
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(images), y)
    assert torch.equal(torch.export.export(model, (images,)).module()(images), y)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(result, y) for result in pool.map(model, [images] * 12))
