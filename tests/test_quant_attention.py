"""quant_attention: integer probabilities, against the reference and against softmax attention in float64."""

from __future__ import annotations

import re

import pytest
import torch
from _problems import U32, assert_nearest_codes, assert_same_bits, codes, padded, reference, transposed
from test_scalar import EXP2_ERROR

from pyvit_accel import ops
from pyvit_accel.reference.quant_attention import STEP

SHAPES = [  # B, H, Nq, Nk, D
    (1, 2, 5, 1, 32), (2, 3, 1, 19, 5), (1, 1, 3, 50, 80), (2, 2, 17, 33, 48), (2, 2, 26, 64, 64), (1, 2, 40, 197, 64),
    (1, 1, 2, 513, 72), (1, 1, 13, 1370, 16),
]  # fmt: skip
VARIANTS = ("plain", "bias", "mask", "everything")


def problem(B, H, Nq, Nk, D, variant="plain", kind="random"):
    """q, k, v as views of (B, N, H, D), the way a qkv matmul leaves them; scales; biases of the variant."""
    q, k, v = (codes(kind, B, N, H, D).transpose(1, 2) for N in (Nq, Nk, Nk))
    per_token = variant in ("mask", "everything")
    q_scale = torch.rand(B, H, Nq) * 0.01 if per_token else torch.rand(1) * 0.01
    k_scale = torch.rand(B, H, Nk) * 0.05 if per_token else torch.rand(H, 1) * 0.05
    v_scale = torch.rand(B, H, Nk) + 0.01 if per_token else torch.rand(H, 1) + 0.01
    kwargs = {}
    if variant in ("bias", "everything"):
        kwargs["bias"] = torch.randn(1, H, Nq, Nk)
    if variant in ("mask", "everything"):
        kwargs["mask"] = torch.rand(B, 1, Nq, Nk) > 0.3
        kwargs["mask"][..., 0] = True  # rows without a key have their own test
    if variant == "everything":
        kwargs["key_bias"] = torch.randn(B, Nk)
    return (q, k, v, q_scale, k_scale, v_scale, D**-0.5), kwargs


def attention_and_error(args, kwargs):
    """Softmax attention of the dequantised operands in float64, and what the format and float32 may add to it.

    A score s is off by e (each float32 operation rounds once), so p = 2^((s - top) log2 e) is off by the factor
    exp(e + e_top + 3 u |s - top|) and EXP2_ERROR. The 16-bit code adds half a step 1 / 65280, or p itself where that is
    less; the byte, which takes or leaves what was dropped before it, another 1 / 255, unless the 16-bit code is zero.
    """
    q, k, v, q_scale, k_scale, v_scale = (t.double() for t in args[:6])
    B, H, Nq, D = q.shape
    Nk = k.shape[2]
    q_scale, k_scale, v_scale = q_scale.expand(B, H, Nq), k_scale.expand(B, H, Nk), v_scale.expand(B, H, Nk)
    s = q @ k.mT * q_scale[..., None] * k_scale[:, :, None] * args[6]
    e = 4 * U32 * s.abs()
    for name in ("bias", "key_bias"):
        if name in kwargs:
            s = s + (kwargs[name].double() if name == "bias" else kwargs[name].double()[:, None, None])
            e = e + U32 * s.abs()
    if "mask" in kwargs:
        s = s.masked_fill(~kwargs["mask"], -torch.inf)
    top = s.amax(-1, keepdim=True)
    p = (s - top).exp()
    far = (s - top).abs().clamp_max(100)
    growth = torch.expm1(e + e.amax(-1, keepdim=True) + 3 * U32 * far) + EXP2_ERROR + 4 * U32
    step = 0.5 / 65280

    def of_code(p):
        return p * growth + (p * (1 + growth)).clamp_max(step)

    def of_byte(p):
        return of_code(p) + (p * (1 + growth) >= step) / 255

    v_max = v_scale.amax(-1)[..., None, None]
    ratio = (v_scale / v_scale.amax(-1, keepdim=True))[:, :, None]
    total = p.sum(-1, keepdim=True)
    y = (p * ratio) @ v / total * v_max
    d_total = of_code(p).sum(-1, keepdim=True)
    error = (of_byte(p * ratio) @ v.abs() * v_max + y.abs() * d_total) / (total - d_total) + 4 * U32 * y.abs()
    return tuple(t.transpose(1, 2).reshape(B, Nq, H * D) for t in (y, error))


def assert_equals_reference(kernel, args, kwargs):
    expected = reference(ops.quant_attention, *args, **kwargs)
    assert_same_bits(kernel(ops.quant_attention, *args, **kwargs), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_reference(kernel, shape, variant):
    _, H, _, _, D = shape
    args, kwargs = problem(*shape, variant)
    for out_scale in (None, torch.tensor([0.5]), torch.rand(H * D) + 0.1):
        assert_equals_reference(kernel, args, kwargs | {"out_scale": out_scale})


@pytest.mark.parametrize("Nq", range(1, 27))
def test_equals_reference_for_every_remainder_of_queries(kernel, Nq):
    assert_equals_reference(kernel, *problem(1, 1, Nq, 21, 20, "everything"))


@pytest.mark.parametrize("kind", ["lowest", "highest", "zeros", "alternating"])
@pytest.mark.parametrize("Nk", [3, 512, 513, 1370])
def test_equals_reference_on_extreme_codes(kernel, kind, Nk):
    """Equal scores give every key the largest code: the sums come as close to 2^31 as they can."""
    args, kwargs = problem(1, 1, 2, Nk, 33, kind=kind)
    assert_equals_reference(kernel, args, kwargs)


def test_equals_reference_on_scores_of_every_size(kernel):
    """Spread scores by up to thousands: codes that vanish, rows of one key."""
    args, kwargs = problem(2, 2, 9, 40, 16, "bias")
    for spread in (0.0, 1.0, 30.0, 3000.0):
        assert_equals_reference(kernel, args, {"bias": kwargs["bias"] * spread})


LAYOUTS = [padded, transposed, lambda t: t.contiguous(), lambda t: t[:, :1]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_reference_in_every_layout(kernel, layout):
    args, kwargs = problem(2, 3, 14, 25, 20, "everything")
    q, k, v = (layout(t).expand(2, 3, -1, -1) for t in args[:3])
    assert_equals_reference(kernel, (q, k, v, *args[3:]), kwargs)


def test_equals_reference_for_biases_in_every_layout(kernel):
    args, kwargs = problem(2, 3, 14, 25, 20, "everything")
    bias, key_bias = kwargs["bias"].expand(2, 3, 14, 25), kwargs["key_bias"]
    for same in (padded(bias.contiguous()), transposed(bias), bias[:, :1, :1], bias[..., :1], bias[0, 0]):
        assert_equals_reference(kernel, args, {"bias": same})
    for same in (padded(key_bias), transposed(key_bias), key_bias[:1], key_bias[:, :1]):
        assert_equals_reference(kernel, args, {"key_bias": same})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_within_bound_of_float64(impl, shape, variant):
    args, kwargs = problem(*shape, variant)
    y, error = attention_and_error(args, kwargs)
    assert ((impl(ops.quant_attention, *args, **kwargs).double() - y).abs() <= error).all()


@pytest.mark.parametrize("out_scale", [torch.tensor([0.7]), torch.linspace(0.2, 2.0, 96)])
def test_nearest_codes_of_float64(impl, out_scale):
    args, kwargs = problem(2, 2, 17, 33, 48, "everything")
    y, error = attention_and_error(args, kwargs)
    q = impl(ops.quant_attention, *args, **kwargs, out_scale=out_scale)
    ratio = y / out_scale.double()
    assert_nearest_codes(q, ratio, error / out_scale.double() + 2.01 * U32 * ratio.abs().clamp_max(300))


def test_identity_values_give_the_attention_weights(impl):
    """v = I: each output is one byte over the sum of the row's codes, and the largest byte is 255.

    The bytes of every 16th key add up to what the exact probabilities add up to, within half a step at every key.
    """
    N = 80
    args, kwargs = problem(2, 2, 23, N, N, "bias")
    v = torch.eye(N, dtype=torch.int8).expand(2, 2, N, N)
    y = impl(ops.quant_attention, *args[:2], v, *args[3:5], torch.ones(1), args[6], **kwargs)
    attention = y.reshape(2, 23, 2, N).double()
    p = attention / attention.amax(-1, keepdim=True) * 255
    assert ((p - p.round()).abs() <= 4 * U32 * 255).all()
    bytes_ = p.round()
    q, k = args[0].double(), args[1].double()
    s = q @ k.mT * args[3].double() * args[4].double()[..., None] * args[6] + kwargs["bias"].double()
    truth = (s - s.amax(-1, keepdim=True)).exp().transpose(1, 2) * 255
    lanes = (bytes_ - truth).unflatten(-1, (-1, STEP)).cumsum(-2)
    rounded = torch.arange(1, N // STEP + 1)[:, None] * 0.5 / 256  # of the 16-bit codes
    assert (lanes.abs() <= 0.5 + rounded + 0.01).all()  # 0.01: errors of 1e-6 in p, of 255
    total = truth.sum(-1, keepdim=True)
    assert ((attention * total - bytes_).abs() <= bytes_ * (N * 0.5 / 256 / total + 1e-5)).all()


def test_a_long_tail_keeps_its_share(impl):
    """One key stands out from 500, each 0.0015 of it: below half a byte, and two fifths of the whole."""
    q, k = torch.ones(1, 1, 1, 4, dtype=torch.int8), torch.zeros(1, 1, 501, 4, dtype=torch.int8)
    k[..., 0, 0] = 65
    v = torch.where(torch.arange(501)[:, None] == 0, 0, 100).to(torch.int8).expand(1, 1, 501, 4)
    ones = torch.ones(1)
    y = impl(ops.quant_attention, q, k, v, ones, ones, ones, 0.1)
    p = torch.exp(torch.tensor(-6.5, dtype=torch.float64))
    assert ((y.double() - 100 * 500 * p / (1 + 500 * p)).abs() <= 100 * 16 * 0.5 / 255).all()


def test_equal_scores_average_the_values(impl):
    args, _ = problem(1, 2, 3, 50, 16)
    v = args[2]
    y = impl(ops.quant_attention, torch.zeros_like(args[0]), *args[1:5], torch.ones(1), args[6])
    mean = v.double().mean(2).reshape(1, 1, 32).expand(1, 3, 32)
    assert ((y.double() - mean).abs() <= 4 * U32 * mean.abs()).all()


def test_one_key_gives_its_value(impl):
    args, _ = problem(2, 2, 5, 1, 24)
    v_scale = torch.tensor([[0.5], [2.0]])
    y = impl(ops.quant_attention, *args[:5], v_scale, args[6])
    expected = (args[2].float() * v_scale[..., None]).expand(2, 2, 5, 24).transpose(1, 2).reshape(2, 5, 48)
    assert ((y - expected).abs() <= 4 * U32 * expected.abs()).all()


@pytest.mark.parametrize("out_scale", [None, torch.tensor([0.01])])
def test_query_that_sees_no_key_gives_zeros(impl, out_scale):
    args, _ = problem(2, 2, 15, 20, 24)
    mask = torch.rand(2, 2, 15, 20) > 0.5
    mask[:, :, 4] = False
    mask[1] = False
    y = impl(ops.quant_attention, *args, mask=mask, out_scale=out_scale)
    assert not y[:, 4].any() and not y[1].any()
    assert y[0, 0].any() and not y.isnan().any()
    bias = torch.zeros(()).masked_fill(~mask, -torch.inf)
    assert_same_bits(impl(ops.quant_attention, *args, bias=bias, out_scale=out_scale), y)
    none_seen = torch.full((2, 20), -torch.inf)
    assert not impl(ops.quant_attention, *args, key_bias=none_seen, out_scale=out_scale).any()


def test_masked_keys_have_no_influence(impl):
    args, _ = problem(2, 2, 15, 40, 24, "mask")
    q, k, v, q_scale, k_scale, v_scale, scale = args
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[..., [3, 17, 39]] = False
    k2, v2, k_scale2 = k.clone(), v.clone(), k_scale.clone()
    k2[:, :, [3, 17, 39]], v2[:, :, [3, 17, 39]], k_scale2[:, :, [3, 17, 39]] = 127, -128, 1e3
    before = impl(ops.quant_attention, *args, mask=mask)
    assert_same_bits(impl(ops.quant_attention, q, k2, v2, q_scale, k_scale2, v_scale, scale, mask=mask), before)
    assert not torch.equal(impl(ops.quant_attention, q, k2, v2, q_scale, k_scale2, v_scale, scale), before)


def test_mask_joins_bias(impl):
    args, kwargs = problem(2, 2, 15, 20, 24, "everything")
    bias = kwargs["bias"].masked_fill(~kwargs["mask"], -torch.inf)
    expected = impl(ops.quant_attention, *args, bias=bias, key_bias=kwargs["key_bias"])
    assert_same_bits(impl(ops.quant_attention, *args, **kwargs), expected)


def test_key_bias_is_a_row_of_bias(impl):
    args, _ = problem(2, 2, 15, 20, 24)
    key_bias = torch.randn(2, 20)
    expected = impl(ops.quant_attention, *args, bias=key_bias[:, None, None])
    assert_same_bits(impl(ops.quant_attention, *args, key_bias=key_bias), expected)
    assert not torch.equal(impl(ops.quant_attention, *args), expected)


def test_key_bias_of_log_two_counts_a_key_twice(impl):
    """What a merged token needs: exactly what two copies of the key give, up to the float32 of log 2."""
    args, _ = problem(1, 2, 9, 20, 24)
    q, k, v, *scales, scale = args
    key_bias = torch.zeros(1, 20)
    key_bias[:, -1] = 2.0
    merged = impl(ops.quant_attention, *args, key_bias=key_bias.clamp_min(1).log())
    twice = impl(ops.quant_attention, q, *(torch.cat([t, t[:, :, -1:]], 2) for t in (k, v)), *scales, scale)
    y, error = attention_and_error(args, {"key_bias": key_bias.clamp_min(1).log()})
    assert ((merged - twice).abs() <= 2 * error + 4 * U32 * y.abs()).all()


def test_refuses_more_keys_than_sums_hold(impl):
    q, k = torch.zeros(1, 1, 1, 4, dtype=torch.int8), torch.zeros(1, 1, 65537, 4, dtype=torch.int8)
    with pytest.raises(ValueError, match="65537 keys; sums are exact for at most 65536"):
        impl(ops.quant_attention, q, k, k, *[torch.ones(1)] * 3, 1.0)


@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_order_of_keys_moves_remainders_only(impl, variant):
    """Which key takes what another dropped depends on their order; the result stays within its bound."""
    args, kwargs = problem(2, 2, 15, 50, 24, variant)
    y, error = attention_and_error(args, kwargs)
    order = torch.randperm(50)
    q, *of_keys = args[:6]
    k, v, k_scale, v_scale = (t[:, :, order] if t.dim() > 2 else t for t in (*of_keys[:2], *of_keys[3:]))
    kwargs = {name: t[..., order] for name, t in kwargs.items()}
    permuted = impl(ops.quant_attention, q, k, v, args[3], k_scale, v_scale, args[6], **kwargs)
    assert ((permuted.double() - y).abs() <= error).all()


def test_heads_images_and_queries_are_independent(impl):
    args, kwargs = problem(3, 2, 14, 30, 24, "everything")
    y = impl(ops.quant_attention, *args, **kwargs).reshape(3, 14, 2, 24)
    one = (t[1:2, 1:2] for t in args[:6])
    own = {"bias": kwargs["bias"][:, 1:2], "mask": kwargs["mask"][1:2], "key_bias": kwargs["key_bias"][1:2]}
    assert_same_bits(impl(ops.quant_attention, *one, args[6], **own), y[1:2, :, 1])


@pytest.mark.parametrize(("B", "Nq", "Nk"), [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
def test_empty(impl, B, Nq, Nk):
    args, _ = problem(B, 3, Nq, Nk, 8)
    for out_scale, dtype in ((None, torch.float32), (torch.ones(24), torch.int8)):
        y = impl(ops.quant_attention, *args, out_scale=out_scale)
        assert y.shape == (B, Nq, 24) and y.dtype == dtype and not y.any()


def test_values_of_scale_zero_give_zeros(impl):
    """All v zero in one head, quantised per token: its scales are as small as scales get, or zero."""
    (q, k, v, q_scale, k_scale, v_scale, softmax_scale), _ = problem(1, 2, 5, 6, 8)
    v_scale = torch.rand(1, 2, 6)
    v_scale[:, 0] = 0
    y = impl(ops.quant_attention, q, k, v, q_scale, k_scale, v_scale, softmax_scale)
    assert not y[..., :8].any() and y[..., 8:].isfinite().all() and y[..., 8:].any()


def test_errors():
    (q, k, v, *scales), _ = problem(2, 3, 9, 10, 8)

    def message(text):
        return "^" + re.escape(text) + "$"

    text = "quant_attention: q, k, v must be int8 codes, got torch.int8, torch.float32, torch.int8"
    with pytest.raises(TypeError, match=message(text)):
        ops.quant_attention(q, k.float(), v, *scales)
    text = "quant_attention: q (2, 3, 9, 8), k {}, v {} do not fit together"
    for k_wrong, v_wrong in ((k, v[:, :, :9]), (k[..., :7], v[..., :7]), (k[:1], v[:1]), (k, v[..., :7])):
        with pytest.raises(ValueError, match=message(text.format(tuple(k_wrong.shape), tuple(v_wrong.shape)))):
            ops.quant_attention(q, k_wrong, v_wrong, *scales)
    text = "quant_attention: q (3, 9, 8) and k (2, 3, 10, 8) must be (B, H, N, D)"
    with pytest.raises(ValueError, match=message(text)):
        ops.quant_attention(q[0], k, v, *scales)
    text = "quant_attention: k_scale (7,) does not broadcast to (2, 3, 10)"
    with pytest.raises(ValueError, match=message(text)):
        ops.quant_attention(q, k, v, scales[0], torch.ones(7), *scales[2:])
    text = "quant_attention: bias or mask (9, 9) does not broadcast to (2, 3, 9, 10)"
    with pytest.raises(ValueError, match=message(text)):
        ops.quant_attention(q, k, v, *scales, bias=torch.zeros(9, 9))
    text = "quant_attention: mask must be bool, got torch.float32; pass additive masks as bias"
    with pytest.raises(TypeError, match=message(text)):
        ops.quant_attention(q, k, v, *scales, mask=torch.zeros(9, 10))


@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_queries_by_index(impl, variant):
    """The rows of the queries that are asked for, in that order, some twice; biases are of those asked for."""
    args, kwargs = problem(2, 3, 14, 30, 24, variant)
    index = torch.randint(0, 14, (2, 9)).int()
    rows = index.long()[:, None].expand(-1, 3, -1)
    q, q_scale = args[0], args[3].expand(2, 3, 14)
    own = (q.gather(2, rows[..., None].expand(-1, -1, -1, 24)), *args[1:3], q_scale.gather(2, rows), *args[4:])
    biases = {}
    for name, value in kwargs.items():
        of_queries = value.dim() == 4 and value.shape[2] == 14
        value = value.expand(2, 3, -1, -1) if of_queries else value
        biases[name] = value.gather(2, rows[..., None].expand(-1, -1, -1, 30)) if of_queries else value
    expected = impl(ops.quant_attention, *own, **biases)
    assert_same_bits(impl(ops.quant_attention, *args, q_index=index, **biases), expected)


def test_queries_by_index_are_checked(kernel):
    args, _ = problem(2, 3, 5, 6, 8)
    with pytest.raises(ValueError, match=r"q_index has 5, outside 0\.\.4"):
        kernel(ops.quant_attention, *args, q_index=torch.full((2, 3), 5, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"q_index must be int32 \(B, Nq\), .*; got torch.int64 \(2, 3\)"):
        kernel(ops.quant_attention, *args, q_index=torch.zeros(2, 3, dtype=torch.int64))
