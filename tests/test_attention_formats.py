"""quant_attention with the formats of formats/softmax.py: codes and integer sums bit for bit, float sums within a bound."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from _problems import U32, assert_same_bits, codes, padded, reference, transposed
from test_quant_attention import SHAPES, VARIANTS, problem

from pyvit_accel import ops
from pyvit_accel.formats import log, softmax, tan, twin

CODEBOOKS = {
    "log_sqrt2": log.log_sqrt2(4, 0.9),
    "adalog 3": log.adalog(3, 25),
    "adalog 4": log.adalog(4, 100),
    "adalog 6": log.adalog(6, 20),
    "sulq": log.sulq(4, 0.01, -6.64, 0.0144),
    "tan": tan.tan(4, 1.4, two_sided=True),
    "twin": twin.softmax(6, 2.0**-4, released=False),
    "uniform 8": twin.uniform(8, 1 / 255),
    "lis": log.log2(4, rounding="lis"),
}
NAMES = [
    *(f"mantissa {bits} {anchor}" for bits in range(4) for anchor in softmax.ANCHORS),
    *(f"log2 {bits} {anchor}" for bits in range(2, 6) for anchor in softmax.ANCHORS),
    *(f"{name} {anchor}" for name in CODEBOOKS for anchor in softmax.ANCHORS),
]
FEW = ["mantissa 3 max", "log2 3 max", "log2 4 lse", "adalog 3 max", "sulq max", "uniform 8 lse"]


@cache
def form(name: str) -> softmax.SoftmaxFormat:
    family, anchor = name.rsplit(" ", 1)
    if family in CODEBOOKS:
        return softmax.of_codebook(CODEBOOKS[family], anchor)
    kind, bits = family.split()
    return {"mantissa": softmax.linear_mantissa, "log2": softmax.log2}[kind](int(bits), anchor)


def tensor_scales(args):
    """The same problem with one scale of v a head, as integer sums have it."""
    q, k, v, q_scale, k_scale, v_scale, scale = args
    return q, k, v, q_scale, k_scale, v_scale[:1, :, :1] if v_scale.dim() == 3 else v_scale, scale


def floats_bound(args, kwargs, out):
    """Error of out from sums in float32 of exact codes: |P| |v| of each output times the roundings on the way.

    Each of Nk products and additions rounds once, the sum of P as well; a value of v times its scale twice.
    """
    q, k, v, q_scale, k_scale, v_scale, scale = args
    sizes = v.double().abs().to(torch.float32)
    kwargs = {name: value for name, value in kwargs.items() if name != "out_scale"}
    weighed = reference(ops.quant_attention, q, k, sizes, q_scale, k_scale, v_scale.abs(), scale, **kwargs)
    p = kwargs["softmax"]
    # Values may be slightly negative (SULQ): their sizes are at most the sum of p and twice the offset of every key.
    extra = 2 * abs(p.offset) * p.unit * k.shape[2] * (v.double().abs().max() * v_scale.max()).item() if p.offset else 0.0
    return (2 * k.shape[2] + 8) * U32 * (weighed.double().abs() + extra) + 1e-30


def assert_equals_reference(kernel, args, kwargs):
    expected = reference(ops.quant_attention, *args, **kwargs)
    actual = kernel(ops.quant_attention, *args, **kwargs)
    p, v, v_scale = kwargs["softmax"], args[2], args[5]
    exact = not p.values.is_floating_point() and v.dtype == torch.int8 and (v_scale.dim() == 0 or v_scale.shape[-1] == 1)
    if exact:
        assert_same_bits(actual, expected)
    elif kwargs.get("out_scale") is not None:
        assert ((actual.int() - expected.int()).abs() <= 1).all()
    else:
        error = (actual.double() - expected.double()).abs()
        assert (error <= floats_bound(args, kwargs, expected)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_reference(kernel, name, variant):
    args, kwargs = problem(2, 2, 26, 64, 64, variant)
    assert_equals_reference(kernel, tensor_scales(args), kwargs | {"softmax": form(name)})


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference_in_every_shape(kernel, name, shape):
    args, kwargs = problem(*shape, "everything")
    for out_scale in (None, torch.tensor([0.5]), torch.rand(shape[1] * shape[4]) + 0.1):
        assert_equals_reference(kernel, tensor_scales(args), kwargs | {"softmax": form(name), "out_scale": out_scale})
