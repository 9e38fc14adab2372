"""CodebookLinear: any pair of codebooks as a drop-in for nn.Linear, within the steps of both; its files, its errors."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from _problems import U32
from _vits import pixels, relative_error, spread, vit
from torch import nn

from pyvit_accel import Recipe, Unsupported, accelerate, load, recipes, save
from pyvit_accel.calibrate import Activation
from pyvit_accel.formats import affine, fp8, log, multiquant, pow2, subset, tan, twin
from pyvit_accel.formats.codebook import WEIGHT_CLIPS
from pyvit_accel.modules import CodebookLinear
from pyvit_accel.recipes import codebook

INT8 = twin.uniform(8, 1.0, 128)
E4M3 = fp8.fp8("e4m3")
ONE_SIDED = ("adalog", "sulq", "tan", "log2")
POINTS = subset.universal_set()[10::24][:16]
FORMATS = {  # of weight and input, and the operand both are exact in
    "fp8": (E4M3, E4M3, "e4m3"),
    "e5m2 x e4m3": (fp8.fp8("e5m2"), E4M3, "fp16"),
    "pow2 x int8": (pow2.ps_weight(bits=4), INT8, "fp16"),
    "pow2 x e4m3": (pow2.ps_weight(), E4M3, "e4m3"),
    "pow2 of 6 bits x e5m2": (pow2.q_weight(), fp8.fp8("e5m2"), "e5m2"),
    "pow2 x float": (pow2.ps_weight(), None, "e4m3"),
    "int4 x int4": (twin.uniform(4, 1.0, 8), twin.uniform(4, 1.0, 8), "e4m3"),
    "int5 x uneven int6": (twin.uniform(5, 1.0, 16), twin.uniform(6, 1.0, 20), "fp16"),
    "multiquant x int8": (multiquant.weight(-1.0, 1.0), INT8, "fp16"),
    "int6 x adalog": (twin.uniform(6, 1.0, 32), log.adalog(4, 20, shift=twin.GELU_MINIMUM), "fp16"),
    "int4 x log2": (twin.uniform(4, 1.0, 8), log.log2(4), "e4m3"),
    "int4 x sulq": (twin.uniform(4, 1.0, 8), log.sulq(4, 0.01, -6.6, 0.1), "e4m3"),
    "int4 x tan": (twin.uniform(4, 1.0, 8), tan.tan(4, 1.4, two_sided=True), "fp16"),
    "int4 x twin": (twin.uniform(4, 1.0, 8), twin.gelu(4, 0.25, 0.03125), "e4m3"),
    "subset x subset": (subset.subset(POINTS), subset.subset(POINTS), "fp16"),
}


def problem(name, K=60, N=37):
    """A linear and an input of the range that its format is for."""
    x = torch.randn(2, 9, K)
    return spread(nn.Linear(K, N)), x.abs() / x.abs().max() if name.split()[-1] in ONE_SIDED else x


def books(name, linear, new, x):
    """The codebooks of the weight and of the rows of x with the scales that the module gave them."""
    w_format, x_format, _ = FORMATS[name]
    w_book = w_format.with_scale(w_format.weight_scale(linear.weight), axis=0)
    return w_book, None if x_format is None else x_format.with_scale(new.quantize(x)[1], axis=0)


@torch.inference_mode()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_is_within_its_steps(name, static):
    """Codes are those of the codebooks, and the result is within both error bounds of the float layer."""
    linear, x = problem(name)
    w_format, x_format, operand = FORMATS[name]
    x_scale = torch.tensor([x.abs().max().item() / 3]) if static and x_format is not None else None
    new = CodebookLinear.from_linear(linear, w_format, x_format, x_scale=x_scale)
    assert x_format is None or new.operand == operand
    w_book, x_book = books(name, linear, new, x)
    weight, rows = linear.weight, x.flatten(0, 1)
    assert torch.equal(new.codes(), (w_book.quantize(weight).int() - 2 ** (w_format.bits - 1)).to(torch.int8))
    w_hat = w_book.dequantize(w_book.quantize(weight)).double()
    w_error = w_book.error_bound(weight)
    x_hat, x_error = rows.double(), torch.zeros(rows.shape, dtype=torch.float64)
    if x_book is not None:
        codes, _ = new.quantize(x)
        assert codes.dtype == torch.uint8
        assert torch.equal(x_book.dequantize(codes.flatten(0, 1)), x_book.dequantize(x_book.quantize(rows)))
        x_hat = x_book.dequantize(codes.flatten(0, 1)).double()
        x_error = x_book.error_bound(rows)
    y, bias = new(x).flatten(0, 1).double(), linear.bias.double()
    # Against its own codes: operands where they are rounded, then float32 sums, two scales and the bias.
    lossy = w_format.with_operand(new.operand).operand_error()
    lossy += 0.0 if x_format is None else x_format.with_operand(new.operand).operand_error()
    offset = 0.0 if x_format is None else x_format.offset.double().abs()
    magnitude = (x_hat.abs() + 2 * offset) @ w_hat.abs().T + bias.abs()
    slack = (1.01 * lossy + 128 * U32) * magnitude
    assert ((y - (x_hat @ w_hat.T + bias)).abs() <= slack).all()
    bound = x_error @ weight.double().abs().T + rows.double().abs() @ w_error.T + x_error @ w_error.T
    truth = rows.double() @ weight.double().T + bias
    error = (y - truth).abs()
    assert (error <= bound + slack).all() and error.max() > bound.min() / 100


@pytest.mark.parametrize("name", FORMATS)
def test_rebuilds_from_its_config(name):
    linear, x = problem(name)
    w_format, x_format, _ = FORMATS[name]
    for x_scale in (None, None if x_format is None else torch.ones(1)):
        new = CodebookLinear.from_linear(linear, w_format, x_format, x_scale=x_scale)
        again = CodebookLinear(**new.config())
        again.load_state_dict(new.state_dict())
        assert torch.equal(again(x), new(x)) and again.config() == new.config() and repr(again) == repr(new)
        assert again.formats() == new.formats() and again.weight_bytes() == new.weight_bytes()
        assert torch.equal(new(x.bfloat16()), new(x.bfloat16().float()).bfloat16())


@torch.inference_mode()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["fp8", "pow2 x float", "int6 x adalog", "int5 x uneven int6"])
def test_compiles_and_exports(name, bias):
    _, x = problem(name)
    w_format, x_format, _ = FORMATS[name]
    for x_scale in (None, None if x_format is None else torch.ones(1)):
        new = CodebookLinear.from_linear(spread(nn.Linear(60, 37, bias=bias)), w_format, x_format, x_scale=x_scale)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(new, fullgraph=True, backend="aot_eager")(x), new(x))
        assert torch.equal(torch.export.export(new, (x,)).module()(x), new(x))


def test_weight_scale_is_the_best_of_its_clips():
    w = torch.randn(20, 96)
    w[3] = 0
    for book in (pow2.ps_weight(bits=4), twin.uniform(3, 1.0, 4), multiquant.weight(-1.0, 1.0), E4M3):
        scale = book.weight_scale(w)
        assert (scale > 0).all() and scale.isfinite().all()

        def error(scale, book=book):
            fitted = book.with_scale(scale, axis=0)
            return (fitted.dequantize(fitted.quantize(w)) - w).square().sum(1)

        low, high = book.levels[0], book.levels[-1]
        full = torch.maximum(w.amax(1) / high, w.amin(1) / low).clamp_min(affine.MIN_SCALE).float()
        assert all((error(scale) <= 1.0001 * error(full * clip)).all() for clip in WEIGHT_CLIPS if book.bits < 8)
        assert book.bits == 8 or error(scale).sum() < 0.97 * error(full).sum()
        assert book.bits < 8 or torch.equal(scale, full)


@torch.inference_mode()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["pow2 x int8", "multiquant x int8", "fp8"])
def test_roundings_and_bias_make_up_for_errors(name, bias):
    """On inputs that go together, as those of a layer do: less error, and none in the mean but that of x itself."""
    linear = spread(nn.Linear(60, 37, bias=bias))
    x = torch.randn(400, 12) @ torch.randn(12, 60) + torch.randn(60) + 0.1 * torch.randn(400, 60)
    w_format, _, _ = FORMATS[name]
    plain = CodebookLinear.from_linear(linear, w_format, None)
    fitted = CodebookLinear.from_linear(linear, w_format, None, seen=Activation.of(x))
    error, before = ((new(x) - linear(x)).double() for new in (fitted, plain))
    assert error.square().sum() < 0.5 * before.square().sum()
    assert error.mean(0).abs().max() < 1e-4 < before.mean(0).abs().max()
    codes = fitted.codes().int() + 2 ** (w_format.bits - 1)
    assert torch.isin(codes, w_format.codes.int()).all() and not torch.equal(fitted.codes(), plain.codes())


@torch.inference_mode()
def test_recipes_take_calibration_and_leave_others_theirs():
    model, images = vit(), pixels(8)
    truth = model(images)
    fitted, plain = (accelerate(model, recipes.POW2, given)[0] for given in ([images], None))
    assert relative_error(fitted(images), truth) < 0.8 * relative_error(plain(images), truth)
    heads = Recipe("POW2 head", (replace(recipes.POW2.rules[0], match="head"),), recipes.POW2.observe)
    for both in (heads + recipes.W4A4, recipes.W4A4 + heads):
        assert both.observe is recipes.W4A4.observe and both.needs_calibration
    _, report = accelerate(model, heads + recipes.W4A4, [images])
    became = {entry.name: entry.became for entry in report.replaced}
    assert became["head"] == "CodebookLinear" and became["blocks.0"] == "QuantBlock"


@torch.inference_mode()
@pytest.mark.parametrize("recipe", [recipes.FP8, recipes.POW2, codebook("POW2A16", pow2.ps_weight(), None)],
                         ids=lambda recipe: recipe.name)  # fmt: skip
def test_models_are_saved_and_loaded(recipe, tmp_path):
    model = vit()
    new, report = accelerate(model, recipe)
    assert {entry.became for entry in report.replaced} == {"CodebookLinear"} and len(report.replaced) == 9
    assert relative_error(new(pixels()), model(pixels())) < (0.06 if recipe.name == "FP8" else 0.4)
    save(new, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert torch.equal(loaded(pixels()), new(pixels())) and str(loaded) == str(new)
    layer = report.layers[0]
    assert (layer.weight, layer.activation) == new.get_submodule(layer.name).formats()
    bits = {"FP8": 8, "POW2": 4, "POW2A16": 5}[recipe.name]
    assert layer.bytes < layer.float_bytes * bits / 16 + 4 * 192 + 64 * 12 + 4 * 2**bits + 1


def refused(text, *args, **kwargs):
    with pytest.raises(ValueError, match="^CodebookLinear: " + re.escape(text)):
        CodebookLinear.from_linear(nn.Linear(16, 8), *args, **kwargs)


def test_errors():
    rows = subset.subset(POINTS.expand(8, 16))
    refused("w_format subset has levels (8, 16), scale (1,) and offset (1,); a matmul looks up in one table", rows)
    refused("x_format log2 has code 256, which no byte holds; use zero='last'", E4M3, log.log2(8))
    refused("w_format multiquant weight has offset 1.0; use 0", multiquant.weight(-1.0, 3.0))
    refused("bits=7; use one of 2, 3, 4, 5, 6, 8", twin.uniform(7, 1.0, 64))
    with pytest.raises(ValueError, match=r"^affine: scale\[0\] is 0.0; every scale must be positive and finite$"):
        CodebookLinear.from_linear(nn.Linear(16, 8), E4M3, E4M3, x_scale=torch.zeros(1))
    with pytest.raises(ValueError, match=r"^CodebookLinear: x_encoder 'cast' is not one of float, e4m3, e5m2, integer"):
        CodebookLinear(16, 8, x_encoder="cast")
    with pytest.raises(ValueError, match=r"x has shape \(2, 9\), expected \(..., in_features=16\)"):
        CodebookLinear.from_linear(nn.Linear(16, 8))(torch.zeros(2, 9))
    linear = nn.Linear(16, 8)
    linear.weight.data[3, 4] = torch.nan
    with pytest.raises(Unsupported, match="weight holds 1 NaN or infinite values"):
        CodebookLinear.from_linear(linear)
