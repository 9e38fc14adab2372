"""Sparse24QuantLinear: a QuantLinear whose weight is 2:4, for sparse tensor cores."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel.formats.sparse24 import Sparse24Operand

from .quant_linear import QuantLinear
from .sparse24_weight import Sparse24Weight


class Sparse24QuantLinear(Sparse24Weight, QuantLinear):
    """QuantLinear's codes and bits; two of every four weights are zero, of 8 bits. Saved as formats/sparse24.py packs
    them; w_packed is there where nothing multiplies sparse operands."""

    dense = "w_packed"

    def __init__(self, in_features: int, out_features: int, bias: bool = True, w_bits: int = 8, **inputs) -> None:
        """inputs: x_bits .. x_table of QuantLinear."""
        if w_bits != 8:
            raise ValueError(f"Sparse24QuantLinear: weights of {w_bits} bits; sparse units multiply 8")
        super().__init__(in_features, out_features, bias, w_bits, **inputs)
        rest = dict(self._buffers)
        self._buffers.clear()
        self.register_packed(torch.int8)
        self.register_buffer("w_sum", torch.zeros(out_features, dtype=torch.int32))
        self._buffers.update((name, t) for name, t in rest.items() if name != "w_packed")

    @classmethod
    def from_quant(cls, linear: QuantLinear) -> Sparse24QuantLinear:
        """The same layer. Raises ValueError, naming row and chunk, for codes that are not 2:4, or not of 8 bits."""
        with linear.w_scale.device:
            new = cls(**linear.config())
        new.pack(linear.codes(), linear.w_scale, linear.bias)
        new.unit_scale, new.x_scale, new.x_table = linear.unit_scale, linear.x_scale, linear.x_table
        new.x_zero_point = linear.x_zero_point
        return new

    def pack_codes(self, codes: Tensor) -> None:
        self.w_values, self.w_meta, self.w_sum = Sparse24Operand.of(codes)
        self.unpack()

    @property
    def operand(self) -> Tensor | Sparse24Operand:
        packed = self.w_packed
        return Sparse24Operand(self.w_values, self.w_meta, self.w_sum) if packed is None else packed

    def formats(self) -> tuple[str, str]:
        return "2:4 int8", f"int{self.x_bits}"

    def config(self) -> dict:
        return super().config() | {"sparse24": True}

    @classmethod
    def from_config(cls, config: dict) -> Sparse24QuantLinear:
        return cls(**{name: value for name, value in config.items() if name != "sparse24"})

    def extra_repr(self) -> str:
        return super().extra_repr().replace("weight=int8", "weight=2:4 int8")


def from_config(config: dict) -> QuantLinear:
    """A QuantLinear of either kind, blank, as its config() says."""
    return Sparse24QuantLinear.from_config(config) if "sparse24" in config else QuantLinear(**config)
