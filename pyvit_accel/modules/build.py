"""From parts to modules: where ranges are folded into weights and scales are set.

observed is what calibration saw (calibrate.Observed); None: every scale is found per token at run time.

A static int8 activation has one scale per tensor after a fold that evens out its channels (calibrate/fold.py):
    norm output    the fold goes into the norm's weight and bias, centred, so codes are symmetric
    v              one scale per channel, which passes through the softmax: undone where the attention output is written
    elsewhere      the fold is a scale per channel, applied where the codes are written
In each case the next weight undoes it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyvit_accel import calibrate
from pyvit_accel.calibrate import Activation, Observed

from .parts import AttentionParts, BlockParts, MlpParts
from .quant_attention import QuantAttention
from .quant_block import QuantBlock
from .quant_linear import QuantLinear, check_weight
from .quant_mlp import QuantMlp


def quant_linear(linear: nn.Linear, observed: Observed | None) -> QuantLinear:
    if observed is None:
        return QuantLinear.from_linear(linear)
    check_weight(linear)
    x = observed.input(linear)
    fold = calibrate.range_fold(x, centre=False)
    scale, zero_point = calibrate.affine_scale(fold.activation(x))
    return _corrected(linear.weight, linear.bias, x.mean, fold.ratio * scale, zero_point)


def quant_mlp(parts: MlpParts, observed: Observed | None) -> QuantMlp:
    return QuantMlp(quant_linear(parts.fc1, observed), _fc2(parts.fc2, observed), parts.activation)


def quant_attention(parts: AttentionParts, observed: Observed | None) -> QuantAttention:
    weight, bias = _fused(parts.qkv)
    if observed is None:
        return _attention(parts, QuantLinear.from_weight(weight, bias), None)
    x = observed.input(parts.qkv[0])
    fold = calibrate.range_fold(x, centre=False)
    scale = calibrate.symmetric_scale(fold.activation(x))
    return _attention(parts, _corrected(weight, bias, x.mean, fold.ratio * scale), observed)


def quant_block(parts: BlockParts, observed: Observed | None) -> QuantBlock:
    attention, mlp = parts.attention, parts.mlp
    norm1, qkv = _norm_and_linear(parts.norm1, attention.qkv, observed)
    norm2, fc1 = _norm_and_linear(parts.norm2, (mlp.fc1,), observed)
    layer_scales = [None if s is None else s.detach().float().clone() for s in (parts.layer_scale1, parts.layer_scale2)]
    return QuantBlock(
        norm1,
        _attention(attention, qkv, observed),
        norm2,
        QuantMlp(fc1, _fc2(mlp.fc2, observed), mlp.activation),
        *layer_scales,
    )


def _corrected(weight: Tensor, bias: Tensor | None, mean: Tensor, x_scale: Tensor, x_zero_point: int = 0) -> QuantLinear:
    """A static QuantLinear whose mean output over the calibration data is the float one's."""
    new = QuantLinear.from_weight(weight, bias, x_scale, x_zero_point)
    ratio = x_scale if x_scale.numel() > 1 else 1.0  # what the packed weight contains
    change = calibrate.bias_correction(weight * ratio, new.dequantized_weight(), mean / ratio)
    new.bias = change if new.bias is None else new.bias + change
    return new


def _norm_and_linear(
    norm: nn.LayerNorm, linears: tuple[nn.Linear, ...], observed: Observed | None
) -> tuple[nn.LayerNorm, QuantLinear]:
    weight, bias = _fused(linears)
    if observed is None:
        return _norm(norm, norm.weight, norm.bias), QuantLinear.from_weight(weight, bias)
    y = observed.input(linears[0])
    fold = calibrate.range_fold(y)
    folded = fold.activation(y)
    linear = _corrected(*calibrate.fold_linear(weight, bias, fold), folded.mean, calibrate.symmetric_scale(folded))
    return _norm(norm, *calibrate.fold_norm(norm.weight, norm.bias, fold)), linear


def _attention(parts: AttentionParts, qkv: QuantLinear, observed: Observed | None) -> QuantAttention:
    # Codes of q and k would have to be written before their norm; with one, scales are found per token and head.
    static = observed is not None and parts.q_norm is None and parts.k_norm is None
    if not static:
        new = QuantAttention(qkv, quant_linear(parts.proj, None), parts.num_heads, parts.scale)
        for name in ("q_norm", "k_norm"):
            norm = getattr(parts, name)
            setattr(new, name, None if norm is None else _norm(norm, norm.weight, norm.bias))
        return new
    check_weight(parts.proj)
    y = observed.input(parts.proj)
    fold = calibrate.range_fold(y, centre=False)
    scale = calibrate.symmetric_scale(fold.activation(y))
    proj = _corrected(parts.proj.weight, parts.proj.bias, y.mean, fold.ratio * scale)
    q, k, v = _split(parts.qkv, observed)
    qk_scale = [calibrate.symmetric_scale(x, groups=parts.num_heads) for x in (q, k)]
    new = QuantAttention(qkv, proj, parts.num_heads, parts.scale, static=True)
    new.set_scales(torch.stack(qk_scale)[..., None], calibrate.symmetric_scale(v, groups=v.amax.shape[0]))
    return new


def _fc2(fc2: nn.Linear, observed: Observed | None) -> QuantLinear:
    if observed is None:
        return quant_linear(fc2, None)
    check_weight(fc2)
    x = observed.input(fc2)
    fold = calibrate.outlier_fold(x)
    scale, zero_point = calibrate.affine_scale(fold.activation(x))
    return _corrected(fc2.weight, fc2.bias, x.mean, fold.ratio * scale, zero_point)


def _fused(linears: tuple[nn.Linear, ...]) -> tuple[Tensor, Tensor | None]:
    """One weight and bias of several Linears that read the same input."""
    for linear in linears:
        check_weight(linear)
    weight = torch.cat([linear.weight.detach() for linear in linears])
    if all(linear.bias is None for linear in linears):
        return weight, None
    zeros = (torch.zeros_like(linear.weight[:, 0]) if linear.bias is None else linear.bias for linear in linears)
    return weight, torch.cat([bias.detach() for bias in zeros])


def _split(qkv: tuple[nn.Linear, ...], observed: Observed) -> tuple[Activation, ...]:
    """What was seen of q, k and v, from one fused Linear or from three."""
    if len(qkv) == 3:
        return tuple(observed.output(linear) for linear in qkv)
    y = observed.output(qkv[0])
    fields = (t.chunk(3, dim=-1) for t in (y.min, y.max, y.mean, y.sample))
    return tuple(Activation(*part, y.count) for part in zip(*fields, strict=True))


def _norm(norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> nn.LayerNorm:
    """A LayerNorm like `norm` with this weight and bias, float32, frozen."""
    new = nn.LayerNorm(norm.normalized_shape, norm.eps, device=weight.device).requires_grad_(False)
    new.weight.copy_(weight.detach())
    new.bias.copy_(bias.detach())
    return new
