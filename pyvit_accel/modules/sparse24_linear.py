"""Sparse24Linear: nn.Linear with a 2:4 sparse weight, 16-bit or int8, as sparse tensor cores read it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyvit_accel import ops, sparsity
from pyvit_accel.errors import Unsupported
from pyvit_accel.formats import affine, sparse24
from pyvit_accel.sparsity import Moments

from .gradient import refuse_gradient
from .quant_linear import check_weight
from .sparse24_weight import Sparse24Weight

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


def pruned_weight(linear: nn.Linear, mask: str | Tensor, inputs: Moments | None) -> Tensor:
    """The weight (N, K) float32 with at most two of every four inputs not zero.

    Raises ValueError for a mask of another shape, kind or name, or one that keeps more, and for inputs of another
    width; Unsupported for one that needs inputs where there are none.
    """
    w = linear.weight.detach().float()
    if inputs is not None and inputs.mean.shape != w.shape[1:]:
        raise ValueError(f"Sparse24Linear: inputs of {inputs.mean.shape[0]} features, the layer has {w.shape[1]}")
    if isinstance(mask, Tensor):
        if mask.shape != w.shape or mask.dtype != torch.bool:
            came = f"{mask.dtype} {tuple(mask.shape)}"
            raise ValueError(f"Sparse24Linear: mask is {came}, expected {torch.bool} {tuple(w.shape)}")
        w = w * mask.to(w.device)
        sparse24.check(w)
        return w
    if mask not in sparsity.METHODS:
        raise ValueError(f"Sparse24Linear: mask {mask!r} is not one of {', '.join(sparsity.METHODS)}, nor a tensor")
    if mask == "magnitude":
        return w * sparsity.magnitude(w)
    if inputs is None:
        raise Unsupported(f"mask {mask!r} reads the layer's inputs; give calibration batches, or use 'magnitude'")
    if mask == "wanda":
        return w * sparsity.wanda(w, inputs.norm.to(w.device))
    gram = inputs.gram if linear.bias is None else inputs.centred  # the bias takes up the mean of the error
    found = sparsity.sparsegpt(w, gram.to(w.device))
    return sparsity.refit(w, found != 0, gram.to(w.device), found)


class Sparse24Linear(Sparse24Weight):
    """Drop-in for nn.Linear on sparse tensor cores. x is rounded to the dtype of the weight, 16 bits, or to int8 codes
    with one scale per token or a static one; the result has the dtype of x.

    Where nothing multiplies sparse operands, on CPUs for one, the speed is that of a dense layer.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, dtype: str = "float16", x_static: bool = False
    ) -> None:
        """dtype: "float16", "bfloat16" or "int8", of the weight. x_static: with int8, x has one scale for all."""
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"Sparse24Linear: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        if x_static and dtype != "int8":
            raise ValueError(f"Sparse24Linear: x_static belongs to int8 weights, not to {dtype}")
        self.in_features, self.out_features, self.dtype, self.x_zero_point = in_features, out_features, dtype, 0
        self.register_packed(DTYPES[dtype])
        scales = {
            "w_scale": torch.ones(out_features) if dtype == "int8" else None,
            "w_sum": torch.zeros(out_features, dtype=torch.int32) if dtype == "int8" else None,
            "x_scale": torch.ones(1) if x_static else None,
            "bias": torch.zeros(out_features) if bias else None,
        }
        for name, tensor in scales.items():
            if tensor is None:
                setattr(self, name, None)  # no buffer, for what _set_dense says
            else:
                self.register_buffer(name, tensor)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        mask: str | Tensor = "magnitude",
        inputs: Moments | Tensor | None = None,
        dtype: str | None = None,
        x_scale: Tensor | None = None,
        x_zero_point: int = 0,
    ) -> Sparse24Linear:
        """mask      "magnitude" | "wanda" | "sparsegpt", or (N, K) bool: what stays

        inputs        what the layer reads, rows (..., K) or their moments: the last two masks need them, and the bias
                      makes good the mean of the error
        dtype         "float16" | "bfloat16" | "int8"; None: that of the weight, float16 for float32
        x_scale       (1,) float32, with x_zero_point: the static scale of x, int8 only; None: one per token

        Raises Unsupported for NaN, infinite or empty weights, weights beyond the range of float16 and inputs that a
        mask needs and were not given; ValueError for a mask that keeps more than two of four.
        """
        check_weight(linear)
        if isinstance(inputs, Tensor):
            inputs = Moments.of(inputs)
        w = pruned_weight(linear, mask, inputs)
        if dtype is None:
            dtype = "bfloat16" if linear.weight.dtype == torch.bfloat16 else "float16"
        with linear.weight.device:
            new = cls(linear.in_features, linear.out_features, linear.bias is not None, dtype, x_scale is not None)
        if x_scale is not None:
            affine.check_scale(x_scale)
            new.x_scale, new.x_zero_point = x_scale.detach().float().reshape(1).to(w.device), x_zero_point
        if dtype == "int8":
            codes, new.w_scale = affine.quantize_weight(w)
            new.w_sum = codes.sum(dim=1, dtype=torch.int32)
        else:
            largest = float(w.abs().max())
            if largest > torch.finfo(DTYPES[dtype]).max:
                raise Unsupported(f"the largest weight is {largest:.3g}, beyond {dtype}; use bfloat16")
            codes = w.to(DTYPES[dtype])
        new.w_values, new.w_meta = sparse24.pack(codes)
        if linear.bias is not None:
            new.bias = linear.bias.detach().float().clone()
            if inputs is not None:
                new.bias += (linear.weight.detach().float() - new.dequantized_weight()) @ inputs.mean.to(w.device)
        new.unpack()
        return new

    def dequantized_weight(self) -> Tensor:
        """The weight (N, K) the matmul multiplies with, float32."""
        w = self.codes().float()
        return w if self.w_scale is None else w * self.w_scale[:, None]

    @property
    def weight(self) -> Tensor:
        """As a float32 of its own, for models that read it past forward(): F.linear(x, self.qkv.weight, bias)."""
        return self.dequantized_weight()

    def to_linear(self) -> nn.Linear:
        """The dense layer with exactly this weight, float32."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=self.w_values.device)
        with torch.no_grad():
            linear.weight.copy_(self.dequantized_weight())
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"Sparse24Linear: x has shape {tuple(x.shape)}, expected (..., in_features={self.in_features})"
            )
        weight = {"out_features": self.out_features, "w_dense": self.w_dense}
        if self.w_scale is None:
            y = ops.sparse24_linear(x, self.w_values, self.w_meta, self.bias, **weight)
        else:
            codes, scale = ops.quantize(x) if self.x_scale is None else ops.quantize(x, self.x_scale, self.x_zero_point)
            y = ops.sparse24_linear(
                codes, self.w_values, self.w_meta, self.bias, x_scale=scale, w_scale=self.w_scale, w_sum=self.w_sum,
                x_zero_point=self.x_zero_point, **weight,
            )  # fmt: skip
        return refuse_gradient(y.to(x.dtype), x)

    def formats(self) -> tuple[str, str]:
        """Of the weight and of the activations."""
        return f"2:4 {self.dtype}", self.dtype

    def config(self) -> dict:
        """What the constructor needs to make this module anew, JSON-able."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "dtype": self.dtype,
            "x_static": self.x_scale is not None,
        }

    def extra_repr(self) -> str:
        kind = "" if self.dtype != "int8" else " per token" if self.x_scale is None else " static"
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, weight=2:4 {self.dtype}, activation={self.dtype}{kind}"
