"""QuantLinear: nn.Linear with int8 weights and int8 activations, from one packed buffer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyvit_accel import ops
from pyvit_accel.errors import Unsupported
from pyvit_accel.formats import affine, packed

from .gradient import refuse_gradient

MAX_IN_FEATURES = 2**16  # of 255 * 127 each, the largest product with a zero point


def check_finite(name: str, t: Tensor | None) -> None:
    """Raise Unsupported for NaN, which codes cannot hold and would hide, and for infinities."""
    if t is not None and not torch.isfinite(t).all():
        count = int((~torch.isfinite(t)).sum())
        raise Unsupported(f"{name} holds {count} NaN or infinite values; repair the checkpoint")


def check_weight(layer: nn.Linear | nn.Conv2d) -> None:
    """Raise Unsupported, with the reason, when a layer cannot be quantised."""
    for name in ("weight", "bias"):
        check_finite(name, getattr(layer, name))
    if layer.weight.numel() == 0:
        raise Unsupported(f"weight {tuple(layer.weight.shape)} is empty")
    if layer.weight[0].numel() >= MAX_IN_FEATURES:
        raise Unsupported(f"in_features={layer.weight[0].numel()}: int32 sums are exact below {MAX_IN_FEATURES}")


class PackedWeight(nn.Module):
    """The buffers shared by the quantised Linears: w_packed (W8 v1), w_scale (N,), bias (N,) or None."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        shape = packed.packed_shape(out_features, in_features)
        self.register_buffer("w_packed", torch.zeros(shape, dtype=torch.uint8))
        self.register_buffer("w_scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    def pack(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Take a float weight (N, K) and bias (N,); returns the weight as quantised, float32."""
        codes, self.w_scale = affine.quantize_weight(weight)
        self.w_packed = packed.pack_w8(codes)
        self.bias = None if bias is None else bias.detach().float().clone()
        return affine.dequantize(codes, self.w_scale[:, None])

    def dequantized_weight(self) -> Tensor:
        """The weight (N, K) the matmul multiplies with, float32."""
        codes = packed.unpack_w8(self.w_packed, self.out_features, self.in_features)
        return affine.dequantize(codes, self.w_scale[:, None])

    def config(self) -> dict:
        """What the constructor needs to make this module anew, JSON-able."""
        return {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QuantLinear(PackedWeight):
    """Drop-in for nn.Linear: quantise x to int8, multiply in integers, scale back.

    x_scale: the static scale of x, (1,), or (K,) one per input feature, which the packed weight then contains; with an
    integer zero point. None: one scale per token, found at run time; x_minimum then is a known lower bound of x from
    which the codes start, its share of the product in the bias. In a block the producer of x quantises instead, in its
    own epilogue, by reading x_scale and x_zero_point here.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, x_scale: int = 0, x_minimum: float | None = None
    ) -> None:
        """x_scale: how many values it has, 0 for one per token."""
        super().__init__(in_features, out_features, bias)
        # In this order: torch.export (2.13) counts buffers that are None, and lacks an input when two come before one.
        self.register_buffer("unit_scale", torch.ones(1))  # of codes whose x_scale the weight contains
        self.register_buffer("x_scale", torch.ones(x_scale) if x_scale else None)
        self.x_zero_point, self.x_minimum = (0 if x_minimum is None else -128), x_minimum

    @classmethod
    def from_linear(cls, linear: nn.Linear, x_minimum: float | None = None) -> QuantLinear:
        """One scale per token. Raises Unsupported for NaN or infinite weights and for shapes int8 sums cannot hold."""
        check_weight(linear)
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, 0, x_minimum)
        new = new.to(linear.weight.device)
        weight = new.pack(linear.weight, linear.bias)
        if x_minimum is not None:
            below = x_minimum * weight.sum(dim=1)
            new.bias = below if new.bias is None else new.bias + below
        return new

    @classmethod
    def from_weight(
        cls, weight: Tensor, bias: Tensor | None, x_scale: Tensor | None = None, x_zero_point: int = 0
    ) -> QuantLinear:
        """weight (N, K), bias (N,) or None; x_scale (1,) or (K,), None for one scale per token."""
        N, K = weight.shape
        new = cls(K, N, bias is not None, 0 if x_scale is None else x_scale.numel()).to(weight.device)
        new.x_scale, new.x_zero_point = x_scale, x_zero_point
        new.pack(weight if x_scale is None or x_scale.numel() == 1 else weight.detach() * x_scale, bias)
        return new

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Float x (..., K) to the codes and scale that matmul takes."""
        if self.x_scale is None:
            return ops.quantize(x, minimum=self.x_minimum)
        return ops.quantize(x, self.x_scale, self.x_zero_point)

    def matmul(self, codes: Tensor, scale: Tensor | None = None, **epilogue) -> Tensor:
        """int8 codes (..., K) to (..., N); epilogue as in ops.lowbit_linear. scale: only when it is dynamic."""
        if self.x_scale is not None:
            scale = self.x_scale if self.x_scale.shape[0] == 1 else self.unit_scale
        return ops.lowbit_linear(
            codes, scale, self.w_packed, self.w_scale, self.bias, x_zero_point=self.x_zero_point, **epilogue
        )

    def forward(self, x: Tensor) -> Tensor:
        return refuse_gradient(self.matmul(*self.quantize(x)).to(x.dtype), x)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.x_zero_point])

    def set_extra_state(self, state: Tensor) -> None:
        self.x_zero_point = int(state)

    def config(self) -> dict:
        x_scale = 0 if self.x_scale is None else self.x_scale.numel()
        return super().config() | {"x_scale": x_scale, "x_minimum": self.x_minimum}

    def extra_repr(self) -> str:
        kinds = {0: "per token", 1: "static"}
        kind = kinds.get(self.config()["x_scale"], "static per channel")
        return f"{super().extra_repr()}, weight=int8, activation=int8 {kind}"
