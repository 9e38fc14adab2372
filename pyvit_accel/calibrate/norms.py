"""Norms that are affine at inference vanish into the linears around them.

    norm(x) = scale * x + shift                            per channel, scale and shift (C,)

RepBN, the norm that PRepBN (SLAB, Guo et al., arXiv:2405.11582) becomes: BN(x) + alpha x
    scale = gamma / sqrt(var + eps) + alpha                shift = beta - gamma mean / sqrt(var + eps)
Unified Normalization (Yang et al., arXiv:2208.01313), no mean subtraction:
    scale = weight / sqrt(running_var + eps)               shift = bias

The linear after the norm   W' = W diag(scale)             bias' = bias + W shift             fold_after
the linear before it        W' = diag(scale) W             bias' = scale * bias + shift       fold_before

All exact; sums are taken in float64 and rounded once to the dtype of the weights. After a fold the linear reads the raw
stream: no norm is left for a fold of activation ranges to go into.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyvit_accel.errors import Unsupported


@dataclass(frozen=True)
class NormAffine:
    """y = scale * x + shift, both (C,) float64."""

    scale: Tensor
    shift: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (x.double() * self.scale + self.shift).to(x.dtype)


def norm_affine(norm: nn.Module) -> NormAffine:
    """What a norm of SLAB or of Unified Normalization computes in eval mode, read by its published attribute names.

    RepBN: alpha, bn.{weight, bias, running_mean, running_var, eps}. LinearNorm: norm2 is its RepBN. BatchNorm1d too.
    UN: weight, bias, running_var, eps, and no running_mean. Raises Unsupported for a norm that is not affine at
    inference, naming what is missing.
    """
    if isinstance(getattr(norm, "norm2", None), nn.Module):
        norm = norm.norm2  # LinearNorm trains LayerNorm and RepBN side by side and keeps the second
    if hasattr(norm, "alpha") and hasattr(norm, "bn"):
        plain = _batch_norm(norm.bn, f"{type(norm).__name__}.bn")
        return NormAffine(plain.scale + norm.alpha.detach().double(), plain.shift)
    if isinstance(norm, nn.modules.batchnorm._BatchNorm) or hasattr(norm, "running_mean"):
        return _batch_norm(norm, type(norm).__name__)
    weight, bias, var = _tensors(norm, type(norm).__name__, "weight", "bias", "running_var")
    return NormAffine(weight / torch.sqrt(var + norm.eps), bias)


def fold_after(norm: NormAffine, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(W', bias') of the linear (N, C) that read the norm's output and now reads its input. The head is one too: an
    average over tokens lets the norm pass."""
    _check("fold_after", "takes", weight.shape[1], norm)
    w = weight.detach().double()
    return _rounded(weight, w * norm.scale, w @ norm.shift + (0 if bias is None else bias.detach().double()))


def fold_before(norm: NormAffine, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(W', bias') of the linear (C, K) that made the norm's input and now makes its output; a convolution's weight
    (C, ...) alike. The released merge of SLAB's patch embedding drops alpha * bias; this does not."""
    _check("fold_before", "makes", weight.shape[0], norm)
    scaled = weight.detach().double() * norm.scale.view(-1, *[1] * (weight.dim() - 1))
    return _rounded(weight, scaled, norm.shift + (0 if bias is None else norm.scale * bias.detach().double()))


def fold_branch(norm: NormAffine, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(W', bias') of a linear (C, K) whose output is added to the stream in front of the norm: proj and fc2.

    To push a norm backwards through a residual stream, y = scale * x + shift takes the place of the stream x:
    fold_before on whatever starts it, fold_branch on what is added to it, undo_after on what reads it.
    """
    scaled, moved = fold_before(NormAffine(norm.scale, torch.zeros_like(norm.shift)), weight, bias)
    return scaled, None if bias is None else moved


def undo_after(norm: NormAffine, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(W', bias') of a linear (N, C) that read x and now reads scale * x + shift: qkv and fc1 of such a stream.

    Raises Unsupported when a scale is zero: that channel is lost.
    """
    _check("undo_after", "takes", weight.shape[1], norm)
    if bool((norm.scale == 0).any()):
        at = int((norm.scale == 0).nonzero()[0])
        raise Unsupported(f"undo_after: the norm's scale[{at}] is 0, nothing brings that channel back; use fold_after")
    return fold_after(NormAffine(1 / norm.scale, -norm.shift / norm.scale), weight, bias)


def _batch_norm(bn: nn.Module, name: str) -> NormAffine:
    if getattr(bn, "running_var", None) is None:
        raise Unsupported(f"{name} has no running_var: it normalises by the batch, also at inference")
    mean, var = _tensors(bn, name, "running_mean", "running_var")
    one = torch.ones_like(mean)
    weight, bias = (one, 0 * one) if getattr(bn, "weight", None) is None else _tensors(bn, name, "weight", "bias")
    scale = weight / torch.sqrt(var + bn.eps)
    return NormAffine(scale, bias - scale * mean)


def _tensors(norm: nn.Module, name: str, *attributes: str) -> list[Tensor]:
    missing = [a for a in attributes if not isinstance(getattr(norm, a, None), Tensor)]
    if missing:
        what = "it is not affine at inference" if isinstance(norm, nn.LayerNorm) else "expected RepBN, LinearNorm or UN"
        raise Unsupported(f"{name} has no {', '.join(missing)}; {what}")
    return [getattr(norm, a).detach().double().flatten() for a in attributes]


def _rounded(like: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return weight.to(like.dtype), bias.to(like.dtype)


def _check(function: str, what: str, channels: int, norm: NormAffine) -> None:
    if channels != norm.scale.shape[0]:
        raise ValueError(f"{function}: the linear {what} {channels} channels but the norm has {norm.scale.shape[0]}")
