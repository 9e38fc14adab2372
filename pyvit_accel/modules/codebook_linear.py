"""CodebookLinear: nn.Linear on codes of any levels: fp8, powers of two, logarithmic; the weight is packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyvit_accel import ops
from pyvit_accel.calibrate import Activation
from pyvit_accel.calibrate.rounding import compensated
from pyvit_accel.formats import affine, operands, packed
from pyvit_accel.formats.codebook import Codebook
from pyvit_accel.formats.fp8 import fp8

from .gradient import refuse_gradient
from .quant_linear import PackedWeight, check_weight

E4M3 = fp8("e4m3")
DAMPING = 0.3  # beyond that of compensated: uneven levels err most on the weights that answers make large
ENCODERS = ("float", "e4m3", "e5m2", "integer", "thresholds")


def _encoder(book: Codebook | None) -> str:
    """How inputs become codes: a cast, a rounding, or a search of the thresholds."""
    if book is None:
        return "float"
    if book.family in ("e4m3", "e5m2"):
        return book.family
    centred = book.parameters.get("zero_point") == 2 ** (book.bits - 1) and not bool(book.offset.any())
    return "integer" if book.family == "uniform" and centred else "thresholds"


def _name(book: Codebook | None) -> str:
    if book is None:
        return "float"
    if book.family in operands.OPERANDS:
        return book.family
    return f"int{book.bits}" if book.family == "uniform" else f"{book.family} {book.bits}"


def _check_format(name: str, book: Codebook) -> None:
    if book.levels.dim() == 2 or book.scale.numel() > 1 or book.offset.numel() > 1:
        raise ValueError(
            f"CodebookLinear: {name} {book.family} has levels {tuple(book.levels.shape)}, scale "
            f"{tuple(book.scale.shape)} and offset {tuple(book.offset.shape)}; a matmul looks up in one table, so use "
            "(n,), (1,) and (1,)"
        )
    if int(book.codes.max()) > 255:
        raise ValueError(f"CodebookLinear: {name} {book.family} has code 256, which no byte holds; use zero='last'")


def _common_operand(w: Codebook, x: Codebook | None) -> tuple[Codebook, Codebook | None]:
    """Both in the narrowest type that holds every level of both; in float16, rounded, where none does."""
    books = [book for book in (w, x) if book is not None]
    for operand in ("e4m3", "e5m2", "fp16", "bf16"):
        prescales = [operands.exact_prescales(book.levels, operand) for book in books]
        bytes_only = operands.OPERANDS[operand].itemsize > 1 or all(
            book.bits < 8 or book.family == operand for book in books
        )
        if all(prescales) and bytes_only:
            break
    else:
        operand = "fp16"
    return w.with_operand(operand), None if x is None else x.with_operand(operand)


def _compensated_codes(weight: Tensor, w: Codebook, inputs: Tensor) -> Tensor:
    """Codes (N, K) of a weight for inputs (rows, K), each rounding made good by the next."""
    levels, inverse = (w.levels * w.unit).float(), 1.0 / w.scale

    def nearest(column: Tensor) -> Tensor:
        return levels[torch.bucketize(column * inverse, w.thresholds, right=True)]

    gram = inputs.T @ inputs
    gram = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram))
    return w.quantize(compensated(weight, gram, nearest, w.scale) * w.scale[:, None])


class CodebookLinear(PackedWeight):
    """Drop-in for nn.Linear: codes of x looked up, times levels of the weight, scaled back.

    x_encoder   "float": x is not quantized, the weight is decoded at every call: for memory. "e4m3", "e5m2": a cast.
                "integer": integers of x_bits. "thresholds": any codebook.
    x_scale     static, (1,); None: one per token, with which its largest value is the largest level
    x_unit      what the operand of a level of x lacks of the level
    x_offset    added to every decoded x; its share of the product is in the bias
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        w_bits: int = 8,
        w_format: str = "e4m3",
        x_format: str = "e4m3",
        x_encoder: str = "e4m3",
        x_bits: int = 8,
        x_levels: int = 256,
        x_codes: int = 256,
        x_range: tuple[float, float] = (-448.0, 448.0),
        x_unit: float = 1.0,
        x_offset: float = 0.0,
        x_static: bool = False,
        operand: str = "e4m3",
    ) -> None:
        """x_levels: how many levels the codebook of x has; x_codes: how many codes; x_range: its outermost levels."""
        super().__init__(in_features, out_features, bias, w_bits)
        if x_encoder not in ENCODERS:
            raise ValueError(f"CodebookLinear: x_encoder {x_encoder!r} is not one of {', '.join(ENCODERS)}")
        self.w_format, self.x_format, self.x_encoder, self.operand = w_format, x_format, x_encoder, operand
        self.x_bits, self.x_levels, self.x_range = x_bits, x_levels, tuple(x_range)
        self.x_unit, self.x_offset = x_unit, x_offset
        self.register_buffer("w_lut", torch.full((2**w_bits,), torch.nan))
        thresholds = x_encoder == "thresholds"
        inputs = {
            "x_lut": None if x_encoder == "float" else torch.full((x_codes,), torch.nan),
            "x_scale": torch.ones(1) if x_static else None,
            "x_thresholds": torch.arange(x_levels - 1.0) if thresholds else None,
            "x_ranks": torch.zeros(x_levels, dtype=torch.uint8) if thresholds else None,
        }
        for name, tensor in inputs.items():
            # Absent, not None: torch.export (2.13) counts buffers that are None, and lacks an input behind two of them.
            if tensor is None:
                setattr(self, name, None)
            else:
                self.register_buffer(name, tensor)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        w_format: Codebook = E4M3,
        x_format: Codebook | None = E4M3,
        w_scale: Tensor | None = None,
        x_scale: Tensor | None = None,
        seen: Activation | None = None,
    ) -> CodebookLinear:
        """w_format, x_format  their own scales count for nothing; x_format None: x stays float

        w_scale  (N,)          None: per output feature, the one with the least squared error
        x_scale  (1,)          None: one per token, found at run time
        seen                   inputs of the layer: rounding then makes up for itself on them, and the bias for the rest

        Raises Unsupported for NaN or infinite weights, ValueError for formats that no matmul takes.
        """
        check_weight(linear)
        for name, book in (("w_format", w_format), ("x_format", x_format)):
            if book is not None:
                _check_format(name, book)
        if bool(w_format.offset.any()):
            raise ValueError(f"CodebookLinear: w_format {w_format.family} has offset {w_format.offset.item()}; use 0")
        packed.check_bits("CodebookLinear", w_format.bits)
        w, x = _common_operand(w_format, x_format)
        weight, bias = linear.weight.detach().float().cpu(), None if linear.bias is None else linear.bias.detach().cpu()
        w = w.with_scale(w.weight_scale(weight) if w_scale is None else w_scale.float(), axis=0)
        codes = w.quantize(weight)
        if seen is not None:
            codes = _compensated_codes(weight, w, seen.sample.cpu())
            correction = (weight - w.dequantize(codes)) @ seen.mean.cpu()
            bias = correction if bias is None else bias + correction
        encoder, inputs = _encoder(x), {"operand": w.operand_dtype}
        if x is not None:
            ends = x.levels[[0, -1]] * x.unit
            inputs |= {
                "x_bits": x.bits, "x_levels": x.levels.numel(), "x_codes": x.lut().numel(),
                "x_range": tuple(ends.tolist()), "x_unit": x.unit * 2.0**-x.prescale_log2,
                "x_offset": x.offset.item(), "x_static": x_scale is not None,
            }  # fmt: skip
            if x.offset.item():
                bias = x.fold_offset(w.dequantize(codes), bias)
        new = cls(
            linear.in_features, linear.out_features, bias is not None, w.bits, _name(w), _name(x), encoder, **inputs
        )  # fmt: skip
        new.w_packed, new.w_scale = w.pack_weight(codes), w.operand_scale()
        new.bias = None if bias is None else bias.float().clone()
        new.w_lut = w.operand_lut(exact=False).nan_to_num()  # codes that do not occur
        if x is not None:
            new.x_lut = x.operand_lut(exact=False).nan_to_num()
            if x_scale is not None:
                affine.check_scale(x_scale)
                new.x_scale = x_scale.detach().float().reshape(1)
            if encoder == "thresholds":
                new.x_thresholds, new.x_ranks = x.thresholds, x.codes.to(torch.uint8)
        return new.to(linear.weight.device)

    def dequantized_weight(self) -> Tensor:
        index = self.codes().flatten().int() + 2 ** (self.w_bits - 1)
        return self.w_lut.index_select(0, index).view(self.out_features, self.in_features) * self.w_scale[:, None]

    def _token_scale(self, x: Tensor) -> Tensor:
        """(..., 1): what maps the largest values of a token to the outermost levels."""
        low, high = self.x_range
        largest = x.amax(dim=-1, keepdim=True) / high if high > 0 else torch.zeros_like(x[..., :1])
        if low < 0:
            largest = torch.maximum(largest, x.amin(dim=-1, keepdim=True) / low)
        return largest.clamp_min(affine.MIN_SCALE)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Float x (..., K) to uint8 codes and their scale (1,) | (rows,)."""
        if self.x_encoder == "integer":
            codes, scale = ops.quantize(x, self.x_scale, bits=self.x_bits)
            return codes.view(torch.uint8) + 2 ** (self.x_bits - 1), scale
        x = x.float() - self.x_offset
        scale = self._token_scale(x) if self.x_scale is None else self.x_scale
        u = x * (1.0 / scale)
        if self.x_encoder == "thresholds":
            ranks = torch.bucketize(u, self.x_thresholds, out_int32=True, right=True)
            codes = self.x_ranks.index_select(0, ranks.flatten()).view(x.shape)
        else:
            low, high = self.x_range
            codes = u.clamp(low, high).to(operands.OPERANDS[self.x_encoder]).view(torch.uint8)
        return codes, scale.flatten()

    def matmul(self, codes: Tensor, scale: Tensor, **epilogue) -> Tensor:
        """uint8 codes (..., K) to (..., N); epilogue as in ops.codebook_linear."""
        self.check_inputs(codes)
        scale = scale if self.x_unit == 1.0 else scale * self.x_unit
        return ops.codebook_linear(
            codes, scale, self.x_lut, self.w_packed, self.w_scale, self.w_lut, self.bias, operand=self.operand,
            **epilogue,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if self.x_encoder == "float":
            self.check_inputs(x)
            y = nn.functional.linear(x.float(), self.dequantized_weight(), self.bias)
        else:
            y = self.matmul(*self.quantize(x))
        return refuse_gradient(y.to(x.dtype), x)

    def formats(self) -> tuple[str, str]:
        return self.w_format, self.x_format

    def config(self) -> dict:
        names = ("w_format", "x_format", "x_encoder", "x_bits", "x_levels", "x_range", "x_unit", "x_offset", "operand")
        inputs = {name: getattr(self, name) for name in names} | {"x_range": list(self.x_range)}
        codes = 0 if self.x_lut is None else self.x_lut.numel()
        return super().config() | inputs | {"x_codes": codes, "x_static": self.x_scale is not None}

    def extra_repr(self) -> str:
        kind = "" if self.x_encoder == "float" else " per token" if self.x_scale is None else " static"
        return f"{super().extra_repr()}, weight={self.w_format}, activation={self.x_format}{kind}"
