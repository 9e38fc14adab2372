"""Sparse24Linear, the form that learns, the gate and the recipe."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from _problems import U32, assert_same_bits
from _vits import module_names, pixels, relative_error, vit
from torch import nn

from pyvit_accel import Unsupported, accelerate, load, ops, recipes, save, sparsity
from pyvit_accel.formats import packed
from pyvit_accel.models import digits_data, digits_model
from pyvit_accel.modules import Sparse24Linear, Sparse24Training, train_sparse24
from pyvit_accel.sparsity import gate, masks
from pyvit_accel.sparsity.moments import Moments

NAN = float("nan")
SPARSE24 = recipes.SPARSE24
U16 = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


def layer(K=36, N=20, bias=True):
    linear = nn.Linear(K, N, bias).requires_grad_(False)
    x = torch.randn(200, 9) @ torch.randn(9, K) + 0.3 * torch.randn(200, K) + 0.5  # inputs that know of each other
    return linear, x


@pytest.mark.parametrize("dtype", [*U16, "int8"])
@pytest.mark.parametrize("mask", ["magnitude", "wanda", "sparsegpt"])
def test_masks_and_formats(mask, dtype):
    linear, x = layer()
    new = Sparse24Linear.from_linear(linear, mask, x, dtype)
    w = new.dequantized_weight()
    assert (w.view(20, -1, 4).count_nonzero(-1) <= 2).all() and w.count_nonzero() > 20 * 36 // 2 - 40
    y = new(x)
    assert y.dtype == x.dtype and y.shape == (200, 20)
    assert relative_error(y, x @ w.T + new.bias) < {"float16": 1e-3, "bfloat16": 8e-3, "int8": 2e-2}[dtype]
    if mask != "sparsegpt":  # which changes values
        keep = masks.magnitude(linear.weight) if mask == "magnitude" else masks.wanda(linear.weight, Moments.of(x).norm)
        step = U16[dtype] * linear.weight.abs() if dtype in U16 else new.w_scale[:, None] / 2 * 1.001
        assert ((w - linear.weight * keep).abs() <= step).all()
    # The mean of the error is in the bias.
    assert ((x @ w.T + new.bias - linear(x)).mean(0).abs() < 1e-5).all()


@pytest.mark.parametrize("mask", sparsity.METHODS)
def test_inputs_that_fill_no_chunk(mask):
    linear, x = layer(37, 5)
    for dtype in ("float16", "int8"):
        new = Sparse24Linear.from_linear(linear, mask, x, dtype)
        w = new.weight
        assert w[:, 36].count_nonzero() >= 4 and (w[:, :36].reshape(5, 9, 4).count_nonzero(-1) <= 2).all()
        assert relative_error(new(x), x @ w.T + new.bias) < 2e-2


def test_what_sees_the_inputs_errs_less():
    errors = []
    for mask in ("sparsegpt", "wanda", "magnitude"):
        torch.manual_seed(1)
        linear, x = layer(64, 48)
        errors.append(relative_error(Sparse24Linear.from_linear(linear, mask, x)(x), linear(x)))
    assert errors[0] < 0.6 * errors[1] and errors[1] < errors[2]


def test_floats_are_rounded_once():
    linear, x = layer(bias=False)
    for dtype, u in U16.items():
        new = Sparse24Linear.from_linear(linear, dtype=dtype)
        w, xs = new.codes().double(), x.to(new.w_values.dtype).double()
        bound = 36 * U32 * (xs.abs() @ w.abs().T) + u * (xs @ w.T).abs() * 1.01 + 1e-7
        assert ((new(x).double() - xs @ w.T).abs() <= bound).all()


def test_integers_are_those_of_lowbit_linear():
    linear, x = layer()
    for static in ({}, {"x_scale": torch.tensor([0.02]), "x_zero_point": -5}):
        new = Sparse24Linear.from_linear(linear, dtype="int8", **static)
        codes, scale = ops.quantize(x, *static.values())
        dense = packed.pack(new.codes())
        expected = ops.lowbit_linear(codes, scale, dense, new.w_scale, new.bias, x_zero_point=new.x_zero_point)
        assert_same_bits(new(x), expected)


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"dtype": "int8"}, {"x_scale": torch.ones(1) * 0.1}])
def test_state_copies_and_moves(options):
    linear, x = layer()
    if "x_scale" in options:
        options = options | {"dtype": "int8", "x_zero_point": 3}
    new = Sparse24Linear.from_linear(linear, **options)
    y = new(x)
    state = new.state_dict()
    assert "w_dense" not in state
    for assign in (False, True):
        other = Sparse24Linear(**new.config())
        other(x)
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(x), y) and str(other) == str(new)  # and not by a weight unpacked before
    with torch.device("meta"):
        blank = Sparse24Linear(**new.config())
    assert blank.to("meta").w_dense is None
    blank.load_state_dict(state, assign=True)
    assert torch.equal(blank(x), y)
    twin = copy.deepcopy(new).half()
    assert torch.equal(twin(x), y) and twin.w_values.dtype == new.w_values.dtype
    assert twin.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(new.to_linear().weight, new.weight) and torch.equal(new(x), y)
    with pytest.raises((ValueError, RuntimeError), match=r"in_features=36; expected 1, 20 and 40|size mismatch"):
        Sparse24Linear(**(new.config() | {"in_features": 40})).load_state_dict(state)


def test_repr_and_bytes():
    linear, _ = layer(256, 128)
    new = Sparse24Linear.from_linear(linear, dtype="int8")
    assert str(new) == (
        "Sparse24Linear(in_features=256, out_features=128, bias=True, weight=2:4 int8, activation=int8 per token)"
    )
    assert new.weight_bytes() == 128 * 256 * 5 // 8 + 2 * 4 * 128  # half the values, an eighth for places; scales, sums
    assert Sparse24Linear.from_linear(linear).weight_bytes() == 2 * 128 * 256 * 9 // 16


def test_refuses_a_gradient_and_other_shapes():
    linear, x = layer()
    new = Sparse24Linear.from_linear(linear)
    with pytest.raises(RuntimeError, match="no derivative"):
        new(x.requires_grad_()).sum().backward()
    with pytest.raises(ValueError, match=r"Sparse24Linear: x has shape \(200, 35\), expected \(..., in_features=36\)"):
        new(x[:, :35])


def test_compiles_and_exports_as_one_graph():
    linear, x = layer()
    new = Sparse24Linear.from_linear(linear, dtype="int8")
    assert torch.equal(torch.compile(new, fullgraph=True, backend="eager")(x), new(x))
    with torch.no_grad():
        exported = torch.export.export(new, (x,)).module()
        assert torch.equal(exported(x), new(x))


def broken(**changes):
    linear, _ = layer()
    for name, (index, value) in changes.items():
        getattr(linear, name)[index] = value
    return linear


TOO_MANY = torch.arange(20 * 36).view(20, 36) % 4 > 0
REFUSALS = {
    "weight holds 1 NaN": (Unsupported, lambda: Sparse24Linear.from_linear(broken(weight=((3, 5), NAN)))),
    "the largest weight is 7e+04, beyond float16": (
        Unsupported, lambda: Sparse24Linear.from_linear(broken(weight=((3, 5), 7e4)))
    ),
    "mask 'wanda' reads the layer's inputs": (Unsupported, lambda: Sparse24Linear.from_linear(broken(), "wanda")),
    "mask 'best' is not one of magnitude": (ValueError, lambda: Sparse24Linear.from_linear(broken(), "best")),
    "row 0, chunk 0": (ValueError, lambda: Sparse24Linear.from_linear(broken(), TOO_MANY)),
    "mask is torch.float32 (20, 36), expected torch.bool": (
        ValueError, lambda: Sparse24Linear.from_linear(broken(), TOO_MANY.float())
    ),
    "inputs of 35 features, the layer has 36": (
        ValueError, lambda: Sparse24Linear.from_linear(broken(), inputs=torch.randn(9, 35))
    ),
    "dtype 'int4' is not one of": (ValueError, lambda: Sparse24Linear(8, 8, dtype="int4")),
    "x_static belongs to int8": (ValueError, lambda: Sparse24Linear(8, 8, x_static=True)),
    "backward='sparse' is not one of": (ValueError, lambda: Sparse24Training(8, 8, backward="sparse")),
    "every=0; masks": (ValueError, lambda: Sparse24Training(8, 8, every=0)),
    "decay=-1": (ValueError, lambda: Sparse24Training(8, 8, decay=-1)),
    "'blocks.9.*' matches no nn.Linear": (ValueError, lambda: train_sparse24(vit(), "blocks.9.*")),
    "mask='best' is not one of": (ValueError, lambda: SPARSE24(mask="best")),
    "layers is empty; give globs": (ValueError, lambda: SPARSE24(layers=[])),
    "weight is on meta, without values": (
        Unsupported, lambda: Sparse24Linear.from_linear(nn.Linear(8, 8, device="meta"))
    ),
    "weight holds 1 NaN or infinite values, the first at [3, 5]": (
        Unsupported, lambda: Sparse24Linear.from_linear(broken(weight=((3, 5), NAN)), "wanda", torch.ones(4, 36))
    ),
    "rows=0": (ValueError, lambda: SPARSE24(rows=0)),
    "dtype='fp8' is not one of float16, bfloat16, int8": (ValueError, lambda: SPARSE24(dtype="fp8")),
    "target='sm_90'; use 10 major + minor": (ValueError, lambda: SPARSE24(target="sm_90")),
    "target=9; use 10 major + minor": (ValueError, lambda: SPARSE24(target=9)),
    "SPARSE24: layers='encoder.*' names no nn.Linear of the model; they are blocks.0.attn.qkv": (
        ValueError, lambda: accelerate(vit(), SPARSE24(mask="magnitude", layers=["*.fc1", "encoder.*"]))
    ),
    "not 4 x 8 bits": (ValueError, lambda: SPARSE24 + recipes.W4A8),
    "leave dtype='bfloat16' out": (ValueError, lambda: SPARSE24(dtype="bfloat16") + recipes.W8A8),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    error, call = REFUSALS[message]
    with pytest.raises(error, match=re.escape(message)):
        call()


VIT_B = {"qkv": (2304, 768), "proj": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}


def kept_dense(images, capability, integer=False):
    kept = set()
    for name, (N, K) in VIT_B.items():
        try:
            gate.check(images * 197, N, K, capability, integer)
        except Unsupported:
            kept.add(name)
    return kept


def test_gate():
    """ViT-B/16 on Hopper: from 10 images on for fc1, 14 for qkv, 40 for proj and fc2; on Ampere four times earlier."""
    assert kept_dense(1, 90) == set(VIT_B)
    assert kept_dense(10, 90) == {"qkv", "proj", "fc2"} and kept_dense(14, 90) == kept_dense(32, 90) == {"proj", "fc2"}
    assert not kept_dense(40, 90) and not kept_dense(10, 80) and kept_dense(9, 80) == {"proj", "fc2"}
    assert "proj" in kept_dense(256, 90, integer=True) and "fc2" not in kept_dense(256, 90, integer=True)
    with pytest.raises(Unsupported, match=r"0.15 M outputs.*; from (\d+) rows a call on it does \(rows=\)") as refusal:
        gate.check(197, 768, 3072, 90)
    enough = int(re.search(r"from (\d+) rows", str(refusal.value))[1])
    gate.check(enough, 768, 3072, 90)
    with pytest.raises(Unsupported):
        gate.check(enough - 1, 768, 3072, 90)
    with pytest.raises(Unsupported, match="no batch is large enough"):
        gate.check(10**6, 64, 64, 90)
    with pytest.raises(Unsupported, match="sm_75 has no sparse units"):
        gate.check(10**6, 4096, 4096, 75)
    with pytest.raises(Unsupported, match=r"197 rows x 768 features are 0.15 M outputs, 2:4 pays from 6 M on"):
        gate.check(197, 768, 3072, 90)
    with pytest.raises(Unsupported, match=r"768 inputs, int8: 2:4 is modelled at 0.\d\d times dense speed on sm_90"):
        gate.check(50432, 768, 768, 90, integer=True)
    assert 1.3 < gate.speed_up(6304, 3072, 768, 90) < 1.5 < gate.speed_up(10**6, 4096, 8192, 90) + 0.01
    assert gate.speed_up(6304, 3072, 768, 100) == gate.speed_up(6304, 3072, 768, 90)


def classes(model):
    names = module_names(model)
    return {name: names.count(name) for name in ("Sparse24Linear", "QuantLinear", "QuantBlock", "Linear")}


def test_recipe():
    model, images = vit(), pixels()
    new, report = accelerate(model, SPARSE24, [images])
    assert classes(new) == {"Sparse24Linear": 8, "QuantLinear": 0, "QuantBlock": 0, "Linear": 1}
    reasons = {entry.name: entry.reason for entry in report.kept}
    assert "a classifier reads one row per image" in reasons["head"]
    text = str(report)
    assert "8 2:4 float16 x float16" in text and text.count("this shows accuracy") == 1
    errors = sorted(one.error for one in report.layers)
    assert errors[0] > 0 and errors[-1] < 1
    assert f"2:4: 8 layers pruned, output error {errors[4]:.2g} (median), at most {errors[-1]:.2g} (blocks." in text
    better, worse = (
        relative_error(accelerate(model, SPARSE24(mask=mask, permute=False), [images])[0](images), model(images))
        for mask in ("sparsegpt", "magnitude")
    )
    assert better < worse
    plain, report = accelerate(model, SPARSE24(mask="magnitude", dtype="bfloat16"))  # without data
    assert plain.blocks[0].mlp.fc1.dtype == "bfloat16" and all(one.error is None for one in report.layers)
    with pytest.raises(ValueError, match=r"SPARSE24 chooses weights on calibration images; .*mask=\"magnitude\""):
        accelerate(model, SPARSE24)
    assert repr(SPARSE24) == "Recipe(SPARSE24)"


def test_recipe_with_int8(tmp_path):
    model, images = vit(), pixels()
    new, report = accelerate(model, SPARSE24(dtype="int8"), [images])
    assert classes(new) == {"Sparse24Linear": 8, "QuantLinear": 0, "QuantBlock": 0, "Linear": 1}
    assert {layer.weight for layer in report.layers} == {"2:4 int8"}
    save(new, tmp_path / "m")
    assert torch.equal(load(tmp_path / "m", vit())(images), new(images))
    exp_free, _ = accelerate(model, recipes.EXP_FREE_ATTENTION + SPARSE24(mask="magnitude"), [images])
    assert classes(exp_free)["Sparse24Linear"] == 4 and "ExpFreeSelfAttention" in module_names(exp_free)


def test_recipe_gate_and_layers():
    model, images = vit(), pixels()
    new, report = accelerate(model, SPARSE24(target=90), [images])
    assert classes(new)["Sparse24Linear"] == 0
    assert "6304 rows x 192 features are 1.2 M outputs" in str(report)
    new, report = accelerate(model, SPARSE24(target=90, layers="*.fc1", rows=10**7), [images])
    assert "modelled at" in str(report)  # 64 inputs are too few
    new, report = accelerate(model, SPARSE24(layers=["*.fc1", "*.qkv"]), [images])
    assert classes(new)["Sparse24Linear"] == 4
    assert {e.reason for e in report.kept if e.name.endswith("fc2")} == {"layers= does not name it"}
    with pytest.raises(Unsupported, match=r"blocks.0.attn.qkv: 6304 rows"):
        accelerate(model, SPARSE24(target=90), [images], strict=True)


class Forked(nn.Module):
    """A branch that no batch reaches, one with NaN, and one that works."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.broken = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.broken.weight.data[2, 5] = NAN

    def forward(self, x):
        return self.used(x) + (self.broken(x) * 0).nan_to_num()


def test_recipe_names_what_it_could_not_take():
    new, report = accelerate(Forked().eval(), SPARSE24, [torch.randn(4, 8)])
    reasons = {entry.name: entry.reason for entry in report.kept}
    assert "no calibration batch reached unused" in reasons["unused"] and "NaN" in reasons["broken"]
    assert type(new.used) is Sparse24Linear


@pytest.mark.parametrize("backward", ["dense", "transposable", "bimask"])
def test_gradients_are_numeric_ones(backward):
    """dx of the product with W Mb, dW of the dense weight, by differences."""
    torch.manual_seed(3)
    train = Sparse24Training.from_linear(nn.Linear(12, 8).double(), backward=backward)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    target = torch.randn(5, 8, dtype=torch.float64)

    def loss_of(x, w):
        return ((x @ w.T + train.bias - target).sin() ** 2).sum()

    y = train(x)
    ((y - target).sin() ** 2).sum().backward()
    w = train.weight.detach() * train.mask
    assert torch.equal(train.sparse_weight(), w) and torch.equal(y, x @ w.T + train.bias)
    dw, steps = torch.zeros_like(w), 1e-6
    for i in range(w.numel()):
        change = torch.zeros(w.numel(), dtype=w.dtype)
        change[i] = steps
        change = change.view_as(w)
        dw.view(-1)[i] = (loss_of(x, w + change) - loss_of(x, w - change)).detach() / (2 * steps)
    torch.testing.assert_close(train.weight.grad, dw, atol=1e-8, rtol=1e-7)
    back = getattr(train, "back_mask", train.mask)
    dy = torch.autograd.grad(((z := y.detach().requires_grad_()) - target).sin().square().sum(), z)[0]
    torch.testing.assert_close(x.grad, dy @ (train.weight.detach() * back))
    if backward != "bimask":
        torch.testing.assert_close(
            x.grad, torch.autograd.functional.jacobian(lambda x: loss_of(x, w), x.detach()), atol=1e-10, rtol=1e-9
        )
    torch.testing.assert_close(train.bias.grad, dy.sum(0))


def test_masks_of_the_two_ways():
    linear = nn.Linear(64, 32).requires_grad_(False)
    two, four = Sparse24Training.from_linear(linear), Sparse24Training.from_linear(linear, backward="transposable")
    assert torch.equal(two.mask, masks.magnitude(linear.weight))
    for axis in (four.mask, four.mask.T):
        assert (axis.reshape(-1, 4).sum(1) == 2).all()
    bimask = Sparse24Training.from_linear(linear, backward="bimask")
    assert torch.equal(bimask.mask, two.mask) and not (bimask.back_mask & ~bimask.mask).any()
    ordered = bimask.back_mask[bimask.order]
    assert (ordered.T.reshape(-1, 4).sum(1) <= 2).all()
    assert bimask.order.sort().values.tolist() == list(range(32))
    plain = masks.magnitude((linear.weight * two.mask).T).T & two.mask
    assert bimask.back_mask.sum() > plain.sum() > bimask.mask.sum() * 0.7


def test_decay_and_schedule():
    torch.manual_seed(0)
    linear = nn.Linear(16, 8, bias=False)
    x, plain = torch.randn(4, 16), Sparse24Training.from_linear(copy.deepcopy(linear))
    decayed = Sparse24Training.from_linear(linear, decay=0.5, every=3, until=6)
    for module in (plain, decayed):
        module(x).sum().backward()
    w = linear.weight.detach()
    torch.testing.assert_close(linear.weight.grad - plain.weight.grad, 0.5 * w * ~decayed.mask)
    updates = []
    for _ in range(9):
        before = decayed.mask.clone()
        with torch.no_grad():
            linear.weight.copy_(torch.randn(8, 16))
        decayed(x)
        updates.append(not torch.equal(before, decayed.mask))
    # steps 1 to 9: at 3 and 6, not at 9
    assert updates == [False, False, True, False, False, True, False, False, False]
    decayed.eval()(x)
    assert decayed.steps == 10
    other = Sparse24Training(16, 8, bias=False)
    other.load_state_dict(decayed.state_dict())
    assert other.steps == 10 and torch.equal(other.mask, decayed.mask)


def test_autocast_and_frozen_inputs():
    for backward in ("dense", "bimask"):
        train = Sparse24Training.from_linear(nn.Linear(16, 8), backward=backward)
        with torch.autocast("cpu", torch.bfloat16):
            y = train(torch.randn(2, 3, 16))
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert train.weight.grad.dtype == torch.float32 and train.weight.grad.shape == (8, 16)


def test_learned_layers_keep_their_masks():
    model, images = vit(), pixels()
    names = train_sparse24(model, "blocks.*", backward="transposable")
    assert len(names) == 8
    with torch.no_grad():
        y = model.eval()(images)
    new, _ = accelerate(model, SPARSE24(mask="magnitude"))
    assert classes(new)["Sparse24Linear"] == 8 and relative_error(new(images), y) < 5e-3
    fc1 = new.blocks[0].mlp.fc1.codes() != 0
    assert torch.equal(fc1, model.blocks[0].mlp.fc1.mask) and (fc1.T.reshape(-1, 4).sum(1) == 2).all()


def test_digits_learn_sparse():
    """From the dense weights: magnitude alone costs five points, after one pass over the data it is one at most."""
    pytest.importorskip("sklearn")
    (x, labels), (test_x, test_labels) = digits_data("train"), digits_data("test")
    model = digits_model()

    @torch.inference_mode()
    def accuracy(model):
        return (model.eval()(test_x).argmax(1) == test_labels).double().mean().item()

    dense = accuracy(model)
    assert accuracy(accelerate(model, SPARSE24(mask="magnitude"))[0]) < dense - 0.03
    train_sparse24(model, "blocks.*", decay=2e-4, every=4)
    optimizer = torch.optim.AdamW(model.requires_grad_().train().parameters(), lr=5e-4, weight_decay=0.01)
    for index in torch.randperm(len(x)).split(100):
        loss = nn.functional.cross_entropy(model(x[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    packed_model, report = accelerate(model.eval(), SPARSE24(mask="magnitude"))
    assert len(report.replaced) == 16 and accuracy(packed_model) >= dense - 0.01
