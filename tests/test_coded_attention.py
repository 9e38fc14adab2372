"""CodedAttention: published codes of q, k, v and the probabilities, in the integer kernel."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from _published import BLOCK, HEADS, C
from test_imported import METHODS, calibrated, float_vit, simulated, weighted

from pyvit_accel import Unsupported, accelerate
from pyvit_accel.formats import affine, log
from pyvit_accel.formats.twin import uniform
from pyvit_accel.imported import imported
from pyvit_accel.modules import CodedAttention, QuantLinear

N = 17


def spied(attention):
    """What its projection is given."""
    seen, quantize = [], attention.proj.quantize
    attention.proj.quantize = lambda x: seen.append(x) or quantize(x)
    return seen


def made(record, zero_points=(0, 0, 0), softmax=None):
    """The attention of the record's block, with other zero points of q, k and v: each of a head is another."""
    block = record.block(BLOCK, HEADS)
    linears = QuantLinear.from_plan(block.qkv.plan()), QuantLinear.from_plan(block.proj.plan())
    spread = torch.arange(HEADS)
    heads = [
        (t.scale, (z - spread * (z > 0) + spread * (z < 0)), t.bits)
        for t, z in zip((block.q, block.k, block.v), zero_points, strict=True)
    ]
    return CodedAttention.from_formats(*linears, HEADS, block.softmax_scale, heads, softmax or block.softmax), block


@torch.inference_mode()
@pytest.mark.parametrize("method", METHODS)
def test_is_what_the_paper_simulates(method):
    """But for probabilities beside the border of two codes."""
    source, record = calibrated(method)
    attention = accelerate(float_vit(), imported(record, "published"))[0].blocks[0].attn
    exact, x, seen = simulated(method, source, True).blocks[0].attn, torch.randn(64, N, C), spied(attention)
    exact(x.double())
    attention(x)
    error = (seen[0] - exact.heads).abs()
    assert (error <= exact.bound).all()
    assert (exact.unsure > 0).double().mean() < (2e-3 if method != "ptq4vit" else 0.05)  # which has 8 bits


@torch.inference_mode()
@pytest.mark.parametrize("zero_points", [(0, 0, 0), (90, -60, 30), (5, 0, -120), (-5, 120, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_zero_points_of_8_bits(zero_points, masked):
    """Codes less a zero point that are no int8: a bias and float16 stand for it."""
    attention, block = made(calibrated("ptq4vit")[1], zero_points)
    assert attention.factors == tuple(int(z == 0) for z in zero_points)
    x, bias, seen = torch.randn(4, N, C), torch.randn(4, 1, N, N), spied(attention)
    qkv = attention.qkv.matmul(*attention.qkv.quantize(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    scales, zeros = (t[..., None] for t in (attention.head_scale, attention.head_zero_point))
    q, k, v = (
        affine.dequantize(affine.quantize(t, scale, zero), scale.double(), zero)
        for t, scale, zero in zip(qkv, scales, zeros, strict=True)
    )
    s = q @ k.mT * attention.scale + (bias if masked else 0)
    heads, unsure, bound = weighted(s, v, lambda p: block.softmax.dequantize(block.softmax.quantize(p)).double())
    attention(x, bias if masked else None)
    assert ((seen[0] - heads).abs() <= bound).all()
    assert (unsure > 0).double().mean() < 0.05


@torch.inference_mode()
def test_state_and_copies():
    attention, _ = made(calibrated("repq_vit")[1], (3, -4, 2))
    assert attention.factors == (8, 8, 1)  # q and k: 4 bits less a zero point, -15 .. 15
    again = CodedAttention.from_config(attention.config())
    again.load_state_dict(attention.state_dict())
    x = torch.randn(2, N, C)
    assert torch.equal(again(x), attention(x)) and again.config() == attention.config()
    assert torch.equal(copy.deepcopy(attention)(x), attention(x))
    assert set(attention.state_dict()) >= {"head_scale", "head_zero_point"}
    assert "log-sqrt2" in repr(attention)


def test_refuses_formats_without_a_kernel():
    _, record = calibrated("repq_vit")
    per_head = replace(uniform(4, 1 / 15), scale=torch.ones(HEADS))
    for softmax, reason in ((log.log2(4, zero="none"), "zero='none'"), (per_head, "one codebook for all heads")):
        with pytest.raises(Unsupported, match=f"softmax outputs: .*{reason}"):
            made(record, softmax=softmax)
