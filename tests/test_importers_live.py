"""Importers of RepQ-ViT, I&S-ViT, PTQ4ViT and TinySAM: their softmax and GELU codes, zero points, what they refuse."""

from __future__ import annotations

import _published as published
import pytest
import torch
from _problems import U32
from _published import BLOCK, LINEARS
from torch.nn import functional as F

from pyvit_accel.calibrate import importers
from pyvit_accel.errors import Unsupported

# ---- RepQ-ViT and I&S-ViT


@pytest.mark.parametrize("layer, norm", [("attn.qkv", "norm1"), ("mlp.fc1", "norm2")])
def test_repq_zero_points_become_integers(layer, norm):
    """The norm's output moves by less than half a step, codes with it, and the float product stays what it was."""
    model = published.repq_model()
    imported, source = importers.repq_vit(model), model.blocks[0].get_submodule(layer)
    linear, q = imported.linears[f"{BLOCK}.{layer}"], source.input_quantizer
    x = torch.randn(20, published.C, dtype=torch.float64)
    before = model.blocks[0].get_submodule(norm)
    weight, bias = (t.double() for t in imported.norms[f"{BLOCK}.{norm}"])
    old = F.layer_norm(x, (published.C,), before.weight.detach().double(), before.bias.detach().double())
    new = F.layer_norm(x, (published.C,), weight, bias)
    assert linear.plan().x_zero_point == int(q.zero_point.round()) - 8
    # What is rounded before the zero point is added differs by an integer: y' / s + z stays the same.
    difference = (new - old) / q.delta.double() - (q.zero_point - q.zero_point.round()).double()
    assert (difference.abs() <= 1e-4).all()
    w = source.weight.detach().double()
    expected = F.linear(old, w, source.bias.detach().double())
    assert (F.linear(new, w, linear.bias.double()) - expected).abs().max() < 1e-5
    assert f"{BLOCK}.{layer}: its zero point was rounded, and {BLOCK}.{norm} and the bias moved along" in imported.notes


def test_repq_softmax_outputs():
    softmax = importers.repq_vit(published.repq_model()).matmuls[f"{BLOCK}.attn.matmul2"].a
    p = torch.randn(40, 30).softmax(-1)
    truth = published.fake_log_sqrt2(p.double(), 4, float(torch.tensor(0.9)))
    assert ((softmax.dequantize(softmax.quantize(p)).double() - truth).abs() <= 2 * U32 * truth).all()


def test_is_vit_softmax_outputs():
    model = published.is_vit_model()
    imported = importers.is_vit(model)
    source, softmax = model.blocks[0].attn.matmul2.quantizer_A, imported.matmuls[f"{BLOCK}.attn.matmul2"].a
    p = torch.randn(40, 30).softmax(-1)
    truth = published.fake_sulq(p.double(), 4, *(float(t) for t in (source.delta, source.minv, source.maxv)))
    assert ((softmax.dequantize(softmax.quantize(p)).double() - truth).abs() <= 4 * U32).all()
    assert imported.linears["patch_embed.proj"].x is None
    assert "patch_embed.proj: the source does not quantize its input" in imported.notes


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: delattr(b.attn.matmul2.quantizer_A, "maxv"), "attn.matmul2.quantizer_A.maxv is missing"),
        (lambda b: setattr(b.mlp.fc2.input_quantizer, "delta", None), "mlp.fc2.input_quantizer.delta is None"),
        (lambda b: setattr(b.attn.qkv.weight_quantizer, "inited", False), "attn.qkv.weight_quantizer.inited is False"),
        (lambda b: delattr(b.attn.proj, "input_quantizer"), "attn.proj.input_quantizer.inited is missing"),
        (
            lambda b: setattr(b.attn.qkv.input_quantizer, "delta", torch.ones(1, 1, published.C)),
            "attn.qkv.input_quantizer.delta has 24 values: the scales per channel are not folded yet",
        ),
        (
            lambda b: setattr(b.mlp.fc2.input_quantizer, "zero_point", torch.tensor(7.25)),
            "mlp.fc2.input_quantizer.zero_point is 7.25 at 0; a zero point here must be an integer",
        ),
        (
            lambda b: b.mlp.fc1.weight_quantizer.delta[3].fill_(-1.0),
            "mlp.fc1.weight_quantizer.delta is -1.0 at 3; every scale must be positive",
        ),
        (lambda b: b.attn.proj.weight.data[0, 0].fill_(torch.nan), "attn.proj.weight holds 1 NaN or infinite values"),
        (
            lambda b: setattr(b.attn.proj.weight_quantizer, "n_bits", 32),
            "attn.proj.weight_quantizer.n_bits is 32; this importer reads 2 to 8 bits",
        ),
    ],
)
def test_live_models_are_refused_with_the_name(change, message):
    model = published.is_vit_model()
    change(model.blocks[0])
    with pytest.raises(Unsupported) as refused:
        importers.is_vit(model)
    assert str(refused.value).startswith(f"is_vit: {BLOCK}.{message}")


def test_weights_that_8_bits_cannot_hold_are_refused():
    model = published.repq_model(bits=8)
    model.head.weight_quantizer.zero_point.fill_(200)
    model.head.weight_quantizer.delta.fill_(1e-4)
    with pytest.raises(Unsupported, match=r"head.weight gives 8-bit codes -200 to 55 once its zero point"):
        importers.repq_vit(model)


def test_a_state_dict_is_no_live_model():
    with pytest.raises(TypeError, match="repq_vit: expected the calibrated model, got OrderedDict"):
        importers.repq_vit(published.repq_model().state_dict())


# ---- PTQ4ViT and TinySAM


@pytest.mark.parametrize("bits, listed", [(8, False), (6, True)])
def test_ptq4vit_twin_codes(bits, listed):
    model = published.ptq4vit_model(bits, listed)
    imported = importers.ptq4vit(model)
    gelu, softmax = imported.linears[f"{BLOCK}.mlp.fc2"].x, imported.matmuls[f"{BLOCK}.attn.matmul2"].a
    interval = model.blocks[0].mlp.fc2.a_interval
    x = F.gelu(torch.randn(40, 30))
    truth = published.fake_twin_gelu(x.double(), bits, float(interval[0] if listed else interval))
    assert ((gelu.dequantize(gelu.quantize(x)).double() - truth).abs() <= 4 * U32 * truth.abs()).all()
    p = torch.cat([torch.randn(40, 30).softmax(-1), torch.eye(30)])
    truth = published.fake_twin_softmax(p.double(), bits, 2.0**-4)
    assert ((softmax.dequantize(softmax.quantize(p)).double() - truth).abs() <= 4 * U32 * truth).all()
    assert truth.max() > 1  # the released formula counts the split twice


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: setattr(b.attn.qkv, "w_interval", torch.ones(3, 1, 2, 1)), "attn.qkv.w_interval has n_H=2 scales"),
        (lambda b: setattr(b.attn.proj, "w_interval", torch.ones(7, 1, 1, 1)), "attn.proj.w_interval has 7 values for"),
        (lambda b: setattr(b.attn.proj, "a_interval", torch.ones(2, 1)), "attn.proj.a_interval has shape (2, 1)"),
        (
            lambda b: setattr(b.attn.matmul1, "A_interval", torch.ones(1, 3, 1, 2, 1, 1, 1)),
            "attn.matmul1.A_interval has shape (1, 3, 1, 2, 1, 1, 1): scales within a head",
        ),
        (lambda b: setattr(b.attn.matmul2, "A_interval", torch.tensor(0.5)), "attn.matmul2.A_interval is 0.5, but"),
        (lambda b: setattr(b.mlp.fc2, "a_neg_interval", -0.5), "mlp.fc2.a_neg_interval is -0.5 at 0; every scale"),
        (lambda b: setattr(b.attn.matmul2, "split", torch.tensor(0.3)), "attn.matmul2.A_interval is 0.0"),
    ],
)
def test_ptq4vit_is_refused_with_the_name(change, message):
    model = published.ptq4vit_model()
    change(model.blocks[0])
    with pytest.raises(Unsupported) as refused:
        importers.ptq4vit(model)
    assert str(refused.value).startswith(f"ptq4vit: {BLOCK}.{message}")


def test_ptq4vit_split_must_be_a_power_of_two():
    """0.01 is what its search starts from."""
    model = published.ptq4vit_model()
    matmul = model.blocks[0].attn.matmul2
    matmul.split, matmul.A_interval = 0.01, 0.01 / 127
    with pytest.raises(Unsupported, match=rf"{BLOCK}.attn.matmul2.split holds no such format: .*split=0.0"):
        importers.ptq4vit(model)


def test_tinysam_buffers():
    state = published.tinysam_state()
    imported = importers.tinysam(state)
    assert set(imported.linears) == {f"image_encoder.{name}" for name in LINEARS[1:]}
    assert "image_encoder.patch_embed.proj: a convolution with an offset, not imported" in imported.notes
    assert imported.linears[f"image_encoder.{BLOCK}.mlp.fc2"].x.bits == 8
    key = f"image_encoder.{BLOCK}.attn.matmul1.A_interval"
    del state[key]
    with pytest.raises(Unsupported, match=f"tinysam: {key} is missing"):
        importers.tinysam(state)


def test_ptq4vit_buffers_need_their_bits():
    state = {name.removeprefix("image_encoder."): t for name, t in published.tinysam_state().items()}
    with pytest.raises(Unsupported, match=r"attn.qkv.w_bit is missing, as in any state_dict; give w_bits and a_bits"):
        importers.ptq4vit(state)
    assert importers.ptq4vit(state, 8, 8).linears["head"].w_bits == 8
