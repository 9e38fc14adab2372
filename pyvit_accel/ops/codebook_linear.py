"""codebook_linear: codes of non-uniform levels on both sides, fp8 among them, with the epilogue of lowbit_linear."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel import reference
from pyvit_accel.formats import operands
from pyvit_accel.formats.packed import bits_of

from ._library import check_rows, check_vector, define
from .lowbit_linear import check_epilogue, check_weight

OPERANDS = ("fp16", "bf16", "e4m3", "e5m2")


def _fake(
    x, x_scale, x_lut, w_packed, w_scale, w_lut, bias, operand, activation, layer_scale, residual, out_scale,
    out_zero_point, out_bits,
):  # fmt: skip
    return x.new_empty(x.shape[0], w_scale.shape[0], dtype=torch.float32 if out_scale is None else torch.int8)


_op = define(
    "codebook_linear",
    "(Tensor x, Tensor x_scale, Tensor x_lut, Tensor w_packed, Tensor w_scale, Tensor w_lut, Tensor? bias, "
    "str operand, str activation, Tensor? layer_scale, Tensor? residual, Tensor? out_scale, int out_zero_point, "
    "int out_bits) -> Tensor",
    reference.codebook_linear,
    _fake,
)


def _check_levels(name: str, lut: Tensor, operand: str) -> None:
    """Raise unless `operand` holds every level, and 256 levels of fp8 are those of the bytes: GPUs then read no table.

    Only where that waits for nothing: not on a GPU, nor while a graph is traced.
    """
    if lut.device.type != "cpu" or torch.compiler.is_compiling():
        return
    dtype = operands.OPERANDS[operand]
    held = lut.to(dtype).float()
    wrong = (held != lut) & ~lut.isnan()
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        level, nearest = lut[i].item(), operands.round_to(operand, lut[i].double()).item()
        raise ValueError(
            f"codebook_linear: {name}[{i}] is {level:.9g}, which {operand} holds as {nearest:.9g}; use an operand "
            "that holds every level (Codebook.with_operand finds its prescale), or round the levels"
        )
    if dtype.itemsize == 1 and lut.shape[0] == 256:
        values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        wrong = (values != lut) & values.isfinite() & ~lut.isnan()
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0])
            raise ValueError(
                f"codebook_linear: {name}[{i}] is {lut[i].item():.9g}, but {name} has 256 levels of {operand}, so "
                f"codes are its bytes, and byte {i} is {values[i].item():.9g}; use operand='fp16'"
            )


def codebook_linear(
    x: Tensor,
    x_scale: Tensor,
    x_lut: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    w_lut: Tensor,
    bias: Tensor | None = None,
    *,
    operand: str = "fp16",
    activation: str = "none",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: int = 0,
    out_bits: int = 8,
) -> Tensor:
    """activation(x_lut[x] @ w.T * x_scale * w_scale + bias) * layer_scale + residual, w = w_lut[q + 2^(bits-1)].

    x                  (..., K)       uint8 codes, each below L
    x_scale            (1,) | (rows,) float32: one, or one per row of x
    x_lut              (L,)           float32, L <= 256; the level of each code, NaN for codes that do not occur
    w_packed           packed         uint8, formats/packed.py; holds (N, K) codes of 2, 3, 4, 5, 6 or 8 bits
    w_scale            (N,)           float32
    w_lut              (2^bits,)      float32, as x_lut
    operand            "fp16" | "bf16" | "e4m3" | "e5m2": must hold every level; with fp8, 256 levels are its bytes'
    bias, layer_scale  (N,)           float32
    residual           (..., N)       float32
    activation         "none" | "gelu" | "gelu_tanh" | "quick_gelu"
    out_scale          (1,) | (N,)    float32; None: the result is float32
    out_bits           int            2 to 8, of codes
    returns            (..., N)       float32, or int8 codes when out_scale is given

    Raises ValueError for shapes that disagree, an unknown operand or activation, a level the operand does not hold
    (tables on the CPU; on a GPU to look would be to wait); TypeError for dtypes. No gradient. Sums are float32;
    Hopper's fp8 sums keep fewer bits (kernels/codebook_linear.py).
    """
    K = check_rows("codebook_linear", x)
    N = check_weight("codebook_linear", w_packed, w_scale, bias, K)
    if x.dtype != torch.uint8:
        raise TypeError(f"codebook_linear: x must be uint8 codes, got {x.dtype}; quantize it with Codebook.quantize")
    if operand not in OPERANDS:
        raise ValueError(f"codebook_linear: operand {operand!r} is not one of {', '.join(OPERANDS)}")
    if x_lut.dim() != 1 or not 1 <= x_lut.shape[0] <= 256:
        raise ValueError(f"codebook_linear: x_lut has shape {tuple(x_lut.shape)}; use (L,), 256 levels or fewer")
    check_vector("codebook_linear", "x_lut", x_lut, x_lut.shape[0])
    check_vector("codebook_linear", "w_lut", w_lut, 2 ** bits_of(w_packed, N, K))
    _check_levels("x_lut", x_lut, operand)
    _check_levels("w_lut", w_lut, operand)
    check_epilogue("codebook_linear", x, N, x_scale, activation, layer_scale, residual, out_scale, out_bits)
    y = _op(
        x.reshape(-1, K),
        x_scale,
        x_lut,
        w_packed,
        w_scale,
        w_lut,
        bias,
        operand,
        activation,
        layer_scale,
        None if residual is None else residual.reshape(-1, N),
        out_scale,
        out_zero_point,
        out_bits,
    )
    return y.reshape(*x.shape[:-1], N)
