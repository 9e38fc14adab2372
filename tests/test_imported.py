"""imported: a float model takes over what a paper's code calibrated, and computes what that code simulates."""

from __future__ import annotations

import _published as published
import pytest
import torch
from _published import BLOCK, CLASSES, HEADS, HIDDEN, PATCH, C
from _vits import relative_error, vit
from test_importers import SOURCES, published_input, published_weight
from torch import nn

from pyvit_accel import Unsupported, accelerate, load, save
from pyvit_accel.calibrate import importers
from pyvit_accel.imported import imported
from pyvit_accel.models.vit import VisionTransformer
from pyvit_accel.modules import CodebookLinear, QuantLinear, WeightOnlyLinear

LINEARS = tuple(name for name in published.LINEARS if name != "patch_embed.proj")


def float_vit(**overrides) -> VisionTransformer:
    """Runs what published.Vit only holds."""
    sizes = {"image_size": 16, "patch_size": PATCH, "num_classes": CLASSES, "dim": C, "num_heads": HEADS, "depth": 1}
    return vit(**(sizes | {"mlp_ratio": HIDDEN / C} | overrides)).eval()


class Simulated(nn.Module):
    """The paper's fake quantization of a Linear, float64."""

    def __init__(self, method, model, name) -> None:
        super().__init__()
        self.weight, _ = published_weight(method, model, name)
        self.bias = model.get_submodule(name).bias.detach().double()
        self.input = lambda x: published_input(method, model, name, x)
        layer = model.get_submodule(name)
        if name.endswith("fc2") and method == "adalog":
            scale, shift = float(layer.a_quantizer.scale), float(layer.a_quantizer.shift)
            self.input = lambda x: published.fake_adalog(x + shift, 4, 20, scale)  # the bias has the shift already
        if name.endswith("fc2") and method == "ptq4vit":
            self.input = lambda x: published.fake_twin_gelu(x, 8, float(layer.a_interval))

    def forward(self, x):
        return self.input(x) @ self.weight.T + self.bias


def simulated(method, source) -> nn.Module:
    model = float_vit().double()
    for name in LINEARS:
        model.set_submodule(name, Simulated(method, source, name))
    for name in (f"{BLOCK}.norm1", f"{BLOCK}.norm2", "norm"):
        model.get_submodule(name).load_state_dict(source.get_submodule(name).state_dict())
    return model


def images(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
@pytest.mark.parametrize("method", SOURCES)
def test_computes_what_the_paper_simulates(method, tmp_path):
    """To float32 rounding: one code that differed would be a step of 1/15 of the range."""
    make, read = SOURCES[method]
    source = make()
    fast, report = accelerate(float_vit(), imported(read(source)), strict=False)
    y, truth = fast(images()), simulated(method, source)(images().double())
    assert relative_error(y, truth) < 2e-5
    kinds = {name: type(fast.get_submodule(name)) for name in LINEARS}
    of_codebooks = {f"{BLOCK}.mlp.fc2"} if method != "repq_vit" else set()
    assert {name for name, kind in kinds.items() if kind is CodebookLinear} == of_codebooks
    assert {name for name, kind in kinds.items() if kind is QuantLinear} == set(LINEARS) - of_codebooks
    reasons = {entry.name: entry.reason for entry in report.kept}
    assert reasons[f"{BLOCK}.norm1"] == "its weights are those of the import"
    assert reasons["patch_embed.proj"].startswith("a convolution")
    save(fast, tmp_path / "imported.safetensors")
    assert torch.equal(load(tmp_path / "imported.safetensors")(images()), y)


def test_repq_with_zero_points_to_round():
    """The published simulation has 17 levels there: close, not equal."""
    source = published.repq_model(whole=False)
    with torch.inference_mode():
        y = accelerate(float_vit(), imported(importers.repq_vit(source)))[0](images())
        truth = simulated("repq_vit", source)(images().double())
    assert 2e-5 < relative_error(y, truth) < 0.2


def test_codes_are_those_of_the_record():
    source = published.adalog_model(reparamed=False)
    record = importers.adalog(source.state_dict(), 4, 4)
    fast, _ = accelerate(float_vit(), imported(record))
    for name in LINEARS:
        found, new = record.linears[name], fast.get_submodule(name)
        assert torch.equal(new.codes(), found.codes)
        assert torch.allclose(new.dequantized_weight(), found.codes * found.w_scale[:, None], rtol=1e-6)
    assert fast.blocks[0].mlp.fc2.x_offset == pytest.approx(-published.SHIFT)


@torch.inference_mode()
def test_inputs_that_are_not_quantized():
    """Codes of the weight alone: a WeightOnlyLinear."""
    source = published.ptq4vit_model()
    record = importers.ptq4vit(source)
    for name in LINEARS:
        object.__setattr__(record.linears[name], "x", None)
    fast, _ = accelerate(float_vit(), imported(record))
    assert {type(fast.get_submodule(name)) for name in LINEARS} == {WeightOnlyLinear}
    x = torch.randn(5, C)
    weight = record.linears["head"].codes * record.linears["head"].w_scale[:, None]
    assert torch.allclose(fast.head(x), x @ weight.T + record.linears["head"].bias, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_classes": 7}, r"head is \(7, 24\); the import has \(5, 24\)"),
        ({"mlp_ratio": 2}, r"blocks.0.mlp.fc1 is \(48, 24\); the import has \(40, 24\)"),
        ({"num_classes": 0}, "head is not in the model"),
    ],
)
def test_refuses_another_model_and_leaves_it(overrides, message):
    model = float_vit(**overrides)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(Unsupported, match=message):
        accelerate(model, imported(importers.ptq4vit(published.ptq4vit_model())), inplace=True)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
