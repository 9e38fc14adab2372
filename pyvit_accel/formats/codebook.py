"""Any monotone number format as one record: thresholds to encode with, levels to decode with.

    u    = (x - offset) * (1 / scale)                            float32
    rank = how many thresholds are <= u,   code = codes[rank]
    x    ~ level[rank] * unit * scale + offset

Levels ascend with the rank; `codes` says what the publication calls each of them. Log formats count downwards and have
2^bits levels and, beyond the last code, an exact zero: 17 levels of "4 bits". Thresholds hold the rounding rule: each
is the smallest float32 of its upper level. Constructors are in log, twin, tan, subset, multiquant, pow2 and fp8.

A matmul multiplies operands, level * 2^prescale_log2 in operand_dtype (operands.py), and undoes the rest after:

    sum_k a b = (scale_a unit_a 2^-prescale_a) (scale_b unit_b 2^-prescale_b) sum_k operand_a operand_b

plus what the offsets add: fold_offset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import affine, operands, packed

ZERO_POLICIES = ("extra", "last", "none")
WEIGHT_CLIPS = tuple(2.0 ** (-i / 8) for i in range(-4, 13))  # scales of powers of two repeat after an octave


@dataclass(frozen=True, eq=False)
class Codebook:
    """G = 1, or the number of heads, channels or branches; they lie along `axis` of what is quantized.

    family         which formula, of the constructors; parameters holds its numbers
    bits           2..8, the storage width; 2^bits + 1 levels are legal for codes that are not packed
    levels         (n,) | (G, n)      float64, not decreasing
    unit           float              a common factor kept out of the levels, so that operands are exact: AdaLog's 1 / D
    thresholds     (n-1,) | (G, n-1)  float32, not decreasing; -inf and inf: a level that nothing reaches
    scale, offset  (1,) | (G,)        float32
    codes          (n,)               the published code of each level; 0..n-1 when not given
    zero_policy    "extra": code 2^bits is an exact zero; "last": code 2^bits - 1 is; "none": none is set aside for it
    axis           int                where G lies
    operand_dtype  "int8" | "e4m3" | "e5m2" | "fp16" | "bf16", and prescale_log2: the operands of a matmul

    Raises ValueError with the numbers for levels or thresholds out of order, a scale that is not positive and finite,
    bits out of range, codes that repeat.
    """

    family: str
    bits: int
    levels: Tensor
    thresholds: Tensor
    scale: Tensor | float = 1.0
    offset: Tensor | float = 0.0
    codes: Tensor | None = None
    zero_policy: str = "none"
    axis: int = -1
    operand_dtype: str = "fp16"
    prescale_log2: int = 0
    unit: float = 1.0
    parameters: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_bits(self.family, self.bits)
        operands.check_operand(self.operand_dtype)
        if self.zero_policy not in ZERO_POLICIES:
            raise ValueError(
                f"{self.family}: zero_policy {self.zero_policy!r} is not one of {', '.join(ZERO_POLICIES)}"
            )
        n = self.levels.shape[-1]
        if not 2 <= n <= 2**self.bits + 1:
            raise ValueError(f"{self.family}: {n} levels; {self.bits} bits have 2 to {2**self.bits + 1}")
        if self.thresholds.shape != (*self.levels.shape[:-1], n - 1) or self.levels.dim() > 2:
            raise ValueError(
                f"{self.family}: levels {tuple(self.levels.shape)} and thresholds {tuple(self.thresholds.shape)}; "
                "use (n,) and (n - 1,), or (G, n) and (G, n - 1)"
            )
        self._set("levels", self.levels.double())
        self._set("thresholds", self.thresholds.float())
        if not bool(self.levels.isfinite().all()):
            raise ValueError(f"{self.family}: levels must be finite")
        _check_order(self.family, "levels", self.levels)
        _check_order(self.family, "thresholds", self.thresholds)
        for name in ("scale", "offset"):
            self._set(name, torch.as_tensor(getattr(self, name), dtype=torch.float32).reshape(-1))
        affine.check_scale(self.scale)
        if not bool(self.offset.isfinite().all()):
            raise ValueError(f"{self.family}: offset {self.offset.tolist()} is not finite")
        self._check_groups()
        codes = torch.arange(n) if self.codes is None else self.codes.long()
        if codes.shape != (n,) or codes.unique().numel() != n or codes.min() < 0 or codes.max() > 2**self.bits:
            raise ValueError(f"{self.family}: codes {codes.tolist()} are not {n} different ones of 0 to {2**self.bits}")
        self._set("codes", codes.to(torch.uint8 if int(codes.max()) < 256 else torch.int16))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_groups(self) -> None:
        counts = {t.shape[0] for t in (self.scale, self.offset) if t.numel() != 1}
        counts |= {self.levels.shape[0]} if self.levels.dim() == 2 else set()
        if len(counts) > 1:
            raise ValueError(
                f"{self.family}: levels {tuple(self.levels.shape)}, scale {tuple(self.scale.shape)} and offset "
                f"{tuple(self.offset.shape)} disagree about the number of groups"
            )

    def _along(self, t: Tensor, x: Tensor) -> Tensor:
        """t (G,) shaped so that it broadcasts along the axis of x."""
        if t.numel() == 1:
            return t
        if not -x.dim() <= self.axis < x.dim() or x.shape[self.axis] != t.numel():
            raise ValueError(
                f"{self.family}: x has shape {tuple(x.shape)}, but axis {self.axis} must have {t.numel()} entries"
            )
        shape = [1] * x.dim()
        shape[self.axis] = t.numel()
        return t.view(shape)

    def _per_group(self, function, table: Tensor, x: Tensor) -> Tensor:
        """function(table (G, m), x (G, ...)) with the axis of x in front, and back."""
        if not -x.dim() <= self.axis < x.dim() or x.shape[self.axis] != table.shape[0]:
            raise ValueError(
                f"{self.family}: x has shape {tuple(x.shape)}, but axis {self.axis} must have {table.shape[0]} entries"
            )
        front = x.movedim(self.axis, 0)
        out = function(table, front.reshape(table.shape[0], -1).contiguous())
        return out.reshape(front.shape).movedim(0, self.axis)

    def _rank(self, u: Tensor) -> Tensor:
        thresholds = self.thresholds.to(u.dtype)
        if thresholds.dim() == 1:
            return torch.bucketize(u.contiguous(), thresholds, right=True)
        return self._per_group(lambda t, v: torch.searchsorted(t, v, right=True), thresholds, u)

    def _take(self, table: Tensor, index: Tensor) -> Tensor:
        """table[index], or of each group its own row."""
        index = index.long()
        return table[index] if table.dim() == 1 else self._per_group(lambda t, i: t.gather(1, i), table, index)

    def quantize(self, x: Tensor) -> Tensor:
        """Codes of x, uint8, or int16 where code 256 exists. x is finite."""
        x = x.float()
        return self.codes[self._rank((x - self._along(self.offset, x)) * (1.0 / self._along(self.scale, x)))]

    def dequantize(self, codes: Tensor) -> Tensor:
        """float32 of codes; NaN for a code that no level has."""
        values = self._take(self.lut().float(), codes)
        return values * self._along(self.scale, values) + self._along(self.offset, values)

    def _by_code(self, values: Tensor) -> Tensor:
        codes = self.codes.long()
        size = max(2**self.bits, int(codes.max()) + 1)
        table = values.new_full((*values.shape[:-1], size), torch.nan)
        table[..., codes] = values
        return table

    def lut(self) -> Tensor:
        """level * unit by code, (size,) | (G, size) float64; size is 2^bits or what the largest code needs.

        NaN where a code has no level.
        """
        return self._by_code(self.levels * self.unit)

    def operand_lut(self, exact: bool = True) -> Tensor:
        """What a matmul multiplies, by code: float32 (size,) | (G, size), each a value of operand_dtype.

        Raises ValueError when a level is not one, unless exact is False; operand_error() says by how much.
        """
        wanted = self._by_code(self.levels * 2.0**self.prescale_log2)
        held = operands.round_to(self.operand_dtype, wanted)
        off = (held != wanted) & ~wanted.isnan()
        if exact and bool(off.any()):
            at = tuple(off.nonzero()[0].tolist())
            fitting = [name for name in operands.OPERANDS if operands.exact_prescales(self.levels, name)]
            raise ValueError(
                f"{self.family}: {wanted[at].item():.9g}, a level times 2^{self.prescale_log2}, is "
                f"{held[at].item():.9g} in {self.operand_dtype}, and the worst level is off by "
                f"{self.operand_error():.2g}; use {' or '.join([*fitting, 'exact=False'])}"
            )
        return held.float()

    def operand_error(self) -> float:
        """Largest relative error of a level as an operand."""
        return operands.relative_error(self.levels, self.operand_dtype, self.prescale_log2)

    def operand_scale(self) -> Tensor:
        """scale * unit with the prescale undone, (1,) | (G,) float32: what the epilogue of a matmul multiplies with."""
        return (self.scale.double() * (self.unit * 2.0**-self.prescale_log2)).float()

    def with_operand(self, operand_dtype: str, prescale_log2: int | None = None) -> Codebook:
        """The same format on another operand type; the prescale is an exact one nearest to 0 unless given."""
        if prescale_log2 is None:
            _, prescale_log2 = operands.choose(self.levels, operand_dtype)
        return replace(self, operand_dtype=operand_dtype, prescale_log2=prescale_log2)

    def with_scale(self, scale: Tensor | float, axis: int = -1) -> Codebook:
        """The same format with another scale, (1,) or (G,) along axis."""
        return replace(self, scale=scale, axis=axis)

    def weight_scale(self, w: Tensor) -> Tensor:
        """scale (N,) for w (N, K): of WEIGHT_CLIPS the one with the least squared error, at 8 bits simply 1.

        1 stands for the scale with which the largest weight of a row is the outermost level of its sign.
        """
        values = (self.levels * self.unit).float()
        low, high = values[[0, -1]].tolist()
        w = w.detach().float()
        full = w.amax(dim=1) / high if high > 0 else w.new_zeros(len(w))
        full = torch.maximum(full, w.amin(dim=1) / low if low < 0 else full).clamp_min(affine.MIN_SCALE)
        best, least = full, torch.full_like(full, torch.inf)
        for clip in (1.0,) if self.bits == 8 else WEIGHT_CLIPS:
            scale = full * clip
            u = (w - self.offset) * (1.0 / scale[:, None])
            rank = torch.bucketize(u, self.thresholds, out_int32=True, right=True)
            found = values.index_select(0, rank.flatten()).view_as(w) * scale[:, None] + self.offset
            error = (found - w).square().sum(dim=1)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return best

    def fold_offset(self, w: Tensor, bias: Tensor | None = None) -> Tensor:
        """The bias (N,) of a linear whose matmul leaves out the offset of its input; w (N, K) as dequantized."""
        total = (w * self.offset).sum(dim=1)
        return total if bias is None else bias + total

    def error_bound(self, x: Tensor) -> Tensor:
        """Largest |x - dequantize(quantize(x))|, float64: the width of x's cell on either side of its level.

        Beyond the outermost threshold the cell has no end, and the distance to its level counts. Near a threshold the
        code may be the neighbour's: u is known to four float32 roundings.
        """
        x = x.double()
        scale, offset = self._along(self.scale.double(), x), self._along(self.offset.double(), x)
        u = (x - offset) / scale
        slack = 4 * 2.0**-24 * (u.abs() + (offset / scale).abs()) + 2.0**-149 * (u != 0)
        ends = torch.nn.functional.pad(self.thresholds.double(), (1, 1), value=torch.inf)
        ends[..., 0] = -torch.inf
        values = self.levels * self.unit

        def reach(rank: Tensor) -> Tensor:
            level = self._take(values, rank)
            outer = torch.stack([self._take(ends, rank), self._take(ends, rank + 1)])
            return (torch.where(outer.isinf(), u, outer) - level).abs().amax(dim=0)

        width = torch.maximum(reach(self._rank(u - slack)), reach(self._rank(u + slack)))
        largest = (values.abs().amax() * scale).clamp_min(x.abs()) + offset.abs()
        return (width + 2 * slack) * scale + 4 * 2.0**-24 * largest + 2.0**-149

    def merged(self) -> Codebook:
        """The same values with one code for each different level, 0 upwards: SULQ repeats most of its own."""
        if self.levels.dim() == 2:
            raise ValueError(f"{self.family}: merged needs one codebook, not {self.levels.shape[0]}")
        first = self.levels.diff() > 0
        levels = self.levels[torch.cat([first.new_ones(1), first])]
        bits = max(2, (levels.numel() - 1).bit_length())
        cuts = self.thresholds[first]
        return replace(self, bits=bits, levels=levels, thresholds=cuts, codes=None, zero_policy="none")

    def _check_fits(self) -> None:
        last = int(self.codes.max())
        if last >= 2**self.bits:
            raise ValueError(
                f"{self.family}: code {last} does not fit in {self.bits} bits; build it with zero='last', use "
                "merged(), or keep one byte per code"
            )

    def pack(self, codes: Tensor) -> Tensor:
        """Codes (..., K) to uint8 (..., ceil(K bits / 8)): low bits first, bit i of a row in byte i // 8."""
        self._check_fits()
        bits = (codes[..., None].int() >> torch.arange(self.bits, device=codes.device)) & 1
        row = bits.flatten(-2)
        row = torch.nn.functional.pad(row, (0, -row.shape[-1] % 8)).unflatten(-1, (-1, 8))
        return (row << torch.arange(8, device=codes.device)).sum(dim=-1).to(torch.uint8)

    def unpack(self, data: Tensor, K: int) -> Tensor:
        """Packed codes (..., bytes) back to (..., K)."""
        self._check_fits()
        if data.dtype != torch.uint8 or data.shape[-1] != -(-K * self.bits // 8):
            raise ValueError(
                f"{self.family}: K={K} codes of {self.bits} bits are {-(-K * self.bits // 8)} uint8, got {data.dtype} "
                f"{tuple(data.shape)}"
            )
        row = (data[..., None].int() >> torch.arange(8, device=data.device)) & 1
        bits = row.flatten(-2)[..., : K * self.bits].unflatten(-1, (K, self.bits))
        return (bits << torch.arange(self.bits, device=data.device)).sum(dim=-1).to(torch.uint8)

    def pack_weight(self, codes: Tensor) -> Tensor:
        """Codes (N, K) of a weight to packed.py's layout, which holds code - 2^(bits-1).

        Padding is code 2^(bits-1), so a level must have it: a kernel multiplies it with zero.
        """
        self._check_fits()
        if not bool((self.codes == 2 ** (self.bits - 1)).any()):
            raise ValueError(
                f"{self.family}: no level has code {2 ** (self.bits - 1)}, which pads weights of {self.bits} bits; "
                "use merged()"
            )
        return packed.pack((codes.int() - 2 ** (self.bits - 1)).to(torch.int8), self.bits)

    def unpack_weight(self, w_packed: Tensor, N: int, K: int) -> Tensor:
        """The packed weight back to codes (N, K)."""
        return (packed.unpack(w_packed, N, K).int() + 2 ** (packed.bits_of(w_packed, N, K) - 1)).to(torch.uint8)


def check_bits(family: str, bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"{family}: bits={bits} is outside 2..8")


def _check_order(family: str, name: str, values: Tensor) -> None:
    """Raise unless the rows do not decrease; NaN is out of order too."""
    good = values[..., 1:] >= values[..., :-1]
    if not bool(good.all()):
        *group, i = (~good).nonzero()[0].tolist()
        row = values[tuple(group)]
        raise ValueError(
            f"{family}: {name} must not decrease, but {name}{[*group, i]} is {row[i].item():.9g} and "
            f"{name}{[*group, i + 1]} is {row[i + 1].item():.9g}"
        )


def boundaries(values: Tensor, goes_up: Tensor | bool = True) -> Tensor:
    """float32 thresholds at float64 boundaries.

    A boundary that float32 holds is a tie, and belongs to its upper level where goes_up says so; any other is rounded
    to nearest, which gives the constants of the closed forms (the bits of sqrt(2): 0x3504F3).
    """
    nearest = values.float()
    lower = (nearest.double() == values) & ~torch.as_tensor(goes_up)
    return torch.where(lower, torch.nextafter(nearest, torch.full_like(nearest, torch.inf)), nearest)


def half_steps(first: int, last: int) -> tuple[Tensor, Tensor]:
    """The ties k + 1/2 between integers first..last, float64, and whether half-to-even goes to k + 1."""
    k = torch.arange(first, last)
    return k.double() + 0.5, k % 2 == 1
