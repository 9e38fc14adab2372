"""quant_attention in the formats of formats/softmax.py: codes and integer sums bit for bit, floats within a bound."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from _problems import U32, assert_same_bits, padded, reference
from test_quant_attention import SHAPES, VARIANTS, problem

from pyvit_accel import backends, ops
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
    sizes = v.float().abs()
    kwargs = {name: value for name, value in kwargs.items() if name != "out_scale"}
    weighed = reference(ops.quant_attention, q, k, sizes, q_scale, k_scale, v_scale.abs(), scale, **kwargs)
    p = kwargs["softmax"]
    # Values may be slightly negative (SULQ): their sizes are at most the sum of p and twice the offset of every key.
    extra = 2 * abs(p.offset) * p.unit * k.shape[2] * (sizes.max() * v_scale.max()).item()
    return (2 * k.shape[2] + 8) * U32 * (weighed.double().abs() + extra) + 1e-30


def assert_equals_reference(kernel, args, kwargs):
    expected = reference(ops.quant_attention, *args, **kwargs)
    actual = kernel(ops.quant_attention, *args, **kwargs)
    p, v, v_scale = kwargs["softmax"], args[2], args[5]
    one_a_head = v_scale.dim() == 0 or v_scale.shape[-1] == 1
    if not p.values.is_floating_point() and v.dtype == torch.int8 and one_a_head:
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


def probabilities(impl, p, args, **kwargs):
    """P (B, H, Nq, Nk) of a format in its units, exactly: v is the identity, D keys at a time; nothing is divided."""
    q, k, _, q_scale, k_scale, _, scale = args
    (B, H, Nq, D), Nk = q.shape, k.shape[2]
    p = replace(p, normalize=False, unit=1.0)
    found = []
    for start in range(0, Nk, D):
        v = torch.eye(D, dtype=torch.int8)[torch.arange(Nk).sub(start).clamp(0, D - 1)]
        v[:start] = v[start + D :] = 0
        one = torch.ones(1)
        y = impl(ops.quant_attention, q, k, v.expand(B, H, Nk, D), q_scale, k_scale, one, scale, softmax=p, **kwargs)
        found.append(y.view(B, Nq, H, D).transpose(1, 2)[..., : Nk - start])
    return torch.cat(found, dim=-1)


KEYS = [1, 7, 196, 197, 257, 577, 1025, 4096]


@cache  # scores with a deviation of 3
def identity_problem(Nk):
    torch.manual_seed(Nk)
    args, _ = problem(1, 1, 2, Nk, 512)
    return (*args[:3], torch.tensor([0.0235]), torch.tensor([0.0235]), *args[5:])


@cache
def expected_probabilities(name, Nk):
    return probabilities(reference, form(name), identity_problem(Nk))


@pytest.mark.parametrize(("name", "Nk"), [(name, Nk) for Nk in KEYS for name in (NAMES if Nk < 1000 else FEW)])
def test_identity_values_give_the_levels(kernel, name, Nk):
    """Every probability is a level of its format, bit for bit the one of the reference."""
    p = probabilities(kernel, form(name), identity_problem(Nk))
    levels = torch.cat([(form(name).values + form(name).offset).float(), torch.zeros(1)])
    assert torch.isin(p, levels).all() and (Nk < 100 or p.unique().numel() > min(5, levels.numel() // 2))
    assert torch.equal(p, expected_probabilities(name, Nk))
    if name.endswith("max"):
        assert (p.amax(-1) == levels[0]).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("Nk", [197, *KEYS[-2:]])
def test_columns_of_one_query_are_its_probabilities(kernel, name, Nk):
    args = identity_problem(Nk)
    p = replace(form(name), normalize=False, unit=1.0)
    _, columns = kernel(ops.quant_attention, args[0][:, :, :1], *args[1:], softmax=p, emit=("columns",))
    expected = reference(ops.quant_attention, args[0][:, :, :1], *args[1:], softmax=p, emit=("columns",))[1]
    assert torch.equal(columns, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [8, 3])
def test_codes_are_those_of_the_format(impl, name, bits):
    """Against float64 scores: the format's own codes, or the next level where a score lies between two.

    Codes of few bits have large scales.
    """
    q, k, v, q_scale, k_scale, v_scale, scale = identity_problem(197)
    q, k, q_scale, k_scale = q >> (8 - bits), k >> (8 - bits), q_scale * 2 ** (8 - bits), k_scale * 2 ** (8 - bits)
    args = q, k, v, q_scale, k_scale, v_scale, scale
    x = (q.double() @ k.double().mT) * q_scale * k_scale * scale / torch.tensor(2.0).double().log()
    f = form(name)
    x = x - (x.exp2().sum(-1, keepdim=True).log2() if f.anchor == "lse" else x.amax(-1, keepdim=True))
    near = 1e-4 if f.anchor == "lse" or f.thresholds is not None else 1e-5
    low, high = (f.dequantize(f.codes((x + d).clamp_max(0))).float() / f.unit for d in (-near, near))
    p = probabilities(impl, f, args)
    slack = 1e-6 * p.abs() + 1e-9
    assert ((low <= p + slack) & (p <= high + slack)).all()


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_linear_mantissas_are_fp8_bytes(impl, bits):
    """P times a power of two survives the round trip through its fp8 type."""
    f = form(f"mantissa {bits} max")
    p = probabilities(impl, f, identity_problem(197)) * (1.0 / 32768 if f.operand == "e5m2" else 1.0 / 512)
    dtype = torch.float8_e5m2 if f.operand == "e5m2" else torch.float8_e4m3fn
    assert torch.equal(p.to(dtype).float(), p) and p.unique().numel() > 10 * bits


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float32])
def test_equals_reference_for_float_values(kernel, dtype):
    args, kwargs = problem(2, 3, 14, 45, 40, "everything")
    v = torch.randn(2, 3, 45, 40).to(dtype)
    for name in FEW:
        assert_equals_reference(kernel, (*args[:2], v, *args[3:]), kwargs | {"softmax": form(name)})


@pytest.mark.parametrize("name", FEW)
def test_equals_reference_for_a_scale_per_key(kernel, name):
    """Of v as well: then sums are floats."""
    args, kwargs = problem(2, 3, 14, 45, 40, "everything")
    assert_equals_reference(kernel, args, kwargs | {"softmax": form(name)})


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("kind", ["lowest", "highest", "zeros", "alternating"])
@pytest.mark.parametrize("Nk", [3, 513, 2000])
def test_equals_reference_on_extreme_codes(kernel, name, kind, Nk):
    args, _ = problem(1, 1, 2, Nk, 33, kind=kind)
    assert_equals_reference(kernel, args, {"softmax": form(name)})


@pytest.mark.parametrize("name", FEW)
def test_equals_reference_on_scores_of_every_size(kernel, name):
    """Biases up to 10^5 and scales that would take scores out of 16 bits: both have their limit, in every kernel."""
    args, kwargs = problem(2, 2, 9, 40, 16, "bias")
    for spread in (0.0, 1.0, 30.0, 3000.0, 1e5):
        assert_equals_reference(kernel, args, {"bias": kwargs["bias"] * spread, "softmax": form(name)})
    q, k, v, q_scale, k_scale, *rest = args
    for factor in (1e3, 1e6):
        for scales in ((q_scale, k_scale), (torch.rand(2, 2, 9) + 0.1, torch.rand(2, 2, 40) + 0.1)):
            assert_equals_reference(kernel, (q, k, v, scales[0] * factor, scales[1], *rest), {"softmax": form(name)})


def test_grid_bias_is_a_bias(impl):
    args, _ = problem(2, 2, 15, 24, 24)
    h, w = torch.randn(2, 2, 15, 4), torch.randn(2, 1, 15, 6)
    bias = (h[..., :, None] + w[..., None, :]).flatten(3)
    for p in (None, *map(form, FEW)):
        expected = impl(ops.quant_attention, *args, softmax=p, bias=bias)
        assert_same_bits(impl(ops.quant_attention, *args, softmax=p, grid_bias=(h, w)), expected)


@pytest.mark.parametrize("name", FEW)
def test_query_that_sees_no_key_gives_zeros(impl, name):
    args, _ = problem(2, 2, 15, 20, 24)
    mask = torch.rand(2, 2, 15, 20) > 0.5
    mask[:, :, 4] = False
    y, cls, lse, columns = impl(
        ops.quant_attention, *args, softmax=form(name), mask=mask & (torch.arange(15) > 0)[:, None],
        emit=("cls", "lse", "columns"),
    )  # fmt: skip
    assert not y[:, 4].any() and not y[:, 0].any() and not cls.any() and not y.isnan().any()
    assert (lse[:, :, [0, 4]] == -torch.inf).all() and lse[:, :, 1].isfinite().all() and columns.isfinite().all()


@pytest.mark.parametrize("name", FEW)
def test_masked_keys_have_no_influence(impl, name):
    args, _ = problem(2, 2, 15, 40, 24)
    q, k, v, *scales = args
    seen = torch.ones(40, dtype=torch.bool)
    seen[[3, 17, 39]] = False
    masked = impl(ops.quant_attention, *args, softmax=form(name), mask=seen.expand(2, 2, 15, 40))
    p, p_cut = (probabilities(impl, form(name), a, mask=m) for a, m in (
        ((q, k, v, *scales), seen.expand(2, 2, 15, 40)), ((q, k[:, :, seen], v[:, :, seen], *scales), None),
    ))  # fmt: skip
    assert torch.equal(p[..., seen], p_cut) and not p[..., ~seen].any()
    assert masked.isfinite().all()


@pytest.mark.parametrize("p", [None, *FEW])
def test_emits(impl, p):
    """The first query's probabilities and the log-sum-exp are those of float64; columns add up what keys got."""
    args, kwargs = problem(2, 3, 30, 41, 40, "everything")
    p = None if p is None else form(p)
    y, cls, lse, columns = impl(ops.quant_attention, *args, softmax=p, emit=("columns", "cls", "lse"), **kwargs)
    assert_same_bits(impl(ops.quant_attention, *args, softmax=p, **kwargs), y)
    q, k, _, q_scale, k_scale, _, scale = (t.double() if torch.is_tensor(t) else t for t in args)
    s = q @ k.mT * q_scale[..., None] * k_scale[:, :, None] * scale + kwargs["bias"] + kwargs["key_bias"][:, None, None]
    s = s.masked_fill(~kwargs["mask"], -torch.inf)
    assert torch.allclose(cls.double(), s[:, :, 0].softmax(-1).mean(1), rtol=2e-5, atol=1e-8)
    step = 0.0 if p is None else {"max": 0.3, "lse": 0.0}[p.anchor]  # nats: what rounded codes may add up to
    assert ((lse.double() - s.logsumexp(-1)).abs() <= 1e-3 + step).all()
    expected = reference(ops.quant_attention, *args, softmax=p, emit=("columns",), **kwargs)[1]
    assert torch.allclose(columns, expected, rtol=1e-4, atol=1e-6)
    if p is None or p.normalize:
        assert torch.allclose(columns.sum(-1), torch.full((2, 3), 30.0), rtol=1e-4)


@pytest.mark.parametrize("p", [None, *FEW])
def test_packed_sequences_are_themselves(impl, p):
    """Each as alone: outputs, and what is emitted; one is empty of keys, one of queries."""
    p = None if p is None else form(p)
    q_ends, k_ends = torch.tensor([[0, 5, 5, 30, 33], [0, 9, 15, 49, 49]], dtype=torch.int32)
    args, kwargs = problem(1, 2, 33, 49, 24, "everything")
    key_bias, out_scale = kwargs["key_bias"], torch.rand(48) * 0.1 + 0.01
    q, k, v, q_scale, k_scale, v_scale, scale = args
    for codes_out in (None, out_scale):
        results = impl(
            ops.quant_attention, *args, softmax=p, key_bias=key_bias, cu_seqlens=q_ends, cu_seqlens_k=k_ends,
            out_scale=codes_out, emit=("cls", "lse", "columns"),
        )  # fmt: skip
        for i in range(4):
            rows, keys = slice(*q_ends[i : i + 2].tolist()), slice(*k_ends[i : i + 2].tolist())
            own = impl(
                ops.quant_attention, q[:, :, rows], k[:, :, keys], v[:, :, keys], q_scale[..., rows],
                k_scale[..., keys], v_scale[..., keys], scale, softmax=p, key_bias=key_bias[:, keys],
                out_scale=codes_out, emit=("cls", "lse", "columns"),
            )  # fmt: skip
            parts = results[0][:, rows], results[1][:, keys], results[2][..., rows], results[3][..., keys]
            assert_same_bits(parts[:3], own[:3])
            assert torch.allclose(parts[3], own[3], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", FEW)
def test_layouts_and_empty(impl, name):
    args, _ = problem(2, 3, 14, 25, 20)
    expected = impl(ops.quant_attention, *args, softmax=form(name))
    same = [padded(t.contiguous()) for t in args[:3]]
    assert_same_bits(impl(ops.quant_attention, *same, *args[3:], softmax=form(name)), expected)
    for B, Nq, Nk in ((0, 5, 5), (2, 0, 5), (2, 5, 0)):
        args, _ = problem(B, 3, Nq, Nk, 8)
        assert not impl(ops.quant_attention, *args, softmax=form(name)).any()


def test_errors():
    args, _ = problem(1, 3, 9, 10, 8)

    def refuses(error, text, *args, **kwargs):
        with pytest.raises(error, match="^" + re.escape(text)):
            ops.quant_attention(*args, **kwargs)

    q, k, v, *rest = args
    refuses(TypeError, "quant_attention: q, k, v must be int8 codes", q, k, v.half(), *rest)
    refuses(ValueError, "quant_attention: v_bits=9; codes have 2 to 8 bits", *args, v_bits=9)
    refuses(ValueError, "quant_attention: emit ['rows'] is not of cls, lse, columns", *args, emit=("rows",))
    grid = torch.zeros(3), torch.zeros(4)
    refuses(ValueError, "quant_attention: grid_bias is of 3 x 4 keys, k has 10", *args, grid_bias=grid)
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    text = "quant_attention: cu_seqlens [0, 4, 10] must ascend from 0 to at most 9"
    refuses(ValueError, text, *args, cu_seqlens=torch.tensor([0, 4, 10], dtype=torch.int32))
    falling = torch.tensor([0, 12, 9], dtype=torch.int32)
    text = "quant_attention: cu_seqlens [0, 12, 9] must ascend from 0 to at most 9"
    refuses(ValueError, text, *args, cu_seqlens=falling, cu_seqlens_k=torch.tensor([0, 4, 10], dtype=torch.int32))
    refuses(TypeError, "quant_attention: cu_seqlens must be int32", *args, cu_seqlens=ends.long())
    text = "quant_attention: packed sequences need B=1, no bias and no mask; got B=1"
    refuses(ValueError, text, *args, cu_seqlens=ends, mask=torch.ones(10, dtype=torch.bool))
    refuses(ValueError, "quant_attention: cu_seqlens_k came without cu_seqlens", *args, cu_seqlens_k=ends)


MEMORY = """
import torch
from pyvit_accel import backends, ops
from pyvit_accel.formats import softmax
from pyvit_accel.measure import peak_mib
torch.set_num_threads(1)
N = {N}
q, k, v = torch.randint(-127, 128, (3, 1, 2, N, 64), dtype=torch.int8)
one, p = torch.ones(1) * 0.01, {p}
ops.quant_attention(q[:, :, :20], k[:, :, :20], v[:, :, :20], one, one, one, 0.1, softmax=p)
before = peak_mib()
ops.quant_attention(q, k, v, one, one, one, 0.1, softmax=p)
print(round(1024 * (peak_mib() - before)))
"""


@pytest.mark.parametrize("p", ["None", "softmax.linear_mantissa(3)", "softmax.linear_mantissa(3, 'lse')"])
def test_memory_grows_with_the_tokens(p):
    """KiB at 12288 tokens are at most four times those at 4096, where scores of one head alone would be 576 MiB."""
    if not backends.HAS_CPU_KERNELS:
        pytest.skip("the reference holds all scores")
    fresh = os.environ | {"MALLOC_MMAP_THRESHOLD_": "16384"}  # memory that was freed before is not given out again
    peak = {}
    for N in (4096, 12288):
        command = [sys.executable, "-c", MEMORY.format(N=N, p=p)]
        peak[N] = int(subprocess.run(command, capture_output=True, check=True, env=fresh).stdout)
    assert peak[12288] <= 4 * peak[4096] + 1024 and peak[12288] < 12 * 1024
