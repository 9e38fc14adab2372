"""One pass over a block on calibration inputs: levels, rounding, biases, each on what the quantized layers before give.

For each Linear, in the order data flows:
  x_table  of inputs that have a minimum, below 8 bits (levels.py)
  codes    rounded with compensation (rounding.py), for the inputs as they are once quantized
  bias     such that the mean output on the calibration data stays

Rows count by what their error does. proj and fc2 add to a residual stream that the next norm divides by its deviation:
their rows count 1 / variance. Without that ViT-Ti at W4A8 loses 27 points: four tokens with activations of 200 own the
sum over rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit_accel.calibrate.levels import choose_table
from pyvit_accel.calibrate.plan import ACTIVATIONS, BlockPlan, LinearPlan, attended, linear_output, quantized_input
from pyvit_accel.calibrate.rounding import compensated_codes
from pyvit_accel.formats import affine

ROWS = 8192  # that the search of one Linear sees at most, evenly spaced
LEVEL_ROWS = 1024  # of these, that levels are chosen on


@torch.no_grad()
def refine(plan: BlockPlan, x: Tensor) -> BlockPlan:
    """The plan with codes, w_scale, biases and tables decided; x (images, N, C) float32, of the quantized network.

    Raises ValueError for an x that does not fit or is not finite.
    """
    C = plan.qkv.weight.shape[1]
    if x.dim() != 3 or x.shape[-1] != C or x.numel() == 0 or not bool(x.isfinite().all()):
        raise ValueError(f"refine: x is {tuple(x.shape)}; it must be (images, tokens, {C}), finite and not empty")
    y = F.layer_norm(x, (C,), *plan.norm1)
    plan = replace(plan, qkv=refine_linear(plan.qkv, y))
    heads = attended(plan, linear_output(plan.qkv, y))
    plan = replace(plan, proj=refine_linear(plan.proj, heads, _importance(plan.proj, heads, x, plan.layer_scale1)))
    x = x + _scaled(linear_output(plan.proj, heads), plan.layer_scale1)
    y = F.layer_norm(x, (C,), *plan.norm2)
    plan = replace(plan, fc1=refine_linear(plan.fc1, y))
    hidden = ACTIVATIONS[plan.activation](linear_output(plan.fc1, y))
    return replace(plan, fc2=refine_linear(plan.fc2, hidden, _importance(plan.fc2, hidden, x, plan.layer_scale2)))


def refine_linear(plan: LinearPlan, x: Tensor, importance: Tensor | None = None) -> LinearPlan:
    """x (..., K) the input, importance (...) of its rows; None: all alike."""
    x = _some(x.reshape(-1, x.shape[-1]), ROWS)
    importance = x.new_ones(len(x)) if importance is None else _some(importance.reshape(-1), ROWS)
    importance = importance / importance.sum()
    if plan.x_minimum is not None and plan.x_bits < 8:
        plan = choose_table(plan, _some(x, LEVEL_ROWS), _some(importance, LEVEL_ROWS))
    x_hat = quantized_input(plan, x)
    per_channel = plan.x_scale is not None and plan.x_scale.numel() > 1
    seen = x_hat / plan.x_scale if per_channel else x_hat
    mean = importance @ seen
    centred = (seen - mean) * importance.sqrt()[:, None]
    w_scale = affine.weight_scale(plan.packed, plan.w_bits) if plan.w_scale is None else plan.w_scale
    codes = compensated_codes(plan.packed, w_scale, centred.T @ centred, plan.w_bits)
    plan = replace(plan, codes=codes, w_scale=w_scale)
    change = plan.weight @ (importance @ x) - plan.weight_hat() @ (importance @ x_hat)
    return replace(plan, bias=change if plan.bias is None else plan.bias + change)


def _importance(plan: LinearPlan, x: Tensor, residual: Tensor, layer_scale: Tensor | None) -> Tensor:
    """Of the rows of x: 1 / variance of the residual stream behind the Linear."""
    y = residual + _scaled(F.linear(x, plan.weight, plan.bias), layer_scale)
    return 1 / y.var(-1, correction=0).clamp_min(affine.MIN_SCALE)


def _scaled(y: Tensor, layer_scale: Tensor | None) -> Tensor:
    return y if layer_scale is None else y * layer_scale


def _some(rows: Tensor, count: int) -> Tensor:
    return rows[:: -(-len(rows) // count)]
