"""The operations: schema, fake kernel, registration and the public function that checks arguments."""

from . import _library
from .codebook_linear import codebook_linear
from .lowbit_linear import lowbit_linear
from .norm_quant import norm_quant
from .quant_attention import quant_attention
from .quant_block import quant_block
from .quant_patch_embed import quant_patch_embed
from .quantize import quantize
from .weight_only_linear import weight_only_linear

_library.finish()

__all__ = [
    "codebook_linear",
    "lowbit_linear",
    "norm_quant",
    "quant_attention",
    "quant_block",
    "quant_patch_embed",
    "quantize",
    "weight_only_linear",
]
