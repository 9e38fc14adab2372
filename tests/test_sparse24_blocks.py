"""2:4 weights in quantised blocks: the ops that take them, Sparse24QuantLinear, and SPARSE24 + W8A8."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from _problems import assert_same_bits, block, codes, mlp, projection, scattered, sparse_codes
from _vits import module_names, pixels, relative_error, vit
from torch import nn

from pyvit_accel import Unsupported, accelerate, backends, load, ops, recipes, save
from pyvit_accel.formats import packed
from pyvit_accel.formats.sparse24 import Sparse24Operand
from pyvit_accel.modules import QuantLinear, Sparse24QuantLinear, Sparse24Training, sparse24_weight, train_sparse24
from pyvit_accel.ops.sparse24_linear import multiplies_dense
from pyvit_accel.sparsity import gate

SPARSE24, W8A8 = recipes.SPARSE24, recipes.W8A8
WEIGHTS = ("qkv_w", "proj_w", "fc1_w", "fc2_w")


def two_forms(args: dict, names: tuple[str, ...]) -> tuple[dict, dict]:
    """The arguments with 2:4 weights, as packed ones and as operands of sparse units."""
    dense, sparse = dict(args), dict(args)
    for name in names:
        N = len(args[f"{name}_scale"])
        q = sparse_codes(N, args["x"].shape[-1] if name in ("w", "qkv_w", "fc1_w") else K_OF[name])
        dense[name], sparse[name] = packed.pack(q), Sparse24Operand.of(q)
    return dense, sparse


K_OF = {"proj_w": 48, "fc2_w": 80}


@pytest.mark.parametrize("static", [False, True])
def test_ops_of_blocks_take_either_weight(impl, static):
    args = block(2, 7, 48, 2, 80, static=static)
    dense, sparse = two_forms(args, WEIGHTS)
    one = sparse | {name: dense[name] for name in ("proj_w", "fc1_w")}  # some are, some are not
    for tokens in (None, 3):
        expected = impl(ops.quant_block, **dense, tokens=tokens)
        for form in (sparse, one):
            assert_same_bits(impl(ops.quant_block, **form, tokens=tokens), expected)
    assert_same_bits(impl(ops.quant_mlp, **mlp(sparse)), impl(ops.quant_mlp, **mlp(dense)))


def test_project_takes_either_weight(impl):
    dense, sparse = two_forms(projection(block(2, 7, 48, 2, 80)), ("w",))
    ptr, col, weight = ops.group_tokens(torch.randint(0, 4, (2, 7)).int(), 4, torch.rand(2, 7) + 0.1)[:3]
    for moved in ({}, {"ptr": ptr, "col": col, "weight": weight}):
        assert_same_bits(impl(ops.quant_project, **sparse, **moved), impl(ops.quant_project, **dense, **moved))


@pytest.mark.parametrize("rows", [13, 1])
def test_rows_by_an_index(impl, rows):
    M, K, N = 13, 37, 19
    q = sparse_codes(N, K)
    linear = (torch.rand(N) * 0.1, torch.randn(N))
    x, x_scale = codes("random", M, K), torch.rand(rows) * 0.1
    index = torch.tensor([4, -1, 0, 4, M - 1, -1], dtype=torch.int32)
    places = torch.tensor([2, 0, -1, 5, 1, 3], dtype=torch.int32)
    rest = {"x_zero_point": 3, "activation": "gelu", "layer_scale": torch.randn(N), "index": index}
    out = torch.randn(7, N)
    forms = (Sparse24Operand.of(q), packed.pack(q))
    for call, first in ((ops.lowbit_linear, ()), (scattered, (out, places))):
        sparse, dense = (impl(call, *first, x, x_scale, w, *linear, **rest) for w in forms)
        assert_same_bits(sparse, dense)
    residual = torch.randn(6, N)
    codes_out = {"out_scale": torch.rand(N) + 0.1, "out_bits": 4, "residual": residual}
    sparse, dense = (impl(ops.lowbit_linear, x, x_scale, w, *linear, **rest, **codes_out) for w in forms)
    assert_same_bits(sparse, dense)


def test_ops_refuse_operands_that_do_not_fit():
    args = two_forms(block(2, 7, 48, 2, 80), WEIGHTS)[1]
    values, meta, sums = args["proj_w"]
    for change, message in (
        (Sparse24Operand(values[:-1], meta, sums), r"values \(7, 4, 32, 16\).*a weight \(48, 48\)"),
        (Sparse24Operand(values, meta, sums[:-1]), r"sums \(47,\) of torch.int32; a weight \(48, 48\) of codes"),
        (Sparse24Operand(values.half(), meta, sums), "sparse24: values"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.quant_block(**args | {"proj_w": change})
        with pytest.raises(ValueError, match=message):
            ops.lowbit_linear(codes("random", 3, 48), torch.ones(1), change, torch.ones(48))


def quant_linear(bias=True, **inputs) -> QuantLinear:
    new = QuantLinear(36, 20, bias, **inputs)
    new.pack(sparse_codes(20, 36), torch.rand(20) * 0.1, torch.randn(20) if bias else None)
    return new


@pytest.fixture
def sparse_units(monkeypatch):
    """As on a GPU: modules made and moved from here on keep no dense form."""
    monkeypatch.setattr(sparse24_weight, "multiplies_dense", lambda values: False)


@pytest.mark.skipif(not backends.HAS_CUDA_LIBRARY, reason="the CUDA library is not built")
@pytest.mark.parametrize("capability, driver, dense", [(80, True, False), (90, False, True), (75, True, True)])
def test_gpus_without_sparse_kernels_multiply_dense(monkeypatch, capability, driver, dense):
    from pyvit_accel.cuda import sparse24_linear as launcher

    monkeypatch.setattr(launcher, "device", lambda index: (capability, 132))
    monkeypatch.setattr(launcher, "has_driver", lambda: driver)
    values = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=0))
    assert multiplies_dense(values) is dense and multiplies_dense(torch.empty(0))


INPUTS = [{}, {"bias": False}, {"x_minimum": -0.2, "x_bits": 4, "x_table": True}, {"x_scale": 1}, {"x_scale": 36}]


@pytest.mark.parametrize("inputs", INPUTS)
def test_module_has_the_bits_of_the_dense_one(inputs, monkeypatch):
    dense, x = quant_linear(**inputs), torch.randn(5, 36)
    if dense.x_scale is not None:
        dense.x_zero_point = 3
    new, y = Sparse24QuantLinear.from_quant(dense), dense(x)
    assert_same_bits(new(x), y)
    state = new.state_dict()
    assert "w_packed" not in state and "w_packed" in dict(new.named_buffers())
    for assign in (False, True):
        other = Sparse24QuantLinear.from_config(new.config())
        other.load_state_dict(state, assign=assign)
        assert_same_bits(other(x), y)
    with torch.device("meta"):
        blank = Sparse24QuantLinear.from_config(new.config())
    blank.load_state_dict(state, assign=True)
    assert_same_bits(blank(x), y)
    with torch.no_grad():
        assert_same_bits(torch.export.export(new, (x,)).module()(x), y)
    assert_same_bits(torch.compile(new, fullgraph=True, backend="eager")(x), y)
    monkeypatch.setattr(sparse24_weight, "multiplies_dense", lambda values: False)
    moved = copy.deepcopy(new).half()
    assert moved.w_packed is None and new.w_packed is not None
    assert_same_bits(moved(x), y)  # the scales keep their dtype
    with torch.no_grad():
        assert_same_bits(torch.export.export(moved, (x,)).module()(x), y)
    assert torch.equal(moved.weight, dense.weight) and moved.weight_bytes() == new.weight_bytes()


def test_module_says_what_it_is():
    new = Sparse24QuantLinear.from_quant(quant_linear())
    assert str(new) == (
        "Sparse24QuantLinear(in_features=36, out_features=20, bias=True, weight=2:4 int8, activation=int8 per token)"
    )
    assert new.formats() == ("2:4 int8", "int8")
    with pytest.raises(ValueError, match=r"x has shape \(5, 35\), expected \(..., in_features=36\)"):
        new(torch.randn(5, 35))
    with pytest.raises(RuntimeError, match="no derivative"):
        new(torch.randn(5, 36, requires_grad=True)).sum().backward()
    crowded = quant_linear()
    crowded.pack(torch.ones(20, 36, dtype=torch.int8), torch.ones(20), None)
    with pytest.raises(ValueError, match=r"row 0, chunk 0 .* more than two non-zeros"):
        Sparse24QuantLinear.from_quant(crowded)
    with pytest.raises(ValueError, match="weights of 4 bits; sparse units multiply 8"):
        Sparse24QuantLinear.from_quant(QuantLinear(36, 20, w_bits=4))
    state = new.state_dict()
    state["_extra_state"][0] = 9
    with pytest.raises(ValueError, match=r"Sparse24QuantLinear: .* packing version 9, .*; expected 1, 20 and 36"):
        Sparse24QuantLinear.from_config(new.config()).load_state_dict(state)


def test_metadata_is_checked_where_nothing_unpacks_it(sparse_units):
    new = Sparse24QuantLinear.from_quant(quant_linear())
    state = new.state_dict() | {"w_meta": new.w_meta.clone()}
    state["w_meta"][0, 0, 0, 0] &= ~0xF
    with pytest.raises(ValueError, match="sparse24: row 0, chunk 0 has metadata 0; legal are"):
        Sparse24QuantLinear.from_config(new.config()).load_state_dict(state)


def classes(model: nn.Module) -> dict[str, int]:
    names = module_names(model)
    return {name: names.count(name) for name in ("QuantBlock", "Sparse24QuantLinear", "QuantLinear", "Sparse24Linear")}


ALL = {"QuantBlock": 2, "Sparse24QuantLinear": 8, "QuantLinear": 1, "Sparse24Linear": 0}


def test_recipe_makes_blocks(tmp_path, sparse_units):
    model, images = vit(), pixels()
    weight = model.blocks[0].mlp.fc1.weight.clone()
    new, report = accelerate(model, SPARSE24 + W8A8, [images])
    assert report.recipe == "SPARSE24 + W8A8" and classes(new) == ALL
    assert torch.equal(model.blocks[0].mlp.fc1.weight, weight)
    text = str(report)
    assert "8 2:4 int8 x int8, 1 int8 x int8" in text and text.count("this shows accuracy") == 1
    assert "2:4: 8 layers pruned, output error 0." in text
    assert new.blocks[0].attention.qkv.w_packed is None
    sparse, _ = accelerate(model, SPARSE24, [images])
    assert relative_error(new(images), sparse(images)) < 0.03 < relative_error(sparse(images), model(images))
    # The zeros are those of the float model.
    assert not new.blocks[1].mlp.fc2.weight[sparse.blocks[1].mlp.fc2.weight == 0].any()
    save(new, tmp_path / "m")
    assert_same_bits(load(tmp_path / "m")(images), new(images))


def test_dense_and_sparse_devices_give_the_same_bits(monkeypatch):
    images = pixels()
    for recipe in (W8A8, W8A8 + recipes.TOME(3), recipes.integer(8, 8, granularity="tensor")):
        new, _ = accelerate(vit(), SPARSE24 + recipe, [images])
        assert classes(new)["Sparse24QuantLinear"] == 8
        expected = new(images)
        with monkeypatch.context() as m:
            m.setattr(sparse24_weight, "multiplies_dense", lambda values: False)
            assert_same_bits(copy.deepcopy(new).to("cpu")(images), expected)


def test_block_compiles_and_exports_as_one_graph(sparse_units):
    new, _ = accelerate(vit(), SPARSE24(mask="magnitude") + recipes.W8A8_DYNAMIC)
    block, x = new.blocks[0], torch.randn(2, 17, 64)
    with torch.no_grad():
        y = block(x)
        assert_same_bits(torch.compile(block, fullgraph=True, backend="eager")(x), y)
        assert_same_bits(torch.export.export(block, (x,)).module()(x), y)


def test_recipe_without_data():
    fresh = vit()
    nn.init.zeros_(fresh.head.weight)  # which is no pruned layer
    assert classes(accelerate(fresh, SPARSE24(mask="magnitude") + recipes.W8A8_DYNAMIC)[0]) == ALL
    new, report = accelerate(vit(), SPARSE24(mask="magnitude") + recipes.W8A8_DYNAMIC)
    assert classes(new) == ALL and "layers pruned" not in str(report)
    with pytest.raises(ValueError, match=r"SPARSE24 \+ W8A8_DYNAMIC chooses weights on calibration images; .* 128"):
        accelerate(vit(), SPARSE24 + recipes.W8A8_DYNAMIC)
    with pytest.raises(ValueError, match="takes its scales from data"):
        accelerate(vit(), SPARSE24(mask="magnitude") + W8A8)


def test_sums_with_more():
    images = pixels()
    for recipe in (SPARSE24 + W8A8 + recipes.EXP_FREE_ATTENTION, recipes.EXP_FREE_ATTENTION + (SPARSE24 + W8A8)):
        new, report = accelerate(vit(), recipe, [images])
        assert relative_error(new(images), vit()(images)) < 0.5 and report.recipe == recipe.name
    with pytest.raises(ValueError, match="8 bits that a search chose, which fills the zeros; add W8A8"):
        SPARSE24 + recipes.integer(8, 8, search=True)
    with pytest.raises(ValueError, match="the sum is int8 by int8; leave dtype='float16' out"):
        SPARSE24(dtype="float16") + W8A8
    for codes_first in (W8A8, recipes.W4A8, W8A8 + recipes.TOME(3)):
        with pytest.raises(ValueError, match="comes first and takes every Linear; put SPARSE24 first"):
            codes_first + SPARSE24
    explicit, _ = accelerate(vit(), SPARSE24(dtype="int8") + W8A8, [images])
    assert classes(explicit) == ALL
    layerwise, _ = accelerate(vit(), SPARSE24(dtype="int8") + recipes.W4A8, [images])
    assert classes(layerwise) == {"QuantBlock": 0, "Sparse24QuantLinear": 0, "QuantLinear": 1, "Sparse24Linear": 8}


def test_gate_and_layers():
    images = pixels()
    new, report = accelerate(vit(), SPARSE24(layers="*.fc?") + W8A8, [images])
    assert classes(new) == ALL | {"Sparse24QuantLinear": 4, "QuantLinear": 5} and "4 2:4 int8 x int8" in str(report)
    new, report = accelerate(vit(), SPARSE24(target=90) + W8A8, [images])
    assert classes(new) == ALL | {"Sparse24QuantLinear": 0, "QuantLinear": 9}
    text = str(report)
    assert "2:4: blocks.*.attn.qkv (2) dense: 6304 rows x 192 features are 1.2 M outputs" in text
    assert "2:4: blocks.*.mlp.fc2 (2) dense: 6304 rows x 64 features" in text and "modelled at" not in text
    wide = nn.Sequential(nn.Linear(768, 3072), nn.Linear(3072, 768)).eval()
    _, report = accelerate(wide, SPARSE24(mask="magnitude", target=90, rows=10**5) + recipes.W8A8_DYNAMIC)
    gain, lost = f"{gate.speed_up(10**5, 768, 3072, 90, integer=True):.2f}", "modelled at 1.00 times dense speed"
    assert f"2:4: modelled at {gain} to {gain} times the speed of the dense layers" in str(report)
    assert f"2:4: 0 (1) dense: 100000 rows x 3072 features x 768 inputs, int8: 2:4 is {lost}" in str(report)


def test_attention_with_packed_projections():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0, batch_first=True, norm_first=True).eval()
    model, x = nn.Sequential(layer, nn.Linear(32, 32)).eval(), torch.randn(16, 9, 6) @ torch.randn(6, 32)
    weight = layer.self_attn.in_proj_weight.clone()
    new, report = accelerate(model, SPARSE24 + W8A8, [x])
    assert classes(new)["Sparse24QuantLinear"] == 5 and "2:4: 5 layers pruned" in str(report)
    assert torch.equal(layer.self_attn.in_proj_weight, weight) and relative_error(new(x), model(x)) < 0.3
    new, _ = accelerate(model, SPARSE24, [x])
    assert type(new[0].self_attn) is nn.MultiheadAttention and classes(new)["Sparse24Linear"] == 3


def test_what_was_trained_keeps_its_mask():
    model = vit()
    train_sparse24(model, "blocks.0.*")
    masks = {name: m.mask for name, m in model.named_modules() if isinstance(m, Sparse24Training)}
    new, report = accelerate(model, SPARSE24(mask="magnitude", layers="blocks.1.*") + recipes.W8A8_DYNAMIC)
    assert classes(new) == ALL and len(masks) == 4 and "2:4: 4 layers keep the masks they" in str(report)
    assert not new.blocks[0].mlp.fc1.weight[~masks["blocks.0.mlp.fc1"]].any()
    single = nn.Sequential(Sparse24Training.from_linear(nn.Linear(16, 8)), nn.Linear(8, 8)).eval()
    new, _ = accelerate(single, SPARSE24(layers="1", mask="magnitude") + recipes.W8A8_DYNAMIC)
    assert [type(m) for m in new] == [Sparse24QuantLinear] * 2


def test_what_learns_and_is_kept_becomes_dense(tmp_path):
    """Whatever the reason: save and load know no layers that learn."""
    model = vit()
    train_sparse24(model, ["*", "head"])
    masked = {name: m.sparse_weight() for name, m in model.named_modules() if isinstance(m, Sparse24Training)}
    with pytest.raises(ValueError, match=r"save: blocks.0.attn.qkv is a Sparse24Training, which learns and"):
        save(accelerate(model, W8A8, [pixels()])[0], tmp_path / "m")
    for recipe, became in ((SPARSE24(mask="magnitude", target=90), nn.Linear), (SPARSE24(mask="magnitude"), None)):
        new, _ = accelerate(model, recipe)
        assert type(new.head) is nn.Linear and torch.equal(new.head.weight, masked["head"])
        assert became is None or type(new.blocks[0].mlp.fc1) is became
        assert "Sparse24Training" not in module_names(new) and len(masked) == 9
        save(new, tmp_path / "m")
        assert_same_bits(load(tmp_path / "m")(pixels()), new(pixels()))
    assert "Sparse24Training" in module_names(model)


def test_layers_that_cannot_be_sparse_are_named():
    model = vit()
    model.blocks[1].attn.proj.weight.data[3, 5] = float("nan")
    _, report = accelerate(model, SPARSE24(mask="magnitude") + recipes.W8A8_DYNAMIC)
    assert "2:4: blocks.*.attn.proj (1) dense: weight holds 1 NaN" in str(report)
    with pytest.raises(Unsupported, match=r"blocks.1: .*weight holds 1 NaN"):
        accelerate(model, SPARSE24(mask="magnitude") + recipes.W8A8_DYNAMIC, strict=True)
