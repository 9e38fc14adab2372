"""From parts to modules: where ranges are folded into weights, and formats and scales are set.

    parts --plan_block--> BlockPlan, in floats --(searches of calibrate/)--> BlockPlan --pack_block--> QuantBlock

Calibration gives q, k and v one static scale per head, and evens out the channels of the norm outputs
(calibrate/fold.py): the fold goes into the norm and, undone, into the next weight. Norm, attention and GELU outputs
have a scale per token: with static ones the squared logit error of DeiT-Ti and ViT-Ti is two to four times as large,
and a block is 5 % faster.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn

from pyvit_accel import calibrate
from pyvit_accel.calibrate import Activation, BlockPlan, LinearPlan, Observed
from pyvit_accel.errors import Unsupported
from pyvit_accel.formats import packed, sparse24
from pyvit_accel.formats.softmax import DEFAULT_SOFTMAX, SoftmaxFormat

from .parts import AttentionParts, BlockParts, MlpParts
from .position import Position
from .quant_attention import QuantAttention
from .quant_block import QuantBlock
from .quant_linear import QuantLinear, check_finite, check_weight
from .quant_mlp import QuantMlp
from .sparse24_quant_linear import Sparse24QuantLinear

GELU_MINIMUM = -0.1701  # just below the smallest value of any GELU: -0.16997 exact, -0.17004 tanh, -0.1636 quick
# Of range_fold below 8 bits: with 4-bit inputs of fc1 the logit error is 7 % (DeiT-Ti), 4 % (ViT-Ti) below that of 0.5.
LOW_BIT_FOLD = 0.75


@dataclass(frozen=True)
class Scheme:
    """The number formats of a model, and how their scales are found.

    w_bits, x_bits   of the codes of weights and of their inputs
    head_bits        of the codes of q, k and v
    layers           (glob, w_bits, x_bits): other numbers for Linears by their dotted name; the first that matches
    observed         what calibration saw; None: every scale is found per token at run time
    observer         "minmax", "percentile" or "mse": how a static scale follows from what was seen
    granularity      of norm and GELU outputs: "token", found at run time, or "tensor", static
    softmax          format of attention probabilities where v has a static scale; None: bytes, of an exponential, as
                     where v has one per token
    bias_correction  keep the mean output of every static Linear where the calibration data had it
    sparse24         pack weights of 8 bits of which two of every four are zero for sparse units
    """

    w_bits: int = 8
    x_bits: int = 8
    head_bits: int = 8
    layers: tuple[tuple[str, int, int], ...] = ()
    observed: Observed | None = None
    observer: str = "minmax"
    granularity: str = "token"
    bias_correction: bool = True
    softmax: SoftmaxFormat | None = DEFAULT_SOFTMAX
    sparse24: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("observer", ("minmax", "percentile", "mse")), ("granularity", ("token", "tensor"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"Scheme: {name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
        for what, w_bits, x_bits in (("", self.w_bits, self.x_bits), *self.layers):
            where = f"Scheme of {what}" if what else "Scheme"
            packed.check_bits(f"{where}: weights", w_bits)
            if not 3 <= x_bits <= 8:
                raise ValueError(f"{where}: activations: bits={x_bits} is outside 3..8")
        if not 3 <= self.head_bits <= 8:
            raise ValueError(f"Scheme: head_bits={self.head_bits} is outside 3..8")

    def bits(self, linear: nn.Linear) -> dict[str, int]:
        """w_bits and x_bits of a Linear."""
        name = self.observed.name(linear) if _is_watched(linear, self.observed) else ""
        for glob, w_bits, x_bits in self.layers:
            if fnmatchcase(name, glob):
                return {"w_bits": w_bits, "x_bits": x_bits}
        return {"w_bits": self.w_bits, "x_bits": self.x_bits}

    def with_observed(self, observed: Observed | None) -> Scheme:
        return replace(self, observed=observed)

    @property
    def symmetric(self) -> partial:
        return partial(calibrate.symmetric_scale, method=self.observer)


def quant_linear(linear: nn.Linear, scheme: Scheme, x_minimum: float | None = None) -> QuantLinear:
    """A scale per token: a layer that reads floats has to pass over them anyway, and this is the more accurate one."""
    return _packed(_dynamic((linear,), scheme, x_minimum))


def quant_mlp(parts: MlpParts, scheme: Scheme) -> QuantMlp:
    fc2 = _packed(_fc2(parts.fc2, scheme))
    return QuantMlp(quant_linear(parts.fc1, scheme), fc2, parts.activation)


def quant_attention(parts: AttentionParts, scheme: Scheme) -> QuantAttention:
    qkv, proj, head_scale = _dynamic(parts.qkv, scheme), _dynamic((parts.proj,), scheme), _head_scale(parts, scheme)
    softmax = None if head_scale is None else scheme.softmax
    return _attention(parts, qkv, proj, head_scale, scheme.head_bits, softmax)


def quant_block(parts: BlockParts, scheme: Scheme) -> QuantBlock:
    return pack_block(plan_block(parts, scheme), parts)


def plan_block(parts: BlockParts, scheme: Scheme) -> BlockPlan:
    """All folds made and all formats chosen; the weights are floats still."""
    attention, mlp = parts.attention, parts.mlp
    norm1, qkv = _norm_and_linear(parts.norm1, attention.qkv, scheme)
    norm2, fc1 = _norm_and_linear(parts.norm2, (mlp.fc1,), scheme)
    for s in (parts.layer_scale1, parts.layer_scale2):
        check_finite("layer_scale", s)
    layer_scales = [None if s is None else s.detach().float().clone() for s in (parts.layer_scale1, parts.layer_scale2)]
    head_scale = _head_scale(attention, scheme)
    return BlockPlan(
        norm1=norm1,
        qkv=qkv,
        num_heads=attention.num_heads,
        softmax_scale=attention.scale,
        head_bits=scheme.head_bits,
        head_scale=head_scale,
        proj=_dynamic((attention.proj,), scheme),
        layer_scale1=layer_scales[0],
        norm2=norm2,
        fc1=fc1,
        activation=mlp.activation,
        fc2=_fc2(mlp.fc2, scheme),
        layer_scale2=layer_scales[1],
        softmax=None if head_scale is None else scheme.softmax,
    )


def output_errors(plan: BlockPlan) -> dict[str, float | None]:
    """Of every matmul of the packed block, by name: |y_hat - y| / |y| on the input rows that calibration kept."""
    linears = {"attention.qkv": plan.qkv, "attention.proj": plan.proj, "mlp.fc1": plan.fc1, "mlp.fc2": plan.fc2}
    return {name: calibrate.output_error(linear) for name, linear in linears.items()}


def pack_block(plan: BlockPlan, parts: BlockParts) -> QuantBlock:
    """The module that computes what the plan says; parts has the norms of q and k, which no plan changes."""
    norm1, norm2 = (
        _norm(norm, weight, bias)
        for norm, (weight, bias, _) in ((parts.norm1, plan.norm1), (parts.norm2, plan.norm2))
    )
    mlp = QuantMlp(_packed(plan.fc1), _packed(plan.fc2), plan.activation)
    attention = _attention(parts.attention, plan.qkv, plan.proj, plan.head_scale, plan.head_bits, plan.softmax)
    return QuantBlock(norm1, attention, norm2, mlp, plan.layer_scale1, plan.layer_scale2)


def _plan(linears: tuple[nn.Linear, ...], scheme: Scheme, **fields) -> LinearPlan:
    """Of Linears that read the same input, as one; fields: of LinearPlan, weight and bias among them after a fold."""
    if "weight" not in fields:
        fields["weight"], fields["bias"] = _fused(linears)
    seen = None if scheme.observed is None or linears[0] not in scheme.observed else scheme.observed.input(linears[0])
    return LinearPlan(**({"seen": seen, "sparse24": scheme.sparse24} | scheme.bits(linears[0]) | fields))


def _packed(plan: LinearPlan) -> QuantLinear:
    new = QuantLinear.from_plan(plan)
    if not plan.sparse24 or new.w_bits != 8:
        return new
    codes = new.codes()
    pruned = bool(codes.any()) and sparse24.is_sparse(codes)  # nobody pruned a layer that is zeros from its start
    return Sparse24QuantLinear.from_quant(new) if pruned else new


def _dynamic(linears: tuple[nn.Linear, ...], scheme: Scheme, x_minimum: float | None = None) -> LinearPlan:
    return _plan(linears, scheme, x_minimum=x_minimum)


def _static(plan: LinearPlan, mean: Tensor, scheme: Scheme) -> LinearPlan:
    """With the bias corrected; mean (K,) is the input's over the calibration data."""
    if not scheme.bias_correction:
        return plan
    change = calibrate.bias_correction(plan.weight, plan.weight_hat(), mean)
    return replace(plan, bias=change if plan.bias is None else plan.bias + change)


def _norm_and_linear(
    norm: nn.LayerNorm, linears: tuple[nn.Linear, ...], scheme: Scheme
) -> tuple[tuple[Tensor, Tensor, float], LinearPlan]:
    for name, t in (("norm weight", norm.weight), ("norm bias", norm.bias)):
        check_finite(name, t)
    if scheme.observed is None:
        return (norm.weight.detach().float(), norm.bias.detach().float(), norm.eps), _dynamic(linears, scheme)
    y = scheme.observed.input(linears[0])
    strength = LOW_BIT_FOLD if scheme.bits(linears[0])["x_bits"] < 8 else 0.5
    fold = calibrate.range_fold(y, strength)
    folded = fold.activation(y)
    weight, bias = calibrate.fold_linear(*_fused(linears), fold)
    plan = _plan(linears, scheme, weight=weight, bias=bias, seen=folded)
    if scheme.granularity == "tensor":
        scale = scheme.symmetric(folded, bits=plan.x_bits)
        plan = _static(replace(plan, x_scale=scale), folded.mean, scheme)
    return (*calibrate.fold_norm(norm.weight, norm.bias, fold), norm.eps), plan


def _head_scale(parts: AttentionParts, scheme: Scheme) -> Tensor | None:
    """Static scales of q, k and v (3, H, 1), where calibration saw their codes' values."""
    # Codes of q and k would have to be written before their norm; with one, scales are found per token and head.
    floats = (parts.q_norm, parts.k_norm, parts.tables, parts.gain, parts.rotary or None)
    if any(part is not None for part in floats) or not _is_watched(parts.qkv[0], scheme.observed):
        return None
    scale = partial(scheme.symmetric, groups=parts.num_heads, bits=scheme.head_bits)
    return torch.stack([scale(x) for x in _split(parts.qkv, scheme.observed)])[..., None]


def _attention(
    parts: AttentionParts,
    qkv: LinearPlan,
    proj: LinearPlan,
    head_scale: Tensor | None,
    head_bits: int,
    softmax: SoftmaxFormat | None,
) -> QuantAttention:
    linears = _packed(qkv), _packed(proj)
    new = QuantAttention(*linears, parts.num_heads, parts.scale, head_scale is not None, head_bits, softmax)
    if head_scale is not None:
        new.set_head_scale(head_scale)
    for name in ("q_norm", "k_norm"):
        norm = getattr(parts, name)
        setattr(new, name, None if norm is None else _norm(norm, norm.weight, getattr(norm, "bias", None)))
    new.position = _position(parts)
    return new


def _position(parts: AttentionParts) -> Position | None:
    if not parts.has_position:
        return None
    tensors = (parts.bias, *(parts.tables or (None, None)), parts.gain)
    for t in tensors:
        check_finite("relative position", t)
    bias, table_h, table_w, gain = (None if t is None else t.detach().float().clone() for t in tensors)
    return Position(bias, None if parts.tables is None else (table_h, table_w), gain, parts.rotary)


def _is_watched(linear: nn.Linear, observed: Observed | None) -> bool:
    """Whether calibration knew of it: adapters make Linears of bare parameters, whose inputs nothing sees."""
    if observed is None:
        return False
    try:
        observed.name(linear)
    except Unsupported:
        return False
    return True


def _fc2(fc2: nn.Linear, scheme: Scheme) -> LinearPlan:
    if scheme.observed is None or scheme.granularity == "token":
        return _dynamic((fc2,), scheme, x_minimum=GELU_MINIMUM)
    x = scheme.observed.input(fc2)
    fold = calibrate.outlier_fold(x)
    plan = _dynamic((fc2,), scheme)
    scale, zero_point = calibrate.affine_scale(fold.activation(x), scheme.observer, bits=plan.x_bits)
    return _static(replace(plan, x_scale=fold.ratio * scale, x_zero_point=zero_point), x.mean, scheme)


def _fused(linears: tuple[nn.Linear, ...]) -> tuple[Tensor, Tensor | None]:
    """One weight and bias, float32, of several Linears that read the same input."""
    for linear in linears:
        check_weight(linear)
    weight = torch.cat([linear.weight.detach() for linear in linears]).float()
    if all(linear.bias is None for linear in linears):
        return weight, None
    zeros = (torch.zeros_like(linear.weight[:, 0]) if linear.bias is None else linear.bias for linear in linears)
    return weight, torch.cat([bias.detach() for bias in zeros]).float()


def _split(qkv: tuple[nn.Linear, ...], observed: Observed) -> tuple[Activation, ...]:
    """What was seen of q, k and v, from one fused Linear or from three."""
    if len(qkv) == 3:
        return tuple(observed.output(linear) for linear in qkv)
    y = observed.output(qkv[0])
    fields = (t.chunk(3, dim=-1) for t in (y.min, y.max, y.mean, y.sample))
    return tuple(Activation(*part, y.count) for part in zip(*fields, strict=True))


def _norm(norm: nn.LayerNorm | nn.RMSNorm, weight: Tensor, bias: Tensor | None) -> nn.LayerNorm | nn.RMSNorm:
    """A norm like `norm` with this weight and bias, float32, frozen."""
    kind = nn.RMSNorm if isinstance(norm, nn.RMSNorm) else nn.LayerNorm
    new = kind(norm.normalized_shape, norm.eps, device=weight.device).requires_grad_(False)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            check_finite(f"norm {name}", t)
            getattr(new, name).copy_(t.detach())
    return new
