"""AdaLog: scales and zero points by a coarse-to-fine search on the error of the layer's output, and the base of a log.

fpcs          "fast progressive combining search": a grid of scales x zero points, the best kept and each cut into finer
              scales around it, six rounds of 128 candidates
fpcs_input, fpcs_weight, fpcs_heads     that search for one operand of a product, the other given
adalog_plan   inputs and weights of a linear by turns
adalog_gelu, adalog_softmax             scale and base 2^(q/37) of outputs of GELU and softmax

Zero points are the published ones less 2^(b-1), for codes are signed. Every loss is the squared error of a product, so
a tall factor is first reduced to its triangular part: the same lengths with fewer rows.
Wu et al., AdaLog, arXiv:2407.12951.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pyvit_accel.calibrate.observers import Activation
from pyvit_accel.calibrate.plan import LinearPlan, quantized_input
from pyvit_accel.calibrate.scales import fake_affine, interpolated_percentile
from pyvit_accel.formats import affine

CANDIDATES = 128
GELU_SHIFT = 0.16997124254703522  # less the minimum of GELU
BASES = range(10, 139)  # q of the base 2^(q/37)


def fpcs(
    loss: Callable[[Tensor, Tensor], Tensor],
    scales: Tensor,
    zero_points: Tensor,
    keep: int = 16,
    expand: int = 8,
    rounds: int = 6,
) -> tuple[Tensor, Tensor]:
    """(scale (G,), zero_point (G,)) with the least loss found, each of G groups by itself.

    loss         takes scale (G,) and zero_point (G,), gives (G,)
    scales       (S, G) ascending, evenly spaced in each group
    zero_points  (Z,)
    """
    grid_scale = scales.repeat(len(zero_points), 1)
    grid_zero = zero_points.to(scales).repeat_interleave(len(scales))[:, None].expand_as(grid_scale)
    step = scales[1] - scales[0] if len(scales) > 1 else scales[0]
    least = torch.full_like(scales[0], torch.inf)
    best_scale, best_zero = scales[-1], torch.zeros_like(least)
    offsets = torch.linspace(-0.5, 0.5, expand, device=scales.device)[:, None]
    for _ in range(rounds):
        losses = torch.stack([loss(s, z) for s, z in zip(grid_scale, grid_zero, strict=True)])
        order = losses.argsort(dim=0, stable=True)[:keep]
        kept_scale, kept_zero = grid_scale.gather(0, order), grid_zero.gather(0, order)
        better = losses.amin(0) < least
        best_scale, best_zero = (
            torch.where(better, kept_scale[0], best_scale),
            torch.where(better, kept_zero[0], best_zero),
        )
        least = torch.minimum(least, losses.amin(0))
        finer = (kept_scale[:, None] + offsets * step).flatten(0, 1)
        grid_scale = torch.maximum(finer, scales[0] * 1e-3)  # positive
        grid_zero = kept_zero.repeat_interleave(expand, 0)
        step = step / (expand - 0.5)
    return best_scale, best_zero


def fpcs_input(x: Activation | Tensor, weight: Tensor, bits: int) -> tuple[Tensor, int]:
    """(scale (1,), zero_point) of the input of weight (N, K): the least squared error of x @ weight.T on the sample."""
    x = x.sample if isinstance(x, Activation) else x.reshape(-1, x.shape[-1]).float()
    rows = _square(weight.detach().float())

    def loss(scale: Tensor, zero_point: Tensor) -> Tensor:
        return ((fake_affine(x, scale, zero_point, bits) - x) @ rows.T).square().sum()[None]

    num_zero = min(16, 2**bits)
    scale, zero_point = fpcs(loss, _grid(x.reshape(1, -1), bits, num_zero), _around_zero(num_zero, x.device))
    return scale, int(zero_point)


def fpcs_weight(
    weight: Tensor, bits: int, x: Activation | Tensor | None = None, symmetric: bool = True
) -> tuple[Tensor, Tensor]:
    """(scale (N,), zero_point (N,)) of weight (N, K), each row by itself: the least squared error of x @ weight.T.

    x: the input the product will see, quantized when it will be; None counts errors of the weight alike.
    symmetric: zero points 0, which is what the kernels multiply with; the published search has them free.
    """
    w = weight.detach().float()
    x = x.sample if isinstance(x, Activation) else x
    rows = None if x is None else _square(x.reshape(-1, x.shape[-1]).float())

    def loss(scale: Tensor, zero_point: Tensor) -> Tensor:
        error = fake_affine(w, scale[:, None], zero_point[:, None], bits) - w
        return (error if rows is None else error @ rows.T).square().sum(1)

    if symmetric:
        scales = _grid(torch.cat([w, -w], 1), bits, 1) * ((2**bits - 1) / (2**bits - 2))  # +max |w| is a code as well
        return fpcs(loss, scales, torch.zeros(1, device=w.device))
    num_zero = min(16, 2 ** (bits - 1))
    return fpcs(loss, _grid(w, bits, num_zero), _around_zero(num_zero, w.device))


def fpcs_heads(x: Tensor, product: Callable[[Tensor], Tensor], bits: int) -> tuple[Tensor, Tensor]:
    """(scale (H,), zero_point (H,)) of q, k or v (B, H, N, D), each head by itself.

    product: linear, (B, H, N, D) to (B, H, ..): what attention makes of x, `lambda e: e @ k.mT` for q.
    """

    def loss(scale: Tensor, zero_point: Tensor) -> Tensor:
        error = product(fake_affine(x, scale[:, None, None], zero_point[:, None, None], bits) - x)
        return error.square().transpose(0, 1).flatten(1).sum(1)

    num_zero = min(16, 2 ** (bits - 1))
    return fpcs(loss, _grid(x.transpose(0, 1).flatten(1), bits, num_zero), _around_zero(num_zero, x.device))


def adalog_plan(
    weight: Tensor, bias: Tensor | None, x: Activation, w_bits: int = 4, x_bits: int = 4, turns: int = 3
) -> LinearPlan:
    """The plan of a linear: weights by their own error first, then input and weights by turns on the output's error.

    For a linear that a norm feeds, after repq_fold. Weights are symmetric per output feature.
    """
    w_scale, _ = fpcs_weight(weight, w_bits)
    plan = LinearPlan(weight.detach().float(), bias, w_bits, x_bits, seen=x)
    for _ in range(turns):
        codes, _ = affine.quantize_weight(weight, w_bits, w_scale)
        x_scale, zero_point = fpcs_input(x, affine.dequantize(codes, w_scale[:, None]), x_bits)
        plan = replace(plan, x_scale=x_scale, x_zero_point=zero_point)
        w_scale, _ = fpcs_weight(weight, w_bits, quantized_input(plan, x.sample))
    return replace(plan, w_scale=w_scale).quantized()


def adalog_gelu(x: Activation | Tensor, weight: Tensor, bits: int, rounds: int = 6) -> tuple[float, int]:
    """(scale, q) of GELU outputs, shifted up by GELU_SHIFT, in front of weight (N, K).

    The best 8 bases at the largest scale, times 16 scales from the 90th percentile of the positive values up; the best
    32 of those, each cut into 4 finer scales, and so on.
    """
    x = x.sample if isinstance(x, Activation) else x.reshape(-1, x.shape[-1]).float()
    rows = _square(weight.detach().float())
    shifted = (x + GELU_SHIFT).clamp_min(0)
    log = shifted.clamp_min(1e-15).log2()

    def loss(scale: float, q: int) -> float:
        error = _decoded(math.log2(scale) - log, q, bits) * scale - shifted
        return float((error @ rows.T).square().sum())

    positive = x[x > 0].sort().values[None]
    if positive.numel() == 0:
        raise ValueError("adalog_gelu: no value of x is positive; are these outputs of GELU?")
    low, high = (float(interpolated_percentile(positive, p)) + GELU_SHIFT for p in (90, 100))
    bases = sorted(BASES, key=lambda q: loss(high, q))[:8]
    step = (high - low) / 15
    grid = [(low + i * step, q) for q in bases for i in range(16)]
    seen: dict[tuple[float, int], float] = {}
    for _ in range(rounds):
        seen |= {candidate: loss(*candidate) for candidate in grid}
        kept = sorted(grid, key=seen.__getitem__)[:32]
        grid = [(scale + (i / 3 - 0.5) * step, q) for scale, q in kept for i in range(4)]
        step /= 3.5
    return min(seen, key=seen.__getitem__)


def adalog_softmax(p: Tensor, v: Tensor, bits: int) -> int:
    """q of softmax outputs p (B, H, N, N) in front of v (B, H, N, D); their scale is 1."""
    log = p.clamp_min(1e-15).log2()
    return min(BASES, key=lambda q: float(((_decoded(-log, q, bits) - p) @ v).square().sum()))


def shift_bias(weight_hat: Tensor, bias: Tensor | None, shift: float = GELU_SHIFT) -> Tensor:
    """The bias (N,) of a linear whose input is shifted up. Exact: weight_hat (N, K) is what will be multiplied."""
    moved = -shift * weight_hat.detach().float().sum(1)
    return moved if bias is None else bias.detach().float() + moved


def fake_adalog(x: Tensor, scale: float, q: int, bits: int) -> Tensor:
    """x >= 0 quantized and dequantized to the 2^b levels of base 2^(q/37) below scale, and zero below those."""
    return _decoded(-(x / scale).clamp(1e-15, 1).log2(), q, bits) * scale


def _decoded(octaves: Tensor, q: int, bits: int) -> Tensor:
    """Level of what lies so many octaves below the scale."""
    code = (octaves * (37 / q)).round_().clamp_(0, 2**bits).int()
    return _levels(q, bits, octaves).index_select(0, code.flatten()).view_as(octaves)


def _levels(q: int, bits: int, like: Tensor) -> Tensor:
    exponent = torch.arange(2**bits) * q
    top = 2 ** (bits + 1) - 2
    mantissa = torch.round(2.0 ** (-(exponent % 37) / 37) * top)
    return torch.cat([mantissa / top * 2.0 ** -(exponent // 37), torch.zeros(1)]).to(like)


def _grid(x: Tensor, bits: int, num_zero: int) -> Tensor:
    """Scales (S, G) for x (G, R): from the range between its 10th and 90th percentile to its whole range, S Z = 128."""
    ordered = x.sort(1).values
    low, high = (interpolated_percentile(ordered, p) - interpolated_percentile(ordered, 100 - p) for p in (90, 100))
    high = torch.where(high > 0, high, torch.ones_like(high))
    low = torch.maximum(low, high * 1e-3)
    part = torch.linspace(0, 1, CANDIDATES // num_zero, device=x.device)[:, None]
    return (low + part * (high - low)) / (2**bits - 1)


def _around_zero(num: int, device: torch.device) -> Tensor:
    return torch.arange(-(num // 2), num // 2, device=device)


def _square(rows: Tensor) -> Tensor:
    """rows (R, K) with at most K rows and the same |rows @ e| for every e."""
    return rows if rows.shape[0] <= rows.shape[1] else torch.linalg.qr(rows, mode="r").R
