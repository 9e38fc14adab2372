"""The Triton launcher quant_attention against its reference: codes bit for bit, sums within a derived bound."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from _problems import U32, assert_nearest_codes, padded, transposed
from _triton import DEVICE, kernel, random_codes, run, triton

from pyvit_accel.formats import log, softmax, tan, twin
from pyvit_accel.reference import quant_attention as reference

FORMATS = {
    **{f"linear mantissa {bits}": softmax.linear_mantissa(bits) for bits in (1, 2, 3)},
    **{f"log2 {bits}": softmax.log2(bits) for bits in (2, 3, 4, 5)},
    "linear mantissa 3, lse": softmax.linear_mantissa(3, "lse"),
    "log2 4, lse": softmax.log2(4, "lse"),
    "log2 5, lse": softmax.log2(5, "lse"),
    "log-sqrt2": softmax.of_codebook(log.log_sqrt2(4), "max"),
    "log-sqrt2, lse": softmax.of_codebook(log.log_sqrt2(4, scale=0.7)),
    "adalog": softmax.of_codebook(log.adalog(4, q=30), "max"),
    "adalog, lse": softmax.of_codebook(log.adalog(4, q=30)),
    "sulq": softmax.of_codebook(log.sulq(5, 1e-3, -9.9, 0.0), "max"),
    "sulq, lse": softmax.of_codebook(log.sulq(5, 1e-3, -9.9, 0.0)),
    "tan, lse": softmax.of_codebook(tan.tan(6, 1.2)),
    "twin": softmax.of_codebook(twin.softmax(4, 2.0**-4, released=False), "max"),
    "uniform, lse": softmax.of_codebook(twin.uniform(8, 1 / 255)),
}
BYTES = (None, None, 0.0, 0.0, 1.0, 0.0, "", "max", True)
NAMES = (
    "q", "k", "v", "q_scale", "k_scale", "v_scale", "softmax_scale", "bias", "key_bias", "grid_bias_h", "grid_bias_w",
    "out_scale", "p_values", "p_thresholds", "p_steps", "p_shift", "p_unit", "p_offset", "p_operand", "p_anchor",
    "p_normalize", "v_bits", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen", "emit_cls", "emit_lse", "emit_columns",
)  # fmt: skip
V_TYPES = {"int8": torch.int8, "int4": torch.int8, "e4m3": torch.float8_e4m3fn, "fp16": torch.float16} | {
    "bf16": torch.bfloat16, "fp32": torch.float32
}  # fmt: skip


@contextmanager
def small_tiles(capability=(9, 0), BLOCK_M=16, BLOCK_N=None):
    """Few queries a program, so that the interpreter is fast. It misreads e5m2 below 2^-14 in dots: repaired here."""
    from triton.runtime import interpreter

    module, convert = import_module("pyvit_accel.kernels.quant_attention"), interpreter._convert_float
    blocks = module._blocks

    def smaller(*args):
        new = blocks(*args)
        return new | {"BLOCK_M": min(BLOCK_M, new["BLOCK_M"]), "BLOCK_N": BLOCK_N or new["BLOCK_N"]}

    def repaired(data, source, target, rounding):
        if source == triton.language.float8e5 and target == triton.language.float16:
            return data.view("uint8").astype("uint16") << 8
        return convert(data, source, target, rounding)

    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(interpreter, "_convert_float", repaired)
            patch.setattr(module, "_blocks", smaller)
            patch.setattr(module, "_capability", lambda q: capability)
        yield


def problem(form, B=1, H=2, Nq=5, Nk=37, D=32, v="int8", parts="", **changes):
    """Arguments by name. Parts: t scales per token, s v_scale per key, b bias, m mask, k key bias, g grid bias, o codes
    out, O per column, e everything that is emitted."""
    bits = 4 if v == "int4" else 8
    q, k = (random_codes(8, B, N, H, D).transpose(1, 2) for N in (Nq, Nk))
    codes = random_codes(bits, B, Nk, H, D).transpose(1, 2)
    values = codes if V_TYPES[v] == torch.int8 else torch.randn(B, H, Nk, D).to(V_TYPES[v])
    per_key = "s" in parts or form is None
    tokens = "t" in parts
    bias = torch.randn(1, H, Nq, Nk).expand(B, H, Nq, Nk) if "b" in parts else None
    if "m" in parts:
        hidden = torch.zeros(B, 1, Nq, Nk).masked_fill_(torch.rand(B, 1, Nq, Nk) > 0.6, -torch.inf)
        hidden[:, :, 1 % Nq] = -torch.inf
        bias = (hidden if bias is None else hidden + bias).expand(B, H, Nq, Nk)
    grid = [torch.randn(B, H, Nq, n) for n in (Nk // 4, 4)] if "g" in parts else (None, None)
    new = dict.fromkeys(NAMES) | {
        "q": q, "k": k, "v": values, "softmax_scale": D**-0.5,
        "q_scale": (torch.rand(B, H, Nq) * 0.02 if tokens else torch.rand(1) * 0.02).expand(B, H, Nq),
        "k_scale": (torch.rand(B, H, Nk) * 0.05 if tokens else torch.rand(H, 1) * 0.05).expand(B, H, Nk),
        "v_scale": torch.rand(B, H, Nk) + 0.01 if "s" in parts else (torch.rand(H, 1) + 0.1).expand(B, H, Nk),
        "bias": bias, "key_bias": torch.randn(1, Nk).expand(B, Nk) if "k" in parts else None,
        "grid_bias_h": grid[0], "grid_bias_w": grid[1],
        "out_scale": torch.rand(1) + 0.01 if "o" in parts else torch.rand(H * D) + 0.01 if "O" in parts else None,
        "v_bits": bits, "max_seqlen": Nq,
    }  # fmt: skip
    if not per_key:
        new["v_scale"] = new["v_scale"][..., :1]
    new |= dict(zip(NAMES[12:21], BYTES if form is None else FORMATS[form].arguments(), strict=True))
    return new | dict.fromkeys(NAMES[25:], "e" in parts) | changes


def error_of(new):
    """How far from the reference sums of float32 may lie, for out (B, Nq, H D), and for a total of P, relatively.

    Each of n products and sums rounds once, by u = 2^-24, and the scale a few times. Values that are not bytes are
    float16, and so is v with a scale per key, or of floats: half an ulp, and as much below 2^-14 of the largest. GPUs
    keep 13 bits of an fp8 sum of 128 keys.
    """
    n = new["k"].shape[2]
    if n == 0:
        return torch.zeros(()), 0.0
    plain = new | {"p_normalize": False, "p_unit": 1.0, "out_scale": None}
    ones = torch.ones_like(new["v"], dtype=torch.float32)
    total = reference(*(new | {"v": ones, "v_scale": new["v_scale"][..., :1] * 0 + 1, "p_normalize": False,
                               "p_unit": 1.0, "out_scale": None}).values())[0].double()  # fmt: skip
    largest = new["v"].float().abs().amax(dim=2, keepdim=True).expand_as(new["v"])
    spread, flat = (
        reference(*(plain | {"v": v}).values())[0].double() for v in (new["v"].float().abs(), largest * 2.0**-13)
    )
    weight = 1 / total.masked_fill(total <= 0, torch.inf) if new["p_normalize"] else new["p_unit"]
    relative = (2 * n + 16) * U32 + (2.0**-12 if DEVICE == "cuda" else 0)
    rounded_p = 2.0**-11 * (new["p_operand"] == "fp16")
    held = new["v"].dtype.itemsize == 1 and new["v_scale"].shape[2] == 1
    error = spread * (relative + rounded_p) + (0 if held else (spread + flat) * 2.0**-11)
    return error * weight, relative


def check(form, *, capability=(9, 0), BLOCK_N=None, **kwargs):
    """Every result of the launcher within its bound of the reference's; bytes, bit for bit."""
    torch.manual_seed(0)
    new = problem(form, **kwargs)
    with small_tiles(capability, BLOCK_N=BLOCK_N):
        out, cls, lse, columns = kernel("quant_attention", *new.values())
    truth = reference(*new.values())
    for result, expected in zip((out, cls, lse, columns), truth, strict=True):
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    n = new["k"].shape[2]
    if form is None:
        assert torch.equal(out, truth[0])
        relative = (2 * n + 16) * U32
    else:
        error, relative = error_of(new)
        if new["out_scale"] is None:
            assert ((out.double() - truth[0].double()).abs() <= error).all()
        else:
            value = reference(*(new | {"out_scale": None}).values())[0].double() / new["out_scale"].double()
            error = error / new["out_scale"].double() + 4 * U32 * value.abs().clamp_max(300)
            assert_nearest_codes(out, value, error)
    assert ((cls - truth[1]).abs() <= relative * truth[1]).all()
    assert torch.equal(lse == -torch.inf, truth[2] == -torch.inf)
    assert ((lse - truth[2]).abs().nan_to_num() <= relative + 16 * U32 * (truth[2].abs() + 100)).all()
    rows = new["q"].shape[2]
    assert ((columns - truth[3]).abs() <= (relative + rows * U32) * truth[3].abs() + rows * 2.0**-40).all()


def checked(form, **kwargs):
    run(partial(check, form, **kwargs))


# ---- codes


def check_identity(form, keys, capability, BLOCK_N, whole=False):
    """v = I, or some of its columns, divided by nothing: what comes out is P, in float16 as that holds it."""
    torch.manual_seed(0)
    for Nk, parts in keys:
        D, picked = 64, torch.arange(Nk)
        if Nk > D and not whole:
            picked = torch.cat([torch.randperm(Nk)[: D - 3], torch.tensor([0, Nk // 2, Nk - 1])])
        H = -(-len(picked) // D)
        v = F.pad(F.one_hot(picked, Nk).to(torch.int8), (0, 0, 0, H * D - len(picked))).reshape(H, D, Nk).mT[None]
        new = problem(form, Nq=2, Nk=Nk, D=D, H=1, parts=parts)
        new = {
            name: a.expand(1, H, -1, -1) if name in ("q", "k", "bias") and a is not None
            else a.expand(1, H, -1) if name in ("q_scale", "k_scale") else a
            for name, a in new.items()
        } | {"v": v, "v_scale": torch.ones(1, H, 1), "p_normalize": False, "p_unit": 1.0}  # fmt: skip
        held = {"p_values": new["p_values"]}
        if new["p_operand"] == "fp16":
            factor = 1 if new["p_values"].is_floating_point() else 2
            values = (new["p_values"] + new["p_offset"]) / factor
            held = {"p_values": values.half().float() * factor, "p_offset": 0.0}
        with small_tiles(capability, BLOCK_N=BLOCK_N or (256 if Nk > 256 else None)):
            out = kernel("quant_attention", *new.values())[0]
        truth = reference(*(new | held).values())[0]
        assert torch.equal(out, truth), f"{Nk} keys: {(out != truth).sum()} of {truth.numel()} differ"
        assert out.any() or not whole


LENGTHS = [(1, ""), (7, "b"), (196, ""), (197, "t"), (257, "m"), (577, ""), (1025, "bt")]


@pytest.mark.parametrize("form", FORMATS)
def test_identity_gives_the_values(form):
    run(check_identity, form, LENGTHS, (9, 0), None)


@pytest.mark.parametrize("form", ["linear mantissa 3", "log2 4, lse", "sulq"])
def test_whole_identity_gives_the_values(form):
    run(check_identity, form, [(197, "b"), (257, "")], (9, 0), None, True)


@pytest.mark.parametrize("form", ["linear mantissa 3", "log2 4, lse", "sulq"])
def test_identity_gives_the_values_of_4096_keys(form):
    run(check_identity, form, [(4096, "")], (9, 0), None)


@pytest.mark.parametrize("form", ["linear mantissa 2", "linear mantissa 3", "log2 4"])
def test_bytes_are_float16_before_sm_89(form):
    run(check_identity, form, [(197, ""), (300, "b")], (8, 0), 64)


# ---- sums


@pytest.mark.parametrize("form", FORMATS)
def test_within_bound_of_the_reference(form):
    checked(form, Nk=100, parts="etb")
    checked(form, Nk=300, parts="em", v="e4m3", capability=(8, 0))


@pytest.mark.parametrize("form", [None, "linear mantissa 3", "log2 5, lse", "sulq"])
@pytest.mark.parametrize("parts", ["b", "m", "k", "g", "bmkgts", "eo", "ekgO"])
def test_biases_masks_and_scales(form, parts):
    checked(form, B=2, Nk=44, parts=parts, BLOCK_N=32)


@pytest.mark.parametrize("D", [5, 32, 48, 64, 72, 80, 96, 128])
def test_every_head_dimension(D):
    for form in ("linear mantissa 3", "sulq", None):
        checked(form, D=D, Nk=70, parts="eb")


@pytest.mark.parametrize("v", V_TYPES)
@pytest.mark.parametrize("form", ["linear mantissa 3", "log2 4", "tan, lse"])
def test_every_type_of_v(form, v):
    for parts in ("", "s"):
        checked(form, Nk=150, v=v, parts=parts)


@pytest.mark.parametrize(("Nq", "Nk"), [(1, 1), (1, 50), (33, 3), (17, 33), (40, 65)])
@pytest.mark.parametrize("form", [None, "linear mantissa 3", "log2 4, lse"])
def test_lengths(form, Nq, Nk):
    checked(form, Nq=Nq, Nk=Nk, parts="e", BLOCK_N=32)


@pytest.mark.parametrize("form", [None, "linear mantissa 3", "log2 5"])
@pytest.mark.parametrize(("B", "Nq", "Nk"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(form, B, Nq, Nk):
    checked(form, B=B, Nq=Nq, Nk=Nk, parts="e")
    checked(form, B=B, Nq=Nq, Nk=Nk, parts="eo")


def check_packed(form, parts):
    ends = {"cu_seqlens_q": [0, 5, 5, 38, 40], "cu_seqlens_k": [0, 17, 20, 20, 100]}
    cu = {name: torch.tensor(at, dtype=torch.int32) for name, at in ends.items()}
    check(form, Nq=40, Nk=100, parts=parts, BLOCK_N=32, **cu, max_seqlen=33)


@pytest.mark.parametrize("form", [None, "linear mantissa 3", "log2 5, lse", "sulq"])
@pytest.mark.parametrize("parts", ["e", "tsko"])
def test_packed_sequences(form, parts):
    run(check_packed, form, parts)


# ---- memory


def check_layouts(form):
    torch.manual_seed(0)
    new = problem(form, Nk=40, parts="b")
    with small_tiles():
        results = []
        for layout in (lambda t: t, padded, transposed, lambda t: t.contiguous()):
            moved = {name: layout(new[name]) for name in ("q", "k", "v", "bias")}
            results.append(kernel("quant_attention", *(new | moved).values())[0])
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("form", [None, "linear mantissa 3", "sulq"])
def test_layouts(form):
    run(check_layouts, form)


def check_transposed_v():
    torch.manual_seed(0)
    values = import_module("pyvit_accel.kernels._values")
    e4m3 = torch.float8_e4m3fn
    new = problem("linear mantissa 3", Nk=48, v="e4m3")
    v = new["v"].mT.contiguous().mT
    ready, _ = values.prepare(v, new["v_scale"], 8, e4m3, None)
    copied, _ = values.prepare(new["v"], new["v_scale"], 8, e4m3, None)
    assert ready.data_ptr() == v.data_ptr() and copied.data_ptr() != new["v"].data_ptr()
    assert torch.equal(ready.view(torch.int8), copied.view(torch.int8))
    for Nk in (47, 40):  # rows that do not fill 16 bytes
        assert values.prepare(v[:, :, :Nk], new["v_scale"], 8, e4m3, None)[0].data_ptr() != v.data_ptr()


@pytest.mark.skipif(DEVICE == "cuda", reason="reads the addresses of CPU tensors")
def test_transposed_v_is_not_copied():
    run(check_transposed_v)


def check_planes():
    """Two planes of e4m3 add up to any int8, one holds five bits; every e4m3 value is a float16."""
    values = import_module("pyvit_accel.kernels._values")
    v, one = torch.arange(-128, 128).to(torch.int8).reshape(1, 1, 32, 8), torch.ones(1, 1, 1)
    for bits, planes in ((8, 2), (6, 2), (5, 1), (4, 1)):
        codes = v >> (8 - bits)
        got, _ = values.prepare(codes.to(DEVICE), one.to(DEVICE), bits, torch.float8_e4m3fn, None)
        assert got.shape == (1, 1, planes, 8, 32)
        assert torch.equal(got.float().sum(dim=2).mT.cpu(), codes.float())
    floats = v.view(torch.float8_e4m3fn)
    got, _ = values.prepare(floats.to(DEVICE), one.to(DEVICE), 8, torch.float16, None)
    assert torch.equal(got[:, :, 0].mT.float().cpu().nan_to_num(1e3), floats.float().nan_to_num(1e3))


def test_planes_hold_v():
    run(check_planes)


def test_head_dimensions_in_two_parts_where_that_is_less():
    dims = (5, 32, 33, 48, 64, 72, 80, 96, 97, 128, 160)
    expected = (32, 0), (32, 0), (64, 0), (64, 0), (64, 0), (64, 32), (64, 32), (64, 32), (128, 0), (128, 0), (128, 32)
    parts = import_module("pyvit_accel.kernels.quant_attention")._parts
    assert tuple(parts(D) for D in dims) == expected
