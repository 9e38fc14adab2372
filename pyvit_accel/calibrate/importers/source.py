"""Reads a calibrated model by dotted names: a state_dict, or a live module whose quantizers are plain attributes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pyvit_accel.errors import Unsupported

MISSING = object()


class Source:
    """`origin` under the name of its method. A value missing or unusable raises Unsupported with its full name."""

    def __init__(self, method: str, origin: nn.Module | Mapping[str, Tensor]) -> None:
        if not isinstance(origin, nn.Module | Mapping):
            raise TypeError(f"{method}: expected a module or its state_dict, got {type(origin).__name__}")
        self.method, self.origin = method, origin

    def refused(self, key: str, reason: str) -> Unsupported:
        return Unsupported(f"{self.method}: {key} {reason}")

    def get(self, key: str) -> object:
        """The value under a dotted name, MISSING when there is none."""
        if isinstance(self.origin, Mapping):
            return self.origin.get(key, MISSING)
        value = self.origin
        for part in key.split("."):
            value = getattr(value, part, MISSING)
        return value

    def has(self, key: str) -> bool:
        value = self.get(key)
        return value is not MISSING and value is not None

    def owners(self, part: str) -> list[str]:
        """Names of the modules that have `part`, a value or a quantizer with values, in the model's order."""
        if isinstance(self.origin, Mapping):
            found = (f".{key}.".rpartition(f".{part}.") for key in self.origin)
            return list(dict.fromkeys(before[1:] for before, match, _ in found if match))
        names = (name for name, _ in self.origin.named_modules() if name)
        return [name for name in names if self.get(f"{name}.{part}") is not MISSING]

    def layers(self, quantizer: str) -> list[str]:
        """Names of the linears and convolutions, and of whatever has the quantizer though its weight is missing.

        Raises Unsupported when nothing has the quantizer.
        """
        quantized = self.owners(quantizer)
        if not quantized:
            raise Unsupported(f"{self.method}: no layer has a {quantizer}; {self.method} did not calibrate this model")
        matrices = [name for name in self.owners("weight") if getattr(self.get(f"{name}.weight"), "ndim", 0) > 1]
        return list(dict.fromkeys([*matrices, *quantized]))

    def tensor(self, key: str) -> Tensor:
        """float32, detached, finite."""
        value = self.get(key)
        if value is MISSING:
            raise self.refused(key, "is missing")
        if value is None:
            raise self.refused(key, "is None: the model was not calibrated")
        value = torch.as_tensor(value).detach().float()
        if not bool(value.isfinite().all()):
            raise self.refused(key, f"holds {int((~value.isfinite()).sum())} NaN or infinite values")
        return value

    def optional(self, key: str) -> Tensor | None:
        return self.tensor(key) if self.has(key) else None

    def number(self, key: str) -> float:
        return float(self.vector(key))

    def bits(self, key: str) -> int:
        bits = int(self.number(key))
        if not 2 <= bits <= 8:
            raise self.refused(key, f"is {bits}; this importer reads 2 to 8 bits")
        return bits

    def build(self, key: str, constructor: Callable, *numbers: float) -> object:
        """constructor(*numbers), its ValueError under this name."""
        try:
            return constructor(*numbers)
        except ValueError as error:
            raise self.refused(key, f"holds no such format: {error}") from None

    def vector(self, key: str, length: int = 1) -> Tensor:
        """(length,); one value stands for all."""
        value = self.tensor(key)
        if value.numel() not in (1, length):
            expected = "one value" if length == 1 else f"1 or {length} values"
            raise self.refused(key, f"has shape {tuple(value.shape)}, expected {expected}")
        return value.reshape(-1).expand(length).contiguous()

    def scale(self, key: str, length: int = 1) -> Tensor:
        """(length,) positive."""
        value = self.vector(key, length)
        if not bool((value > 0).all()):
            at = int((value <= 0).nonzero()[0])
            raise self.refused(key, f"is {float(value[at])} at {at}; every scale must be positive")
        return value

    def integers(self, key: str, length: int = 1) -> Tensor:
        """(length,) int64."""
        value = self.vector(key, length)
        if not torch.equal(value, value.round()):
            at = int((value != value.round()).nonzero()[0])
            raise self.refused(key, f"is {float(value[at])} at {at}; a zero point here must be an integer")
        return value.long()
