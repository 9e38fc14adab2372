"""RepQ-ViT (Li et al., arXiv:2212.08254) and I&S-ViT (Zhong et al., arXiv:2311.10126), the calibrated model in memory.

Neither saves its quantizers completely, so both are read as live modules, after scale reparameterization. Weights are
asymmetric per output feature; softmax outputs are log-sqrt2 codes (RepQ-ViT) or those of SULQ (I&S-ViT).

The zero points of qkv and fc1 are means and no integers: the published simulation has 2^b + 1 levels. They are rounded
here, and the norm and the bias shifted by the difference (calibrate.refold): the codes are those of the scales per
channel, on 2^b levels, but values differ from the simulation by less than one step. A note tells where.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from pyvit_accel.calibrate.fold import Fold, fold_linear, fold_norm
from pyvit_accel.calibrate.repq import refold
from pyvit_accel.formats import log
from pyvit_accel.formats.codebook import Codebook

from . import layers
from .records import ImportedLinear, ImportedMatmul, ImportedModel, Uniform
from .source import Source

FED_BY = {"attn.qkv": "norm1", "mlp.fc1": "norm2"}  # the linears of a block whose input a norm makes


def repq_vit(model: nn.Module) -> ImportedModel:
    """Raises Unsupported, naming the attribute, for what is missing, not calibrated or not folded."""
    return _live("repq_vit", model, _log_sqrt2)


def is_vit(model: nn.Module) -> ImportedModel:
    """Raises Unsupported, naming the attribute, for what is missing, not calibrated or not folded.

    maxv and minv of the softmax quantizers are no parameters: a model loaded from its state_dict lacks them.
    """
    return _live("is_vit", model, _sulq)


def _live(method: str, model: nn.Module, softmax: Callable[[Source, str], Codebook]) -> ImportedModel:
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise TypeError(f"{method}: expected the calibrated model, got {kind}; a state_dict lacks its quantizers")
    source = Source(method, model)
    names = source.layers("weight_quantizer")
    norms, linears, notes = layers.norms(source, names), {}, []
    for name in names:
        norm = next((name.removesuffix(fed) + norm for fed, norm in FED_BY.items() if name.endswith(fed)), None)
        linears[name], fold = _linear(source, name, foldable=norm is not None)
        if fold is not None:
            norms[norm] = fold_norm(*norms[norm], fold)
            notes.append(f"{name}: its zero point was rounded, and {norm} and the bias moved along")
    matmuls = {name: _matmul(source, name, softmax) for name in layers.matmuls(linears)}
    notes += layers.storage_notes(linears.values()) + layers.not_quantized(linears.values())
    return ImportedModel(linears, matmuls, norms, tuple(notes))


def _linear(source: Source, name: str, foldable: bool) -> tuple[ImportedLinear, Fold | None]:
    """foldable: a norm makes the input, so its zero point need not be an integer; the fold that makes it one."""
    N, K = source.tensor(f"{name}.weight").flatten(1).shape
    quantizer = f"{name}.weight_quantizer"
    _check_calibrated(source, quantizer)
    bits = source.bits(f"{quantizer}.n_bits")
    scale, zero_point = source.scale(f"{quantizer}.delta", N), source.integers(f"{quantizer}.zero_point", N)
    x, fold = None, None
    # A convolution of I&S-ViT reads pixels and quantizes no input; any other layer has to.
    if source.has(f"{name}.input_quantizer") or source.tensor(f"{name}.weight").dim() == 2:
        x, fold = _input(source, f"{name}.input_quantizer", K, foldable)
    linear = layers.linear(source, name, scale, zero_point, bits, x)
    if fold is not None:
        linear = replace(linear, bias=fold_linear(linear.weight, linear.bias, fold)[1])
    return linear, fold


def _input(source: Source, quantizer: str, channels: int, foldable: bool) -> tuple[Uniform, Fold | None]:
    _check_calibrated(source, quantizer)
    values = source.tensor(f"{quantizer}.delta").numel()
    if values > 1:
        reason = f"has {values} values: the scales per channel are not folded yet (scale reparameterization)"
        raise source.refused(f"{quantizer}.delta", reason)
    bits, scale = source.bits(f"{quantizer}.n_bits"), source.scale(f"{quantizer}.delta")
    zero_point, fold = source.number(f"{quantizer}.zero_point"), None
    if foldable and zero_point != round(zero_point):
        fold, _ = refold(float(scale), zero_point, channels)
        return layers.uniform(scale, torch.tensor([round(zero_point)]), bits), fold
    return layers.uniform(scale, source.integers(f"{quantizer}.zero_point"), bits), None


def _matmul(source: Source, name: str, softmax: Callable[[Source, str], Codebook]) -> ImportedMatmul:
    a = f"{name}.quantizer_A"
    _check_calibrated(source, a)
    first = softmax(source, a) if name.endswith("matmul2") else _operand(source, a)
    return ImportedMatmul(name, first, _operand(source, f"{name}.quantizer_B"))


def _operand(source: Source, quantizer: str) -> Uniform:
    _check_calibrated(source, quantizer)
    heads = source.tensor(f"{quantizer}.delta").numel()
    scale, zero_point = source.scale(f"{quantizer}.delta", heads), source.integers(f"{quantizer}.zero_point", heads)
    return layers.uniform(scale, zero_point, source.bits(f"{quantizer}.n_bits"))


def _log_sqrt2(source: Source, quantizer: str) -> Codebook:
    return source.build(
        quantizer, log.log_sqrt2, source.bits(f"{quantizer}.n_bits"), float(source.scale(f"{quantizer}.delta"))
    )


def _sulq(source: Source, quantizer: str) -> Codebook:
    eta, minv, maxv = (source.number(f"{quantizer}.{part}") for part in ("delta", "minv", "maxv"))
    return source.build(quantizer, log.sulq, source.bits(f"{quantizer}.n_bits"), eta, minv, maxv)


def _check_calibrated(source: Source, quantizer: str) -> None:
    """A fold makes the quantizer of its weight forget what it found, until the next batch."""
    if not source.number(f"{quantizer}.inited"):
        raise source.refused(f"{quantizer}.inited", "is False: run a calibration batch through the folded model")
