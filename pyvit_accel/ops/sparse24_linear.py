"""sparse24_linear: x times a 2:4 sparse weight, 16-bit or int8, and all up to the next quantiser."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit_accel import backends
from pyvit_accel.formats import packed, sparse24
from pyvit_accel.reference.lowbit_linear import finish

from ._library import check_rows, check_vector, define
from .lowbit_linear import check_epilogue

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def dense_form(values: Tensor, meta: Tensor, out_features: int, in_features: int) -> Tensor:
    """The unpacked weight as devices without sparse units multiply with it: float32 (N, K), or formats/packed.py."""
    w = sparse24.unpack(values, meta, out_features, in_features)
    return packed.pack(w) if w.dtype == torch.int8 else w.float()


def multiplies_dense(values: Tensor) -> bool:
    """Whether the device of these values reads w_dense: CPUs do, and GPUs that no sparse kernel here is for."""
    if not (values.is_cuda and backends.HAS_CUDA_LIBRARY):
        return True
    from pyvit_accel.cuda.sparse24_linear import takes

    return not takes(values.device.index)


def on_dense(
    x, values, meta, bias, out_features, x_scale, w_scale, w_sum, x_zero_point, activation, layer_scale, residual,
    out_scale, out_zero_point, out_bits, w_dense=None,
):  # fmt: skip
    """Any device without a kernel of its own: through the dense matmul, whose weight a caller keeps in w_dense."""
    if w_dense is None:
        w_dense = dense_form(values, meta, out_features, x.shape[1])
    epilogue = (layer_scale, residual, out_scale, out_zero_point, out_bits)
    if w_scale is not None:
        return torch.ops.pyvit_accel.lowbit_linear.default(
            x, x_scale, w_dense, w_scale, bias, x_zero_point, activation, *epilogue
        )
    wide = x.float()
    if residual is None and activation == "none" and layer_scale is None and out_scale is None:
        return torch.nn.functional.linear(wide, w_dense, bias).to(x.dtype)
    y = finish(wide @ w_dense.T, bias, activation, *epilogue)
    return y.to(x.dtype) if out_scale is None else y


def _fake(
    x, values, meta, bias, out_features, x_scale, w_scale, w_sum, x_zero_point, activation, layer_scale, residual,
    out_scale, out_zero_point, out_bits, w_dense=None,
):  # fmt: skip
    float_dtype = x.dtype if w_scale is None else torch.float32
    return x.new_empty(x.shape[0], out_features, dtype=float_dtype if out_scale is None else torch.int8)


_op = define(
    "sparse24_linear",
    "(Tensor x, Tensor values, Tensor meta, Tensor? bias, int out_features, Tensor? x_scale, Tensor? w_scale, "
    "Tensor? w_sum, int x_zero_point, str activation, Tensor? layer_scale, Tensor? residual, Tensor? out_scale, "
    "int out_zero_point, int out_bits, Tensor? w_dense=None) -> Tensor",
    on_dense,
    _fake,
)


def _check_weight(op: str, values: Tensor, meta: Tensor, w_dense: Tensor | None, N: int, K: int) -> None:
    """Raise unless all are of a weight (N, K). Nibbles are read when they are packed and unpacked, not here."""
    if values.dtype not in sparse24.ELEMENTS or meta.dtype != torch.int32:
        raise TypeError(
            f"{op}: values are {values.dtype} and meta {meta.dtype}; expected float16, bfloat16 or int8, and int32, as "
            "formats.sparse24.pack makes them"
        )
    expected = sparse24.packed_shapes(N, K, values.dtype)
    if (tuple(values.shape), tuple(meta.shape)) != expected:
        raise ValueError(
            f"{op}: x has K={K} and out_features={N}, but values are {tuple(values.shape)} and meta "
            f"{tuple(meta.shape)}; expected {expected[0]} and {expected[1]}"
        )
    if w_dense is not None:
        integer = values.dtype == torch.int8
        shape, dtype = (packed.packed_shape(N, K, 8), torch.uint8) if integer else ((N, K), torch.float32)
        if tuple(w_dense.shape) != shape or w_dense.dtype != dtype:
            raise ValueError(
                f"{op}: w_dense is {w_dense.dtype} {tuple(w_dense.shape)}, expected {dtype} {shape}; dense_form, of "
                "pyvit_accel/ops/sparse24_linear.py, makes it"
            )


def sparse24_linear(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    x_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    w_sum: Tensor | None = None,
    x_zero_point: int = 0,
    activation: str = "none",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: int = 0,
    out_bits: int = 8,
    w_dense: Tensor | None = None,
) -> Tensor:
    """activation((x - x_zero_point) @ w.T * x_scale * w_scale + bias) * layer_scale + residual, requantised or not.

    x                  (..., K)       int8 codes for int8 values; else float, rounded to the dtype of values
    values, meta       packed         P24 v1, formats/sparse24.py, of w (N, K): float16, bfloat16 or int8
    out_features       int            N; K is that of x. The padding hides both: modules check the rest
    x_scale            (1,) | (rows,) float32: one, or one per row of x; with int8 only, and needed there
    w_scale            (N,)           float32; with int8 only, and needed there
    w_sum              (N,)           int32, the sums of the codes of w; needed where x_zero_point is not 0
    bias, layer_scale  (N,)           float32
    residual           (..., N)       float32
    activation         "none" | "gelu" | "gelu_tanh" | "quick_gelu"
    out_scale          (1,) | (N,)    float32; None: the result is floats
    out_bits           int            2 to 8, of codes
    w_dense            tensor         dense_form(values, meta, N, K), which devices without sparse units read; None:
                                      they make it at every call
    returns            (..., N)       dtype of x, float32 for int8, or int8 codes when out_scale is given

    16-bit: sums and epilogue are float32, the result is rounded once to the dtype of values. int8: sums are exact and
    the bits are those of lowbit_linear on the unpacked weight. Inputs must be finite: what a weight's pattern leaves
    out, sparse units do not read, and dense ones multiply with zero. Raises ValueError for shapes that disagree or an
    unknown activation, TypeError for dtypes. No gradient: Sparse24Training is the form that learns.
    """
    op = "sparse24_linear"
    K = check_rows(op, x)
    N = out_features
    _check_weight(op, values, meta, w_dense, N, K)
    integer = values.dtype == torch.int8
    if integer != (x.dtype == torch.int8) or not (integer or x.dtype in FLOATS):
        raise TypeError(
            f"{op}: x is {x.dtype} and values are {values.dtype}; use int8 codes for int8 (ops.quantize makes them), "
            "else float16, bfloat16 or float32"
        )
    if any((scale is not None) != integer for scale in (x_scale, w_scale)):
        given = ", ".join(name for name, t in (("x_scale", x_scale), ("w_scale", w_scale)) if t is not None) or "none"
        raise ValueError(f"{op}: scales given: {given}; int8 values need x_scale and w_scale, 16-bit ones take neither")
    if x_zero_point and not integer:
        raise ValueError(f"{op}: x_zero_point={x_zero_point} with values of {values.dtype}; use 0")
    if w_sum is not None and (not integer or w_sum.dtype != torch.int32 or w_sum.shape != (N,)):
        raise ValueError(f"{op}: w_sum is {w_sum.dtype} {tuple(w_sum.shape)}; use int32 ({N},), for int8 values only")
    if x_zero_point and w_sum is None:
        raise ValueError(f"{op}: x_zero_point={x_zero_point} needs w_sum, the sums of the codes of w (int32 ({N},))")
    check_vector(op, "w_scale", w_scale, N)
    check_vector(op, "bias", bias, N)
    check_epilogue(op, x, N, x_scale, activation, layer_scale, residual, out_scale, out_bits)
    y = _op(
        x.reshape(-1, K) if integer else x.reshape(-1, K).to(values.dtype),
        values,
        meta,
        bias,
        N,
        x_scale,
        w_scale,
        w_sum,
        x_zero_point,
        activation,
        layer_scale,
        None if residual is None else residual.reshape(-1, N),
        out_scale,
        out_zero_point,
        out_bits,
        w_dense,
    ).reshape(*x.shape[:-1], N)
    return y if integer or out_scale is not None else y.to(x.dtype)
