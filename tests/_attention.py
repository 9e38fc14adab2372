"""Float attention in float64, and what rounding q, k, v and P may change in it and in its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from _problems import U32
from torch import Tensor

from pyvit_accel.formats import affine, softmax, tan, twin
from pyvit_accel.formats import log as log_formats
from pyvit_accel.formats.softmax import SoftmaxFormat

LN2 = log(2.0)
FORMATS = {
    **{f"linear mantissa {bits}": softmax.linear_mantissa(bits) for bits in range(4)},
    **{f"log2 {bits}": softmax.log2(bits) for bits in (3, 5)},
    "log-sqrt2": softmax.of_codebook(log_formats.log_sqrt2(4), "max"),
    "linear mantissa 3, lse, divided": softmax.linear_mantissa(3, "lse"),
    "tan, max": softmax.of_codebook(tan.tan(6, 1.2), "max"),
    "log2 4, published": softmax.log2(4, "lse"),
    "adalog, published": softmax.of_codebook(log_formats.adalog(4, q=30)),
    "sulq, published": softmax.of_codebook(log_formats.sulq(5, 1e-3, -9.9, 0.0)),
    "twin, published": softmax.of_codebook(twin.softmax(8, 1 / 32)),
    "uniform, published": softmax.of_codebook(twin.uniform(8, 1 / 255)),
}
_K = torch.arange(255.0)
FINEST = SoftmaxFormat(  # half a step is 1.1 %
    "log, 31 an octave", "max", torch.exp2(15 - _K / 31), 0.0, thresholds=-(_K + 0.5) / 31
)


@dataclass
class Exact:
    """Attention of floats (B, H, N, D) in float64, nothing rounded, and what rounding may change.

    q, k, v         the floats, k less its mean; q_hat, k_hat, v_hat  what their codes stand for
    p               (B, H, Nq, Nk); p_low, p_high: between which their format leaves them
    y, error        (B, H, Nq, Dv)  the result, and how far from it rounding may carry
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_hat: Tensor
    k_hat: Tensor
    v_hat: Tensor
    p: Tensor
    p_low: Tensor
    p_high: Tensor
    y: Tensor
    error: Tensor


def rounded(x: Tensor, dim: int) -> Tensor:
    """float32 x in 8 bits, with a scale for each of what lies along dim; float64."""
    scale = affine.scale_of(x.abs().amax(dim=dim, keepdim=True))
    return affine.quantize(x, scale).double() * scale.double()


def exact(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, form: SoftmaxFormat, u_out: float = U32
) -> Exact:
    """A score of the rounded q and k is off by a few roundings of float32, e. How far a weight then lies from exp(s) is
    what its format says, see _weights; the rest is monotone, and the steps of v are known."""
    q, k, v = q.float(), k.float(), v.float()
    q_hat, k_hat, v_hat = rounded(q, -1), rounded(k - k.mean(dim=2, keepdim=True), -1), rounded(v, 2)
    q, k, v = q.double(), k.double() - k.double().mean(dim=2, keepdim=True), v.double()
    s, s_hat = q @ k.mT * scale, q_hat @ k_hat.mT * scale
    e = 8 * U32 * s_hat.abs() + 8 * U32
    if bias is not None:
        e = e + 8 * U32 * bias.double().abs().masked_fill(bias == -torch.inf, 0)
        s, s_hat = s + bias.double(), s_hat + bias.double()
    low, high = _weights(form, s_hat, e)
    p = s.softmax(dim=-1)
    if form.normalize:
        others = [t.sum(dim=-1, keepdim=True) - t for t in (low, high)]
        low, high = low / (low + others[1]).clamp_min(1e-300), high / (high + others[0]).clamp_min(1e-300)
    y, far = p @ v, torch.maximum(high - p, p - low)
    error = far @ v_hat.abs() + (p @ (v_hat - v)).abs()
    error = error + 64 * U32 * (high.abs() @ v_hat.abs()) + u_out * (y.abs() + error)
    return Exact(q, k, v, q_hat, k_hat, v_hat, p, low, high, y, error)


def _weights(form: SoftmaxFormat, s: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Between what the weight of a key lies, up to a factor of the row where rows are divided by their sum."""
    anchor, e_top = s.amax(dim=-1, keepdim=True), e.amax(dim=-1, keepdim=True)
    if form.anchor == "lse":  # its sum is of 16-bit codes
        anchor = s.logsumexp(dim=-1, keepdim=True)
        e_top = e_top + s.shape[-1] * 0.5 / 65280 + 1e-6
    x, far = (s - anchor) / LN2, (e + e_top) / LN2
    return tuple(form.dequantize(form.codes((x + d).clamp_max(0))) for d in (-far, far))
