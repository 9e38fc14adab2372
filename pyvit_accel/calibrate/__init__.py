"""How the formats get their numbers: watch a float model, choose scales, fold ranges into weights, correct biases.

    observed = calibrate.observe(model, batches)
    x = observed.input(block.attn.qkv)                    per-channel range, mean and a row sample
    fold = calibrate.range_fold(x)                        y' = (y - shift) / ratio
    scale = calibrate.symmetric_scale(fold.activation(x)) one step for all channels of y'
    gamma, beta = calibrate.fold_norm(norm.weight, norm.bias, fold)
    w, bias = calibrate.fold_linear(qkv.weight, qkv.bias, fold)

It sees modules and batches, never kernels. Nothing here is random: the same batches give the same numbers.
"""

from pyvit_accel.calibrate import allocate, norms
from pyvit_accel.calibrate.fold import (
    Fold,
    bias_correction,
    fold_linear,
    fold_norm,
    outlier_fold,
    range_fold,
)
from pyvit_accel.calibrate.observers import Activation, Observed, observe
from pyvit_accel.calibrate.plan import BlockPlan, LinearPlan
from pyvit_accel.calibrate.relevance import relevance
from pyvit_accel.calibrate.repq import channel_scales, clipped_scales, refold, repq_fold, repq_plan
from pyvit_accel.calibrate.scales import affine_scale, percentile_search, symmetric_scale
from pyvit_accel.calibrate.sqb import sqb_fold

__all__ = [
    "Activation",
    "BlockPlan",
    "Fold",
    "LinearPlan",
    "Observed",
    "affine_scale",
    "allocate",
    "bias_correction",
    "channel_scales",
    "clipped_scales",
    "fold_linear",
    "fold_norm",
    "norms",
    "observe",
    "outlier_fold",
    "percentile_search",
    "range_fold",
    "refold",
    "relevance",
    "repq_fold",
    "repq_plan",
    "sqb_fold",
    "symmetric_scale",
]
