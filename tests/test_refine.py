"""calibrate.refine and its parts: rounding that compensates, levels where inputs are, rotations that change nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit_accel.calibrate import BlockPlan, LinearPlan, block_output, refine
from pyvit_accel.calibrate.heads import hadamard, rotate_heads
from pyvit_accel.calibrate.levels import choose_clip, choose_table, fitted_levels, log_levels, table
from pyvit_accel.calibrate.plan import linear_output, quantized_input
from pyvit_accel.calibrate.refine import refine_linear
from pyvit_accel.calibrate.rounding import DAMPING, compensated_codes
from pyvit_accel.formats import affine

GELU_MINIMUM = -0.1701
IMAGES, TOKENS, C, HEADS, HIDDEN = 6, 10, 24, 2, 48


def correlated(rows: int, K: int) -> Tensor:
    """Inputs of which a third of the directions carry nearly everything, as those of a trained network."""
    return torch.randn(rows, K // 3) @ torch.randn(K // 3, K) + 0.1 * torch.randn(rows, K)


def gram_error(w: Tensor, codes: Tensor, scale: Tensor, gram: Tensor) -> Tensor:
    error = (w - codes * scale[:, None]).double()
    return (error @ gram.double() * error).sum()


def block_plan(bits: int = 4, head_bits: int = 8, layer_scale: bool = False) -> BlockPlan:
    def linear(N: int, K: int, **fields) -> LinearPlan:
        return LinearPlan(torch.randn(N, K) / K**0.5, 0.2 * torch.randn(N), bits, bits, **fields)

    def norm() -> tuple[Tensor, Tensor, float]:
        return 1 + 0.2 * torch.randn(C), 0.2 * torch.randn(C), 1e-6

    scales = [0.5 + torch.rand(C) if layer_scale else None for _ in range(2)]
    return BlockPlan(
        norm1=norm(),
        qkv=linear(3 * C, C),
        num_heads=HEADS,
        softmax_scale=(C // HEADS) ** -0.5,
        head_bits=head_bits,
        head_scale=torch.full((3, HEADS, 1), 4 / affine.q_range(head_bits)[1]),
        proj=linear(C, C),
        layer_scale1=scales[0],
        norm2=norm(),
        fc1=linear(HIDDEN, C),
        activation="gelu",
        fc2=linear(C, HIDDEN, x_minimum=GELU_MINIMUM),
        layer_scale2=scales[1],
    )


def float_output(plan: BlockPlan, x: Tensor) -> Tensor:
    """What the block computes when nothing is quantized."""
    qkv = F.linear(F.layer_norm(x, (C,), *plan.norm1), plan.qkv.weight, plan.qkv.bias)
    q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, scale=plan.softmax_scale).transpose(1, 2).flatten(2)
    y = F.linear(y, plan.proj.weight, plan.proj.bias)
    x = x + (y if plan.layer_scale1 is None else y * plan.layer_scale1)
    y = F.gelu(F.linear(F.layer_norm(x, (C,), *plan.norm2), plan.fc1.weight, plan.fc1.bias))
    y = F.linear(y, plan.fc2.weight, plan.fc2.bias)
    return x + (y if plan.layer_scale2 is None else y * plan.layer_scale2)


def one_by_one(w: Tensor, scale: Tensor, gram: Tensor, bits: int) -> Tensor:
    """Rounding with compensation from its definition: after each column, least squares for those that are left."""
    K, (lo, hi) = len(gram), affine.weight_range(bits)
    gram = gram.double() + DAMPING * gram.double().diagonal().mean() * torch.eye(K, dtype=torch.float64)
    w, codes = w.double().clone(), torch.empty_like(w, dtype=torch.int8)
    left = gram.diagonal().argsort(descending=True, stable=True).tolist()
    while left:
        k, *left = left
        code = (w[:, k] / scale).round().clamp(lo, hi)
        codes[:, k] = code.to(torch.int8)
        error = w[:, k] - code * scale
        if left:
            w[:, left] += error[:, None] * torch.linalg.solve(gram[left][:, left], gram[left, k])
    return codes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("K", [5, 64, 100])
def test_compensated_codes_follow_their_definition(bits, K):
    w, x = torch.randn(7, K), correlated(200, K)
    scale = affine.weight_scale(w, bits)
    codes = compensated_codes(w, scale, x.T @ x, bits)
    expected = one_by_one(w, scale, x.T @ x, bits)
    assert codes.dtype == torch.int8
    # A value within float32 of a tie may fall the other way, and what follows it in its row is then another solution.
    assert (codes == expected).all(1).double().mean() >= 6 / 7


def test_compensated_codes_are_nearest_for_unrelated_inputs():
    w = torch.randn(9, 70)
    codes, scale = affine.quantize_weight(w, 4)
    assert torch.equal(compensated_codes(w, scale, torch.eye(70), 4), codes)


def test_compensated_codes_err_less():
    w, x = torch.randn(32, 96), correlated(400, 96)
    nearest, scale = affine.quantize_weight(w, 4)
    gram = x.T @ x
    codes = compensated_codes(w, scale, gram, 4)
    assert gram_error(w, codes, scale, gram) < 0.5 * gram_error(w, nearest, scale, gram)


@pytest.mark.parametrize("dead", [slice(3, 9), slice(None)])
def test_compensated_codes_with_inputs_always_zero(dead):
    w, x = torch.randn(8, 40), correlated(100, 40)
    x[:, dead] = 0
    nearest, scale = affine.quantize_weight(w, 4)
    codes = compensated_codes(w, scale, x.T @ x, 4)
    assert torch.equal(codes[:, dead], nearest[:, dead])


@pytest.mark.parametrize("gram", [torch.eye(5), torch.full((6, 6), torch.nan), torch.ones(6)])
def test_compensated_codes_refuse(gram):
    with pytest.raises(ValueError, match=r"must be \(6, 6\) and finite"):
        compensated_codes(torch.randn(2, 6), torch.ones(2), gram, 4)


def test_log_levels():
    """16 levels: 0 and 255 2^(-k / 2.5), k = 0 .. 14."""
    expected = torch.tensor([0, *(255 * 2 ** (-k / 2.5) for k in range(14, -1, -1))])
    torch.testing.assert_close(log_levels(16), expected)


@pytest.mark.parametrize("bits", [3, 4, 5, 6])
def test_table_holds_the_nearest_levels(bits):
    levels = log_levels(2**bits).round()
    entries = table(levels).long() + 128
    assert set(entries.tolist()) <= set(levels.long().tolist())
    distance = (torch.arange(256) - entries).abs()
    assert torch.equal(distance, (torch.arange(256)[:, None] - levels.long()).abs().amin(1))
    assert (entries.diff() >= 0).all()


def test_fitted_levels_are_the_best():
    """Against every way to cut nine codes into three runs."""
    codes = torch.tensor([0, 1, 2, 7, 30, 31, 90, 200, 255])
    histogram = torch.zeros(256)
    histogram[codes] = torch.tensor([9.0, 4, 1, 3, 2, 5, 1, 0.5, 2])

    def error(levels: Tensor) -> float:
        return float((histogram * (torch.arange(256.0)[:, None] - levels).square().amin(1)).sum())

    def means(cuts: tuple[int, ...]) -> Tensor:
        runs = codes.tensor_split(cuts)
        return torch.stack([(histogram[run] * run).sum() / histogram[run].sum() for run in runs])

    best = min(error(means(cuts)) for cuts in combinations(range(1, 9), 2))
    assert error(fitted_levels(histogram, 3)) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("bits", [3, 4, 5, 6])
def test_chosen_table_beats_even_levels(bits):
    x = F.gelu(2 * torch.randn(300, HIDDEN))
    plan = LinearPlan(torch.randn(C, HIDDEN), None, 8, bits, x_minimum=GELU_MINIMUM)
    chosen = choose_table(plan, x, torch.ones(300))
    assert chosen.x_table.unique().numel() <= 2**bits
    error, even = (((quantized_input(p, x) - x) @ p.weight.T).square().sum() for p in (chosen, plan))
    assert error < 0.8 * even


def test_chosen_table_follows_the_importance():
    """Half of the rows crowd at the minimum, the others are spread evenly: each wants other levels."""
    x = torch.cat([F.gelu(torch.randn(200, HIDDEN)), 4 * torch.rand(200, HIDDEN)])
    plan = LinearPlan(torch.randn(C, HIDDEN), None, 8, 4, x_minimum=GELU_MINIMUM)
    crowded = torch.arange(400) < 200

    def error(rows: Tensor, important: Tensor) -> Tensor:
        chosen = choose_table(plan, x, torch.where(important, 1.0, 1e-6))
        return ((quantized_input(chosen, x) - x) @ plan.weight.T)[rows].var(0).sum()

    assert error(crowded, crowded) < 0.8 * error(crowded, ~crowded)
    assert error(~crowded, ~crowded) < 0.8 * error(~crowded, crowded)


def test_chosen_clip_beats_none():
    x = torch.randn(300, 200)
    plan = LinearPlan(torch.randn(C, 200), None, 8, 4)
    chosen = choose_clip(plan, x, torch.ones(300))
    assert 0.6 <= chosen.x_clip <= 0.9  # sixteen levels of a normal distribution: 2.7 of the 3 deviations that 200 span
    error, whole = (((quantized_input(p, x) - x) @ p.weight.T).square().sum() for p in (chosen, plan))
    assert error < 0.9 * whole


@pytest.mark.parametrize("size", [1, 2, 12, 64, 80, 7])
def test_hadamard_is_orthogonal(size):
    H = hadamard(size)
    torch.testing.assert_close(H @ H.T, torch.eye(size))
    assert (H != 0).sum(1).unique().tolist() == [size & -size]


@pytest.mark.parametrize("bits, head_bits", [(4, 8), (8, 4), (4, 4)])
def test_rotated_heads_compute_the_same(bits, head_bits):
    plan, x = block_plan(bits, head_bits), torch.randn(IMAGES, TOKENS, C)
    rotated = rotate_heads(plan, F.layer_norm(x, (C,), *plan.norm1))
    assert not torch.equal(rotated.qkv.weight, plan.qkv.weight)
    torch.testing.assert_close(float_output(rotated, x), float_output(plan, x), rtol=1e-5, atol=1e-5)


def test_rotated_heads_at_8_bits_stay():
    plan = block_plan(8)
    assert rotate_heads(plan, torch.randn(IMAGES, TOKENS, C)) is plan


def test_rotated_heads_have_scales_that_fit():
    """No code of v that calibration saw is clipped, and the largest is used."""
    plan, y = block_plan(), torch.randn(IMAGES, TOKENS, C)
    rotated = rotate_heads(plan, y)
    heads = F.linear(y, rotated.qkv.weight, rotated.qkv.bias).unflatten(-1, (3, HEADS, -1))
    codes = (heads / rotated.head_scale).abs().amax((0, 1, 4))
    torch.testing.assert_close(codes[2], torch.full((HEADS,), 127.0))


@pytest.mark.parametrize("fields", [{}, {"x_scale": torch.tensor([0.3])}, {"x_minimum": GELU_MINIMUM}])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_refined_linear_keeps_the_mean_output(fields, bits):
    x = F.gelu(torch.randn(500, HIDDEN))
    plan = LinearPlan(torch.randn(C, HIDDEN), torch.randn(C), bits, bits, **fields)
    refined = refine_linear(plan, x, torch.ones(500))
    mean, truth = linear_output(refined, x).mean(0), F.linear(x, plan.weight, plan.bias).mean(0)
    torch.testing.assert_close(mean, truth, rtol=1e-4, atol=1e-4)


def test_refined_linear_with_a_scale_per_channel():
    """The codes stand for the weight times these scales."""
    x = correlated(500, HIDDEN) * torch.logspace(-1, 1, HIDDEN)
    x_scale = x.abs().amax(0) / 127
    plan = LinearPlan(torch.randn(C, HIDDEN) / x_scale, None, 4, 8, x_scale=x_scale)
    refined = refine_linear(plan, x, torch.ones(500))
    y = x @ plan.weight.T
    error, nearest = ((linear_output(p, x) - y).square().sum() for p in (refined, plan))
    assert error < 0.5 * nearest


@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("bits, head_bits", [(3, 8), (4, 8), (4, 4), (6, 8)])
def test_refined_block_errs_less(bits, head_bits, layer_scale):
    plan = block_plan(bits, head_bits, layer_scale)
    mix = torch.randn(C, C)
    x, unseen = (torch.randn(32, TOKENS, C) @ mix for _ in range(2))
    refined = refine(plan, x)
    truth = float_output(plan, unseen)
    error, before = ((block_output(p, unseen) - truth).square().sum() for p in (refined, plan))
    assert error < 0.9 * before
    for linear in (refined.qkv, refined.proj, refined.fc1, refined.fc2):
        lo, hi = affine.q_range(bits)
        assert linear.codes.dtype == torch.int8 and lo <= linear.codes.min() and linear.codes.max() <= hi


def with_a_wild_token(plan: BlockPlan, x: Tensor) -> tuple[BlockPlan, Tensor]:
    """The last token of every image brings one output of fc1, and with it the residual stream, to some hundreds."""
    weight, bias, x = plan.fc1.weight.clone(), plan.fc1.bias.clone(), x.clone()
    weight[0], bias[0], x[:, -1, 0] = 0, -120, 300
    weight[0, 0] = 60
    return replace(plan, fc1=replace(plan.fc1, weight=weight, bias=bias)), x


def test_refined_block_is_not_ruled_by_few_tokens():
    """The others still gain, for the next norm makes all tokens alike."""
    error = before = 0
    for _ in range(12):
        plan, x = with_a_wild_token(block_plan(), torch.randn(32, TOKENS, C) @ torch.randn(C, C))
        truth, refined = float_output(plan, x), refine(plan, x)
        assert truth[:, -1].abs().amax() > 20 * truth[:, :-1].abs().mean()
        distances = [(block_output(p, x) - truth)[:, :-1].square().mean() for p in (refined, plan)]
        error, before = error + distances[0], before + distances[1]
    assert error < 0.9 * before


def test_refined_block_serves_the_first_token_more():
    """Against the same token in the second place."""
    first = second = 0
    for _ in range(4):
        plan, x = block_plan(), torch.randn(32, 100, C) @ torch.randn(C, C)
        x[:, 0] = torch.randn(32, C) @ torch.randn(C, C)  # correlated otherwise
        swapped = x[:, [1, 0, *range(2, 100)]]
        truth = float_output(plan, x)[:, 0]
        first += (block_output(refine(plan, x), x)[:, 0] - truth).square().mean()
        second += (block_output(refine(plan, swapped), x)[:, 0] - truth).square().mean()
    assert first < 0.9 * second


def test_refine_decides_every_number():
    refined = refine(block_plan(), torch.randn(IMAGES, TOKENS, C))
    for linear in (refined.qkv, refined.proj, refined.fc1, refined.fc2):
        assert linear.codes.shape == linear.weight.shape and linear.w_scale.shape == linear.codes.shape[:1]
        assert (linear.x_table is not None) == (linear is refined.fc2)
    assert refined.qkv.x_clip == 1 and refined.proj.x_clip < 1 and refined.fc1.x_clip < 1


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 3), torch.zeros(2, 3, C + 1), torch.zeros(0, 3, C), torch.full((1, 2, C), torch.nan)]
)
def test_refine_refuses(x):
    with pytest.raises(ValueError, match=f"refine: x is .*must be .images, tokens, {C}., finite and not empty"):
        refine(block_plan(), x)


def test_refine_of_constant_inputs():
    """A norm of a constant token is its bias, and most inputs never change: nothing to learn, nothing to divide by."""
    refined = refine(block_plan(), torch.ones(IMAGES, TOKENS, C))
    assert block_output(refined, torch.randn(1, TOKENS, C)).isfinite().all()
