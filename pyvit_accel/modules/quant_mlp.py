"""QuantMlp: Linear, GELU, Linear; GELU and requantisation happen in the first matmul's epilogue."""

from __future__ import annotations

from torch import Tensor, nn

from .gradient import refuse_gradient
from .quant_linear import QuantLinear
from .sparse24_quant_linear import from_config


class QuantMlp(nn.Module):
    """fc2(activation(fc1(x))); x (..., C) float in and out."""

    def __init__(self, fc1: QuantLinear, fc2: QuantLinear, activation: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.activation = fc1, fc2, activation

    def apply_codes(self, codes: Tensor, scale: Tensor, **epilogue) -> Tensor:
        """Int8 codes (..., C) to fc2's output; epilogue as in ops.lowbit_linear."""
        return self.fc2.matmul(*self.hidden(codes, scale), **epilogue)

    def hidden(self, codes: Tensor, scale: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Codes and scale that fc2 reads, of int8 codes (..., C), or of their rows in index where it is not below 0."""
        fc1, fc2 = self.fc1, self.fc2
        if fc2.x_scale is None:
            return fc2.quantize(fc1.matmul(codes, scale, activation=self.activation, index=index), index)
        codes = fc1.matmul(
            codes,
            scale,
            activation=self.activation,
            out_scale=fc2.x_scale,
            out_zero_point=fc2.x_zero_point,
            out_bits=fc2.x_bits,
            index=index,
        )
        return codes, None

    def forward(self, x: Tensor) -> Tensor:
        return refuse_gradient(self.apply_codes(*self.fc1.quantize(x)).to(x.dtype), x)

    def config(self) -> dict:
        return {"fc1": self.fc1.config(), "fc2": self.fc2.config(), "activation": self.activation}

    @classmethod
    def from_config(cls, config: dict) -> QuantMlp:
        return cls(from_config(config["fc1"]), from_config(config["fc2"]), config["activation"])

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
