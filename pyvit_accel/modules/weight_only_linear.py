"""WeightOnlyLinear: nn.Linear with packed integer weights and float activations, for memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyvit_accel import ops
from pyvit_accel.errors import Unsupported
from pyvit_accel.formats import affine

from .quant_linear import PackedWeight, check_weight


class WeightOnlyLinear(PackedWeight):
    """Drop-in for nn.Linear; x keeps its dtype, sums are float32.

    group_size  inputs that share a scale and a zero point; 0: one scale per output feature, symmetric
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, w_bits: int = 8, group_size: int = 0
    ) -> None:
        super().__init__(in_features, out_features, bias, w_bits)
        self.group_size = group_size
        shape = (out_features, in_features // group_size) if group_size else None
        if shape:
            self.w_scale = torch.ones(shape)
        self.register_buffer("w_zero_point", torch.zeros(shape) if shape else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, w_bits: int = 8, group_size: int = 0) -> WeightOnlyLinear:
        """Raises Unsupported for NaN or infinite weights, and when group_size does not divide in_features."""
        check_weight(linear)
        if group_size and linear.in_features % group_size:
            raise Unsupported(f"in_features={linear.in_features} is not a multiple of group_size={group_size}")
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, w_bits, group_size)
        new = new.to(linear.weight.device)
        if group_size:
            codes, scale, new.w_zero_point = affine.quantize_groups(linear.weight, w_bits, group_size)
        else:
            codes, scale = affine.quantize_weight(linear.weight, w_bits)
        new.pack(codes, scale, linear.bias)
        return new

    def dequantized_weight(self) -> Tensor:
        if not self.group_size:
            return super().dequantized_weight()
        codes = self.codes().view(*self.w_scale.shape, -1)
        return affine.dequantize(codes, self.w_scale[..., None], self.w_zero_point[..., None]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        self.check_inputs(x)
        return ops.weight_only_linear(x, self.w_packed, self.w_scale, self.bias, self.w_zero_point)

    def config(self) -> dict:
        return super().config() | {"group_size": self.group_size}

    def extra_repr(self) -> str:
        groups = f" in groups of {self.group_size}" if self.group_size else ""
        return f"{super().extra_repr()}, weight=int{self.w_bits}{groups}"
