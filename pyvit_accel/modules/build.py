"""From parts to modules: where ranges are folded into weights and scales are set.

A static int8 activation has one scale per tensor after a fold that evens out its channels (calibrate/fold.py):
    norm output         the fold goes into the norm's weight and bias, centred, so codes are symmetric
    v                   its scale per channel passes through the softmax: undone where the attention output is written
    attention output,   the fold is a scale per channel, applied where the codes are written
    GELU output
In each case the next weight undoes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pyvit_accel import calibrate
from pyvit_accel.calibrate import Activation, Observed

from .parts import AttentionParts, BlockParts, MlpParts
from .quant_attention import QuantAttention
from .quant_block import QuantBlock
from .quant_linear import QuantLinear, check_weight
from .quant_mlp import QuantMlp

GELU_MINIMUM = -0.1701  # just below the smallest value of any GELU: -0.16997 exact, -0.17004 tanh, -0.1636 quick


@dataclass(frozen=True)
class Scales:
    """Where the scales of a block's activations come from.

    observed         what calibration saw; None: every scale is found per token at run time
    observer         "minmax", "percentile" or "mse": how a static scale follows from what was seen
    hidden           "per_token" or "static": the GELU output, whose range varies most between tokens. Static saves a pass
                     over memory (about 3 % of a block) and on DeiT-Ti and ViT-Ti multiplies the logit error by 1.4
    bias_correction  keep the mean output of every static Linear where the calibration data had it
    """

    observed: Observed | None = None
    observer: str = "minmax"
    hidden: str = "per_token"
    bias_correction: bool = True

    def __post_init__(self) -> None:
        for name, choices in (("observer", ("minmax", "percentile", "mse")), ("hidden", ("per_token", "static"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"Scales: {name}={getattr(self, name)!r} is not one of {', '.join(choices)}")

    @property
    def symmetric(self) -> partial:
        return partial(calibrate.symmetric_scale, method=self.observer)


def quant_linear(linear: nn.Linear) -> QuantLinear:
    """A scale per token: a layer that reads floats has to pass over them anyway, and this is the more accurate one."""
    return QuantLinear.from_linear(linear)


def quant_mlp(parts: MlpParts, scales: Scales) -> QuantMlp:
    return QuantMlp(quant_linear(parts.fc1), _fc2(parts.fc2, scales), parts.activation)


def quant_attention(parts: AttentionParts, scales: Scales) -> QuantAttention:
    return _attention(parts, QuantLinear.from_weight(*_fused(parts.qkv)), scales)


def quant_block(parts: BlockParts, scales: Scales) -> QuantBlock:
    attention, mlp = parts.attention, parts.mlp
    norm1, qkv = _norm_and_linear(parts.norm1, attention.qkv, scales)
    norm2, fc1 = _norm_and_linear(parts.norm2, (mlp.fc1,), scales)
    layer_scales = [None if s is None else s.detach().float().clone() for s in (parts.layer_scale1, parts.layer_scale2)]
    return QuantBlock(
        norm1,
        _attention(attention, qkv, scales),
        norm2,
        QuantMlp(fc1, _fc2(mlp.fc2, scales), mlp.activation),
        *layer_scales,
    )


def _static(
    weight: Tensor, bias: Tensor | None, mean: Tensor, x_scale: Tensor, x_zero_point: int, scales: Scales
) -> QuantLinear:
    """A static QuantLinear; mean (K,) is its input's over the calibration data."""
    new = QuantLinear.from_weight(weight, bias, x_scale, x_zero_point)
    if not scales.bias_correction:
        return new
    ratio = x_scale if x_scale.numel() > 1 else 1.0  # what the packed weight contains
    change = calibrate.bias_correction(weight * ratio, new.dequantized_weight(), mean / ratio)
    new.bias = change if new.bias is None else new.bias + change
    return new


def _norm_and_linear(
    norm: nn.LayerNorm, linears: tuple[nn.Linear, ...], scales: Scales
) -> tuple[nn.LayerNorm, QuantLinear]:
    weight, bias = _fused(linears)
    if scales.observed is None:
        return _norm(norm, norm.weight, norm.bias), QuantLinear.from_weight(weight, bias)
    y = scales.observed.input(linears[0])
    fold = calibrate.range_fold(y)
    folded = fold.activation(y)
    linear = _static(*calibrate.fold_linear(weight, bias, fold), folded.mean, scales.symmetric(folded), 0, scales)
    return _norm(norm, *calibrate.fold_norm(norm.weight, norm.bias, fold)), linear


def _attention(parts: AttentionParts, qkv: QuantLinear, scales: Scales) -> QuantAttention:
    # Codes of q and k would have to be written before their norm; with one, scales are found per token and head.
    if scales.observed is None or parts.q_norm is not None or parts.k_norm is not None:
        new = QuantAttention(qkv, quant_linear(parts.proj), parts.num_heads, parts.scale)
        for name in ("q_norm", "k_norm"):
            norm = getattr(parts, name)
            setattr(new, name, None if norm is None else _norm(norm, norm.weight, norm.bias))
        return new
    check_weight(parts.proj)
    y = scales.observed.input(parts.proj)
    fold = calibrate.range_fold(y, centre=False)
    x_scale = fold.ratio * scales.symmetric(fold.activation(y))
    proj = _static(parts.proj.weight, parts.proj.bias, y.mean, x_scale, 0, scales)
    q, k, v = _split(parts.qkv, scales.observed)
    qk_scale = [scales.symmetric(x, groups=parts.num_heads) for x in (q, k)]
    new = QuantAttention(qkv, proj, parts.num_heads, parts.scale, static=True)
    fold = calibrate.range_fold(v, centre=False)
    per_head = scales.symmetric(fold.activation(v), groups=parts.num_heads)
    new.set_scales(torch.stack(qk_scale)[..., None], fold.ratio * per_head.repeat_interleave(new.head_dim))
    return new


def _fc2(fc2: nn.Linear, scales: Scales) -> QuantLinear:
    if scales.observed is None or scales.hidden == "per_token":
        return QuantLinear.from_linear(fc2, x_minimum=GELU_MINIMUM)
    check_weight(fc2)
    x = scales.observed.input(fc2)
    fold = calibrate.outlier_fold(x)
    scale, zero_point = calibrate.affine_scale(fold.activation(x), scales.observer)
    return _static(fc2.weight, fc2.bias, x.mean, fold.ratio * scale, zero_point, scales)


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
