"""sparsity.prune and the permutations it folds: what a model computes, what the report says, what is refused."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from _torchvision_stub import import_timm
from torch import nn

from pyvit_accel import sparsity
from pyvit_accel.errors import Unsupported
from pyvit_accel.formats import sparse24
from pyvit_accel.models.vit import VisionTransformer, ViTConfig
from pyvit_accel.modules import Sparse24Training
from pyvit_accel.sparsity import Moments, prune
from pyvit_accel.sparsity.stream import Stream

LAYERS = ["blocks.*.attn.qkv", "blocks.*.attn.proj", "blocks.*.mlp.fc?"]


@pytest.fixture
def vit():
    config = ViTConfig(32, 8, 3, 10, dim=32, depth=3, num_heads=2, qk_norm=True, layer_scale=True)
    model = VisionTransformer(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.5)
        if "norm" in name and name.endswith("weight"):
            parameter.abs_().add_(0.5)
    return model.double()


@pytest.fixture
def images():
    return torch.randn(12, 3, 32, 32, dtype=torch.float64)


def two_of_four(model, names):
    return all((model.get_submodule(n).weight.unflatten(1, (-1, 4)) != 0).sum(-1).max() <= 2 for n in names)


def test_folds_leave_the_network_unchanged(vit, images):
    """Within rounding of float64, whatever the order, and the inputs do come in that order."""
    before, other = vit(images), deepcopy(vit)
    for i in range(3):
        for name in (f"blocks.{i}.mlp.fc2", f"blocks.{i}.attn.proj"):
            pair = sparsity.pair_of(other, name)
            K = other.get_submodule(name).in_features
            order = torch.cat([torch.randperm(K // pair.heads) + h * (K // pair.heads) for h in range(pair.heads)])
            pair.fold(other, order)
            seen = [sparsity.observe(m, images, [name])[name] for m in (vit, other)]
            assert torch.allclose(seen[1].mean, seen[0].mean[order], atol=1e-5)
            assert not torch.allclose(seen[1].mean, seen[0].mean, atol=1e-3)
    assert torch.allclose(other(images), before, rtol=1e-10, atol=1e-10)


def test_timm_s_blocks_can_be_permuted():
    model = import_timm().create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval().double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = model(x)
    for name in ("blocks.0.mlp.fc2", "blocks.0.attn.proj"):
        pair = sparsity.pair_of(model, name)
        found = pair.search(model.get_submodule(name).weight.detach().square())
        assert found.after > found.before
        pair.fold(model, found.order)
    assert torch.allclose(model(x), before, rtol=1e-10, atol=1e-10)


class Fade(nn.Module):
    """No parameter, and no two channels alike."""

    def forward(self, x):
        return x * torch.linspace(0, 1, x.shape[-1])


def test_which_inputs_can_move(vit):
    for name in ("blocks.0.attn.qkv", "blocks.0.mlp.fc1", "head"):
        with pytest.raises(Unsupported, match=f"{name}: its inputs are shared with other layers; .* fc2 and proj"):
            sparsity.pair_of(vit, name)
    mlp = vit.blocks[0].mlp
    for mlp.act in (nn.GLU(), nn.PReLU(128), Fade()):
        kind = type(mlp.act).__name__
        with pytest.raises(Unsupported, match=f"blocks.0.mlp.fc2: its inputs do not follow .* fc1, through {kind}"):
            sparsity.pair_of(vit, "blocks.0.mlp.fc2")
    mlp.act = nn.SiLU()
    mlp.fc1 = nn.Linear(32, 256)  # of a gated MLP
    with pytest.raises(Unsupported, match=r"blocks.0.mlp.fc2: its inputs do not follow .* fc1, through SiLU"):
        sparsity.pair_of(vit, "blocks.0.mlp.fc2")
    vit.blocks[1].mlp.fc1 = Sparse24Training.from_linear(vit.blocks[1].mlp.fc1)
    with pytest.raises(Unsupported, match=r"blocks.1.mlp.fc2: fc1 is a Sparse24Training, of which more would have to"):
        sparsity.pair_of(vit, "blocks.1.mlp.fc2")
    vit.blocks[1].mlp.fc1 = nn.Linear(32, 128)
    vit.blocks[1].mlp.fc1.weight = vit.blocks[2].mlp.fc1.weight
    with pytest.raises(Unsupported, match=r"blocks.1.mlp.fc2: fc1 or fc2 share weights with blocks.2.mlp"):
        sparsity.pair_of(vit, "blocks.1.mlp.fc2")
    vit.blocks[2].attn.qkv = vit.blocks[0].attn.qkv
    with pytest.raises(Unsupported, match=r"blocks.2.attn.proj: qkv or proj share weights with blocks.0.attn"):
        sparsity.pair_of(vit, "blocks.2.attn.proj")
    vit.blocks[1].attn.temperature = nn.Parameter(torch.ones(2))
    with pytest.raises(Unsupported, match=r"blocks.1.attn.proj: this Attention is no plain attention"):
        sparsity.pair_of(vit, "blocks.1.attn.proj")


def test_refused_orders(vit):
    attn, mlp = vit.blocks[0].attn, vit.blocks[0].mlp
    across = torch.arange(32)
    across[[3, 20]] = across[[20, 3]]
    with pytest.raises(ValueError, match="input 20 of head 1 would come to place 3 of head 0"):
        sparsity.fold_values(attn.qkv, attn.proj, 2, across)
    with pytest.raises(ValueError, match="is no permutation of the 128 inputs"):
        sparsity.fold_hidden(mlp.fc1, mlp.fc2, torch.zeros(128, dtype=torch.long))
    with pytest.raises(ValueError, match="fc1 makes 96 features, fc2 takes 128"):
        sparsity.fold_hidden(attn.qkv, mlp.fc2, torch.arange(128))
    with pytest.raises(ValueError, match="qkv makes 128 features, 2 heads of proj take 32"):
        sparsity.fold_values(mlp.fc1, attn.proj, 2, torch.arange(32))


@pytest.mark.parametrize("method", sparsity.METHODS)
def test_what_is_left_is_2_4_and_packs(vit, images, method):
    model = vit.float()
    found = prune(model, LAYERS, [images.float()], method, permute=True)
    names = [one.name for one in found]
    assert names == [f"blocks.{i}.{name}" for i in range(3) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert two_of_four(model, names)
    for name in names:
        w = model.get_submodule(name).weight.bfloat16()
        assert torch.equal(sparse24.unpack(*sparse24.pack(w), *w.shape), w)
    for one in found:
        assert 0.5 < one.kept_energy < 1 and 0 < one.output_error < 1 and one.method == method
        moved = one.name.endswith(("fc2", "proj"))
        assert (one.permuted is not None and one.permuted >= 1) == moved and bool(one.reason) != moved
    assert max(one.permuted for one in found if one.permuted) > 1.01


def test_magnitude_needs_no_batch(vit):
    dense = deepcopy(vit)
    (one,) = prune(vit, "blocks.1.mlp.fc1", method="magnitude")
    w = dense.blocks[1].mlp.fc1.weight
    assert torch.allclose(vit.blocks[1].mlp.fc1.weight, w * sparsity.magnitude(w))
    assert one.output_error is None and one.kept_energy == pytest.approx(sparsity.kept_energy(w, sparsity.magnitude(w)))
    unchanged = [name for name, p in vit.named_parameters() if torch.equal(p, dense.get_parameter(name))]
    assert len(unchanged) == len(list(vit.parameters())) - 1


def test_the_reported_error_is_the_layer_s(vit, images):
    """Of the first block, which sees the same inputs in both: measured at its outputs."""
    for correct in (False, True):
        other, outputs = deepcopy(vit), []
        report = prune(other, LAYERS, [images], "wanda", correct_bias=correct, weigh_tokens=False)
        found = {one.name: one for one in report}
        x = vit.blocks[0].norm1(_tokens(vit, images))
        for model in (vit, other):
            qkv = model.blocks[0].attn.qkv
            outputs.append(qkv(x) - vit.blocks[0].attn.qkv.bias)
        exact = ((outputs[1] - outputs[0]).norm() / outputs[0].norm()).item()
        assert found["blocks.0.attn.qkv"].output_error == pytest.approx(exact, rel=1e-3)
        if correct:  # the mean of the error is gone
            assert (outputs[1] - outputs[0]).mean((0, 1)).abs().max() < 1e-5


def test_permuted_layers_are_calibrated_in_their_new_order(vit, images):
    other, name, outputs = deepcopy(vit), "blocks.0.mlp.fc2", []
    (one,) = prune(other, name, [images], permute=True, correct_bias=False, weigh_tokens=False)
    for model in (vit, other):
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda module, args, y: outputs.append(y - module.bias))
        model(images)
    exact = ((outputs[1] - outputs[0]).norm() / outputs[0].norm()).item()
    assert one.output_error == pytest.approx(exact, rel=1e-3) and one.permuted > 1


def _tokens(model, images):
    seen = []
    handle = model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(images)
    handle.remove()
    return seen[0]


def test_sequential_sees_the_pruned_network(vit, images):
    """Blocks later than the first are calibrated on what the pruned ones give; run from the start it is the same."""
    chained, whole, apart, one = (deepcopy(vit) for _ in range(4))
    batches = list(images.split(6))
    prune(chained, LAYERS, batches)
    prune(whole, LAYERS, batches, sequential=False)
    prune(one, LAYERS, batches, weigh_tokens=False)
    for i in range(3):
        prune(apart, f"blocks.{i}.*", batches)
    for name, parameter in chained.named_parameters():
        assert torch.allclose(parameter, apart.get_parameter(name), atol=1e-6)
    assert torch.equal(one.blocks[0].mlp.fc2.weight, whole.blocks[0].mlp.fc2.weight)
    assert not torch.allclose(one.blocks[1].mlp.fc2.weight, whole.blocks[1].mlp.fc2.weight, atol=1e-3)


def test_blocks_without_a_layer_are_run_through(vit, images):
    """Those in between hand on what the pruned ones before them give."""
    some, apart = deepcopy(vit), deepcopy(vit)
    prune(some, ["blocks.0.mlp.fc2", "blocks.2.mlp.fc2"], [images])
    for i in (0, 2):
        prune(apart, f"blocks.{i}.mlp.fc2", [images])
    for name, parameter in some.named_parameters():
        assert torch.allclose(parameter, apart.get_parameter(name), atol=1e-6)
    assert torch.equal(some.blocks[1].mlp.fc2.weight, vit.blocks[1].mlp.fc2.weight)


def test_tokens_count_by_what_their_error_does(vit, images):
    """The moments of fc1 count the first token more; those of proj and fc2 divide by the variance of the stream too."""
    seen = {}
    for name in ("attn.proj", "mlp.fc1", "mlp.fc2"):
        layer = vit.blocks[1].get_submodule(name)
        layer.register_forward_pre_hook(lambda module, args, name=name: seen.setdefault(name, args[0]))
    vit.blocks[1].register_forward_hook(lambda module, args, y: seen.setdefault("stream", y))
    vit(images)
    tokens = torch.ones(12, 17)
    tokens[:, 0] = 0.15 * 17
    names = [f"blocks.1.{name}" for name in ("attn.proj", "mlp.fc1", "mlp.fc2")]
    found = Stream(vit, [images], names, True, True).moments("blocks.1", names)
    for name in names:
        importance = tokens if name.endswith("fc1") else tokens / seen["stream"].var(-1, correction=0)
        expected = Moments.of(seen[name.removeprefix("blocks.1.")], importance)
        assert torch.allclose(found[name].gram, expected.gram, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", sparsity.METHODS)
def test_nothing_to_tell_apart(vit, images, method):
    """Weights of zero and images without contrast: no division by zero, nothing that is not finite."""
    model = vit.float()
    model.blocks[0].attn.proj.weight.zero_()
    model.blocks[1].mlp.fc2.weight.zero_()
    found = prune(model, LAYERS, [torch.zeros(8, 3, 32, 32)], method, permute=True)
    assert [found[1].permuted, found[7].permuted] == [1.0, 1.0] and model(images.float()).isfinite().all()


class Pairs(nn.Module):
    """Two blocks that are no chain: something is added in between, and one takes its input by name."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head, self.unused = nn.Linear(8, 3), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.blocks[1](input=self.blocks[0](x).relu() + x))


def test_models_without_a_chain_of_blocks():
    model, x = Pairs().eval(), torch.randn(64, 8)
    dense = deepcopy(model)
    found = prune(model, ["blocks.*", "head"], [x[:32], (x[32:], torch.zeros(32))], refits=False)
    assert [one.name for one in found] == ["blocks.0", "blocks.1", "head"] and two_of_four(model, ["blocks.0", "head"])
    with torch.no_grad():
        hidden = model.blocks[0](x).relu() + x
    seen = Moments.of(hidden)
    w = dense.blocks[1].weight
    assert torch.allclose(model.blocks[1].weight, sparsity.sparsegpt(w, seen.centred), atol=1e-5)


def test_each_method_is_what_it_says():
    """Of a layer by itself, with inputs of different sizes: the functions for one weight."""
    x = torch.randn(400, 8) @ (torch.eye(8) + torch.randn(8, 8) / 2) * torch.rand(8).square() + 1
    seen, dense = Moments.of(x), nn.Sequential(nn.Linear(8, 12)).eval().requires_grad_(False)
    w = dense[0].weight
    found = sparsity.sparsegpt(w, seen.centred)
    expected = {
        "magnitude": w * sparsity.magnitude(w),
        "wanda": w * sparsity.wanda(w, seen.norm),
        "sparsegpt": sparsity.refit(w, found != 0, seen.centred, found),
    }
    assert not torch.equal(expected["magnitude"], expected["wanda"])
    assert not torch.allclose(found, expected["sparsegpt"])
    for method, new in expected.items():
        model = deepcopy(dense)
        (one,) = prune(model, "0", [x], method)
        assert torch.allclose(model[0].weight, new, atol=1e-6)
        assert torch.allclose((model(x) - dense(x)).mean(0), torch.zeros(12), atol=1e-5)
        exact = ((x @ (new - w).T).std(0, correction=0).norm() * 400**0.5 / (x @ w.T).norm()).item()
        assert one.output_error == pytest.approx(exact, rel=1e-3)
        assert one.kept_energy == pytest.approx(sparsity.kept_energy(w, new != 0))


def test_permutations_weigh_by_the_inputs(vit, images):
    """A layer's order is of its Wanda scores, where there are inputs; of its weights alone for magnitude."""
    for name, method in (("blocks.0.mlp.fc2", "wanda"), ("blocks.0.mlp.fc2", "magnitude")):
        model, pair = deepcopy(vit), sparsity.pair_of(vit, name)
        seen = sparsity.observe(vit, [images], [name])[name]
        w = vit.get_submodule(name).weight.float()
        score = w.square() * (seen.gram.diagonal() if method == "wanda" else 1)
        (one,) = prune(model, name, [images], method, permute=True, weigh_tokens=False)
        found = pair.search(score)
        assert one.permuted == pytest.approx(found.after / found.before, rel=1e-4)


def test_refused(vit, images):
    with pytest.raises(ValueError, match=r"method='best'; use one of magnitude, wanda, sparsegpt"):
        prune(vit, LAYERS, [images], "best")
    with pytest.raises(ValueError, match=r"'blocks.9' matches no Linear of the model; they are blocks.0.attn.qkv, "):
        prune(vit, "blocks.9", [images])
    with pytest.raises(ValueError, match=r"prune: no layers are named; they are blocks.0.attn.qkv, "):
        prune(vit, [], [images])
    with pytest.raises(ValueError, match="images have shape"):
        prune(vit, LAYERS, [images, images[0]])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vit.modules())
    with pytest.raises(ValueError, match="sparsegpt needs calibration batches; magnitude alone does without"):
        prune(vit, LAYERS)
    pairs = Pairs().eval()
    before = deepcopy(pairs)
    for layers in ("unused", ["blocks.*", "unused"]):
        with pytest.raises(Unsupported, match="no calibration batch reached unused"):
            prune(pairs, layers, [torch.randn(4, 8)])
    assert torch.equal(pairs.blocks[0].weight, before.blocks[0].weight)
    assert not pairs.unused._forward_pre_hooks and not pairs.blocks[0]._forward_hooks
    pairs.head = nn.utils.parametrizations.weight_norm(pairs.head)
    with pytest.raises(Unsupported, match="head: its weight is computed from others"):
        prune(pairs, "head", method="magnitude")
    with pytest.raises(Unsupported, match=r"blocks.1: a Sparse24Training has its own mask; accelerate"):
        pairs.blocks[1] = Sparse24Training.from_linear(pairs.blocks[1])
        prune(pairs, "blocks.*", method="magnitude")
    with pytest.raises(Unsupported, match=r"blocks.0: its weight is on the meta device"):
        prune(Pairs().to("meta"), "blocks.*", method="magnitude")
    for name in ("blocks.1.norm2", "blocks.2.norm1"):  # before and behind the layer that is asked for
        spoilt = deepcopy(vit)
        spoilt.get_submodule(name).weight[3] = torch.nan
        with pytest.raises(ValueError, match=r"the output of blocks.[12] is not finite; clean the calibration"):
            prune(spoilt, ["blocks.*.attn.proj"], [images])
        with pytest.raises(ValueError, match=r"the input of blocks.2.attn.proj is not finite; .* weights before it"):
            prune(spoilt, ["blocks.*.attn.proj"], [images], sequential=False)
    vit.blocks[1].mlp.fc1.weight[5, 9] = torch.nan
    before = deepcopy(vit.blocks[0])
    for method in sparsity.METHODS:
        with pytest.raises(ValueError, match=r"blocks.1.mlp.fc1: row 5, chunk 2 holds nan; weights must be finite"):
            prune(vit, LAYERS, [images], method)
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, vit.blocks[0].get_parameter(name))
