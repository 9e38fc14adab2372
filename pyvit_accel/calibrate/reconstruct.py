"""Block reconstruction: learn which way each weight rounds, so that quantized blocks give what float blocks gave.

code = clip(base + h(v))                      base <= w / w_scale <= base + 1, or around the codes the plan came with
h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)       0 or 1 in the end
loss = mean over tokens of |y_hat - y|^2 / variance of y

y is the output of the float blocks on float inputs, y_hat that of the quantized ones on what the quantized network
gives them. While codes are learned, every activation stays as it is with probability `drop`, drawn anew at each step.
Learned beside v: weight scales, clips or static scales of the activations, biases, weights and biases of the norms.
The last steps have fixed codes and adapt the others to them.

Tokens count by 1 / variance, as in `refine`: the next norm divides by it, and a few tokens of ViT-Ti with activations
of 200 would own the sum. W4A4, 60 steps of 8 of 128 images, two minutes of one core each; points of top-1 lost on 650
images, logit error:
            refine alone   learned      last_tokens=1   and tokens alike
DeiT-Ti     4.3  0.63      3.1  0.53    2.6  0.50
ViT-Ti      9.9  1.33      5.4  1.11    5.2  1.07       9.7  1.26

rounding "straight"  h counts rounded, its gradient passes: some hundred steps are enough
rounding "soft"      h counts as it is, and PULL mean(1 - |2 h - 1|^beta), beta falling from 20 to 2, drives it to its
                     ends: the published form, made for 20000 steps

Relative error of block 0 of DeiT-Ti on unseen images, W4A4, 80 steps of 16 images: nearest codes 0.121, soft 0.050,
straight 0.040. Of 80 steps of 16 images and 160 of 8, which take as long, the latter are better: 0.051 and 0.046, soft.

AdaRound, Nagel et al., arXiv:2004.10568; QDrop, Wei et al., arXiv:2203.05740; groups of blocks learned together after
MRECG, Ma et al., arXiv:2303.11906.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from pyvit_accel.calibrate.checkpoint import (
    LINEARS,
    decisions_of,
    digest_of,
    read_checkpoint,
    restored,
    write_checkpoint,
)
from pyvit_accel.calibrate.plan import BlockPlan, LinearPlan, Rint, block_output
from pyvit_accel.formats import affine

ROUNDINGS = ("straight", "soft")
LEARNING = 0.85  # part of the steps that learn codes; the others adapt scales, biases and norms to them
FREE = 0.2  # part of the steps before anything pulls h to 0 or 1
BETA_FIRST, BETA_LAST, PULL = 20.0, 2.0, 3.0
STRETCH = 0.1  # h reaches 0 and 1 at finite v
NEAREST = 0.45  # h starts at most this far from the code it would round to: the first hard codes are the plan's


class _Round(torch.autograd.Function):
    """Round half to even where not `kept`; the gradient passes."""

    @staticmethod
    def forward(ctx, x: Tensor, kept: Tensor | None) -> Tensor:
        rounded = torch.round(x)
        return rounded if kept is None else torch.where(kept, x, rounded)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _LearnedLinear(nn.Module):
    """A LinearPlan whose codes, scales, clip and bias are being learned."""

    def __init__(self, plan: LinearPlan, rounding: str):
        super().__init__()
        self.rounding = rounding
        self.plan = plan = plan.quantized()
        self.lo, self.hi = affine.weight_range(plan.w_bits)
        codes = plan.codes.float()
        offset = (plan.packed / plan.w_scale[:, None] - codes).clamp(-NEAREST, NEAREST)
        self.base = codes - (offset < 0).float()
        self.v = nn.Parameter(torch.logit((codes + offset - self.base + STRETCH) / (1 + 2 * STRETCH)))
        self.hard_codes: Tensor | None = None
        # Relative steps: one learning rate then fits every layer.
        self.log_w_scale = nn.Parameter(torch.zeros_like(plan.w_scale))
        self.log_x_scale = nn.Parameter(torch.zeros(()))
        self.bias_unit = plan.weight.norm(dim=1)
        self.bias_step = nn.Parameter(torch.zeros_like(plan.w_scale))

    def h(self) -> Tensor:
        return ((1 + 2 * STRETCH) * torch.sigmoid(self.v) - STRETCH).clamp(0, 1)

    def _codes(self) -> Tensor:
        if self.hard_codes is not None:
            return self.hard_codes
        h = self.h()
        return (self.base + (_Round.apply(h, None) if self.rounding == "straight" else h)).clamp(self.lo, self.hi)

    def harden(self) -> None:
        self.hard_codes = (self.base + (self.v.detach() >= 0)).clamp(self.lo, self.hi)
        self.v.requires_grad_(False)

    @property
    def w_scale(self) -> Tensor:
        return self.plan.w_scale * self.log_w_scale.exp()

    def weight(self) -> Tensor:
        w = self._codes() * self.w_scale[:, None]
        x_scale = self.plan.x_scale
        return w if x_scale is None or x_scale.numel() == 1 else w / x_scale

    def current(self) -> LinearPlan:
        """The plan with tensors that gradients reach; x_clip is one too."""
        plan, factor = self.plan, self.log_x_scale.exp()
        bias = self.bias_step * self.bias_unit
        plan = replace(plan, bias=bias if plan.bias is None else plan.bias + bias)
        if plan.x_scale is None:
            return replace(plan, x_clip=plan.x_clip * factor)
        # A scale per channel is inside the packed weight: it stays.
        return replace(plan, x_scale=plan.x_scale * factor) if plan.x_scale.numel() == 1 else plan

    def decided(self) -> LinearPlan:
        plan = replace(self.current(), codes=self.hard_codes.to(torch.int8), w_scale=self.w_scale)
        return replace(plan, x_clip=float(plan.x_clip))


class _LearnedBlock(nn.Module):
    """A BlockPlan whose numbers are being learned."""

    def __init__(self, plan: BlockPlan, rounding: str):
        super().__init__()
        self.plan = plan
        self.linears = nn.ModuleDict({name: _LearnedLinear(getattr(plan, name), rounding) for name in LINEARS})
        norms = [t for norm in (plan.norm1, plan.norm2) for t in norm[:2]]
        self.norm_steps = nn.ParameterList(torch.zeros_like(t) for t in norms)
        heads = plan.head_scale
        self.log_head_scale = None if heads is None else nn.Parameter(torch.zeros_like(heads))

    def forward(self, x: Tensor, rint: Rint) -> Tensor:
        plan = self._with({name: linear.current() for name, linear in self.linears.items()})
        return block_output(plan, x, rint, {name: linear.weight() for name, linear in self.linears.items()})

    @torch.no_grad()
    def decided(self) -> BlockPlan:
        return self._with({name: linear.decided() for name, linear in self.linears.items()})

    def _with(self, linears: dict[str, LinearPlan]) -> BlockPlan:
        plan = self.plan
        heads = None if self.log_head_scale is None else plan.head_scale * self.log_head_scale.exp()
        return replace(plan, norm1=self._norm(0), norm2=self._norm(1), head_scale=heads, **linears)

    def _norm(self, i: int) -> tuple[Tensor, Tensor, float]:
        weight, bias, eps = (self.plan.norm1, self.plan.norm2)[i]
        weight_step, bias_step = self.norm_steps[2 * i], self.norm_steps[2 * i + 1]
        return weight * (1 + weight_step), bias + weight.abs() * bias_step, eps


@dataclass(frozen=True)
class Reconstruction:
    """How long and how fast `reconstruct` learns.

    iterations, batch_size  steps for each group of blocks, and images of a step
    lr, scale_lr            Adam's, of the roundings, and of everything else, whose steps are relative
    rounding                "straight" or "soft"
    drop                    probability that an activation stays unquantized while codes are learned
    merges                  how many pairs of neighbouring blocks to learn together, by mrecg_groups
    checkpoint              a file written after every group, from which an interrupted call goes on, bit for bit
    """

    iterations: int = 60
    batch_size: int = 8
    lr: float = 0.03
    scale_lr: float = 0.003
    rounding: str = "straight"
    drop: float = 0.25
    seed: int = 0
    merges: int = 0
    checkpoint: str | Path | None = None

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.batch_size < 1:
            got = f"iterations={self.iterations}, batch_size={self.batch_size}"
            raise ValueError(f"reconstruct: {got}; both must be at least 1")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"reconstruct: rounding={self.rounding!r} is not one of {', '.join(ROUNDINGS)}")
        if not 0 <= self.drop < 1:
            raise ValueError(f"reconstruct: drop={self.drop} is outside 0..1; 0.5 keeps every second activation")


def reconstruct(
    plans: Sequence[BlockPlan],
    blocks: Sequence[Callable[[Tensor], Tensor]],
    inputs: Tensor,
    settings: Reconstruction | None = None,
    *,
    float_inputs: Tensor | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    last_tokens: int | None = None,
    progress: Callable[[Iterable, str], Iterable] | None = None,
) -> list[BlockPlan]:
    """The plans with codes, w_scale, biases, clips, static scales and norms decided.

    blocks        the float blocks that the plans stand for: (B, N, C) -> (B, N, C)
    inputs        (images, N, C) float32, what the quantized network feeds the first block
    float_inputs  the same of the float network; None: inputs
    groups        runs of consecutive blocks learned together, [[0], [1, 2], ...]; None: as settings.merges says
    last_tokens   how many tokens of the last block's output are read, from the first on; None: all
    progress      progress(steps, label) iterates the steps of one group

    A plan with codes starts from them. The same seed, data and number of threads give the same plans. Raises ValueError
    for shapes and groups that do not fit, data or a loss that is not finite, and a checkpoint of anything else.
    """
    plans, settings = list(plans), Reconstruction() if settings is None else settings
    float_inputs = inputs if float_inputs is None else float_inputs
    groups = mrecg_groups(plans, settings.merges) if groups is None else [list(group) for group in groups]
    _check(plans, blocks, inputs, float_inputs, groups)
    learning = {key: value for key, value in asdict(settings).items() if key not in ("merges", "checkpoint")}
    identity: dict[str, object] = learning | {
        "groups": groups,
        "last_tokens": last_tokens,
        "inputs": digest_of(inputs),
        "float_inputs": digest_of(float_inputs),
        **{f"plan of block {i}": digest_of(plan) for i, plan in enumerate(plans)},
    }
    path = None if settings.checkpoint is None else Path(settings.checkpoint)
    saved = {} if path is None else read_checkpoint(path, identity)
    x, y, batch = inputs.float(), float_inputs.float(), settings.batch_size
    for group in groups:
        target = y
        for i in group:
            target = _apply(blocks[i], target, batch)
        if group[0] not in saved:
            group_name = f"block {group[0]}" if len(group) == 1 else f"blocks {group[0]}-{group[-1]}"
            steps: Iterable[int] = range(settings.iterations)
            steps = steps if progress is None else progress(steps, f"{group_name} of {len(plans)}")
            learned = _Group([plans[i] for i in group], settings, group[0], group_name)
            tokens = last_tokens if group[-1] == len(plans) - 1 else None
            decided = learned.run(steps, x, y, target, tokens)
            saved |= {i: decisions_of(plan) for i, plan in zip(group, decided, strict=True)}
            if path is not None:
                write_checkpoint(path, identity, saved)
        for i in group:
            plans[i] = restored(plans[i], saved[i])
            x = _apply(partial(block_output, plans[i]), x, batch)
        y = target
    return plans


class _Group:
    """Blocks learned together."""

    def __init__(self, plans: list[BlockPlan], settings: Reconstruction, first: int, name: str):
        self.settings, self.name = settings, name
        self.blocks = nn.ModuleList(_LearnedBlock(plan, settings.rounding) for plan in plans)
        self.linears = [linear for block in self.blocks for linear in block.linears.values()]
        self.generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + first)
        self.drop = settings.drop
        self.hard_from = max(1, int(LEARNING * settings.iterations))

    def run(
        self, steps: Iterable[int], x: Tensor, float_x: Tensor, target: Tensor, tokens: int | None
    ) -> list[BlockPlan]:
        """The plans decided. x and float_x (images, N, C) go in, `tokens` of target (images, N, C) are to come out."""
        settings, target = self.settings, target[:, :tokens]
        roundings = {linear.v for linear in self.linears}
        others = [p for p in self.blocks.parameters() if p not in roundings]
        optimizer = torch.optim.Adam(
            [{"params": [linear.v for linear in self.linears], "lr": settings.lr}, {"params": others}],
            lr=settings.scale_lr,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, self._decay])
        importance = _importance(target)
        order = torch.empty(0, dtype=torch.long)
        for step in steps:
            if step == self.hard_from:
                self._harden()
            while len(order) < settings.batch_size:
                order = torch.cat([order, torch.randperm(len(x), generator=self.generator)])
            chosen, order = order[: settings.batch_size], order[settings.batch_size :]
            y = self._mixed(x[chosen], float_x[chosen])
            for block in self.blocks:
                y = block(y, self._rint)
            error = (y[:, :tokens] - target[chosen]).square()
            loss = (error * importance[chosen]).mean() + self._pull(step)
            if not bool(loss.isfinite()):
                raise ValueError(
                    f"reconstruct: the loss of {self.name} is {loss.item()} at step {step}; lower lr={settings.lr} "
                    "or look for weights that are not finite"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        if self.linears[0].hard_codes is None:
            self._harden()
        return [block.decided() for block in self.blocks]

    def _decay(self, step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * step / self.settings.iterations))

    def _harden(self) -> None:
        self.drop = 0.0
        for linear in self.linears:
            linear.harden()

    def _kept(self, x: Tensor) -> Tensor | None:
        return torch.rand(x.shape, generator=self.generator) < self.drop if self.drop else None

    def _rint(self, x: Tensor) -> Tensor:
        return _Round.apply(x, self._kept(x))

    def _mixed(self, x: Tensor, float_x: Tensor) -> Tensor:
        kept = self._kept(x)
        return x if kept is None else torch.where(kept, float_x, x)

    def _pull(self, step: int) -> Tensor | float:
        start = FREE * self.settings.iterations
        if self.settings.rounding == "straight" or not start <= step < self.hard_from:
            return 0.0
        beta = BETA_FIRST + (BETA_LAST - BETA_FIRST) * (step - start) / (self.hard_from - start)
        h = torch.cat([linear.h().flatten() for linear in self.linears])
        return PULL * (1 - (2 * h - 1).abs().pow(beta)).mean()


def mrecg_groups(plans: Sequence[BlockPlan], merges: int, capacities: Sequence[float] | None = None) -> list[list[int]]:
    """Groups for `reconstruct`: the `merges` pairs of neighbours that differ most in capacity are learned together.

    capacities: one number a block; None: bits of its weights. Neighbours that do not differ stay apart: in a plain ViT
    only mixed precision, or a measure of one's own, tells blocks from each other.
    """
    capacities = [_weight_bits(plan) for plan in plans] if capacities is None else list(capacities)
    if len(capacities) != len(plans) or not plans:
        raise ValueError(f"mrecg_groups: got {len(capacities)} capacities for {len(plans)} blocks; give one a block")
    if not 0 <= merges < len(plans):
        raise ValueError(f"mrecg_groups: merges={merges}; {len(plans)} blocks have {len(plans) - 1} neighbouring pairs")
    differences = [abs(b - a) for a, b in pairwise(capacities)]
    ranked = sorted(range(len(differences)), key=lambda i: -differences[i])  # stable: the earlier of equals
    merged = {i for i in ranked[:merges] if differences[i] > 0}
    groups = [[0]]
    for i in range(1, len(plans)):
        if i - 1 in merged:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _weight_bits(plan: BlockPlan) -> float:
    linears = (getattr(plan, name) for name in LINEARS)
    return float(sum(linear.weight.numel() * linear.w_bits for linear in linears))


def _importance(target: Tensor) -> Tensor:
    """1 / variance (..., 1) of each token: what the norms behind it divide by."""
    return 1 / target.var(-1, keepdim=True, correction=0).clamp_min(affine.MIN_SCALE)


@torch.no_grad()
def _apply(block: Callable[[Tensor], Tensor], x: Tensor, batch_size: int) -> Tensor:
    return torch.cat([block(part) for part in x.split(batch_size)])


def _check(
    plans: list[BlockPlan],
    blocks: Sequence,
    inputs: Tensor,
    float_inputs: Tensor,
    groups: list[list[int]],
) -> None:
    if not plans or len(plans) != len(blocks):
        raise ValueError(f"reconstruct: got {len(plans)} plans and {len(blocks)} float blocks; give as many")
    if [i for group in groups for i in group] != list(range(len(plans))) or not all(groups):
        raise ValueError(
            f"reconstruct: groups={groups} are not consecutive runs of all blocks "
            f"0..{len(plans) - 1}, such as {[[i] for i in range(len(plans))]}"
        )
    if inputs.dim() != 3 or inputs.shape != float_inputs.shape or inputs.numel() == 0:
        shapes = f"inputs {tuple(inputs.shape)} and float_inputs {tuple(float_inputs.shape)}"
        raise ValueError(f"reconstruct: got {shapes}; both must be (images, N, C), one image or more")
    for name, x in (("inputs", inputs), ("float_inputs", float_inputs)):
        if not bool(x.isfinite().all()):
            raise ValueError(f"reconstruct: {name} hold NaN or an infinity; clean the calibration data")
