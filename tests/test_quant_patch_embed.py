"""quant_patch_embed: raw pixels to embeddings, against the reference and against a convolution in float64."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from _problems import U32, assert_same_bits, reference, transposed, weights

from pyvit_accel import ops
from pyvit_accel.formats import affine, packed

SHAPES = [  # B, C, H, W, patch size, N
    (1, 3, 8, 8, 8, 16), (2, 3, 32, 48, 8, 20), (1, 1, 5, 15, 5, 3), (3, 2, 28, 14, 14, 33), (1, 3, 64, 64, 16, 40),
]


def images_of(kind, *shape):
    if kind == "random":
        return torch.randint(0, 256, shape, dtype=torch.uint8)
    return torch.full(shape, {"black": 0, "white": 255}[kind], dtype=torch.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["random", "black", "white"])
def test_equals_reference(kernel, shape, kind):
    B, C, H, W, p, N = shape
    images = images_of(kind, B, C, H, W)
    _, w_packed, w_scale = weights(N, C * p * p)
    for bias in (torch.randn(N), torch.randn(H // p * (W // p), N)):
        args = w_packed, w_scale, bias, p
        assert_same_bits(kernel(ops.quant_patch_embed, images, *args), reference(ops.quant_patch_embed, images, *args))


def layouts(images):
    """The same pixels: channels last, transposed, between other pixels."""
    wide = torch.zeros(*images.shape[:3], images.shape[3] + 5, dtype=torch.uint8)
    wide[..., 2:-3] = images
    yield images.contiguous(memory_format=torch.channels_last)
    yield transposed(images)
    yield wide[..., 2:-3]


def test_equals_reference_in_every_memory_format(kernel):
    images = images_of("random", 2, 3, 16, 24)
    args = *weights(20, 3 * 64)[1:], torch.randn(2 * 6, 20)[::2], 8
    expected = reference(ops.quant_patch_embed, images, *args)
    for same in layouts(images):
        assert_same_bits(kernel(ops.quant_patch_embed, same, *args), expected)
    repeated = kernel(ops.quant_patch_embed, images[:1].expand(2, -1, -1, -1), *args)
    assert_same_bits(repeated, expected[:1].expand(2, -1, -1))


def test_decodes_weights_exactly(impl):
    """One white pixel in each image: 255 times one decoded weight of every feature."""
    w, w_packed, _ = weights(18, 2 * 9)
    images = (torch.eye(18) * 255).to(torch.uint8).reshape(18, 2, 3, 3)
    y = impl(ops.quant_patch_embed, images, w_packed, torch.ones(18), torch.zeros(18), 3)
    assert_same_bits(y[:, 0], w.T.float() * 255)


@pytest.mark.parametrize("per_patch", [False, True])
def test_equals_normalised_convolution(impl, per_patch):
    """The fold is exact: only the accumulator, the scale, the folded bias and the sum round, once each."""
    B, C, H, W, p, N = 2, 3, 32, 48, 8, 20
    images = images_of("random", B, C, H, W)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()
    s, t = (1 / (255 * std))[:, None, None], (-mean / std)[:, None, None]
    q, w_scale = affine.quantize_weight((torch.randn(N, C, p, p) * s).reshape(N, -1))
    weight = (q.double() * w_scale.double()[:, None]).reshape(N, C, p, p) / s
    bias = torch.randn(H // p * (W // p), N).double() if per_patch else torch.randn(N).double()
    folded = bias + (weight * t).sum((1, 2, 3))

    normalised = (images.double() / 255 - mean[:, None, None]) / std[:, None, None]
    truth = F.conv2d(normalised, weight, stride=p).flatten(2).mT + bias
    error = U32 * (2.01 * (truth - folded).abs() + 1.01 * folded.abs() + 1.01 * truth.abs())
    actual = impl(ops.quant_patch_embed, images, packed.pack(q), w_scale, folded.float(), p)
    assert ((actual.double() - truth).abs() <= error).all()


def test_empty(impl):
    _, w_packed, w_scale = weights(20, 48)
    images = torch.empty(0, 3, 8, 12, dtype=torch.uint8)
    assert impl(ops.quant_patch_embed, images, w_packed, w_scale, torch.zeros(20), 4).shape == (0, 6, 20)


def test_errors():
    images = images_of("random", 1, 3, 8, 12)
    _, w_packed, w_scale = weights(20, 48)
    bias = torch.zeros(20)

    def message(text):
        return "^" + re.escape(text) + "$"

    with pytest.raises(TypeError, match=message("quant_patch_embed: images must be uint8 pixels, got torch.float32")):
        ops.quant_patch_embed(images.float(), w_packed, w_scale, bias, 4)
    text = "quant_patch_embed: images must be (B, C, H, W) with sides that are multiples of {}, got {}"
    for wrong, p in ((images[0], 4), (images[:, :, :6], 4), (images[..., :6], 4), (images, 5)):
        with pytest.raises(ValueError, match=message(text.format(p, tuple(wrong.shape)))):
            ops.quant_patch_embed(wrong, w_packed, w_scale, bias, p)
    text = "quant_patch_embed: x has K=16 and w_scale N=20, but w_packed of N=20, K=16 has shape (2, 192) for 2 bits"
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        ops.quant_patch_embed(images[:, :1], w_packed, w_scale, bias, 4)
    for wrong in (bias[:1], torch.zeros(5, 20)):
        text = f"quant_patch_embed: bias is {tuple(wrong.shape)}; use (20,) or (6, 20)"
        with pytest.raises(ValueError, match=message(text)):
            ops.quant_patch_embed(images, w_packed, w_scale, wrong, 4)
