"""Schedules in whole models: float and accelerated, ours, timm's and transformers', saved, restored and refused."""

from __future__ import annotations

import copy
import warnings
from importlib.util import find_spec

import pytest
import torch
from _torchvision_stub import import_timm
from _vits import VARIANTS, module_names, pixels, relative_error, spread, vit
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyvit_accel import TokenSchedule, accelerate, load, recipes, reduce_tokens, save, token_state
from pyvit_accel.errors import Unsupported
from pyvit_accel.formats.softmax import log2
from pyvit_accel.modules import QuantBlock
from pyvit_accel.modules.token_block import TokenBlock
from pyvit_accel.recipes import DIFFRATE, EVIT, TOME, W8A8, W8A8_DYNAMIC, W8A16

DEPTH, PATCHES = 4, 16
COUNTS = {"prune": [17, 14, 12, 8], "merge": [16, 13, 10, 8]}
SCHEDULES = {
    "tome": TokenSchedule("tome", {"r": 3}),
    "evit": TokenSchedule("evit", {"rate": 0.6, "layers": [1, 2]}),
    "evit, fused": TokenSchedule("evit", {"rate": 0.6, "layers": [1, 2], "fuse": True}),
    "diffrate": TokenSchedule("diffrate", COUNTS),
    "tofu": TokenSchedule("tofu", {"r": 3, "switch": 2}),
    "zero_tprune": TokenSchedule("zero_tprune", {"rate": 0.7, "similar": 2, "layers": [1, 2]}),
}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def model(**overrides):
    return vit(depth=DEPTH, **overrides)


def schedule_for(name: str, variant: dict) -> TokenSchedule:
    """Of counts that have the model's prefix in them."""
    extra = variant.get("num_registers", 0) + variant.get("distilled", False)
    if name != "diffrate" or not extra:
        return SCHEDULES[name]
    return TokenSchedule("diffrate", {key: [n + extra for n in counts] for key, counts in COUNTS.items()})


def run(net, images=None):
    with torch.no_grad():
        return net(pixels() if images is None else images)


def blocks_of(net):
    return [m for m in net.modules() if isinstance(m, (TokenBlock, QuantBlock))]


class Counts:
    """How many tokens leave each block."""

    def __init__(self, net):
        self.seen = []
        self.hooks = [b.register_forward_hook(lambda m, i, y: self.seen.append(y.shape[1])) for b in blocks_of(net)]


@every_schedule
@pytest.mark.parametrize("variant", ["plain", "distilled", "registers", "layer scale", "qk norm"])
def test_quantized_blocks_do_what_float_ones_do(name, variant):
    """The same tokens but for choices that codes of 8 bits tip; logits as near as without a schedule."""
    net = model(**VARIANTS[variant])
    schedule = recipes.tokens(schedule_for(name, VARIANTS[variant]), restore=False)
    plain, _ = accelerate(net, W8A8, [pixels()])
    floats, _ = accelerate(net, schedule)
    quantized, report = accelerate(net, W8A8 + schedule, [pixels()])
    assert all(isinstance(b, QuantBlock) for b in blocks_of(quantized)) and "tokens: " in str(report)
    counts = [Counts(m) for m in (floats, quantized)]
    y, truth = run(quantized), run(floats)
    assert counts[0].seen == counts[1].seen and counts[0].seen[-1] < token_state(floats).shape[1]
    before = relative_error(run(plain), run(net))
    same = (token_state(quantized).origin() == token_state(floats).origin()).float().mean()
    assert same > 0.6 and relative_error(y, truth) < 0.1 + 3 * before
    assert relative_error(truth, run(net)) > 1e-3  # something happened


@every_schedule
def test_images_do_not_see_each_other(name):
    """And two runs give the same bits."""
    quantized, _ = accelerate(model(), W8A8 + recipes.tokens(SCHEDULES[name]), [pixels()])
    y = run(quantized)
    again = run(quantized)
    assert torch.equal(y, again)
    flipped = run(quantized, pixels().flip(0))
    assert torch.equal(flipped.flip(0), y)


def test_no_reduction_is_the_model():
    """Schedules that keep everything change no bit of a quantized model and nothing but rounding of a float one."""
    net = model()
    for schedule in (TokenSchedule("tome", {"r": 0}), TokenSchedule("evit", {"rate": 1.0, "layers": [1]})):
        plain, _ = accelerate(net, W8A8, [pixels()])
        quantized, _ = accelerate(net, W8A8 + recipes.tokens(schedule), [pixels()])
        assert torch.equal(run(quantized), run(plain))
        floats, _ = accelerate(net, recipes.tokens(schedule))
        torch.testing.assert_close(run(floats), run(net))


@every_schedule
def test_restored_tokens_are_where_they_were(name):
    """forward_features gives all tokens back: merged ones share a row, dropped ones are no row of the others."""
    net, _ = accelerate(model(), W8A8 + recipes.tokens(SCHEDULES[name], restore=True), [pixels()])
    features = net.forward_features(pixels())
    assert features.shape[1] == 1 + PATCHES
    origin = token_state(net).origin()
    for image, rows in zip(features, origin, strict=True):
        for row in rows[rows >= 0].unique():
            group = image[rows == row]
            assert torch.equal(group, group[:1].expand_as(group))
    if any(step is not None and step.drops for step in SCHEDULES[name].steps(DEPTH)) and name != "diffrate":
        assert (origin < 0).any()


def test_mean_pooling_weighs_by_size():
    """A mean over restored tokens is the mean by sizes of those that are left."""
    net = model(pool="avg")
    reduced, _ = accelerate(net, TOME(3))
    y = run(reduced)
    state = token_state(reduced)
    bare, _ = accelerate(net, recipes.tokens(SCHEDULES["tome"], restore=False))
    with torch.no_grad():
        rows = bare.forward_features(pixels())
        weight = state.size[:, 1:, None] / PATCHES
        expected = bare.head(bare.fc_norm((rows[:, 1:] * weight).sum(1)))
    torch.testing.assert_close(y, expected)


def test_dropping_before_a_dense_head_warns():
    with pytest.warns(UserWarning, match=r"EVIT.*: the head of VisionTransformer may read the patches that are"):
        accelerate(model(pool="avg"), EVIT(0.6, layers=(1,)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(model(pool="avg"), TOME(2))
        accelerate(model(), EVIT(0.6, layers=(1,)))


@every_schedule
def test_copies_have_a_state_of_their_own(name):
    """One for all their blocks, also when a forward with gradients came before."""
    net, _ = accelerate(model(), recipes.tokens(SCHEDULES[name]))
    y = net(pixels())
    twin = copy.deepcopy(net)
    assert torch.equal(twin(pixels()), y)
    states = {id(block.state) for block in blocks_of(twin)}
    assert len(states) == 1 and states != {id(token_state(net))}


def test_schedules_come_and_go():
    net, _ = accelerate(model(), W8A8, [pixels()])
    plain = run(net)
    for name, schedule in SCHEDULES.items():
        assert reduce_tokens(net, schedule) is net
        assert not torch.equal(run(net), plain), name
    reduce_tokens(net, None)
    assert torch.equal(run(net), plain)
    with pytest.raises(ValueError, match=r"token_state: no tokens of this VisionTransformer are reduced"):
        token_state(net)


@pytest.mark.parametrize("recipe", [W8A8, W8A8_DYNAMIC, W8A16, None], ids=lambda r: r.name if r else "float")
def test_saved_models_have_their_schedule(tmp_path, recipe):
    whole = TOME(3) if recipe is None else recipe + TOME(3)
    net, _ = accelerate(model(), whole, [pixels()])
    save(net, tmp_path / "net.safetensors")
    loaded = load(tmp_path / "net.safetensors")
    assert torch.equal(run(loaded), run(net))
    assert token_state(loaded).origin().shape == (4, 1 + PATCHES)
    reduce_tokens(net, None)
    save(net, tmp_path / "net.safetensors")
    assert torch.equal(run(load(tmp_path / "net.safetensors")), run(net))


def test_attention_without_an_exponential_stays(tmp_path):
    """In the blocks that reduce tokens too; its format is no other's."""
    net = model()
    exact, _ = accelerate(net, TOME(3))
    free, report = accelerate(net, recipes.EXP_FREE_ATTENTION + TOME(3))
    coarse, _ = accelerate(net, recipes.exp_free_attention("LOG2", log2(3)) + TOME(3))
    assert all(block.exp_free is not None for block in blocks_of(free)) and "TokenBlock" in str(report)
    truth = run(exact)
    assert 1e-6 < relative_error(run(free), truth) < relative_error(run(coarse), truth)
    save(free, tmp_path / "net.safetensors")
    assert torch.equal(run(load(tmp_path / "net.safetensors")), run(free))


def test_learned_steps_are_saved(tmp_path):
    schedule = TokenSchedule("dynamic_vit", {"dim": 64, "rate": 0.7, "layers": [1], "patches": PATCHES})
    net, _ = accelerate(model(), W8A8 + recipes.tokens(schedule), [pixels()])
    spread(net.blocks[1].step)
    save(net, tmp_path / "net.safetensors")
    assert torch.equal(run(load(tmp_path / "net.safetensors")), run(net))


def test_report_names_blocks_and_counts():
    _, report = accelerate(model(), W8A16 + TOME(3))
    text = str(report)
    assert "TokenBlock" in text and "17 to 14, 11, 8, 5" in text and "WeightOnlyLinear" in text
    assert module_names(accelerate(model(), W8A16 + TOME(3))[0]).count("WeightOnlyLinear") == 4 * DEPTH + 1


@pytest.mark.parametrize("name", ["tome", "evit", "diffrate"])
def test_compiles_as_one_graph(name):
    net, _ = accelerate(model(), W8A8 + recipes.tokens(SCHEDULES[name]), [pixels()])
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert torch.equal(run(compiled), run(net))
    assert torch.equal(run(compiled, pixels(3)), run(net, pixels(3)))


TIMM = ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"]


@pytest.mark.parametrize("classes", TIMM)
def test_timm(classes):
    timm = import_timm()
    net = timm.create_model(classes, pretrained=False, img_size=56, num_classes=5, embed_dim=48, num_heads=3, depth=3)
    net = spread(net)
    images = torch.randn(2, 3, 56, 56)
    for name in ("tome", "tofu"):
        floats, _ = accelerate(net, recipes.tokens(SCHEDULES[name]))
        quantized, report = accelerate(net, W8A8 + recipes.tokens(SCHEDULES[name]), [images])
        assert token_state(quantized).num_prefix_tokens == net.num_prefix_tokens and len(blocks_of(quantized)) == 3
        assert relative_error(run(quantized, images), run(floats, images)) < 0.3
        assert relative_error(run(floats, images), run(net, images)) > 1e-4
        assert " to " in str(report)


SIZES = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 3, "image_size": 40, "patch_size": 8}
HIDDEN = {"intermediate_size": 96}
FAMILIES = {  # options, tokens of the prefix
    "ViTForImageClassification": (HIDDEN, 1),
    "DeiTForImageClassification": (HIDDEN, 2),
    "Dinov2ForImageClassification": ({}, 1),
    "Dinov2WithRegistersModel": ({"num_register_tokens": 4}, 5),
    "CLIPVisionModel": (HIDDEN, 1),
    "SiglipVisionModel": (HIDDEN, 0),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers(family):
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    import_timm()
    import transformers

    options, prefix = FAMILIES[family]
    kind = family.replace("ForImageClassification", "").removesuffix("Model")
    config = getattr(transformers, f"{kind}Config")(**SIZES, **options)
    net = spread(getattr(transformers, family)(config))
    images = torch.randn(2, 3, 40, 40)

    def last(m):
        with torch.no_grad():
            y = m(images)
        return y.logits if "logits" in y else y.last_hidden_state

    quantized, report = accelerate(net, W8A8 + TOME(4), [{"pixel_values": images}])
    floats, _ = accelerate(net, TOME(4))
    assert last(quantized).shape == last(net).shape
    assert relative_error(last(quantized), last(floats)) < 0.35
    assert relative_error(last(floats), last(net)) > 1e-4
    state = token_state(quantized)
    assert state.num_prefix_tokens == prefix and state.size.sum(1).eq(25 + prefix).all()
    assert len(blocks_of(quantized)) == 3 and "QuantBlock" in str(report)


def test_towers_are_reduced_one_by_one():
    """Blocks of two chains do not see each other's tokens."""
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    import_timm()
    from transformers import SiglipConfig, SiglipModel

    tower = SIZES | HIDDEN
    text = {k: v for k, v in tower.items() if k not in ("image_size", "patch_size")} | {"vocab_size": 30}
    net = spread(SiglipModel(SiglipConfig(text_config=text, vision_config=tower)))
    with pytest.raises(Unsupported, match=r"blocks in text_model\.encoder\.layers, vision_model\."):
        reduce_tokens(net, SCHEDULES["tome"])
    reduce_tokens(net.vision_model, SCHEDULES["tome"])
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        y = net.get_image_features(pixel_values=images)
    assert torch.is_tensor(y) or y.pooler_output is not None
    assert token_state(net).origin().shape == (2, 25)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: accelerate(model(), TOME(9)), ValueError, r"r=9 merges of 17 tokens, 1 of them prefix; .* 8, can"),
        (lambda: accelerate(model(), TOME([1, 2])), ValueError, r"2 entries.*4 blocks"),
        (lambda: accelerate(model(), EVIT(0.5)), ValueError, r"layers \(3, 6, 9\) must ascend within 0\.\.3"),
        (lambda: accelerate(model(), DIFFRATE("deit-s", "2.9G")), ValueError, r"12 blocks, the model 4"),
        (lambda: DIFFRATE("deit-x", "1G"), ValueError, r"no schedule 'deit-x' '1G'; there are deit-t"),
        (lambda: accelerate(model(), TOME(1) + EVIT(0.5)), ValueError, r"one schedule of tokens"),
        (lambda: accelerate(torch.nn.Linear(4, 4).eval(), TOME(1)), Unsupported, r"Linear has no block"),
        (lambda: TokenSchedule("toom"), ValueError, r"method 'toom' is not one of"),
    ],
)  # fmt: skip
def test_refused_with_the_numbers(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_what_a_file_cannot_hold_is_not_saved(tmp_path):
    path = tmp_path / "net.safetensors"
    reduced, _ = accelerate(model(), TOME(3))
    after, _ = accelerate(reduced, W8A16)
    assert relative_error(run(after), run(reduced)) < 0.1
    with pytest.raises(ValueError, match=r"blocks\.0\.qkv\.0 was replaced after .*; accelerate with both in one call"):
        save(after, path)
    outer = torch.nn.Sequential(model()).eval()
    outer, _ = accelerate(outer, W8A8_DYNAMIC)
    reduce_tokens(outer[0], SCHEDULES["tome"])
    with pytest.raises(ValueError, match=r"the tokens of 0 are reduced, which Sequential does not know; save 0 itself"):
        save(outer, path)
    assert not path.exists()


def test_no_class_token_to_rank_by():
    timm = import_timm()
    options = {"class_token": False, "global_pool": "avg", "embed_dim": 32, "depth": 2, "num_heads": 2}
    net = timm.models.vision_transformer.VisionTransformer(32, 8, num_classes=3, **options).eval()
    for method, arguments in (
        ("evit", {"layers": [1]}), ("diffrate", {"prune": [9, 8], "merge": [8, 8]}), ("zero_tprune", {"layers": [1]}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"0 tokens of the prefix; it ranks patches by what the class token"):
            reduce_tokens(net, TokenSchedule(method, arguments))
    images = torch.randn(2, 3, 32, 32)
    uniform = {"layers": [1], "start": "uniform", "similar": 2}
    for schedule in (TokenSchedule("tome", {"r": 2}), TokenSchedule("zero_tprune", uniform)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert run(reduce_tokens(net, schedule), images).isfinite().all()
    assert run(net, images[:0]).shape == (0, 3)
    with pytest.raises(ValueError, match=r"VisionTransformer is in training mode; call model\.eval\(\) first"):
        reduce_tokens(net.train(), schedule)


def test_state_before_a_forward():
    net, _ = accelerate(model(), TOME(3))
    with pytest.raises(ValueError, match=r"no forward since the schedule was set; call the model first"):
        token_state(net).origin()


def test_a_mask_is_refused():
    net, _ = accelerate(model(), W8A8 + TOME(3), [pixels()])
    with pytest.raises(ValueError, match=r"attn_mask came to a block whose tokens are reduced"):
        net.blocks[0](torch.randn(1, 17, 64), torch.ones(1, 1, 17, 17, dtype=torch.bool))


def test_an_error_leaves_the_model():
    net = model()
    before = run(net)
    with pytest.raises(ValueError, match=r"2 entries"):
        accelerate(net, W8A8 + TOME([1, 2]), [pixels()], inplace=True)
    assert torch.equal(run(net), before) and not blocks_of(net)


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that an op returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            # Views of what is there already, an expanded bias for example, are no memory.
            own = isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() // max(t.element_size(), 1)
            self.numel = max(self.numel, own or 0)
        return result


@every_schedule
def test_no_attention_map_is_in_memory(name):
    """Of 401 tokens not even one head's, quantized or not; nor one of similarities."""
    long = vit(depth=DEPTH, dim=16, num_heads=2, image_size=80, patch_size=4, mlp_ratio=1.0)
    N, images = 401, pixels(1, size=80)
    schedule = SCHEDULES[name]
    if name == "diffrate":
        schedule = TokenSchedule("diffrate", {"prune": [401, 380, 300, 200], "merge": [390, 350, 250, 150]})
    quantized, _ = accelerate(long, W8A8 + recipes.tokens(schedule), [images])
    floats, _ = accelerate(long, recipes.tokens(schedule))
    with Largest() as whole:
        torch.randn(N, N).softmax(-1)
    assert whole.numel == N * N
    for net in (quantized, floats):
        run(net, images)
        with Largest() as largest:
            run(net, images)
        assert 0 < largest.numel < N * N // 2
