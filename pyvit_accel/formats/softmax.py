"""Formats of attention probabilities, read off the logarithm of a probability without an exponential.

    x = log2 p, of p = 2^(S - anchor)      S the scores in octaves, log2(e) (q k^T scale + bias)
    anchor "max"   the row's largest score; the row is divided by the sum of its own values
    anchor "lse"   its log-sum-exp: p is the probability, as published

Two ways from x to the code k = 0 .. L, of which L is an exact zero and 0 the largest value:

    steps a octave      k = rint(-x steps)                         log2, log-sqrt2, AdaLog, linear mantissa
    thresholds          k = how many thresholds (L,) x is below    any Codebook: SULQ, TanQ-style, twin, uniform

Linear mantissa: code and value are those of fp8, whose byte is the logarithm in fixed point, its fraction taken as it
is: 2^(e + f) is read as 2^e (1 + f). With the smallest byte 0, byte(k) = byte_step * (L - k) for k <= L.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .codebook import Codebook

ANCHORS = ("max", "lse")
MAX_CODES = 255  # that are not zero: a code is a byte
_STEPS = {"log2": lambda p: 1.0, "log_sqrt2": lambda p: 2.0, "adalog": lambda p: p["r"] / p["q"]}
# mantissa bits -> the fp8 type and its largest byte, chosen so that values are integers up to 2^15 of its smallest
_FP8 = {1: ("e5m2", 60), 2: ("e5m2", 56), 3: ("e4m3", 104)}


@dataclass(frozen=True, eq=False)
class SoftmaxFormat:
    """values (L,) descend, positive or, with an offset, not; p ~ (values + offset) unit, 0 for code L.

    name         of the format; the anchor not included
    anchor       "max" | "lse"
    values       int32, 1 .. 65535, where integers times a unit are exact; else float32
    steps        codes an octave, or 0: thresholds
    thresholds   (L,) float32, log2 p, not ascending; or None
    shift        what is added to -x steps before it is rounded: a scale that is no power of two
    unit, offset float; offset in units: SULQ's -eta
    operand      "e5m2" | "e4m3": byte(k) = byte_step (L - k) is the value; "fp16": values are looked up
    normalize    divide each row by the sum of its values

    Raises ValueError for an unknown anchor, and for more than 255 values.
    """

    name: str
    anchor: str
    values: Tensor
    steps: float
    thresholds: Tensor | None = None
    shift: float = 0.0
    unit: float = 1.0
    offset: float = 0.0
    operand: str = "fp16"
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.anchor not in ANCHORS:
            raise ValueError(f"{self.name}: anchor {self.anchor!r} is not one of {', '.join(ANCHORS)}")
        if self.values.numel() > MAX_CODES:
            raise ValueError(f"{self.name}: {self.values.numel()} values that are not zero; there can be {MAX_CODES}")

    @property
    def label(self) -> str:
        divided = ", divided by the sum" if self.anchor == "lse" and self.normalize else ""
        return f"{self.name}, {self.anchor}{divided}"

    def codes(self, x: Tensor) -> Tensor:
        """Codes 0 .. L of x = log2 p <= 0, int64; -inf is a key that is not seen, and gives L."""
        L = self.values.numel()
        if self.thresholds is None:
            return torch.round(self.shift - x * self.steps).clamp(0, L).long()
        below = torch.bucketize(-x.contiguous(), -self.thresholds.to(x.dtype), right=False)
        return below.masked_fill(x == -torch.inf, L)

    def dequantize(self, codes: Tensor) -> Tensor:
        """p of codes, float64."""
        table = (self.values.double() + self.offset) * self.unit
        return torch.cat([table, table.new_zeros(1)])[codes]

    def arguments(self) -> tuple:
        """What ops.quant_attention takes: values to normalize, in its order."""
        return (
            *(self.values, self.thresholds, self.steps, self.shift, self.unit, self.offset),
            *(self.operand, self.anchor, self.normalize),
        )

    def describe(self) -> dict:
        """A record for JSON, of which from_description makes the format again: by name where it has one."""
        for kind, (_, bits) in KINDS.items():
            for b in bits:
                named = {"kind": kind, "bits": b, "anchor": self.anchor, "normalize": self.normalize}
                if from_description(named).equals(self):
                    return named
        record = {field.name: getattr(self, field.name) for field in fields(self)}
        record["values"] = self.values.tolist()
        if self.thresholds is not None:  # JSON has no infinity
            record["thresholds"] = [None if t == -math.inf else t for t in self.thresholds.tolist()]
        return record

    def equals(self, other: SoftmaxFormat) -> bool:
        """The same in everything, wherever it is held."""
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return all(_same(a, b) for a, b in pairs)

    def to(self, device: torch.device | str) -> SoftmaxFormat:
        moved = None if self.thresholds is None else self.thresholds.to(device)
        return replace(self, values=self.values.to(device), thresholds=moved)


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    return type(a) is type(b) and a == b


def from_description(record: dict) -> SoftmaxFormat:
    """The format of a record that describe() made, on the CPU."""
    with torch.device("cpu"):  # a file is loaded onto none
        if "kind" in record:
            make, _ = KINDS[record["kind"]]
            return make(record["bits"], record["anchor"], record["normalize"])
        integers = all(isinstance(value, int) for value in record["values"])
        values = torch.tensor(record["values"], dtype=torch.int32 if integers else torch.float32)
        thresholds = record["thresholds"]
        if thresholds is not None:
            thresholds = torch.tensor([-math.inf if t is None else t for t in thresholds], dtype=torch.float32)
        return SoftmaxFormat(**record | {"values": values, "thresholds": thresholds})


def linear_mantissa(bits: int = 3, anchor: str = "max", normalize: bool = True) -> SoftmaxFormat:
    """bits 0 .. 3 of mantissa. 0 is log2 with 16 values; else the fp8 bytes read as they are: 30, 56 or 104 values.

    The smallest is 2^-15 of the largest.
    """
    if bits == 0:
        return log2(4, anchor, normalize=normalize)
    if bits not in _FP8:
        raise ValueError(f"linear_mantissa: bits={bits} is outside 0..3, the mantissas that fp8 has")
    operand, top = _FP8[bits]
    steps = 2**bits
    byte = torch.arange(top, 0, -_byte_step(operand, steps), dtype=torch.uint8)
    values = byte.view(_DTYPES[operand]).double()
    name = f"linear mantissa, {bits} bit{'s' if bits > 1 else ''}"
    return _of(name, anchor, values / values[0], steps=float(steps), operand=operand, normalize=normalize)


def log2(bits: int, anchor: str = "max", normalize: bool | None = None) -> SoftmaxFormat:
    """2^-k, k = 0 .. 2^bits - 1, and zero; bits 2 .. 5. Up to 4 bits an e5m2 byte; FQ-ViT, arXiv:2111.13824."""
    if not 2 <= bits <= 5:
        raise ValueError(f"log2: bits={bits} is outside 2..5; more would reach below 2^-32")
    values = torch.exp2(-torch.arange(2.0**bits, dtype=torch.float64))
    operand = "e5m2" if bits <= 4 else "fp16"
    normalize = anchor == "max" if normalize is None else normalize
    return _of(f"log2, {bits} bits", anchor, values, steps=1.0, operand=operand, normalize=normalize)


def of_codebook(codebook: Codebook, anchor: str = "lse", normalize: bool | None = None) -> SoftmaxFormat:
    """A format of formats/log.py, twin.py or tan.py, one for all heads. normalize: None, if and only if "max".

    Raises ValueError for a codebook per head, and for zero="none": small probabilities would add up.
    """
    if codebook.levels.dim() == 2 or codebook.scale.numel() > 1 or codebook.offset.numel() > 1:
        raise ValueError(f"{codebook.family}: one codebook for all heads is needed, not one per head")
    steps = _STEPS.get(codebook.family)
    if steps and codebook.parameters.get("rounding", "nearest") == "nearest" and not codebook.offset.item():
        return _log_spaced(codebook, steps(codebook.parameters), anchor, normalize)
    name = _name(codebook)
    codebook = codebook.merged() if codebook.family == "sulq" else codebook
    scale, offset = codebook.scale.double().item(), codebook.offset.double().item()
    levels, factor = codebook.levels.flip(0), codebook.unit * scale
    cuts = (codebook.thresholds.double() * scale + offset).flip(0)
    cuts = torch.where(cuts > 0, cuts.clamp_min(1e-300).log2(), -torch.inf).float()
    if levels[-1].item() * factor + offset == 0:
        levels = levels[:-1]
    else:
        cuts = torch.cat([cuts, cuts.new_full((1,), -torch.inf)])
    return _of(
        name, anchor, levels, factor, offset / factor, steps=0.0, thresholds=cuts,
        normalize=anchor == "max" if normalize is None else normalize,
    )  # fmt: skip


def _log_spaced(codebook: Codebook, steps: float, anchor: str, normalize: bool | None) -> SoftmaxFormat:
    if codebook.zero_policy == "none":
        raise ValueError(f"{codebook.family}: zero='none' makes every small probability the last value; use 'extra'")
    scale = codebook.scale.double().item() if anchor == "lse" else 1.0  # of the maximum it has no meaning
    levels = codebook.levels[codebook.levels > 0].flip(0)
    operand = "e5m2" if codebook.family == "log2" and codebook.bits <= 4 else "fp16"
    normalize = anchor == "max" if normalize is None else normalize
    new = _of(_name(codebook), anchor, levels, codebook.unit * scale, steps=steps, operand=operand, normalize=normalize)
    return replace(new, shift=steps * math.log2(scale))


def _name(codebook: Codebook) -> str:
    return f"{codebook.family.replace('_', '-')}, {codebook.bits} bits"


KINDS = {"linear_mantissa": (linear_mantissa, range(1, 4)), "log2": (log2, range(2, 6))}
_DTYPES = {"e5m2": torch.float8_e5m2, "e4m3": torch.float8_e4m3fn}


def _byte_step(operand: str, steps: int) -> int:
    return (8 if operand == "e4m3" else 4) // steps


def _of(name: str, anchor: str, levels: Tensor, factor: float = 1.0, offset: float = 0.0, **rest) -> SoftmaxFormat:
    """p ~ (levels + offset) factor; levels (L,) float64, code 0 first.

    A power of two brings them to integers or, where there is none, to at most 2^15, which float16 holds.
    """
    for n in range(-16, 32):
        values = levels * 2.0**n
        if offset == 0 and values.max() <= 65535 and torch.equal(values, values.round()) and values.min() >= 1:
            return SoftmaxFormat(name, anchor, values.to(torch.int32), unit=factor * 2.0**-n, **rest)
    n = 15 - math.ceil(math.log2(levels.max().item()))
    values = (levels * 2.0**n).float()
    return SoftmaxFormat(name, anchor, values, unit=factor * 2.0**-n, offset=offset * 2.0**n, **rest)


DEFAULT_SOFTMAX = linear_mantissa(3)  # near lossless for any model, and without an exponential
