"""calibrate.reconstruct: rounding that is learned beats the nearest, and a run goes on where it was cut off."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyvit_accel import accelerate, recipes
from pyvit_accel.calibrate.checkpoint import digest_of
from pyvit_accel.calibrate.levels import log_levels, table
from pyvit_accel.calibrate.plan import BlockPlan, LinearPlan, block_output
from pyvit_accel.calibrate.reconstruct import Reconstruction, mrecg_groups, reconstruct
from pyvit_accel.formats import affine
from pyvit_accel.models.vit import VisionTransformer, ViTConfig

LINEARS = ("qkv", "proj", "fc1", "fc2")
TOKENS, CHANNELS, HEADS, IMAGES = 5, 16, 2, 24
SETTINGS = Reconstruction(iterations=30, batch_size=8, seed=3)
FEW = Reconstruction(iterations=8, batch_size=8, seed=3)  # where only who wins or what is equal matters
GELU_MINIMUM = -0.1701


def float_blocks(depth: int = 2) -> list[torch.nn.Module]:
    config = ViTConfig(image_size=8, patch_size=4, dim=CHANNELS, depth=depth, num_heads=HEADS, num_classes=0)
    model = VisionTransformer(config).eval().requires_grad_(False)
    for parameter in model.blocks.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return list(model.blocks)


def plan_of(block: torch.nn.Module, bits: int = 4, static: bool = False) -> BlockPlan:
    def linear(layer, **fields) -> LinearPlan:
        fields = {"x_scale": torch.tensor([0.4])} if static else fields
        return LinearPlan(layer.weight.clone(), layer.bias.clone(), bits, bits, **fields)

    attn, mlp = block.attn, block.mlp
    head_scale = None if static else torch.full((3, HEADS, 1), 0.04)
    return BlockPlan(
        norm1=(block.norm1.weight, block.norm1.bias, block.norm1.eps),
        qkv=linear(attn.qkv),
        num_heads=HEADS,
        softmax_scale=(CHANNELS // HEADS) ** -0.5,
        head_bits=8,
        head_scale=head_scale,
        proj=linear(attn.proj),
        layer_scale1=None,
        norm2=(block.norm2.weight, block.norm2.bias, block.norm2.eps),
        fc1=linear(mlp.fc1),
        activation="gelu",
        fc2=linear(mlp.fc2, x_minimum=GELU_MINIMUM),
        layer_scale2=None,
    )


@pytest.fixture
def blocks() -> list[torch.nn.Module]:
    return float_blocks()


@pytest.fixture
def plans(blocks) -> list[BlockPlan]:
    return [plan_of(block) for block in blocks]


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(IMAGES, TOKENS, CHANNELS)


@torch.no_grad()
def error(plans: list[BlockPlan], blocks: list[torch.nn.Module], x: Tensor, tokens: int | None = None) -> float:
    """Squared distance of the quantized blocks' output from the float blocks', relative."""
    y, y_hat = x, x
    for plan, block in zip(plans, blocks, strict=True):
        y, y_hat = block(y), block_output(plan, y_hat)
    return ((y_hat - y)[:, :tokens].square().sum() / y[:, :tokens].square().sum()).item()


def assert_same(a: list[BlockPlan], b: list[BlockPlan]) -> None:
    """Bit for bit, in all that was decided."""
    assert [digest_of(plan) for plan in a] == [digest_of(plan) for plan in b]


@pytest.mark.parametrize("rounding", ["straight", "soft"])
@pytest.mark.parametrize("static", [False, True], ids=["per token", "static"])
@pytest.mark.parametrize("groups", [None, [[0, 1]]], ids=["one by one", "together"])
def test_beats_nearest_rounding(blocks, inputs, rounding, static, groups):
    plans = [plan_of(block, static=static) for block in blocks]
    learned = reconstruct(plans, blocks, inputs, settings=replace(SETTINGS, rounding=rounding), groups=groups)
    for x in (inputs, torch.randn(IMAGES, TOKENS, CHANNELS)):
        assert error(learned, blocks, x) < error(plans, blocks, x)


def test_decides_legal_codes_scales_and_clips(plans, blocks, inputs):
    for plan in reconstruct(plans, blocks, inputs, settings=FEW):
        tensors = [*plan.norm1[:2], *plan.norm2[:2], plan.head_scale]
        for linear in (getattr(plan, name) for name in LINEARS):
            lo, hi = affine.weight_range(linear.w_bits)
            assert linear.codes.dtype == torch.int8 and lo <= linear.codes.min() and linear.codes.max() <= hi
            assert linear.w_scale.dtype == torch.float32 and bool((linear.w_scale > 0).all())
            assert isinstance(linear.x_clip, float) and 0 < linear.x_clip < 2
            tensors += [linear.codes, linear.w_scale, linear.bias]
        assert not any(t.requires_grad for t in tensors)


def test_given_plans_stay_as_they_were(plans, blocks, inputs):
    before = [digest_of(plan) for plan in plans]
    reconstruct(plans, blocks, inputs, settings=FEW)
    assert [digest_of(plan) for plan in plans] == before


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_starts_from_the_codes_of_the_plan(blocks, inputs, bits):
    """One step at learning rate zero decides nothing anew, whatever the distance of codes from the weight."""
    plan = plan_of(blocks[0], bits).qkv.quantized()
    lo, hi = affine.weight_range(bits)
    codes = (plan.codes.int() + torch.randint(-2, 3, plan.codes.shape)).clamp(lo, hi).to(torch.int8)
    refined = replace(plan_of(blocks[0], bits), qkv=replace(plan, codes=codes))
    still = Reconstruction(iterations=1, lr=0.0, scale_lr=0.0)
    (decided,) = reconstruct([refined], blocks[:1], inputs, settings=still)
    assert torch.equal(decided.qkv.codes, codes)
    assert torch.equal(decided.qkv.w_scale, plan.w_scale)


def test_a_scale_per_channel_stays_in_the_packed_weight(blocks, inputs):
    plan = plan_of(blocks[0])
    scale = torch.rand(CHANNELS * 4) + 0.1
    plan = replace(plan, fc2=replace(plan.fc2, x_minimum=None, x_scale=scale, x_zero_point=-5))
    (decided,) = reconstruct([plan], blocks[:1], inputs, settings=SETTINGS)
    assert torch.equal(decided.fc2.x_scale, scale)
    assert error([decided], blocks[:1], inputs) < error([plan], blocks[:1], inputs)


def test_a_table_of_levels_stays(blocks, inputs):
    """Unevenly spaced levels behind GELU: the codes around them are learned, gradients pass the table."""
    plan = plan_of(blocks[0])
    plan = replace(plan, fc2=replace(plan.fc2, x_table=table(log_levels(16))))
    (decided,) = reconstruct([plan], blocks[:1], inputs, settings=SETTINGS)
    assert torch.equal(decided.fc2.x_table, plan.fc2.x_table)
    assert not torch.equal(decided.fc1.codes, plan.fc1.quantized().codes)
    assert error([decided], blocks[:1], inputs) < error([plan], blocks[:1], inputs)


def test_last_tokens_are_the_ones_that_count(plans, blocks, inputs):
    """What is compared is fitted better than when everything is."""
    one = reconstruct(plans, blocks, inputs, settings=SETTINGS, last_tokens=1)
    every = reconstruct(plans, blocks, inputs, settings=SETTINGS)
    assert error(one, blocks, inputs, 1) < error(every, blocks, inputs, 1)
    assert_same(one[:1], every[:1])


def test_tokens_of_large_activations_do_not_drown_the_others(plans, blocks, inputs):
    """The first token is to be something of 2500 times the energy that the block cannot give."""

    def block(x: Tensor) -> Tensor:
        y = blocks[0](x)
        y[:, 0] = 50 * torch.randn(len(y), CHANNELS, generator=torch.Generator().manual_seed(0))
        return y

    learned = reconstruct(plans[:1], [block], inputs, settings=SETTINGS)

    def others(plan: BlockPlan) -> Tensor:
        return (block_output(plan, inputs) - blocks[0](inputs))[:, 1:].square().mean()

    assert others(learned[0]) < 0.8 * others(plans[0])


def test_learning_together_looks_at_the_last_output_only(plans, blocks, inputs):
    alone = reconstruct(plans, blocks, inputs, settings=FEW)
    together = reconstruct(plans, blocks, inputs, settings=FEW, groups=[[0, 1]])
    assert digest_of(alone[0]) != digest_of(together[0])


def test_same_seed_same_plans(plans, blocks, inputs):
    first = reconstruct(plans, blocks, inputs, settings=FEW)
    assert_same(first, reconstruct(plans, blocks, inputs, settings=FEW))
    other = reconstruct(plans, blocks, inputs, settings=replace(FEW, seed=4))
    assert digest_of(first[0]) != digest_of(other[0])


def test_progress_sees_every_step(plans, blocks, inputs):
    seen = []

    def progress(steps, label):
        for step in steps:
            seen.append((label, step))
            yield step

    reconstruct(plans, blocks, inputs, settings=replace(FEW, iterations=3), progress=progress)
    assert seen == [(f"block {i} of 2", step) for i in range(2) for step in range(3)]


# ---- checkpoints


class Interrupted(Exception):
    pass


def interrupt_in(label: str):
    def progress(steps, name):
        for step in steps:
            if name.startswith(label) and step == 5:
                raise Interrupted
            yield step

    return progress


def test_resumes_bit_for_bit(plans, blocks, inputs, tmp_path):
    path = tmp_path / "blocks.pt"
    whole = reconstruct(plans, blocks, inputs, settings=FEW)
    with pytest.raises(Interrupted):
        reconstruct(plans, blocks, inputs, settings=replace(FEW, checkpoint=path), progress=interrupt_in("block 1"))
    labels = []

    def progress(steps, label):
        labels.append(label)
        return steps

    assert_same(whole, reconstruct(plans, blocks, inputs, settings=replace(FEW, checkpoint=path), progress=progress))
    assert labels == ["block 1 of 2"]
    again = reconstruct(plans, blocks, inputs, settings=replace(FEW, checkpoint=path), progress=interrupt_in(""))
    assert_same(whole, again)


def test_a_checkpoint_appears_whole_or_not_at_all(plans, blocks, inputs, tmp_path, monkeypatch):
    def broken(content, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="no space"):
        reconstruct(plans, blocks, inputs, settings=replace(FEW, checkpoint=tmp_path / "blocks.pt"))
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_checkpoint_is_refused(plans, blocks, inputs, tmp_path):
    path = tmp_path / "blocks.pt"
    reconstruct(plans, blocks, inputs, settings=replace(FEW, checkpoint=path))
    with pytest.raises(ValueError, match=r"another lr \(0\.03 there, 0\.1 here\), seed \(3 there, 4 here\); delete it"):
        reconstruct(plans, blocks, inputs, settings=replace(FEW, lr=0.1, seed=4, checkpoint=path))
    with pytest.raises(ValueError, match="another inputs, float_inputs; delete it"):
        reconstruct(plans, blocks, inputs + 1, settings=replace(FEW, checkpoint=path))
    other = [plans[0], replace(plans[1], fc1=replace(plans[1].fc1, w_bits=3))]
    with pytest.raises(ValueError, match="another plan of block 1; delete it"):
        reconstruct(other, blocks, inputs, settings=replace(FEW, checkpoint=path))
    with pytest.raises(ValueError, match=r"another groups \(\[\[0\], \[1\]\] there, \[\[0, 1\]\] here\)"):
        reconstruct(plans, blocks, inputs, settings=replace(FEW, checkpoint=path), groups=[[0, 1]])


def test_what_is_no_checkpoint_is_refused(plans, blocks, inputs, tmp_path):
    for content in (b"", b"not a file of torch", b"PK\x03\x04 cut off"):
        path = tmp_path / "blocks.pt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a checkpoint of a reconstruction"):
            reconstruct(plans, blocks, inputs, settings=replace(FEW, checkpoint=path))
        assert path.read_bytes() == content
    torch.save({"version": 0, "identity": {}, "blocks": {}}, path)
    with pytest.raises(ValueError, match="has version 0, expected 1"):
        reconstruct(plans, blocks, inputs, settings=replace(FEW, checkpoint=path))
    with pytest.raises(ValueError, match="does not exist; create it"):
        reconstruct(plans, blocks, inputs, settings=replace(FEW, checkpoint=tmp_path / "nowhere" / "blocks.pt"))


# ---- what is refused


def test_nan_names_the_block(plans, blocks, inputs):
    broken = replace(plans[1], fc2=replace(plans[1].fc2, bias=torch.full((CHANNELS,), torch.nan)))
    with pytest.raises(ValueError, match="loss of block 1 is nan at step 0"):
        reconstruct([plans[0], broken], blocks, inputs, settings=SETTINGS)
    with pytest.raises(ValueError, match="loss of blocks 0-1 is nan at step 0"):
        reconstruct([plans[0], broken], blocks, inputs, settings=SETTINGS, groups=[[0, 1]])
    with pytest.raises(ValueError, match="inputs hold NaN"):
        reconstruct(plans, blocks, inputs.fill_(torch.inf), settings=SETTINGS)


@pytest.mark.parametrize("groups", [[[0]], [[1], [0]], [[0], [], [1]], [[0, 1], [1]], [[0, 1, 2]]])
def test_groups_that_do_not_fit_are_refused(plans, blocks, inputs, groups):
    with pytest.raises(ValueError, match=r"not consecutive runs of all blocks 0\.\.1, such as \[\[0\], \[1\]\]"):
        reconstruct(plans, blocks, inputs, settings=SETTINGS, groups=groups)


def test_arguments_that_do_not_fit_are_refused(plans, blocks, inputs):
    with pytest.raises(ValueError, match="got 2 plans and 1 float blocks"):
        reconstruct(plans, blocks[:1], inputs)
    with pytest.raises(ValueError, match=r"inputs \(24, 5, 16\) and float_inputs \(23, 5, 16\)"):
        reconstruct(plans, blocks, inputs, float_inputs=inputs[1:])
    with pytest.raises(ValueError, match=r"inputs \(0, 5, 16\)"):
        reconstruct(plans, blocks, inputs[:0])
    for wrong in ({"iterations": 0}, {"batch_size": 0}, {"rounding": "up"}, {"drop": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Reconstruction(**wrong)


# ---- groups


def test_mrecg_groups_merge_the_largest_differences(plans):
    five = [plans[0]] * 5
    assert mrecg_groups(five, 4) == [[0], [1], [2], [3], [4]]  # blocks alike: nothing tells them apart
    assert mrecg_groups(five, 0, [1, 9, 1, 9, 1]) == [[0], [1], [2], [3], [4]]
    assert mrecg_groups(five, 1, [1, 2, 9, 8, 8]) == [[0], [1, 2], [3], [4]]
    assert mrecg_groups(five, 2, [1, 2, 9, 4, 4]) == [[0], [1, 2, 3], [4]]
    assert mrecg_groups(five, 1, [1, 5, 5, 9, 9]) == [[0, 1], [2], [3], [4]]  # the earlier of equals
    wider = replace(plans[0], fc1=replace(plans[0].fc1, w_bits=8))
    assert mrecg_groups([plans[0], plans[0], wider], 1) == [[0], [1, 2]]
    with pytest.raises(ValueError, match="merges=5; 5 blocks have 4"):
        mrecg_groups(five, 5)
    with pytest.raises(ValueError, match="got 2 capacities for 5 blocks"):
        mrecg_groups(five, 1, [1, 2])


# ---- in a recipe


def logit_error(model: torch.nn.Module, converted: torch.nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return (converted(images) - model(images)).square().mean().item()


def test_a_recipe_learns_and_goes_on(tmp_path):
    model = VisionTransformer(ViTConfig(image_size=16, patch_size=4, dim=32, depth=2, num_heads=2, num_classes=5))
    model = model.eval()
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    images, unseen = torch.randn(2, IMAGES, 3, 16, 16)
    learning = Reconstruction(iterations=60, checkpoint=tmp_path / "blocks.pt")
    recipe = recipes.integer(3, 4, search=False, reconstruction=learning)
    learned, _ = accelerate(model, recipe, [images])
    nearest, _ = accelerate(model, recipes.integer(3, 4, search=False), [images])
    assert logit_error(model, learned, unseen) < logit_error(model, nearest, unseen)
    written = learning.checkpoint.stat().st_mtime_ns
    again, _ = accelerate(model, recipe, [images])
    assert learning.checkpoint.stat().st_mtime_ns == written
    with torch.no_grad():
        assert torch.equal(learned(unseen), again(unseen))
