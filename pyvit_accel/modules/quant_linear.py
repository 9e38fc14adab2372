"""QuantLinear: nn.Linear on integer codes of 2 to 8 bits, the weight in one packed buffer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyvit_accel import ops
from pyvit_accel.calibrate import LinearPlan
from pyvit_accel.errors import Unsupported
from pyvit_accel.formats import affine, packed
from pyvit_accel.formats.sparse24 import Sparse24Operand

from .gradient import refuse_gradient

MAX_IN_FEATURES = 2**16  # of 255 * 127 each, the largest product with a zero point


def check_finite(name: str, t: Tensor | None) -> None:
    """Raise Unsupported for NaN, which codes cannot hold and would hide, for infinities, and for no values at all."""
    if t is None:
        return
    if t.is_meta:
        raise Unsupported(f"{name} is on meta, without values; load the model's weights first")
    finite = torch.isfinite(t)
    if not finite.all():
        first = ", ".join(map(str, (~finite).nonzero()[0].tolist()))
        raise Unsupported(
            f"{name} holds {int((~finite).sum())} NaN or infinite values, the first at [{first}]; repair the checkpoint"
        )


def check_weight(layer: nn.Linear | nn.Conv2d) -> None:
    """Raise Unsupported, with the reason, when a layer cannot be quantised."""
    for name in ("weight", "bias"):
        check_finite(name, getattr(layer, name))
    if layer.weight.numel() == 0:
        raise Unsupported(f"weight {tuple(layer.weight.shape)} is empty")
    if layer.weight[0].numel() >= MAX_IN_FEATURES:
        raise Unsupported(f"in_features={layer.weight[0].numel()}: int32 sums are exact below {MAX_IN_FEATURES}")


class PackedWeight(nn.Module):
    """The buffers shared by the quantised Linears: w_packed of w_bits, w_scale (N,) | (N, G), bias (N,) | None."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, w_bits: int = 8) -> None:
        super().__init__()
        self.in_features, self.out_features, self.w_bits = in_features, out_features, w_bits
        shape = packed.packed_shape(out_features, in_features, w_bits)
        self.register_buffer("w_packed", torch.zeros(shape, dtype=torch.uint8))
        self.register_buffer("w_scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    def pack(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Take codes (N, K) int8, their scale (N,) | (N, G) and a bias (N,)."""
        self.pack_codes(codes)
        self.w_scale = scale.detach().float().contiguous()
        self.bias = None if bias is None else bias.detach().float().clone()

    def pack_codes(self, codes: Tensor) -> None:
        self.w_packed = packed.pack(codes, self.w_bits)

    def check_inputs(self, x: Tensor) -> None:
        """The ops see the padded length of a packed weight only."""
        if x.shape[-1:] != (self.in_features,):
            name = type(self).__name__
            raise ValueError(f"{name}: x has shape {tuple(x.shape)}, expected (..., in_features={self.in_features})")

    def codes(self) -> Tensor:
        """The codes (N, K) of the weight, int8."""
        return packed.unpack(self.w_packed, self.out_features, self.in_features)

    def dequantized_weight(self) -> Tensor:
        """The weight (N, K) the matmul multiplies with, float32."""
        return affine.dequantize(self.codes(), self.w_scale[:, None])

    @property
    def weight(self) -> Tensor:
        """As a float32 of its own, for models that read it past forward(): F.linear(x, self.qkv.weight, bias)."""
        return self.dequantized_weight()

    def formats(self) -> tuple[str, str]:
        """Of the weight and of the activations."""
        return f"int{self.w_bits}", "float"

    def weight_bytes(self) -> int:
        """Of the packed weight with its scales and sums."""
        return sum(t.nbytes for name, t in self.named_buffers(recurse=False) if name.startswith("w_"))

    def config(self) -> dict:
        """What the constructor needs to make this module anew, JSON-able."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "w_bits": self.w_bits,
        }

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QuantLinear(PackedWeight):
    """Drop-in for nn.Linear: quantise x to integer codes, multiply in integers, scale back.

    Codes of w_bits and x_bits, 2 to 8; in memory weights are packed and activations are bytes.

    x_scale: the static scale of x, (1,), or (K,) one per input feature, which the packed weight then contains; with an
    integer zero point. None: one scale per token, found at run time, whose codes span the part x_clip of the token's
    range; x_minimum then is a known lower bound of x from which the codes start, its share of the product in the bias.
    x_table replaces each of its 8-bit codes by one of 2^x_bits, not evenly spaced: the format of GELU outputs at few
    bits. In a block the producer of x quantises instead, in its own epilogue, by reading x_scale and x_zero_point here.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        w_bits: int = 8,
        x_bits: int = 8,
        x_scale: int = 0,
        x_minimum: float | None = None,
        x_clip: float = 1.0,
        x_table: bool = False,
    ) -> None:
        """x_scale: how many values it has, 0 for one per token."""
        super().__init__(in_features, out_features, bias, w_bits)
        # In this order: torch.export (2.13) counts buffers that are None, and lacks an input when two come before one.
        self.register_buffer("unit_scale", torch.ones(1))  # of codes whose x_scale the weight contains
        self.register_buffer("x_scale", torch.ones(x_scale) if x_scale else None)
        identity = torch.arange(-128, 128).to(torch.int8)
        self.register_buffer("x_table", identity if x_table else None)
        self.x_bits, self.x_minimum, self.x_clip = x_bits, x_minimum, x_clip
        self.code_bits = 8 if x_table else x_bits  # that codes are found with, before the table
        self.x_zero_point = 0 if x_minimum is None else affine.q_range(self.code_bits)[0]

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, w_bits: int = 8, x_bits: int = 8, x_minimum: float | None = None
    ) -> QuantLinear:
        """One scale per token. Raises Unsupported for NaN or infinite weights, and K that int32 sums cannot hold."""
        check_weight(linear)
        bias = None if linear.bias is None else linear.bias.detach().float()
        plan = LinearPlan(linear.weight.detach().float(), bias, w_bits, x_bits, x_minimum=x_minimum)
        return cls.from_plan(plan)

    @classmethod
    def from_plan(cls, plan: LinearPlan) -> QuantLinear:
        """The module that computes what the plan says."""
        plan, (N, K) = plan.quantized(), plan.weight.shape
        has_bias = plan.bias is not None or plan.x_minimum is not None
        x_scale = 0 if plan.x_scale is None else plan.x_scale.numel()
        has_table = plan.x_table is not None
        new = cls(K, N, has_bias, plan.w_bits, plan.x_bits, x_scale, plan.x_minimum, plan.x_clip, has_table)
        new = new.to(plan.weight.device)
        new.x_table = plan.x_table
        if plan.x_scale is not None:
            new.x_scale, new.x_zero_point = plan.x_scale, plan.x_zero_point
        bias = plan.bias
        if plan.x_minimum is not None:
            below = plan.x_minimum * affine.dequantize(plan.codes, plan.w_scale[:, None]).sum(dim=1)
            bias = below if bias is None else bias + below
        new.pack(plan.codes, plan.w_scale, bias)
        return new

    def quantize(self, x: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Float x (..., K), or its rows in index, to the codes and scale that matmul takes."""
        if self.x_scale is None:
            form = {"minimum": self.x_minimum, "bits": self.code_bits, "clip": self.x_clip, "table": self.x_table}
            return ops.quantize(x, **form, index=index)
        return ops.quantize(x, self.x_scale, self.x_zero_point, bits=self.x_bits, index=index)

    def quantize_norm(self, norm: nn.LayerNorm, x: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The same of norm(x)."""
        clip = self.x_clip if self.x_scale is None else 1.0  # a static scale has none
        return ops.norm_quant(x, norm.weight, norm.bias, self.x_scale, norm.eps, self.x_bits, clip, index=index)

    def matmul(self, codes: Tensor, scale: Tensor | None = None, **epilogue) -> Tensor:
        """int8 codes (..., K) to (..., N); epilogue as in ops.lowbit_linear. scale: only when it is dynamic."""
        self.check_inputs(codes)
        return ops.lowbit_linear(*self._operands(codes, scale), x_zero_point=self.x_zero_point, **epilogue)

    def add_matmul(self, out: Tensor, out_index: Tensor, codes: Tensor, scale: Tensor | None = None, **rest) -> None:
        """The same added to the rows out_index of out, in place; rest as in ops.lowbit_linear_scatter."""
        self.check_inputs(codes)
        operands = self._operands(codes, scale)
        ops.lowbit_linear_scatter(out, out_index, *operands, x_zero_point=self.x_zero_point, **rest)

    def _operands(self, codes: Tensor, scale: Tensor | None) -> tuple[Tensor | None, ...]:
        if self.x_scale is not None:
            scale = self.x_scale if self.x_scale.shape[0] == 1 else self.unit_scale
        return codes, scale, self.operand, self.w_scale, self.bias

    @property
    def operand(self) -> Tensor | Sparse24Operand:
        """The weight as the ops take it."""
        return self.w_packed

    def formats(self) -> tuple[str, str]:
        return f"int{self.w_bits}", f"int{self.x_bits}"

    def forward(self, x: Tensor) -> Tensor:
        return refuse_gradient(self.matmul(*self.quantize(x)).to(x.dtype), x)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.x_zero_point])

    def set_extra_state(self, state: Tensor) -> None:
        self.x_zero_point = int(state)

    def config(self) -> dict:
        x_scale = 0 if self.x_scale is None else self.x_scale.numel()
        inputs = {"x_bits": self.x_bits, "x_scale": x_scale, "x_minimum": self.x_minimum, "x_clip": self.x_clip}
        return super().config() | inputs | {"x_table": self.x_table is not None}

    def extra_repr(self) -> str:
        kinds = {0: "per token", 1: "static"}
        kind = kinds.get(self.config()["x_scale"], "static per channel")
        return f"{super().extra_repr()}, weight=int{self.w_bits}, activation=int{self.x_bits} {kind}"
