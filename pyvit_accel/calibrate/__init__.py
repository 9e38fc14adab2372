"""How the formats get their numbers: watch a float model, choose scales, fold ranges into weights, correct biases.

    observed = calibrate.observe(model, batches)
    x = observed.input(block.attn.qkv)                    per-channel range, mean and a row sample
    fold = calibrate.range_fold(x)                        y' = (y - shift) / ratio
    scale = calibrate.symmetric_scale(fold.activation(x)) one step for all channels of y'
    gamma, beta = calibrate.fold_norm(norm.weight, norm.bias, fold)
    w, bias = calibrate.fold_linear(qkv.weight, qkv.bias, fold)

It sees modules and batches, never kernels. The same batches and seeds give the same numbers.

scales     min-max, percentile and MSE observers, RepQ-ViT's percentile search; 2 to 8 bits
fold       the general fold; repq, sqb: the folds of RepQ-ViT, LRP-QViT and MPTQ-ViT
refine     what a block gains from one pass: levels, clips, rounding (GPTQ), biases; heads: rotations inside heads
adalog     AdaLog's search for scales, zero points and bases; sulq, twin, optm: other formats of softmax and GELU
relevance  what a layer contributes; allocate: bits per layer under a budget
reconstruct  rounding and scales learned block by block; data_free: calibration images made from the model alone
norms      RepBN and Unified Normalization folded away
"""

from pyvit_accel.calibrate import allocate, norms
from pyvit_accel.calibrate.adalog import (
    adalog_gelu,
    adalog_plan,
    adalog_softmax,
    fpcs,
    fpcs_heads,
    fpcs_input,
    fpcs_weight,
    shift_bias,
)
from pyvit_accel.calibrate.data_free import synthesize
from pyvit_accel.calibrate.fold import (
    Fold,
    bias_correction,
    fold_linear,
    fold_norm,
    outlier_fold,
    range_fold,
)
from pyvit_accel.calibrate.observers import Activation, Kept, Observed, observe
from pyvit_accel.calibrate.optm import optm_gelu
from pyvit_accel.calibrate.plan import BlockPlan, LinearPlan, block_output, output_error
from pyvit_accel.calibrate.reconstruct import Reconstruction, mrecg_groups, reconstruct
from pyvit_accel.calibrate.refine import refine
from pyvit_accel.calibrate.relevance import relevance
from pyvit_accel.calibrate.repq import channel_scales, clipped_scales, log_sqrt2_scale, refold, repq_fold, repq_plan
from pyvit_accel.calibrate.scales import affine_scale, percentile_search, symmetric_scale
from pyvit_accel.calibrate.sqb import sqb_fold
from pyvit_accel.calibrate.sulq import sulq_search
from pyvit_accel.calibrate.twin import twin_gelu, twin_softmax

__all__ = [
    "Activation",
    "BlockPlan",
    "Fold",
    "Kept",
    "LinearPlan",
    "Observed",
    "Reconstruction",
    "adalog_gelu",
    "adalog_plan",
    "adalog_softmax",
    "affine_scale",
    "allocate",
    "bias_correction",
    "block_output",
    "channel_scales",
    "clipped_scales",
    "fold_linear",
    "fold_norm",
    "fpcs",
    "fpcs_heads",
    "fpcs_input",
    "fpcs_weight",
    "log_sqrt2_scale",
    "mrecg_groups",
    "norms",
    "observe",
    "optm_gelu",
    "outlier_fold",
    "output_error",
    "percentile_search",
    "range_fold",
    "reconstruct",
    "refine",
    "refold",
    "relevance",
    "repq_fold",
    "repq_plan",
    "shift_bias",
    "sqb_fold",
    "sulq_search",
    "symmetric_scale",
    "synthesize",
    "twin_gelu",
    "twin_softmax",
]
