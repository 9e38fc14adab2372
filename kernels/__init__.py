"""Triton kernels: launchers with the names and signatures of the references, for CUDA tensors."""

from .codebook_linear import codebook_linear
from .lowbit_linear import lowbit_linear, lowbit_linear_scatter
from .norm_quant import norm_quant, norm_quant_dynamic
from .quant_attention import quant_attention
from .quantize import quantize, quantize_dynamic
from .weight_only_linear import weight_only_linear

__all__ = [
    "codebook_linear",
    "lowbit_linear",
    "lowbit_linear_scatter",
    "norm_quant",
    "norm_quant_dynamic",
    "quant_attention",
    "quantize",
    "quantize_dynamic",
    "weight_only_linear",
]
