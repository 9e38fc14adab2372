"""lowbit_linear, lowbit_linear_scatter: integer codes x packed weights, and all up to the next quantiser."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel import reference
from pyvit_accel.formats.packed import bits_of
from pyvit_accel.formats.sparse24 import Sparse24Operand

from . import _weights
from ._library import check_bits, check_index, check_rows, check_vector, define
from ._weights import Weight

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu")


def _fake(
    x,
    x_scale,
    w_packed,
    w_scale,
    bias,
    x_zero_point,
    activation,
    layer_scale,
    residual,
    out_scale,
    out_zero_point,
    out_bits,
    index=None,
):
    M = (x if index is None else index).shape[0]
    return x.new_empty(M, w_scale.shape[0], dtype=torch.float32 if out_scale is None else torch.int8)


_op = define(
    "lowbit_linear",
    "(Tensor x, Tensor x_scale, Tensor w_packed, Tensor w_scale, Tensor? bias, int x_zero_point, str activation, "
    "Tensor? layer_scale, Tensor? residual, Tensor? out_scale, int out_zero_point, "
    "int out_bits, Tensor? index=None) -> Tensor",
    reference.lowbit_linear,
    _fake,
)
_scatter = define(
    "lowbit_linear_scatter",
    "(Tensor(a!) out, Tensor out_index, Tensor x, Tensor x_scale, Tensor w_packed, Tensor w_scale, Tensor? bias, "
    "int x_zero_point, str activation, Tensor? layer_scale, Tensor? index=None) -> ()",
    reference.lowbit_linear_scatter,
    lambda *args: None,
)


def check_packed(op: str, w_packed: Weight, N: int, K: int) -> None:
    """Raise unless w_packed holds N x K codes of some number of bits."""
    try:
        w_packed.check(N, K) if isinstance(w_packed, Sparse24Operand) else bits_of(w_packed, N, K)
    except ValueError as error:
        raise ValueError(f"{op}: x has K={K} and w_scale N={N}, but {error}") from None


def check_weight(op: str, w_packed: Weight, w_scale: Tensor, bias: Tensor | None, K: int) -> int:
    """Raise unless weight, scale and bias fit together and x (..., K); returns N."""
    check_vector(op, "w_scale", w_scale, w_scale.numel())
    N = w_scale.shape[0]
    check_packed(op, w_packed, N, K)
    check_vector(op, "bias", bias, N)
    return N


def check_epilogue(
    op: str,
    x: Tensor,
    N: int,
    x_scale: Tensor,
    activation: str,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out_bits: int,
    index: Tensor | None = None,
) -> None:
    """Raise unless what follows the sums fits x (..., K), or its rows by an index, and N output features."""
    check_index(op, "index", index)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    check_vector(op, "x_scale", x_scale, 1, x.numel() // x.shape[-1])
    check_vector(op, "layer_scale", layer_scale, N)
    check_vector(op, "out_scale", out_scale, 1, N)
    check_bits(op, out_bits, "out_bits")
    if residual is not None:
        if residual.dtype != torch.float32:
            raise TypeError(f"{op}: residual must be float32, got {residual.dtype}")
        shape = (*(x.shape[:-1] if index is None else index.shape), N)
        if residual.shape != shape:
            raise ValueError(f"{op}: residual is {tuple(residual.shape)}, the output {shape}")


def lowbit_linear(
    x: Tensor,
    x_scale: Tensor,
    w_packed: Weight,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    x_zero_point: int = 0,
    activation: str = "none",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: int = 0,
    out_bits: int = 8,
    index: Tensor | None = None,
) -> Tensor:
    """activation((x - x_zero_point) @ w.T * x_scale * w_scale + bias) * layer_scale + residual, requantised or not.

    x                  (..., K)       int8 codes of any number of bits
    x_scale            (1,) | (rows,) float32: one, or one per row of x
    w_packed           packed         uint8, formats/packed.py; holds (N, K) codes of 2, 3, 4, 5, 6 or 8 bits. Or a
                                      formats.sparse24.Sparse24Operand, which sparse24_linear then multiplies with
    w_scale            (N,)           float32
    bias, layer_scale  (N,)           float32
    residual           (..., N)       float32, like the result
    activation         "none" | "gelu" | "gelu_tanh" | "quick_gelu"
    out_scale          (1,) | (N,)    float32; None: the result is float32
    out_bits           int            2 to 8, of codes
    index              (M,)           int32: row m is of row index[m] of x, taken as (R, K), and of its x_scale; zeros
                                      where that is below 0, at no cost. Checked against R on the CPU only
    returns            (..., N)       float32, or int8 codes when out_scale is given; (M, N) by an index

    Raises ValueError for shapes that disagree or an unknown activation, TypeError when x is not int8. A packed weight
    knows K as a multiple of 32 times its bits only: modules check the rest. No gradient.
    Sums are exact and the epilogue is float32 in the order of reference/lowbit_linear.py, the same bits on every CPU.
    """
    K, N = _check("lowbit_linear", x, w_packed, w_scale, bias)
    check_epilogue("lowbit_linear", x, N, x_scale, activation, layer_scale, residual, out_scale, out_bits, index)
    y = (_op if isinstance(w_packed, Tensor) else _weights.lowbit_linear)(
        x.reshape(-1, K),
        x_scale,
        w_packed,
        w_scale,
        bias,
        x_zero_point,
        activation,
        layer_scale,
        None if residual is None else residual.reshape(-1, N),
        out_scale,
        out_zero_point,
        out_bits,
        index,
    )
    return y if index is not None else y.reshape(*x.shape[:-1], N)


def _check(op: str, x: Tensor, w_packed: Weight, w_scale: Tensor, bias: Tensor | None) -> tuple[int, int]:
    K = check_rows(op, x)
    N = check_weight(op, w_packed, w_scale, bias, K)
    if x.dtype != torch.int8:
        raise TypeError(f"{op}: x must be int8 codes, got {x.dtype}; quantize it with ops.quantize")
    return K, N


def lowbit_linear_scatter(
    out: Tensor,
    out_index: Tensor,
    x: Tensor,
    x_scale: Tensor,
    w_packed: Weight,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    x_zero_point: int = 0,
    activation: str = "none",
    layer_scale: Tensor | None = None,
    index: Tensor | None = None,
) -> None:
    """out[out_index[m]] += activation((x - x_zero_point) @ w.T * x_scale * w_scale + bias) * layer_scale, in place.

    out        (..., N)  float32, contiguous or two-dimensional; taken as (T, N)
    out_index  (M,)      int32: where row m goes, nowhere if below 0. The others must differ, or what they add up to is
                         undefined. Checked against T on the CPU only
    index      (M,)      int32, as in lowbit_linear; None: M is the number of rows of x

    Rows that go nowhere, or that index leaves out, are not computed; rows of out that none goes to are not read. All
    else, and what is refused, as lowbit_linear. No gradient.
    """
    op = "lowbit_linear_scatter"
    K, N = _check(op, x, w_packed, w_scale, bias)
    check_epilogue(op, x, N, x_scale, activation, layer_scale, None, None, 8, index)
    check_index(op, "out_index", out_index, x.numel() // K if index is None else index.shape[0])
    if out.dtype != torch.float32:
        raise TypeError(f"{op}: out must be float32, got {out.dtype}")
    if out.dim() < 2 or out.shape[-1] != N or not (out.dim() == 2 or out.is_contiguous()):
        layout = f"{tuple(out.shape)} with strides {out.stride()}"
        raise ValueError(f"{op}: out is {layout}; use (..., {N}), contiguous where it has more than two dimensions")
    rows = out if out.dim() == 2 else out.view(-1, N)
    x = x.reshape(-1, K)
    scatter = _scatter if isinstance(w_packed, Tensor) else _weights.lowbit_linear_scatter
    scatter(rows, out_index, x, x_scale, w_packed, w_scale, bias, x_zero_point, activation, layer_scale, index)
