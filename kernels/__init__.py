"""Triton kernels: launchers with the names and signatures of the references, for CUDA tensors."""

from .lowbit_linear import lowbit_linear
from .norm_quant import norm_quant, norm_quant_dynamic
from .quantize import quantize, quantize_dynamic

__all__ = ["lowbit_linear", "norm_quant", "norm_quant_dynamic", "quantize", "quantize_dynamic"]
