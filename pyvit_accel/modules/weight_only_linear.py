"""WeightOnlyLinear: nn.Linear with int8 weights and float activations: a quarter of the memory, float accuracy."""

from __future__ import annotations

from torch import Tensor, nn

from pyvit_accel import ops

from .quant_linear import PackedWeight, check_weight


class WeightOnlyLinear(PackedWeight):
    """Drop-in for nn.Linear; x keeps its dtype, sums are float32."""

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> WeightOnlyLinear:
        """Raises Unsupported for NaN or infinite weights."""
        check_weight(linear)
        new = cls(linear.in_features, linear.out_features, linear.bias is not None)
        new.pack(linear.weight, linear.bias)
        return new.to(linear.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        return ops.weight_only_linear(x, self.w_packed, self.w_scale, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight=int8"
