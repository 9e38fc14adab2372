"""What each op means, in the plainest PyTorch: the only truth tests compare with, the fallback where no kernel is."""

from .codebook_linear import codebook_linear
from .lowbit_linear import lowbit_linear
from .norm_quant import norm_quant, norm_quant_dynamic
from .quant_attention import quant_attention
from .quant_block import quant_block
from .quant_patch_embed import quant_patch_embed
from .quantize import quantize, quantize_dynamic
from .weight_only_linear import weight_only_linear

__all__ = [
    "codebook_linear",
    "lowbit_linear",
    "norm_quant",
    "norm_quant_dynamic",
    "quant_attention",
    "quant_block",
    "quant_patch_embed",
    "quantize",
    "quantize_dynamic",
    "weight_only_linear",
]
