"""One pass over a block on calibration inputs: levels, rounding, biases, each on what the quantized layers before give.

For each Linear, in the order data flows:
  x_clip   of the inputs of proj and fc1, below 8 bits (levels.py); one of qkv too helps ViT-Ti, not DeiT-Ti
  x_table  of inputs that have a minimum, below 8 bits (levels.py)
  codes    rounded with compensation (rounding.py), for the inputs as they are once quantized
  bias     such that the mean output on the calibration data stays

Before that, below 8 bits, the features of a head of v are rotated, and the weights of proj back (heads.py).

Tokens count by what their error does:
  - proj and fc2 add to a residual stream that the next norm divides by its deviation: they count 1 / variance. Without
    that ViT-Ti at W4A8 loses 27 points: four tokens with activations of 200 own the sum over all.
  - the first one counts as much as FIRST_TOKEN of all. It is what most classifiers read, and all attend to it. Where it
    means nothing, little is lost.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit_accel.calibrate.heads import rotate_heads
from pyvit_accel.calibrate.levels import choose_clip, choose_table
from pyvit_accel.calibrate.plan import ACTIVATIONS, BlockPlan, LinearPlan, attended, linear_output, quantized_input
from pyvit_accel.calibrate.rounding import compensated_codes
from pyvit_accel.formats import affine

ROWS = 8192  # that the search of one Linear sees at most, evenly spaced
LEVEL_ROWS = 1024  # of these, that levels are chosen on
# KL of the logits of DeiT-Ti, ViT-Ti at W4A4: 0.24, 0.40 when all tokens count alike; 0.20, 0.37 with 0.05.
FIRST_TOKEN = 0.15


@torch.no_grad()
def refine(plan: BlockPlan, x: Tensor) -> BlockPlan:
    """The plan with codes, w_scale, biases and tables decided; x (images, N, C) float32, of the quantized network.

    Raises ValueError for an x that does not fit or is not finite.
    """
    C = plan.qkv.weight.shape[1]
    if x.dim() != 3 or x.shape[-1] != C or x.numel() == 0 or not bool(x.isfinite().all()):
        raise ValueError(f"refine: x is {tuple(x.shape)}; it must be (images, tokens, {C}), finite and not empty")
    tokens = x.new_ones(x.shape[:2])
    tokens[:, 0] = max(1.0, FIRST_TOKEN * x.shape[1])
    y = F.layer_norm(x, (C,), *plan.norm1)
    plan = rotate_heads(plan, y)
    plan = replace(plan, qkv=refine_linear(plan.qkv, y, tokens, clips=False))
    y = attended(plan, linear_output(plan.qkv, y))
    plan = replace(plan, proj=refine_linear(plan.proj, y, tokens / _variance(plan.proj, y, x, plan.layer_scale1)))
    x = x + _scaled(linear_output(plan.proj, y), plan.layer_scale1)
    y = F.layer_norm(x, (C,), *plan.norm2)
    plan = replace(plan, fc1=refine_linear(plan.fc1, y, tokens))
    y = ACTIVATIONS[plan.activation](linear_output(plan.fc1, y))
    return replace(plan, fc2=refine_linear(plan.fc2, y, tokens / _variance(plan.fc2, y, x, plan.layer_scale2)))


def refine_linear(plan: LinearPlan, x: Tensor, importance: Tensor, clips: bool = True) -> LinearPlan:
    """x (..., K) the input, importance (...) what the square of an error of that row counts; clips: may be chosen."""
    x, importance = _some(x.flatten(0, -2), ROWS), _some(importance.flatten(), ROWS)
    importance = importance / importance.sum()
    if plan.x_scale is None and plan.x_bits < 8:
        few = _some(x, LEVEL_ROWS), _some(importance, LEVEL_ROWS)
        if plan.x_minimum is not None:
            plan = choose_table(plan, *few)
        elif clips:
            plan = choose_clip(plan, *few)
    x_hat = quantized_input(plan, x)
    per_channel = plan.x_scale is not None and plan.x_scale.numel() > 1
    read = x_hat / plan.x_scale if per_channel else x_hat  # by the packed weight
    centred = (read - importance @ read) * importance.sqrt()[:, None]
    gram = centred.T @ centred
    w_scale = affine.weight_scale(plan.packed, plan.w_bits) if plan.w_scale is None else plan.w_scale
    codes = compensated_codes(plan.packed, w_scale, gram, plan.w_bits)
    plan = replace(plan, codes=codes, w_scale=w_scale)
    change = plan.weight @ (importance @ x) - plan.weight_hat() @ (importance @ x_hat)
    return replace(plan, bias=change if plan.bias is None else plan.bias + change)


def _variance(plan: LinearPlan, x: Tensor, residual: Tensor, layer_scale: Tensor | None) -> Tensor:
    """Of each token of the residual stream behind the Linear."""
    y = residual + _scaled(F.linear(x, plan.weight, plan.bias), layer_scale)
    return y.var(-1, correction=0).clamp_min(affine.MIN_SCALE)


def _scaled(y: Tensor, layer_scale: Tensor | None) -> Tensor:
    return y if layer_scale is None else y * layer_scale


def _some(rows: Tensor, count: int) -> Tensor:
    return rows[:: -(-len(rows) // count)]
