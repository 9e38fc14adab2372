"""Blocks on selected tokens, DyT and DiT: the specification's vectors, and that the modes agree."""

from __future__ import annotations

import pytest
import torch
from _routing import (
    DYNAMIC,
    ORDER,
    STATIC,
    B,
    C,
    FloatBlock,
    N,
    NoSync,
    adapter,
    alone,
    blocks_for,
    float_blocks,
    gate,
    groups,
    quant_blocks,
    some,
    tokens,
)
from _vits import spread
from torch import nn

from pyvit_accel import ops, recipes
from pyvit_accel.models.vit import ViTConfig
from pyvit_accel.tokens import packed
from pyvit_accel.tokens.avit import HaltingBlocks
from pyvit_accel.tokens.dit import RoutedBlock
from pyvit_accel.tokens.dyt import Adapter, DispatchedBlock, TokenDispatcher, selection_loss
from pyvit_accel.tokens.routing import MODES, Runner, TokenGate

METHODS = {
    "DyT, float": lambda: TokenDispatcher(gate(), adapter(), nn.LayerNorm(C), nn.Linear(C, C)).requires_grad_(False),
    "DyT": lambda: DispatchedBlock(quant_blocks()[0], gate(), adapter()),
    "DyT, dynamic": lambda: DispatchedBlock(quant_blocks(DYNAMIC)[0], gate(), adapter()),
    "DiT, padded": lambda: RoutedBlock(gate(), float_blocks()[0], "padded", 0.6),
    "DiT": lambda: RoutedBlock(gate(), quant_blocks()[0]),
    "A-ViT, masked": lambda: HaltingBlocks(float_blocks(), 1.0, 0.0, mode="masked"),
    "A-ViT": lambda: HaltingBlocks(quant_blocks(), 1.0, 0.0),
    "IA-RED2, padded": lambda: groups("padded", capacity=(0.8, 0.5)),
    "IA-RED2": lambda: groups("packed"),
}


def make(name):
    return METHODS[name]().eval()


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_nothing_waits_for_the_device(name):
    method = make(name)
    with NoSync():
        method(tokens())


def test_waiting_is_noticed():
    for wait in (lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: bool((x > 0).any())):
        with NoSync(), pytest.raises(AssertionError, match="waits"):
            wait(tokens())


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_permuted_images_are_permuted_results(name):
    method = make(name)
    y = method(tokens())
    assert torch.equal(method(tokens()), y) and y.isfinite().all() and not torch.equal(y, tokens())
    if "padded" in name or "float" in name or "masked" in name:  # float matmuls of other rows may round differently
        torch.testing.assert_close(method(tokens()[ORDER]), y[ORDER])
    else:
        assert torch.equal(method(tokens()[ORDER]), y[ORDER])


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_no_images_are_no_images(name):
    assert make(name)(tokens()[:0]).shape == (0, N, C)


@torch.no_grad()
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (STATIC, {"layer_scale": True}),
        (STATIC, {"qk_norm": True}),
        (DYNAMIC, {}),
        (recipes.integer(8, 8, granularity="tensor"), {}),
        (recipes.W8A8_DYNAMIC, {"qk_norm": True}),
    ],
    ids=["layer scale", "qk norm", "dynamic", "tensor", "dynamic, qk norm"],
)
def test_packed_is_the_block_on_the_selected_tokens_alone(recipe, options):
    blocks, x = quant_blocks(recipe, **options), tokens()
    for mask in (some(), some(1), torch.zeros(B, N, dtype=torch.bool), torch.ones(B, N, dtype=torch.bool)):
        y = Runner("packed")(blocks, x, mask)
        assert torch.equal(y, alone(blocks, x, mask))
        assert torch.equal(x, tokens())


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_modes_agree(mode):
    blocks, x, mask = quant_blocks(layer_scale=True), tokens(), some()
    assert torch.equal(Runner(mode)(blocks, x, mask), alone(blocks, x, mask))
    if mode != "packed":
        blocks = float_blocks()
        y = Runner(mode)(blocks, x, mask)
        torch.testing.assert_close(y, alone(blocks, x, mask))
        assert torch.equal(y[~mask], x[~mask])


@torch.no_grad()
def test_too_many_for_the_capacity_are_left_out_from_the_lowest_score():
    blocks, x = float_blocks(1), tokens()
    scores = torch.rand(B, N, generator=torch.Generator().manual_seed(2))
    mask = scores > 0.3
    runner = Runner("padded", 0.25)  # room for 5
    fits = runner.limit(mask, scores)
    assert fits.sum(1).tolist() == [5, 5, 5] and (fits <= mask).all()
    assert (scores.masked_fill(~fits, 1).amin(1) > (scores * (mask & ~fits)).amax(1)).all()
    torch.testing.assert_close(runner(blocks, x, mask, scores), alone(blocks, x, fits))
    low = scores < 0.25  # those of the highest scores are not wanted at all
    fits = runner.limit(low, scores)
    assert low.any() and (fits <= low).all() and torch.equal(fits.sum(1), low.sum(1).clamp(max=5))


def test_rows_are_the_vectors():
    """Spec: logits .4, -.2, .01 beside the class token select rows 0, 1 and 3; counts 3, 1, 4 start at 0, 3, 4, 8."""
    new = TokenGate(1, 1).requires_grad_(False)
    new.router.weight.fill_(1)
    new.router.bias.zero_()
    x = torch.tensor([-9, 0.4, -0.2, 0.01]).view(1, 4, 1)
    assert packed.pack(new(x)).rows.tolist() == [0, 1, 3, -1]
    x = torch.tensor([-9, 0.004, 0.0, -0.0]).view(1, 4, 1).bfloat16()  # a bfloat16 sigmoid of 0.004 is 0.5
    assert new(x).tolist() == [[True, True, False, False]]
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1]]).bool()
    places = packed.pack(mask)
    assert places.cu_seqlens.tolist() == [0, 3, 4, 8] and places.max_seqlen == 4
    assert places.places.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, -1, -1, -1, -1]


@torch.no_grad()
@pytest.mark.parametrize("recipe", [STATIC, DYNAMIC, recipes.integer(8, 8, granularity="tensor")])
@pytest.mark.parametrize("bias", [0.0, -100.0, 100.0], ids=["some", "none", "all"])
def test_dispatched_block_is_the_masked_sum(recipe, bias):
    block, x = quant_blocks(recipe, layer_scale=True)[0], tokens()
    method = DispatchedBlock(block, gate(bias=bias), adapter())
    y = block.project(block.attend(block.heads(x), None), x, None, None)
    mask = method.gate(y)
    assert B <= mask.sum() <= B * N and (bias == 0 or mask.sum() == (B if bias < 0 else B * N))
    base = y + method.adapter(y)
    norm, fc1 = block.norm2, block.mlp.fc1
    codes, scale = ops.norm_quant(y, norm.weight, norm.bias, fc1.x_scale, norm.eps)
    full = block.mlp.apply_codes(codes, scale, layer_scale=block.layer_scale2, residual=base)
    assert torch.equal(method(x), torch.where(mask[..., None], full, base))
    assert torch.equal(method(x.mT.contiguous().mT), method(x)) and torch.equal(x, tokens())


@torch.no_grad()
@pytest.mark.parametrize("recipe", [STATIC, DYNAMIC])
def test_unselected_rows_are_not_computed(monkeypatch, recipe):
    """What every op is asked for: the rows that its indices name."""
    asked = []

    def watch(name):
        real = getattr(ops, name)

        def call(*args, **kwargs):
            index = args[1] if name.endswith("scatter") else kwargs["index"]
            asked.append(((index >= 0).sum() * B * N // len(index)).item())
            return real(*args, **kwargs)

        monkeypatch.setattr(ops, name, call)

    x = tokens()
    method = RoutedBlock(gate(), quant_blocks(recipe)[0]).eval()
    for name in ("quantize", "norm_quant", "lowbit_linear", "lowbit_linear_scatter"):
        watch(name)
    method(x)
    heads = 0 if recipe is STATIC else 3
    assert asked == [gate()(x).sum()] * (8 + heads) and 0 < asked[0] < B * N


@torch.no_grad()
def test_float_dispatcher_takes_the_best_of_its_capacity():
    method, x = TokenDispatcher(gate(), adapter(), nn.LayerNorm(C), nn.Linear(C, C)).eval(), tokens()
    base, mlp = x + method.adapter(x), method.mlp(method.norm(x))
    for capacity in (1.0, 0.2):  # room for 4
        method.capacity = capacity
        logits = method.gate.logits(x)
        kept = (logits > 0) & (capacity == 1 or logits >= logits.topk(4, dim=1).values[:, -1:])
        assert capacity == 1 or kept.sum(1).tolist() == [4, 4, 4]
        torch.testing.assert_close(method(x), torch.where(kept[..., None], base + mlp, base))


def test_dispatcher_can_be_trained():
    """To the part it is told to select; in training as in inference its prefix is selected."""
    torch.manual_seed(0)
    method = TokenDispatcher(TokenGate(C, 1), Adapter(C, 8), nn.LayerNorm(C), nn.Linear(C, C)).train()
    with torch.no_grad():
        method.gate.router.bias.fill_(3.0)
    optimizer = torch.optim.Adam(method.parameters(), 0.1)
    x, losses = torch.randn(4, 40, C), []
    for _ in range(60):
        y = method(x)
        assert method.selection[:, 0].eq(1).all()
        loss = selection_loss([method.selection], target=0.3) + 1e-3 * y.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    # With tau 5 a draw is almost even: the logits have to grow far before its mean follows.
    assert method.selection.mean() < 0.45 and losses[-1] < losses[0] / 3
    with torch.no_grad():
        method.eval()(x)
    assert method.selection is None


def test_selection_loss_by_hand():
    few, half = torch.zeros(2, 10), torch.tensor([1.0, 0.0] * 5).expand(2, 10)
    assert abs(selection_loss([half, half]).item()) < 1e-7
    # mean 1/4; each of two images lacks 0.1 in one block
    assert abs(selection_loss([few, half]).item() - 2 * (0.25**2 + 0.2)) < 1e-6
    with pytest.raises(ValueError, match="2 blocks, not all of which ran in training mode"):
        selection_loss([few, None])


def test_adapter_by_hand():
    new, x = adapter(), tokens()
    torch.testing.assert_close(
        new(x), 0.1 * ((x @ new.down.weight.T + new.down.bias).relu() @ new.up.weight.T + new.up.bias)
    )
    assert torch.equal(Adapter(C)(x), torch.zeros_like(x))


def test_samples_are_bits_with_a_gradient():
    new, x = TokenGate(C, 2), tokens()
    bits = new.sample(x)
    assert ((bits.round() - bits).abs() < 1e-6).all() and bits[:, :2].eq(1).all() and 0 < bits.mean() < 1
    bits[:, 2:].sum().backward()
    assert new.router.weight.grad.abs().sum() > 0


def test_packed_refuses_a_gradient():
    x = tokens().requires_grad_()
    for method in (make("DyT"), make("DiT")):
        with pytest.raises(RuntimeError, match="derivative"):
            method(x).sum().backward()


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_routed_block_is_the_block_or_nothing(mode):
    block, x = blocks_for(mode)[0], tokens()
    for bias in (0.0, -100.0, 100.0):
        method = RoutedBlock(gate(0, bias), block, mode).eval()
        expected = alone([block], x, method.gate(x))
        torch.testing.assert_close(method(x), expected)
    torch.testing.assert_close(expected, block(x))


def test_routed_block_can_be_trained():
    block = spread(FloatBlock(ViTConfig(dim=C, num_heads=2)))
    for prefix, bias in ((1, 0.0), (0, -100.0)):  # the second selects nothing
        method = RoutedBlock(gate(prefix, bias).requires_grad_(), block, "masked").train()
        y = method(tokens())
        y.square().mean().backward()
        chosen = method.selection > 0.5
        assert chosen.any() == (prefix == 1) and method.gate.router.weight.grad.isfinite().all()
        torch.testing.assert_close(y, alone([block], tokens(), chosen))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Runner("sparse"), "mode='sparse' is not one of masked, padded, packed"),
        (lambda: Runner("packed", 0.5), "capacity=0.5 with mode='packed'"),
        (lambda: Runner("padded", 0.0), "capacity=0.0"),
        (lambda: Runner("masked")([], tokens(), some()[:2]), r"\(2, 17\) of x \(3, 17, 64\); expected bool \(3, 17\)"),
        (lambda: Runner("masked")([], tokens(), some().float()), "mask torch.float32"),
        (lambda: RoutedBlock(gate(), float_blocks()[0]), "came with a FloatBlock; only QuantBlocks"),
        (lambda: TokenGate(C, tau=0.0), "tau=0.0"),
        (lambda: TokenDispatcher(gate(), adapter(), None, None, 1.5), "capacity=1.5"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
