"""Importers: the integers they read compute, in the low-bit matmul, what the papers' simulated quantization does."""

from __future__ import annotations

import _published as published
import pytest
import torch
from _problems import U32
from _published import BLOCK, LINEARS
from torch.nn import functional as F

from pyvit_accel import ops
from pyvit_accel.calibrate import importers
from pyvit_accel.calibrate.importers import Uniform
from pyvit_accel.calibrate.plan import block_output
from pyvit_accel.errors import Unsupported
from pyvit_accel.formats import packed
from pyvit_accel.formats.codebook import Codebook


def adalog(model, **kwargs):
    return importers.adalog(model.state_dict(), **({"w_bits": 4, "a_bits": 4} | kwargs))


def published_weight(method, model, name):
    """(weight as the paper's matmul sees it, its bits), float64 (N, K)."""
    layer = model.get_submodule(name)
    w = layer.weight.detach().flatten(1)
    if method == "adalog":
        q, bits = layer.w_quantizer, 4
        return published.fake_uniform(w.double(), q.scale.view(-1, 1), q.zero_point.view(-1, 1).round(), bits), bits
    if method == "ptq4vit":
        qmax, interval = 2 ** (layer.w_bit - 1), layer.w_interval
        codes = (w.view(len(interval), -1, 1, w.shape[1]) / interval.view(-1, 1, 1, 1)).round().clamp(-qmax, qmax - 1)
        return (codes.double() * interval.view(-1, 1, 1, 1).double()).view(w.shape), layer.w_bit
    q = layer.weight_quantizer
    return published.fake_uniform(w.double(), q.delta.view(-1, 1), q.zero_point.view(-1, 1), q.n_bits), q.n_bits


def published_input(method, model, name, x):
    """x as the paper's matmul sees it, for inputs with uniform codes."""
    layer = model.get_submodule(name)
    if method == "adalog":
        return published.fake_uniform(x, layer.a_quantizer.scale, layer.a_quantizer.zero_point.round(), 4)
    if method == "ptq4vit":
        qmax = 2 ** (layer.a_bit - 1)
        return published.fake_uniform(x, layer.a_interval.view(1), torch.tensor(qmax), layer.a_bit)
    q = layer.input_quantizer
    return published.fake_uniform(x, q.delta, q.zero_point, q.n_bits)


SOURCES = {
    "adalog": (published.adalog_model, adalog),
    "repq_vit": (lambda: published.repq_model(whole=True), importers.repq_vit),
    "ptq4vit": (published.ptq4vit_model, importers.ptq4vit),
}
each_source = pytest.mark.parametrize("method", SOURCES)


def load(method):
    build, read = SOURCES[method]
    model = build()
    return model, read(model)


def between_ties(scale, *shape):
    """Values that lie clearly on one side of every tie, so that dividing and multiplying with 1 / scale agree."""
    return ((torch.randint(-12, 13, shape) + 0.8 * (torch.rand(shape) - 0.5)) * scale).double()


def run(impl, linear, x):
    """The imported layer through ops.lowbit_linear, its weight packed."""
    plan, w_packed = linear.plan(), packed.pack(linear.codes, linear.w_bits)
    codes = linear.x.quantize(x.float())
    return impl(
        ops.lowbit_linear, codes, plan.x_scale, w_packed, plan.w_scale, plan.bias, x_zero_point=plan.x_zero_point
    )


@each_source
def test_weights_are_the_papers(method):
    model, imported = load(method)
    assert set(imported.linears) == set(LINEARS)
    for name, linear in imported.linears.items():
        truth, bits = published_weight(method, model, name)
        assert torch.equal(linear.codes.double() * linear.w_scale.double()[:, None], truth)
        assert linear.published_bits == bits and linear.w_bits >= bits
        assert torch.equal(packed.unpack(packed.pack(linear.codes, linear.w_bits), *truth.shape), linear.codes)


@each_source
def test_weights_at_ties_are_divided(method):
    """A product with 1 / scale rounds some ties to the other side, and the papers' code divides."""
    build, read = SOURCES[method]
    model = build()
    layer = model.head
    found = read(model).linears["head"]
    scale, reach = found.w_scale[:, None], 2 ** (found.published_bits - 1)
    ties = (torch.randint(-reach, reach, layer.weight.shape) + 0.5) * scale
    assert ((ties / scale).round() != (ties * (1 / scale)).round()).any()
    layer.weight.data = ties
    linear = read(model).linears["head"]
    truth, _ = published_weight(method, model, "head")
    assert torch.equal(linear.codes.double() * scale.double(), truth)


@each_source
def test_linears_are_the_papers(impl, method):
    model, imported = load(method)
    for name in LINEARS:
        linear = imported.linears[name]
        if not isinstance(linear.x, Uniform):
            continue
        x = between_ties(linear.x.scale, 7, linear.codes.shape[1])
        w, _ = published_weight(method, model, name)
        product = published_input(method, model, name, x) @ w.T
        bias = model.get_submodule(name).bias.detach().double()
        # Sums are exact: roundings are those of the two scales' product, of the product with it, and of the bias added.
        bound = U32 * (2 * product.abs() + (product + bias).abs()) * 1.001
        assert ((run(impl, linear, x).double() - (product + bias)).abs() <= bound).all(), name


@each_source
def test_heads_are_the_papers(method):
    model, imported = load(method)
    for name, matmul in imported.matmuls.items():
        layer = model.get_submodule(name)
        for part, operand in zip("AB", (matmul.a, matmul.b), strict=True):
            if isinstance(operand, Codebook):
                continue
            x = between_ties(operand.scale.view(-1, 1, 1), 2, published.HEADS, 5, 8).float()
            if method == "ptq4vit":
                bits, zero_point = layer.B_bit, torch.tensor(2 ** (layer.B_bit - 1))
                scale = getattr(layer, f"{part}_interval").view(1, -1, 1, 1)
            elif method == "adalog":
                q, bits = getattr(layer, f"{part}_quantizer"), 4
                scale, zero_point = q.scale.detach(), q.zero_point.detach().round()
            else:
                q = getattr(layer, f"quantizer_{part}")
                scale, zero_point, bits = q.delta, q.zero_point, q.n_bits
            truth = published.fake_uniform(x.double(), scale, zero_point, bits)
            shape = (-1, 1, 1)
            codes = operand.quantize(x).double() - operand.zero_point.view(shape)
            assert torch.equal(codes * operand.scale.double().view(shape), truth)


# ---- AdaLog


@pytest.mark.parametrize("reparamed", [True, False])
def test_adalog_gelu_outputs(reparamed):
    """The shift of the input is in the bias, whether the source put it there or not."""
    model = published.adalog_model(reparamed=reparamed)
    imported = adalog(model)
    linear, layer = imported.linears[f"{BLOCK}.mlp.fc2"], model.blocks[0].mlp.fc2
    x = F.gelu(torch.randn(50, published.HIDDEN)).double()
    truth = published.fake_adalog(x + published.SHIFT, 4, 20, float(layer.a_quantizer.scale.detach()))
    w, _ = published_weight("adalog", model, f"{BLOCK}.mlp.fc2")
    expected = (truth if reparamed else truth - published.SHIFT) @ w.T + layer.bias.detach().double()
    seen = linear.x.dequantize(linear.x.quantize(x.float())).double() - linear.x.offset
    assert ((seen - truth).abs() <= 4 * U32 * (truth.abs() + published.SHIFT)).all()
    bound = 8 * U32 * ((truth + published.SHIFT) @ w.abs().T + layer.bias.detach().abs() + linear.bias.abs())
    assert ((seen @ w.T + linear.bias.double() - expected).abs() <= bound).all()
    assert any("bias_reparamed is False" in note for note in imported.notes) is not reparamed


def test_adalog_softmax_outputs():
    softmax = adalog(published.adalog_model()).matmuls[f"{BLOCK}.attn.matmul2"].a
    assert isinstance(softmax, Codebook) and softmax.bits == 3
    p = torch.randn(40, 30).softmax(-1)
    truth = published.fake_adalog(p.double(), 3, 25, 1.0)
    assert torch.equal(softmax.dequantize(softmax.quantize(p)).double(), truth.float().double())


def test_adalog_zero_points_are_rounded():
    model = published.adalog_model()
    imported = adalog(model)
    zero_point = model.head.a_quantizer.zero_point.detach()
    assert zero_point != zero_point.round()
    assert imported.linears["head"].plan().x_zero_point == int(zero_point.round()) - 8


def test_adalog_weights_already_on_their_grid_are_clipped():
    """After reconstruction the checkpoint holds multiples of the scale, some beyond the last code."""
    model = published.adalog_model()
    layer = model.head
    scale, zero_point = layer.w_quantizer.scale.view(-1, 1), layer.w_quantizer.zero_point.view(-1, 1).round()
    grid = torch.randint(-15, 16, layer.weight.shape)
    layer.weight.data = (grid * scale).detach()
    assert torch.equal(adalog(model).linears["head"].codes.float(), torch.clamp(grid, -zero_point, 15 - zero_point))


def test_adalog_stores_asymmetric_weights_in_more_bits_and_says_so():
    imported = adalog(published.adalog_model())
    linear = imported.linears[f"{BLOCK}.attn.qkv"]
    assert (linear.published_bits, linear.w_bits) == (4, 5)
    assert f"{BLOCK}.attn.qkv: its 4-bit weights and zero points are stored in 5 bits" in imported.notes


def test_adalog_bits_of_a_file():
    assert importers.bits_of_file("deit_tiny_w4_a4_s3_calibsize_32.pth") == (4, 4, 3)
    with pytest.raises(ValueError, match=r"deit_tiny.pth.*give w_bits and a_bits"):
        importers.bits_of_file("deit_tiny.pth")


def test_adalog_refuses_tables_of_another_base():
    state = published.adalog_model().state_dict()
    state[f"{BLOCK}.attn.matmul2.A_quantizer.table2"][3] += 0.1
    with pytest.raises(Unsupported, match=rf"{BLOCK}.attn.matmul2.A_quantizer.table2 is .* at 3, but q=25"):
        importers.adalog(state, 4, 4)


def test_adalog_refuses_bits_that_contradict_the_tables():
    with pytest.raises(Unsupported, match=rf"{BLOCK}.mlp.fc2.a_quantizer.table1 has 16 entries, but a_bits=3"):
        importers.adalog(published.adalog_model().state_dict(), 4, 3)


def test_adalog_names_every_missing_tensor():
    state = published.adalog_model().state_dict()
    optional = {"norm.weight", "norm.bias", "patch_embed.proj.a_quantizer.scale"}
    for key in state.keys() - {name for name in state if name.endswith(".bias") and "norm" not in name} - optional:
        with pytest.raises(Unsupported, match="is missing") as refused:
            importers.adalog({name: t for name, t in state.items() if name != key}, 4, 4)
        assert key in str(refused.value)


# ---- blocks


def test_layers_that_were_not_quantized_are_missing_quantizers():
    state = published.adalog_model().state_dict()
    state = {key: t for key, t in state.items() if f"{BLOCK}.attn.proj." not in key or "quantizer" not in key}
    with pytest.raises(Unsupported, match=f"adalog: {BLOCK}.attn.proj.w_quantizer.scale is missing"):
        importers.adalog(state, 4, 4)
    with pytest.raises(Unsupported, match="repq_vit: no layer has a weight_quantizer"):
        importers.repq_vit(published.ptq4vit_model())


def test_a_block_with_a_missing_part():
    imported = importers.tinysam(published.tinysam_state())
    name = f"image_encoder.{BLOCK}"
    assert imported.blocks() == [name]
    with pytest.raises(Unsupported, match=f"{name}.norm1 is missing: no plain block of a ViT"):
        imported.block(name)


def test_a_block_says_what_attention_cannot_run():
    block = importers.repq_vit(published.repq_model()).block(BLOCK, num_heads=published.HEADS)
    with pytest.raises(Unsupported) as refused:
        block.plan()
    assert f"{BLOCK}.attn: " in str(refused.value) and "softmax outputs have" in str(refused.value)
    assert "replace_attention=True" in str(refused.value)


def test_a_block_becomes_a_plan():
    imported = importers.repq_vit(published.repq_model())
    assert imported.blocks() == [BLOCK]
    plan = imported.block(BLOCK, num_heads=published.HEADS).plan(replace_attention=True)
    assert torch.equal(plan.fc2.quantized().codes, imported.linears[f"{BLOCK}.mlp.fc2"].codes)
    assert block_output(plan, torch.randn(2, 7, published.C)).isfinite().all()


def test_a_codebook_input_is_no_linear_plan():
    imported = adalog(published.adalog_model())
    assert imported.block(BLOCK).num_heads == published.HEADS
    with pytest.raises(Unsupported, match=rf"{BLOCK}.mlp.fc2: its input has codes of a codebook"):
        imported.block(BLOCK).plan(replace_attention=True)


def test_heads_that_the_source_does_not_tell():
    imported = importers.repq_vit(published.repq_model())
    with pytest.raises(ValueError, match=f"{BLOCK} has no scale per head; give num_heads"):
        imported.block(BLOCK)
