"""calibrate: what observe keeps, the scales chosen from it, and folds that leave the float network alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pyvit_accel.calibrate import (
    Activation,
    Fold,
    affine_scale,
    bias_correction,
    fold_linear,
    fold_norm,
    observe,
    outlier_fold,
    range_fold,
    symmetric_scale,
)
from pyvit_accel.errors import Unsupported

# quantization.md 1.2, with s~ = 1 and z~ = 8
SCALE = torch.tensor([0.2, 0.05, 0.12, 0.4])
ZERO_POINT = torch.tensor([8.0, 5.0, 10.0, 7.0])
GAMMA, BETA = torch.tensor([1.0, 2.0, 0.5, 4.0]), torch.tensor([0.1, -0.2, 0.0, 0.3])
WEIGHT = torch.tensor([[0.5, -1.0, 2.0, 0.25], [1.0, 0.0, -0.5, 0.1]])
BIAS = torch.tensor([0.1, -0.3])
NORMALISED = torch.tensor([[0.3, -1.2, 0.7, -0.1], [1.5, 0.2, -0.9, 0.6]])


class Mlp(nn.Module):
    """norm, two linears, and one that is never called."""

    def __init__(self, features: int = 8):
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.fc1 = nn.Linear(features, 2 * features)
        self.fc2 = nn.Linear(2 * features, features)
        self.unused = nn.Linear(features, features)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(self.norm(x)))) * scale


@pytest.fixture
def model() -> Mlp:
    return Mlp().eval()


def no_hooks(model: nn.Module) -> bool:
    return not any(module._forward_hooks for module in model.modules())


def uneven(rows: int, channels: int) -> Tensor:
    """Channels whose ranges span three decades, none centred."""
    return (torch.randn(rows, channels) + 0.5) * torch.logspace(-2, 1, channels)


# ---- observe


def test_observe_keeps_range_mean_and_rows(model):
    batches = [torch.randn(2, 5, 8) for _ in range(3)]
    observed = observe(model, batches)
    x = torch.cat([model.norm(batch).reshape(-1, 8) for batch in batches]).detach()
    y = model.fc1(x).detach()
    for seen, truth in ((observed.input(model.fc1), x), (observed.output(model.fc1), y)):
        assert seen.count == 30
        torch.testing.assert_close(seen.min, truth.amin(0))
        torch.testing.assert_close(seen.max, truth.amax(0))
        torch.testing.assert_close(seen.mean, truth.mean(0))
        torch.testing.assert_close(seen.sample, truth)
        torch.testing.assert_close(seen.amax, truth.abs().amax(0))
    assert no_hooks(model)


@pytest.mark.parametrize("sizes", [(100,), (1, 2, 3, 94), (7,) * 14 + (2,), (1,) * 100])
@pytest.mark.parametrize("rows", [1, 7, 32, 99, 100])
def test_sample_is_evenly_spaced_whatever_the_batches(sizes, rows):
    """A row carries its running number, so the sample shows which rows were kept."""
    model = nn.Sequential(nn.Linear(1, 1)).eval()
    numbers = torch.arange(100.0)[:, None]
    sample = observe(model, numbers.split(list(sizes)), rows=rows).input(model[0]).sample[:, 0]
    stride = 1 if len(sample) == 1 else int(sample[1] - sample[0])
    assert torch.equal(sample, torch.arange(0.0, 100.0, stride)[: len(sample)])
    assert len(sample) <= rows and 2 * len(sample) > min(rows, 99)


def test_batches_may_be_one_tensor_pairs_or_keywords(model):
    x = torch.randn(4, 8)
    alone = observe(model, x).input(model.fc2)
    for batches in ([x], [(x, torch.zeros(4))], [[x, "label"]], [{"x": x, "scale": 2.0}], {"x": x}, iter([x])):
        seen = observe(model, batches).input(model.fc2)
        assert torch.equal(seen.sample, alone.sample) and seen.count == alone.count


def test_a_keyword_mask_may_hold_infinities(model):
    class Masked(Mlp):
        def forward(self, x, mask):
            return super().forward(x)

    masked = Masked().eval()
    mask = torch.full((4,), -torch.inf)
    assert observe(masked, [{"x": torch.randn(4, 8), "mask": mask}]).input(masked.fc1).count == 4


def test_modules_limits_what_is_watched(model):
    observed = observe(model, torch.randn(4, 8), modules=[model.norm])
    assert model.norm in observed and model.fc1 not in observed
    assert observed.output(model.norm).count == 4
    with pytest.raises(Unsupported, match=r"this Linear was not observed; name it in observe\(modules=...\)"):
        observed.input(model.fc1)


def test_a_shared_layer_sums_its_calls():
    linear = nn.Linear(3, 3)
    model = nn.Sequential(linear, nn.ReLU(), linear).eval()
    assert observe(model, torch.randn(5, 3)).input(linear).count == 10


def test_observe_is_deterministic_and_leaves_no_gradient(model):
    batches = [torch.randn(40, 8) for _ in range(4)]
    first, second = observe(model, batches, rows=16), observe(model, batches, rows=16)
    assert torch.equal(first.input(model.fc1).sample, second.input(model.fc1).sample)
    assert not first.output(model.fc1).mean.requires_grad


def test_observe_takes_half_precision():
    model = Mlp().eval().bfloat16()
    seen = observe(model, torch.randn(4, 8).bfloat16()).input(model.fc1)
    assert seen.sample.dtype == seen.min.dtype == seen.mean.dtype == torch.float32


def test_a_layer_no_batch_reached(model):
    observed = observe(model, torch.randn(4, 8))
    assert model.unused not in observed
    with pytest.raises(Unsupported, match="no calibration batch reached unused; it has no statistics"):
        observed.input(model.unused)


@pytest.mark.parametrize(
    "batches, error, message",
    [
        ([], ValueError, "no calibration batches; give at least one"),
        (iter(()), ValueError, "no calibration batches; give at least one"),
        ([torch.zeros(0, 8)], ValueError, r"batch 0 is empty, shape \(0, 8\); give at least one image"),
        ([torch.zeros(1, 8), torch.full((1, 8), torch.nan)], ValueError, "batch 1 holds NaN or an infinity"),
        ([torch.full((1, 8), torch.inf)], ValueError, "batch 0 holds NaN or an infinity; clean the calibration data"),
        ([{"x": torch.full((1, 8), torch.nan)}], ValueError, "batch 0 holds NaN or an infinity"),
        (["photo.jpg"], TypeError, "batch 0 is a str; expected a Tensor, a tuple or list starting with one, or a map"),
        ([("photo.jpg",)], TypeError, "batch 0 is a tuple; expected a Tensor"),
    ],
)
def test_observe_names_what_is_wrong_with_the_data(model, batches, error, message):
    with pytest.raises(error, match="observe: " + message):
        observe(model, batches)
    assert no_hooks(model)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_observe_names_the_layer_that_overflows(model, bad):
    def batches():
        yield torch.randn(1, 8)
        model.fc1.bias.data[0] = bad
        yield torch.randn(1, 8)

    with pytest.raises(ValueError, match="observe: the output of fc1 holds NaN or an infinity in batch 1"):
        observe(model, batches())
    assert no_hooks(model)


def test_observe_checks_its_arguments(model):
    x = torch.randn(1, 8)
    with pytest.raises(ValueError, match=r"in training mode, .*call model.eval\(\)"):
        observe(model.train(), x)
    model.eval()
    with pytest.raises(ValueError, match="rows=0 keeps no sample; use at least 1"):
        observe(model, x, rows=0)
    with pytest.raises(ValueError, match="a Linear in modules is not part of the model"):
        observe(model, x, modules=[nn.Linear(8, 8)])


def test_hooks_are_removed_when_the_model_raises(model):
    with pytest.raises(RuntimeError):
        observe(model, torch.randn(4, 9))
    assert no_hooks(model)


def test_activation_of_refuses_nothing():
    with pytest.raises(ValueError, match=r"x has shape \(0, 4\) and no element; give at least one row"):
        Activation.of(torch.zeros(0, 4))


# ---- scales


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_symmetric_minmax_covers_each_group(groups):
    x = uneven(50, 12)
    scale = symmetric_scale(x, groups=groups)
    assert scale.shape == (groups,)
    assert (x.reshape(50, groups, -1) / scale[:, None]).round().abs().max() == 127


def test_symmetric_percentile_drops_exactly_the_outermost():
    x = torch.arange(1.0, 1001.0).reshape(100, 10)
    assert symmetric_scale(x, "percentile", percentile=99.9) * 127 == pytest.approx(999)
    assert symmetric_scale(x, "percentile", percentile=99.0) * 127 == pytest.approx(990)
    assert symmetric_scale(-x, "percentile", percentile=100.0) * 127 == pytest.approx(1000)


@pytest.mark.parametrize("groups", [1, 4])
def test_mse_clips_a_lone_outlier(groups):
    x = torch.randn(100_000, 4)
    x[0] = 8.0

    def error(method):
        scale = symmetric_scale(x, method, groups=groups)
        return ((x / scale).round().clamp(-127, 127) * scale - x).square().mean()

    assert error("mse") < 0.8 * error("minmax")


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("low, high", [(-0.17, 6.0), (0.5, 2.0), (-3.0, -1.0), (-1.0, 1.0)])
def test_affine_holds_zero_exactly(method, low, high):
    x = torch.rand(300, 8) * (high - low) + low
    scale, zero_point = affine_scale(x, method)
    assert scale.shape == (1,) and -128 <= zero_point <= 127
    codes = ((x / scale).round() + zero_point).clamp(-128, 127)
    if method == "minmax":
        # the rounded zero point moves the range by half a step; half a step more is the rounding of the code
        assert ((codes - zero_point) * scale - x).abs().max() <= scale * (1 + 2e-5)
        assert codes.max() - codes.min() >= 250 * (x.max() - x.min()) / (max(high, 0) - min(low, 0))


def test_affine_mse_clips_a_lone_outlier():
    x = nn.functional.gelu(torch.randn(40_000, 16))
    x[0, 0] = 10.0
    assert affine_scale(x, "mse")[0] < 0.9 * affine_scale(x)[0]


def test_a_constant_zero_has_a_usable_scale():
    x = torch.zeros(3, 4)
    for method in ("minmax", "percentile", "mse"):
        assert torch.equal(symmetric_scale(x, method, groups=2), torch.ones(2))
        assert torch.equal(affine_scale(x, method)[0], torch.ones(1))


def test_scales_check_their_arguments():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="4 channels do not divide into groups=3"):
        symmetric_scale(x, groups=3)
    for function in (symmetric_scale, affine_scale):
        unknown = f"{function.__name__}: unknown method 'max'; use 'minmax', 'percentile' or 'mse'"
        with pytest.raises(ValueError, match=unknown):
            function(x, "max")
        with pytest.raises(ValueError, match=r"percentile=0\.999 is outside 50\.\.100"):
            function(x, "percentile", percentile=0.999)


# ---- folds


def test_fold_matches_the_published_example():
    fold = Fold.from_affine(SCALE, ZERO_POINT, 1.0, 8.0)
    torch.testing.assert_close(fold.shift, torch.tensor([0.0, 0.15, -0.24, 0.4]))
    gamma, beta = fold_norm(GAMMA, BETA, fold)
    torch.testing.assert_close(gamma, torch.tensor([5.0, 40.0, 4.1666667, 10.0]))
    torch.testing.assert_close(beta, torch.tensor([0.5, -7.0, 2.0, -0.25]))
    weight, bias = fold_linear(WEIGHT, BIAS, fold)
    torch.testing.assert_close(weight, torch.tensor([[0.1, -0.05, 0.24, 0.1], [0.2, 0.0, -0.06, 0.04]]))
    torch.testing.assert_close(bias, torch.tensor([-0.43, -0.14]))

    y, folded = NORMALISED * GAMMA + BETA, NORMALISED * gamma + beta
    codes = torch.tensor([[10, 0, 13, 7], [15, 9, 6, 14]])
    assert torch.equal(((y / SCALE).round() + ZERO_POINT).clamp(0, 15).long(), codes)
    assert torch.equal((folded.round() + 8).clamp(0, 15).long(), codes)
    output = torch.tensor([[3.575, -0.085], [0.475, 1.795]])
    torch.testing.assert_close(nn.functional.linear(y, WEIGHT, BIAS), output)
    torch.testing.assert_close(nn.functional.linear(folded, weight, bias), output)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_norm_fold_leaves_the_output(strength, affine, with_bias):
    norm, linear = nn.LayerNorm(32, elementwise_affine=affine), nn.Linear(32, 24, bias=with_bias)
    if affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        norm.weight.data[3] = norm.bias.data[3] = 0.0  # a dead channel: its range is zero
    x = torch.randn(50, 32)
    fold = range_fold(Activation.of(norm(x)), strength)
    gamma, beta = fold_norm(norm.weight, norm.bias, fold)
    weight, bias = fold_linear(linear.weight, linear.bias, fold)
    folded = nn.functional.linear(nn.functional.layer_norm(x, (32,), gamma, beta), weight, bias)
    torch.testing.assert_close(folded, linear(norm(x)), rtol=1e-5, atol=1e-5)


def test_a_value_fold_leaves_attention():
    """P (V / r) = (P V) / r: without a shift the fold passes through the attention average."""
    value, proj = nn.Linear(16, 16), nn.Linear(16, 16)
    x, p = torch.randn(2, 9, 16), torch.rand(2, 9, 9)
    fold = range_fold(Activation.of(p @ value(x)), centre=False)
    assert not fold.shift.any()
    y = nn.functional.linear(p @ value(x) / fold.ratio, *fold_linear(proj.weight, proj.bias, fold))
    torch.testing.assert_close(y, proj(p @ value(x)), rtol=1e-5, atol=1e-5)


def test_full_strength_makes_every_range_equal_and_centred():
    fold = range_fold(seen := Activation.of(uneven(200, 8)), strength=1.0)
    folded = fold.activation(seen)
    torch.testing.assert_close(folded.max, torch.ones(8))
    torch.testing.assert_close(folded.min, -torch.ones(8))


def test_a_fold_moves_statistics_as_it_moves_data():
    x = uneven(64, 8)
    fold = range_fold(Activation.of(x))
    moved, truth = fold.activation(Activation.of(x)), Activation.of((x - fold.shift) / fold.ratio)
    for name in ("min", "max", "mean", "sample", "amax"):
        torch.testing.assert_close(getattr(moved, name), getattr(truth, name))
    assert moved.count == truth.count


def test_a_fold_narrows_the_spread_of_the_ranges():
    x = Activation.of(uneven(500, 16))
    spread = [float((y := range_fold(x, s).activation(x).amax).max() / y.min()) for s in (0.0, 0.5, 1.0)]
    assert spread[0] > 900 and 25 < spread[1] < 40 and spread[2] == pytest.approx(1, rel=0.05)


def test_an_outlier_fold_touches_only_outliers():
    x = nn.functional.gelu(torch.randn(300, 9))
    x = x / x.amax(0)
    x[0, 4] = 100.0
    fold = outlier_fold(Activation.of(x))
    assert fold.ratio[4] == pytest.approx(10)
    assert torch.equal(fold.ratio[[0, 1, 2, 3, 5, 6, 7, 8]], torch.ones(8)) and not fold.shift.any()


def test_a_tensor_of_zeros_folds_to_itself():
    x = Activation.of(torch.zeros(3, 4))
    for fold in (range_fold(x), outlier_fold(x)):
        assert torch.equal(fold.ratio, torch.ones(4)) and torch.equal(fold.shift, torch.zeros(4))


def test_bias_correction_keeps_the_mean_output():
    weight, x = torch.randn(6, 10), torch.randn(400, 10) + 2
    weight_hat = weight + 0.01 * torch.randn_like(weight)
    corrected = x @ weight_hat.T + bias_correction(weight, weight_hat, x.mean(0))
    torch.testing.assert_close(corrected.mean(0), (x @ weight.T).mean(0), rtol=1e-5, atol=1e-5)


def test_folds_check_their_arguments():
    fold = Fold(torch.ones(4), torch.zeros(4))
    with pytest.raises(ValueError, match=r"Fold: got ratio \(4,\) and shift \(3,\); both must be \(C,\)"):
        Fold(torch.ones(4), torch.zeros(3))
    for ratio in (torch.zeros(4), -torch.ones(4), torch.full((4,), torch.inf)):
        with pytest.raises(ValueError, match="Fold: every ratio must be positive and every entry finite"):
            Fold(ratio, torch.zeros(4))
    with pytest.raises(ValueError, match="fold_norm: the norm has 5 channels but the fold has 4"):
        fold_norm(torch.ones(5), None, fold)
    with pytest.raises(ValueError, match="fold_linear: the linear takes 5 channels but the fold has 4"):
        fold_linear(torch.ones(2, 5), None, fold)
    x = Activation.of(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"range_fold: strength=1\.5 is outside 0\.\.1"):
        range_fold(x, 1.5)
    with pytest.raises(ValueError, match=r"outlier_fold: strength=-1 is outside 0\.\.1"):
        outlier_fold(x, -1)
    with pytest.raises(ValueError, match=r"got weight \(2, 5\), weight_hat \(2, 4\), mean \(5,\); expected"):
        bias_correction(torch.ones(2, 5), torch.ones(2, 4), torch.ones(5))
