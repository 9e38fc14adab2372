"""Triton kernels: launchers with the names and signatures of the references, for CUDA tensors."""

from .class_row import class_row
from .codebook_linear import codebook_linear
from .local_assign import local_assign
from .lowbit_linear import lowbit_linear, lowbit_linear_scatter
from .match_tokens import match_tokens, mean_heads, merge_pairs
from .mix_tokens import mix_tokens
from .norm_quant import norm_quant, norm_quant_dynamic
from .propagate import propagate
from .quant_attention import quant_attention
from .quantize import quantize, quantize_dynamic
from .select_tokens import group_tokens, select_tokens, split_tokens
from .weight_only_linear import weight_only_linear

__all__ = [
    "class_row",
    "codebook_linear",
    "group_tokens",
    "local_assign",
    "lowbit_linear",
    "lowbit_linear_scatter",
    "match_tokens",
    "mean_heads",
    "merge_pairs",
    "mix_tokens",
    "norm_quant",
    "norm_quant_dynamic",
    "propagate",
    "quant_attention",
    "quantize",
    "quantize_dynamic",
    "select_tokens",
    "split_tokens",
    "weight_only_linear",
]
