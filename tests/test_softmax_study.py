"""bench/softmax_formats.py: its attention against the formats and the op, its statistics, and a run on digits."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from pyvit_accel import backends, ops
from pyvit_accel.formats import log, twin
from pyvit_accel.formats.softmax import linear_mantissa, log2, of_codebook
from pyvit_accel.models import digits_data, digits_model

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import _softmax_study as study
import softmax_formats

FORMS = {
    form.label: form
    for form in (
        linear_mantissa(3), linear_mantissa(1, "lse"), log2(4), log2(3, "lse"), log2(4, "lse", normalize=True),
        of_codebook(log.log_sqrt2(4, 0.9)), of_codebook(log.adalog(4, 25), "max"),
        of_codebook(log.sulq(4, 0.01, -6.6, 0.015)), of_codebook(twin.softmax(6, 2.0**-4, released=False), "max"),
        of_codebook(twin.uniform(8, 1 / 255)),
    )
}  # fmt: skip
every = pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))


def exact_probabilities(s, form):
    """By the format's own codes, in float64."""
    s = s.double()
    m = s.amax(-1, keepdim=True)
    anchor = m if form.anchor == "max" else m + torch.exp2(s - m).sum(-1, keepdim=True).log2()
    p = form.dequantize(form.codes(s - anchor))
    return p / p.sum(-1, keepdim=True) if form.normalize else p


@every
def test_probabilities_are_the_format_s(form):
    """But where float32 and float64 see a tie differently: there by one code, in few places."""
    s = 4 * torch.randn(2, 3, 50, 65)
    found, expected = study.probabilities(s, form, "exact").double(), exact_probabilities(s, form)
    off = ~torch.isclose(found, expected, rtol=1e-5, atol=1e-12)
    rows = off.any(-1)
    assert rows.double().mean() < 0.02  # a tie is nearer than 2^-17 in one of 2^12 rows, and moves its row's sum
    if form.normalize:
        assert ((found.sum(-1) - 1).abs() < 1e-5).all()


@pytest.mark.parametrize("form", [f for f in FORMS.values() if f.offset == 0], ids=lambda f: f.label)
def test_attention_is_the_op_s(form):
    """The reference of quant_attention on the same integers: as told apart by float32 at few ties."""
    q, k, v = (torch.randint(-128, 128, (2, 3, 24, 32), dtype=torch.int8) for _ in range(3))
    scale = torch.tensor([0.02])
    with backends.use_reference():
        expected = ops.quant_attention(q, k, v, scale, scale, scale, 32**-0.5, softmax=form)
    s = study.scores(q.float() * 0.02, k.float() * 0.02, 32**-0.5)
    found = (study.probabilities(s, form) @ (v.float() * 0.02)).transpose(1, 2).flatten(2)
    same = torch.isclose(found, expected, rtol=1e-4, atol=1e-4).unflatten(-1, (3, 32)).all(-1)
    assert same.double().mean() > 0.98


def test_tops():
    """The three ways to take a maximum, on a score and a maximum of known fractions; log2 codes."""
    s, form = torch.tensor([[3.4, 2.6, 0.0, -1.3]]), log2(4)
    m = s.amax(-1, keepdim=True)
    assert study.codes(s, m, form, "step").tolist() == [[0, 0, 3, 4]]  # 3 - (3, 3, 0, -1)
    assert study.codes(s, m, form, "exact").tolist() == [[0, 1, 3, 5]]  # 0, 0.8, 3.4, 4.7
    assert study.codes(s, m, form, "octave").tolist() == [[1, 1, 4, 5]]  # 4 - the same
    assert study.codes(s, m, linear_mantissa(3), "octave").tolist() == [[5, 11, 32, 42]]  # 32 - rint(8 s)


def test_bytes_add_up():
    """To 255 less what the last keys of 16 lanes keep, half a byte each; each p within the byte that it hands on."""
    s = 3 * torch.randn(1, 2, 20, 40)
    p, exact = study.probabilities(s, None), study.softmax(s)
    total = 255 * (1 / exact.amax(-1))  # the sum of a row, in bytes: its maximum is 255
    assert ((p.sum(-1) - 1).abs() <= 8.1 / total).all()
    assert ((p - exact).abs() <= 1.01 / total[..., None]).all()


@pytest.fixture(scope="module")
def digits():
    """Model, what its blocks saw, and images to measure on."""
    pytest.importorskip("sklearn")
    model = digits_model()
    return model, study.sample_blocks(model, digits_data("train")[0][:16]), digits_data()[0][:20]


def variant(form, **rest):
    return study.Variant("", "P", "", "max", lambda sample: form, **rest)


def error(digits, **rest):
    """Relative logit error of a variant with 8-bit twin probabilities, which lose next to nothing."""
    model, samples, images = digits
    fine = of_codebook(twin.softmax(8, 2.0**-4, released=False), "max")
    with torch.inference_mode():
        exact = model(images)
        found = study.studied(model, variant(rest.pop("form", fine), **rest), samples)(images)
    return ((found - exact).norm() / exact.norm()).item()


def test_the_exact_softmax_changes_nothing(digits, monkeypatch):
    model, samples, images = digits
    monkeypatch.setattr(study, "probabilities", lambda s, form, top: study.softmax(s))
    with torch.inference_mode():
        found = study.studied(model, variant(log2(4), centre=True), samples)(images)
        assert torch.allclose(found, model(images), atol=1e-3)


def test_a_fine_format_changes_nothing_else(digits):
    """Nor is the model touched: it still runs its own attention, on the same weights."""
    model, samples, images = digits
    assert error(digits) < 0.01
    other = study.studied(model, variant(log2(4)), samples)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not any(isinstance(module, study.StudiedAttention) for module in model.modules())
    with torch.inference_mode():  # the last block for the class token alone, and for all
        short, full = other(images), other.forward_head(other.forward_features(images))
    assert torch.allclose(short, full, atol=1e-4)


def test_samples_are_what_attention_reads(digits):
    model, samples, _ = digits
    assert len(samples) == len(model.blocks) and not model.blocks[0].attn._forward_pre_hooks
    for sample in samples:
        assert sample.q.shape == sample.k.shape == sample.v.shape == (16, 3, 65, 32)
        assert sample.p.shape == (study.SEARCHED, 3, 65, 65) and torch.allclose(sample.p.sum(-1), torch.ones(()))
        logits = sample.q[: study.SEARCHED] @ sample.k[: study.SEARCHED].mT * sample.scale
        assert torch.allclose(sample.p, logits.softmax(-1), atol=1e-5)


def test_the_best_candidate(digits):
    """By the product with v: 6 bits before 4 and 3, wherever they stand."""
    sample = digits[1][1]
    forms = [of_codebook(log.adalog(bits, 10 * 2 ** (6 - bits)), "max") for bits in (3, 6, 4)]
    assert sample.best(forms) is forms[1]


def test_operands_cost_what_they_should(digits):
    """Of v int8 least, e4m3, with its 3 bits of mantissa, more, int4 most; q and k on top of it."""
    assert error(digits, v="int8") < error(digits, v="e4m3") < error(digits, v="int4") < 0.5
    assert error(digits) < error(digits, qk="head", v="int8")


def test_finer_scales_of_q_and_k(digits):
    """Squared error of the scores: one scale is worst, then one a head, then one a token."""
    model, samples, _ = digits
    lost = dict.fromkeys(("token", "head", "tensor"), 0.0)
    for block, sample in zip(model.blocks, samples, strict=True):
        for qk in lost:
            attention = study.StudiedAttention(block.attn, variant(log2(4), qk=qk), sample)
            q, k, _ = attention.rounded(sample.q, sample.k, sample.v)
            lost[qk] += float((q @ k.mT - sample.q @ sample.k.mT).square().sum())
    assert 0 < lost["token"] < lost["head"] < lost["tensor"]


@pytest.mark.parametrize("qk", ["", "tensor", "head", "token"])
def test_rounding_of_q_and_k(digits, qk):
    """Within half a step; no softmax notices that k lost its mean."""
    model, samples, _ = digits
    sample = samples[0]
    q, k, v = sample.q, sample.k, sample.v
    for centre in (False, True):
        attention = study.StudiedAttention(model.blocks[0].attn, variant(log2(4), qk=qk, centre=centre), sample)
        found_q, found_k, found_v = attention.rounded(q, k, v)
        exact = k - k.mean(2, keepdim=True) if centre else k
        assert found_v is v
        groups = {"": None, "tensor": (0, 1, 2, 3), "head": (0, 2, 3), "token": (3,)}[qk]
        for found, x in ((found_q, q), (found_k, exact)):
            step = x.abs().amax(groups, keepdim=True) / 127 if groups else torch.zeros(())
            assert ((found - x).abs() <= step / 2 * 1.00001).all()
    assert torch.allclose((q @ exact.mT).softmax(-1), (q @ k.mT).softmax(-1), atol=1e-4)


def test_v_in_e4m3(digits):
    """Half a unit in the last of four places, or half a subnormal; the largest of a head is 448 steps."""
    model, samples, _ = digits
    sample = samples[0]
    attention = study.StudiedAttention(model.blocks[0].attn, variant(log2(4), v="e4m3"), sample)
    _, _, v = attention.rounded(sample.q, sample.k, sample.v)
    step = sample.v.abs().amax((0, 2, 3), keepdim=True) / 448
    assert ((v - sample.v).abs() <= torch.maximum(sample.v.abs() / 16, step * 2.0**-10) * 1.00001).all()


def test_summary():
    """Five images: one lost, one won, one the same right, two the same wrong."""
    exact = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [2, 0, 0], [0, 0, 2]])
    logits = torch.tensor([[0.0, 2, 0], [2, 0, 0], [0, 0, 2], [2, 0, 0], [0, 0, 2]])
    row = softmax_formats.summary(variant(None), logits, exact, torch.tensor([0, 0, 1, 0, 0]))
    assert (row["images"], row["top1"], row["lost"], row["agreement"]) == (5, 0.4, 0.0, 0.6)
    assert row["lost_error"] == pytest.approx(math.sqrt(2 / 5 / 5))  # lost is 1, -1, 0, 0, 0
    assert row["logit_error"] == pytest.approx(4 / math.sqrt(20))


def test_study_names_every_row_once():
    variants = list(softmax_formats.study())
    names = [v.name for v in variants]
    assert len(set(names)) == len(names)
    assert set(softmax_formats.MAIN) <= {*names, softmax_formats.FP32}


def test_run_on_digits(tmp_path, monkeypatch, capsys):
    """The files and the table of a run; rows of less interest have fewer images, paired with the same in fp32."""
    pytest.importorskip("sklearn")
    chosen = [
        softmax_formats.fixed(linear_mantissa(3)), softmax_formats.fixed(log2(4, "lse")),
        softmax_formats.found("AdaLog", 3, "max", softmax_formats.adalog_max),
        softmax_formats.rounded(log2(4), qk="head", v="e4m3"),
    ]  # fmt: skip
    monkeypatch.setattr(softmax_formats, "study", lambda: chosen)
    files = [str(tmp_path / name) for name in ("s.json", "s.png")]
    arguments = ["--models", "digits", "--images", "30", "--others", "15", "--json", files[0], "--chart", files[1]]
    monkeypatch.setattr(sys, "argv", ["softmax_formats.py", *arguments])
    softmax_formats.main()
    found = json.loads(Path(files[0]).read_text())
    rows = found["rows"]
    assert [row["images"] for row in rows] == [30, 30, 30, 15, 15]
    assert (rows[0]["name"], rows[0]["logit_error"], rows[0]["agreement"]) == ("fp32", 0, 1)
    assert [row["values"] for row in rows[1:]] == [105, 17, 9, 17]
    assert len(rows[3]["searched"]) == 4 and rows[1]["searched"] is None
    assert 0 < rows[1]["logit_error"] < rows[2]["logit_error"] < 0.3
    assert found["said"][0].startswith("digits, linear mantissa, 3 bits, max: ") and "within 0.3" in found["said"][0]
    assert Path(files[1]).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert rows[4]["name"] in capsys.readouterr().out
