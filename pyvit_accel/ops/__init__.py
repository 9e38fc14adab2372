"""The operations: schema, fake kernel, registration and the public function that checks arguments."""

from . import _library
from .class_row import class_row
from .codebook_linear import codebook_linear
from .local_assign import local_assign
from .lowbit_linear import lowbit_linear, lowbit_linear_scatter
from .match_tokens import match_tokens, mean_heads, merge_pairs
from .mix_tokens import mix_tokens
from .norm_quant import norm_quant
from .propagate import propagate
from .quant_attention import quant_attention
from .quant_block import quant_block
from .quant_mlp import quant_mlp
from .quant_patch_embed import quant_patch_embed
from .quant_project import quant_project
from .quantize import quantize
from .select_tokens import group_tokens, select_tokens, split_tokens
from .sparse24_linear import sparse24_linear
from .weight_only_linear import weight_only_linear

_library.finish()

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
    "propagate",
    "quant_attention",
    "quant_block",
    "quant_mlp",
    "quant_patch_embed",
    "quant_project",
    "quantize",
    "select_tokens",
    "sparse24_linear",
    "split_tokens",
    "weight_only_linear",
]
