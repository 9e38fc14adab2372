"""Triton kernels: launchers with the names and signatures of the references, for CUDA tensors."""

from .codebook_linear import codebook_linear
from .local_assign import local_assign
from .lowbit_linear import lowbit_linear
from .mix_tokens import mix_tokens
from .norm_quant import norm_quant, norm_quant_dynamic
from .propagate import propagate
from .quant_attention import quant_attention
from .quantize import quantize, quantize_dynamic
from .weight_only_linear import weight_only_linear

__all__ = [
    "codebook_linear",
    "local_assign",
    "lowbit_linear",
    "mix_tokens",
    "norm_quant",
    "norm_quant_dynamic",
    "propagate",
    "quant_attention",
    "quantize",
    "quantize_dynamic",
    "weight_only_linear",
]
