"""What a block will be once it is quantized, still in floats: folded weights, formats, scales, chosen codes.

Folds and searches make a plan and refine it; modules pack it. Between the two, `linear_output` and `block_output` say
in plain float arithmetic what the packed block will compute, differentiable where `rint` is: every search measures
itself with them.

    y = Q(x) @ What.T + bias        Q quantizes and dequantizes as the plan says, What = codes * w_scale
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit_accel.calibrate.observers import Activation
from pyvit_accel.formats import affine
from pyvit_accel.formats.softmax import SoftmaxFormat

Rint = Callable[[Tensor], Tensor]
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@dataclass(frozen=True)
class LinearPlan:
    """weight (N, K), bias (N,) | None: float32, all folds included.

    w_bits, x_bits  of the codes of weight and input
    x_scale         (1,) | (K,) static, x ~ (q - x_zero_point) * x_scale; None: one per token, found at run time
    x_minimum       of an input with a scale per token: a lower bound of it, from which the codes start
    x_clip          of an input with a scale per token: the part of its range that the codes span
    x_table         (256,) int8 of an input with a minimum: the operand of each 8-bit code, 2^x_bits different ones;
                    codes are then found with 8 bits, and the table rounds them to levels unevenly spaced
    w_scale         (N,) of `packed`; None: formats.affine chooses
    codes           (N, K) int8 of `packed`; None: the nearest
    seen            what calibration saw of the input, after the folds
    sparse24        pack it for sparse units, if two of every four codes are zero
    """

    weight: Tensor
    bias: Tensor | None
    w_bits: int = 8
    x_bits: int = 8
    x_scale: Tensor | None = None
    x_zero_point: int = 0
    x_minimum: float | None = None
    x_clip: float = 1.0
    x_table: Tensor | None = None
    w_scale: Tensor | None = None
    codes: Tensor | None = None
    seen: Activation | None = None
    sparse24: bool = False

    @property
    def packed(self) -> Tensor:
        """The float matrix that codes and w_scale stand for: the weight, times a static scale per channel."""
        per_channel = self.x_scale is not None and self.x_scale.numel() > 1
        return self.weight * self.x_scale if per_channel else self.weight

    def quantized(self) -> LinearPlan:
        """The same plan with w_scale and codes decided."""
        if self.codes is not None:
            return self
        codes, w_scale = affine.quantize_weight(self.packed, self.w_bits, self.w_scale)
        return replace(self, codes=codes, w_scale=w_scale)

    def weight_hat(self) -> Tensor:
        """What the matmul multiplies a dequantized input with, (N, K)."""
        plan = self.quantized()
        w = affine.dequantize(plan.codes, plan.w_scale[:, None])
        per_channel = self.x_scale is not None and self.x_scale.numel() > 1
        return w / self.x_scale if per_channel else w


@dataclass(frozen=True)
class BlockPlan:
    """A pre-norm block. norm weights and biases (C,); head_scale (3, H, 1) of q, k, v, None: per token and head.

    softmax: the format of the probabilities, which block_output leaves as they are; None: bytes of an exponential.
    """

    norm1: tuple[Tensor, Tensor, float]  # weight, bias, eps
    qkv: LinearPlan
    num_heads: int
    softmax_scale: float
    head_bits: int
    head_scale: Tensor | None
    proj: LinearPlan
    layer_scale1: Tensor | None
    norm2: tuple[Tensor, Tensor, float]
    fc1: LinearPlan
    activation: str
    fc2: LinearPlan
    layer_scale2: Tensor | None
    softmax: SoftmaxFormat | None = None


def quantized_input(plan: LinearPlan, x: Tensor, rint: Rint = torch.round) -> Tensor:
    """x (..., K) as the matmul sees it."""
    if plan.x_scale is not None:
        return _fake(x, plan.x_scale, plan.x_zero_point, plan.x_bits, rint)
    if plan.x_minimum is None:
        return fake_per_token(x, plan.x_bits, plan.x_clip, rint)
    bits = plan.x_bits if plan.x_table is None else 8
    lo, hi = affine.q_range(bits)
    scale = affine.scale_of((x - plan.x_minimum).amax(-1, keepdim=True) * plan.x_clip, hi - lo)
    y = _fake(x - plan.x_minimum, scale, lo, bits, rint)
    if plan.x_table is not None:
        codes = torch.round(y.detach() / scale).clamp(0, 255).long()
        y = y + ((plan.x_table[codes].float() + 128) * scale - y).detach()  # the gradient of the 8-bit code
    return y + plan.x_minimum


def fake_per_token(x: Tensor, bits: int, clip: float = 1.0, rint: Rint = torch.round) -> Tensor:
    """x (..., K) quantized and dequantized, symmetric, one scale per row."""
    scale = affine.scale_of(x.abs().amax(-1, keepdim=True) * clip, affine.q_range(bits)[1])
    return _fake(x, scale, 0, bits, rint)


def linear_output(plan: LinearPlan, x: Tensor, rint: Rint = torch.round, weight: Tensor | None = None) -> Tensor:
    """y (..., N); weight: another (N, K) in place of plan.weight_hat()."""
    return F.linear(quantized_input(plan, x, rint), plan.weight_hat() if weight is None else weight, plan.bias)


def output_error(plan: LinearPlan) -> float | None:
    """|y_hat - y| / |y| of the product without its bias, on the rows of `seen`; None without them."""
    if plan.seen is None:
        return None
    x = plan.seen.sample
    y = x @ plan.weight.T
    return float((quantized_input(plan, x) @ plan.weight_hat().T - y).norm() / y.norm().clamp_min(1e-30))


def block_output(
    plan: BlockPlan, x: Tensor, rint: Rint = torch.round, weights: dict[str, Tensor] | None = None
) -> Tensor:
    """The block on x (B, N, C). weights: others in place of weight_hat(), by "qkv", "proj", "fc1", "fc2"."""
    weights = weights or {}
    C = x.shape[-1]

    def linear(name: str, x: Tensor) -> Tensor:
        return linear_output(getattr(plan, name), x, rint, weights.get(name))

    qkv = linear("qkv", F.layer_norm(x, (C,), *plan.norm1))
    y = linear("proj", attended(plan, qkv, rint))
    x = x + (y if plan.layer_scale1 is None else y * plan.layer_scale1)
    hidden = ACTIVATIONS[plan.activation](linear("fc1", F.layer_norm(x, (C,), *plan.norm2)))
    y = linear("fc2", hidden)
    return x + (y if plan.layer_scale2 is None else y * plan.layer_scale2)


def attended(plan: BlockPlan, qkv: Tensor, rint: Rint = torch.round) -> Tensor:
    """What attention makes of the output of qkv (B, N, 3 H D): (B, N, H D).

    Probabilities are floats here; in the kernels they are bytes whose errors add up to nothing along the keys.
    """
    qkv = qkv.unflatten(-1, (3, plan.num_heads, -1))
    if plan.head_scale is None:
        qkv = fake_per_token(qkv, plan.head_bits, rint=rint)
    else:
        qkv = _fake(qkv, plan.head_scale, 0, plan.head_bits, rint)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, scale=plan.softmax_scale).transpose(1, 2).flatten(2)


def _fake(x: Tensor, scale: Tensor, zero_point: int, bits: int, rint: Rint) -> Tensor:
    lo, hi = affine.q_range(bits)
    return (rint(x / scale).clamp(lo - zero_point, hi - zero_point)) * scale
