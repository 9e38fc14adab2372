"""Which two of every four inputs a 2:4 weight keeps, and what the others are made good with.

    sparsity.prune(model, ["blocks.*.mlp.fc?", "blocks.*.attn.*"], batches, permute=True)   in place, after training
    mask = sparsity.magnitude(w)                                                            one weight, while training

masks      magnitude, wanda, the best transposable mask (90 patterns of 4 x 4), any score by largest_two
sparsegpt  masks and new values
moments    what wanda and sparsegpt need to know of a layer's inputs
permute    orders of inputs under which more is kept, folded into the layer before
bimask     a second mask for the backward pass
branches   two branches of one mask as one weight
prune      all of it over a model, with a report

Masks are of dense weights; formats/sparse24 packs what they leave. The same batches give the same masks.
"""

from pyvit_accel.sparsity.bimask import BiMask, bimask
from pyvit_accel.sparsity.branches import merge_branches
from pyvit_accel.sparsity.masks import kept_energy, largest_two, magnitude, transposable, wanda
from pyvit_accel.sparsity.moments import Moments, observe
from pyvit_accel.sparsity.permute import Pair, Permutation, fold_hidden, fold_values, pair_of, search
from pyvit_accel.sparsity.prune import METHODS, Pruned, output_error, prune
from pyvit_accel.sparsity.sparsegpt import refit, sparsegpt

__all__ = [
    "METHODS",
    "BiMask",
    "Moments",
    "Pair",
    "Permutation",
    "Pruned",
    "bimask",
    "fold_hidden",
    "fold_values",
    "kept_energy",
    "largest_two",
    "magnitude",
    "merge_branches",
    "observe",
    "output_error",
    "pair_of",
    "prune",
    "refit",
    "search",
    "sparsegpt",
    "transposable",
    "wanda",
]
