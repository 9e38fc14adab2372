"""imported: a float model takes over what a paper's code calibrated, and computes what that code simulates."""

from __future__ import annotations

import copy
import math

import _published as published
import pytest
import torch
from _problems import U32
from _published import BLOCK, CLASSES, HEADS, HIDDEN, PATCH, C
from _torchvision_stub import import_timm
from _vits import relative_error, vit
from test_importers import SOURCES, published_input, published_weight
from torch import nn

from pyvit_accel import Unsupported, accelerate, load, save
from pyvit_accel.calibrate import importers
from pyvit_accel.calibrate.importers import Uniform
from pyvit_accel.imported import imported
from pyvit_accel.models.vit import VisionTransformer
from pyvit_accel.modules import CodebookLinear, QuantAttention, QuantBlock, QuantLinear, WeightOnlyLinear

LINEARS = tuple(name for name in published.LINEARS if name != "patch_embed.proj")


METHODS = SOURCES | {
    "repq_vit": (published.repq_model, importers.repq_vit),
    "is_vit": (published.is_vit_model, importers.is_vit),
}
LIVE = ("repq_vit", "is_vit")  # whose zero points are no integers


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


def weighted(s, v, softmax):
    """What the projection gets, (B, N, C), for scores s and values v, float64; softmax: fake quantization of p.

    Also how far p is unsure, (B, H, N, N), for it lies beside the border of two codes: the kernel's log-sum-exp adds
    terms of 16 bits, each off by half a step of 1 / 65280 of the largest, which their sum is at least, and scores in
    octaves are float32. And the bound of an error, which follows from that and from a float32 sum.
    """
    p, N = s.softmax(-1), s.shape[-1]
    off = 2.0 ** (N / 2 / 65280 / math.log(2) + 8 * U32 * s.abs().max().item() / math.log(2))
    unsure = (softmax(p * off) - softmax(p / off)).abs()
    found, size = softmax(p), softmax(p).abs() @ v.abs()
    bound = unsure @ v.abs() + 2 * N * U32 * size
    return (found @ v).transpose(1, 2).flatten(2), unsure, bound.transpose(1, 2).flatten(2)


class SimulatedAttention(nn.Module):
    """The paper's fake quantization between the Linears of an attention, float64."""

    def __init__(self, method, attention, layers) -> None:
        super().__init__()
        self.attention = attention  # of the float model, its Linears replaced
        self.operands = {"qk": layers.matmul1, "pv": layers.matmul2}
        self.method = method

    def operand(self, x, which, part):
        layer = self.operands[which]
        if self.method == "adalog":
            q = getattr(layer, f"{part}_quantizer")
            return published.fake_uniform(x, q.scale, q.zero_point.round(), 4)
        if self.method == "ptq4vit":
            scale = getattr(layer, f"{part}_interval").view(1, -1, 1, 1)
            return published.fake_uniform(x, scale, torch.tensor(128), 8)
        q = getattr(layer, f"quantizer_{part}")
        return published.fake_uniform(x, q.delta, q.zero_point, q.n_bits)

    def softmax(self, p):
        if self.method == "adalog":
            return published.fake_adalog(p, 3, 25, 1.0)
        if self.method == "ptq4vit":
            return published.fake_twin_softmax(p, 8, 2.0**-4)
        q = self.operands["pv"].quantizer_A
        if self.method == "is_vit":
            return published.fake_sulq(p, 4, *(float(t) for t in (q.delta, q.minv, q.maxv)))
        return published.fake_log_sqrt2(p, 4, float(q.delta))

    def forward(self, x):
        q, k, v = self.attention.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        s = self.operand(q, "qk", "A") @ self.operand(k, "qk", "B").mT * self.attention.scale
        self.heads, self.unsure, self.bound = weighted(s, self.operand(v, "pv", "B"), self.softmax)
        return self.attention.proj(self.heads)


def simulated(method, source, attention=False) -> nn.Module:
    """attention: whether its q, k, v and probabilities are quantized too."""
    model = float_vit().double()
    weight, _ = published_weight(method, source, "patch_embed.proj")
    conv = model.patch_embed.proj
    conv.weight.data = weight.view_as(conv.weight).detach()
    conv.bias.data = source.patch_embed.proj.bias.detach().double()
    for name in LINEARS:
        model.set_submodule(name, Simulated(method, source, name))
    for name in (f"{BLOCK}.norm1", f"{BLOCK}.norm2", "norm"):
        model.get_submodule(name).load_state_dict(source.get_submodule(name).state_dict())
    if attention:
        block = model.blocks[0]
        block.attn = SimulatedAttention(method, block.attn, source.blocks[0].attn)
    return model


def refolded(source):
    """The source with integer zero points of qkv and fc1, norm and bias moved along: quantization.md 1.4."""
    source = copy.deepcopy(source)
    block = source.blocks[0]
    for norm, layer in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
        q = layer.input_quantizer
        d = (q.zero_point - q.zero_point.round()) * q.delta
        assert d != 0
        norm.bias.data = norm.bias + d
        layer.bias.data = layer.bias - d * layer.weight.sum(1)
        q.zero_point = q.zero_point.round()
    return source


def calibrated(method):
    """The source, with scales of q, k and v that fit this model, and its record."""
    make, read = METHODS[method]
    source = make()
    if method in LIVE:
        attn = source.blocks[0].attn
        for q in (attn.matmul1.quantizer_A, attn.matmul1.quantizer_B, attn.matmul2.quantizer_B):
            q.delta = q.delta * 15
    record = read(source)
    return refolded(source) if method in LIVE else source, record


def images(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def inputs_of(fast, record, monkeypatch):
    """Runs fast; its logits, and every quantized input as the matmul sees it, by the name of the Linear."""
    names, seen = {module: name.replace(".accelerated", "") for name, module in fast.named_modules()}, {}
    for cls in (QuantLinear, CodebookLinear):

        def spy(self, x, quantize=cls.quantize):
            codes, scale = quantize(self, x)
            found = record.linears[names[self]].x
            if isinstance(found, Uniform):
                seen[names[self]] = (codes.double() - found.zero_point) * found.scale.double()
            else:
                seen[names[self]] = found.dequantize(codes).double() - found.offset.double()
            return codes, scale

        monkeypatch.setattr(cls, "quantize", spy)
    return fast(images()), seen


FORMS = [(method, attention) for method in METHODS for attention in ("float", "published")]
FORMS.remove(("ptq4vit", "published"))  # 8 bits have so many codes that no image is sure of all its probabilities


@torch.inference_mode()
@pytest.mark.parametrize(("method", "attention"), FORMS)
def test_computes_what_the_paper_simulates(method, attention, monkeypatch):
    """Every code is the paper's, from the pixels on; so the logits differ by what the last epilogue rounds.

    Published attention: of those images whose probabilities all lie far enough from where their code changes.
    """
    source, record = calibrated(method)
    fast, _ = accelerate(float_vit(), imported(record, attention))
    model, expected = simulated(method, source, attention == "published"), {}
    for name, layer in model.named_modules():
        if isinstance(layer, Simulated):
            name = name.replace("attn.attention", "attn")
            layer.register_forward_pre_hook(lambda layer, x, name=name: expected.update({name: layer.input(x[0])}))
    truth = model(images().double())
    y, seen = inputs_of(fast, record, monkeypatch)
    assert set(seen) == set(expected) == set(LINEARS)
    sure = torch.ones(len(y), dtype=torch.bool)
    if attention == "published":
        sure = model.blocks[0].attn.unsure.flatten(1).amax(1) == 0
    assert sure.sum() >= 2
    y, truth = y[sure], truth[sure]
    for name, x in expected.items():
        x, seen[name] = x[sure], seen[name][sure]
        # Values of equal codes differ by the roundings of a level and a scale; the smallest step is 1e5 times as wide.
        assert ((seen[name] - x).abs() <= 4 * U32 * (x.abs() + published.SHIFT)).all(), name
        assert x.unique().numel() > 4
    bias = source.head.bias.detach().double()
    assert ((y - truth).abs() <= U32 * (2 * (truth - bias).abs() + truth.abs()) * 1.001).all()


@torch.inference_mode()
@pytest.mark.parametrize("method", METHODS)
def test_report_says_what_is_run(method, tmp_path):
    _, record = calibrated(method)
    fast, report = accelerate(float_vit(), imported(record))
    kinds = {name: type(fast.get_submodule(name)) for name in LINEARS}
    of_codebooks = {f"{BLOCK}.mlp.fc2"} if method not in LIVE else set()
    assert {name for name, kind in kinds.items() if kind is CodebookLinear} == of_codebooks
    assert {name for name, kind in kinds.items() if kind is QuantLinear} == set(LINEARS) - of_codebooks
    reasons = {entry.name: entry.reason for entry in report.kept}
    assert reasons[f"{BLOCK}.norm1"] == "its weights are those of the import"
    assert reasons["patch_embed.proj"].startswith("a convolution; its weight holds the values of the published")
    assert ("8-bit codes of its input left out" in reasons["patch_embed.proj"]) is (method == "repq_vit")
    assert reasons[f"{BLOCK}.attn"].startswith("its matmuls are float: ")
    assert "softmax outputs have" in reasons[f"{BLOCK}.attn"]
    save(fast, tmp_path / "imported.safetensors")
    assert torch.equal(load(tmp_path / "imported.safetensors")(images()), fast(images()))


@torch.inference_mode()
def test_published_attention_of_8_bits():
    source, record = calibrated("ptq4vit")
    fast, _ = accelerate(float_vit(), imported(record, "published"))
    assert relative_error(fast(images()), simulated("ptq4vit", source, True)(images().double())) < 0.02


@torch.inference_mode()
def test_published_attention_is_saved_and_takes_masks(tmp_path):
    _, record = calibrated("adalog")
    fast, report = accelerate(float_vit(), imported(record, "published"))
    attention = fast.blocks[0].attn
    assert report.recipe == "imported, attention published" and "softmax=adalog, 3 bits, lse" in repr(attention)
    save(fast, tmp_path / "imported.safetensors")
    again = load(tmp_path / "imported.safetensors").blocks[0].attn
    x, mask = torch.randn(2, 17, C), torch.rand(17, 17) > 0.3
    assert torch.equal(again(x), attention(x))
    bias = torch.zeros(17, 17).masked_fill(~mask, -torch.inf)
    assert torch.equal(attention(x, mask), attention(x, bias))
    assert not torch.equal(attention(x, mask), attention(x))


@torch.inference_mode()
def test_whole_blocks_with_attention_in_8_bits():
    """The Linears are the paper's; with inputs in fine steps the model is too."""
    source = published.repq_model(bits=8, whole=True)
    for name in LINEARS:
        source.get_submodule(name).input_quantizer.delta /= 16
    record = importers.repq_vit(source)
    fast, report = accelerate(float_vit(), imported(record, "int8"))
    block = fast.blocks[0]
    assert isinstance(block, QuantBlock) and report.recipe == "imported, attention int8"
    found = record.linears[f"{BLOCK}.mlp.fc2"]
    assert torch.equal(block.mlp.fc2.codes(), found.codes) and torch.equal(block.mlp.fc2.x_scale, found.x.scale)
    assert torch.equal(block.norm1.weight, record.norms[f"{BLOCK}.norm1"][0])
    assert relative_error(fast(images()), simulated("repq_vit", source)(images().double())) < 0.02


@torch.inference_mode()
def test_blocks_that_are_not_fused_have_attention_in_8_bits():
    source, record = calibrated("ptq4vit")
    fast, report = accelerate(float_vit(), imported(record, "int8"))
    reasons = {entry.name: entry.reason for entry in report.kept}
    assert reasons[BLOCK].startswith(f"{BLOCK}.mlp.fc2: its input has codes of a codebook")
    block = fast.blocks[0]
    assert isinstance(block.attn, QuantAttention) and isinstance(block.mlp.fc2, CodebookLinear)
    assert relative_error(fast(images()), simulated("ptq4vit", source)(images().double())) < 0.02


@torch.inference_mode()
def test_timm_takes_published_attention():
    timm = import_timm()
    model = timm.create_model(
        "deit_tiny_patch16_224", img_size=16, patch_size=PATCH, num_classes=CLASSES, embed_dim=C, depth=1,
        num_heads=HEADS, mlp_ratio=HIDDEN / C,
    ).eval()  # fmt: skip
    ours = float_vit()
    ours.load_state_dict(model.state_dict())
    _, record = calibrated("adalog")
    theirs, ours = (accelerate(m, imported(record, "published"))[0] for m in (model, ours))
    assert torch.equal(theirs(images()), ours(images()))


def test_attention_has_three_forms():
    with pytest.raises(ValueError, match="attention='log2' is not one of float, published, int8"):
        imported(calibrated("adalog")[1], "log2")


def test_codes_are_those_of_the_record():
    source = published.adalog_model(reparamed=False)
    record = importers.adalog(source.state_dict(), 4, 4)
    fast, _ = accelerate(float_vit(), imported(record))
    for name in LINEARS:
        found, new = record.linears[name], fast.get_submodule(name)
        assert torch.equal(new.codes(), found.codes)
        assert torch.allclose(new.dequantized_weight(), found.codes * found.w_scale[:, None], rtol=1e-6)
    assert fast.blocks[0].mlp.fc2.x_offset == pytest.approx(-published.SHIFT)


@pytest.mark.parametrize(("method", "bound"), [("adalog", 0.0), ("ptq4vit", 2.0**-11)])
def test_levels_as_operands(method, bound):
    _, record = calibrated(method)
    book = record.linears[f"{BLOCK}.mlp.fc2"].x
    new = accelerate(float_vit(), imported(record))[0].blocks[0].mlp.fc2
    levels, held = book.levels * book.unit, new.x_lut[book.codes.long()].double() * new.x_unit
    assert ((held - levels).abs() <= bound * levels.abs() + 2 * U32 * levels.abs()).all()
    assert (held.unique().numel(), new.operand) == (levels.unique().numel(), "fp16")


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
