"""PTQ4ViT (Yuan et al., arXiv:2111.12293), live or as buffers, and TinySAM (Shu et al., arXiv:2312.13789) after it.

Weights and uniform activations are symmetric, one scale per run of output features, q, k and v per head. GELU and
softmax outputs are twin uniform codes in the form that was released: where the two ranges of the softmax meet, values
count twice, and a model calibrated with that formula needs it. Weights and intervals are read, never the uint8
activations that the method's own dump writes, in which two different values share a byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from pyvit_accel.errors import Unsupported
from pyvit_accel.formats import twin
from pyvit_accel.formats.codebook import Codebook

from . import layers
from .records import ImportedLinear, ImportedMatmul, ImportedModel, Uniform
from .source import Source


def ptq4vit(
    model: nn.Module | Mapping[str, Tensor], w_bits: int | None = None, a_bits: int | None = None
) -> ImportedModel:
    """The calibrated model, or a state_dict that holds its intervals.

    w_bits, a_bits: for a state_dict, which does not keep them. Raises Unsupported, naming what is missing.
    """
    source = Source("ptq4vit", model)
    names = source.layers("w_interval")
    imported = _read(source, names, layers.matmuls(names), w_bits, a_bits)
    return replace(imported, norms=layers.norms(source, imported.linears))


def tinysam(model: nn.Module | Mapping[str, Tensor], w_bits: int = 8, a_bits: int = 8) -> ImportedModel:
    """The released module, or its state_dict, which is complete once the module was unpickled from a trusted file.

    Linears and matmuls by name; its blocks are not those of a plain ViT. A note lists the convolutions: not imported.
    """
    source = Source("tinysam", model)
    matmuls = dict.fromkeys(source.owners("A_interval") + source.owners("B_interval"))
    return _read(source, source.owners("w_interval"), matmuls, w_bits, a_bits)


def _read(
    source: Source, names: Iterable[str], matmuls: Iterable[str], w_bits: int | None, a_bits: int | None
) -> ImportedModel:
    linears, skipped = {}, []
    for name in names:
        if source.has(f"{name}.a_bias"):  # TinySAM's convolutions, the only layers with an offset
            skipped.append(name)
        else:
            linears[name] = _linear(source, name, w_bits, a_bits)
    operands = {name: _matmul(source, name, a_bits) for name in matmuls}
    if not linears:
        raise Unsupported(f"{source.method}: no layer has a w_interval; {source.method} did not calibrate this model")
    notes = layers.not_quantized(linears.values())
    notes += [f"{name}: a convolution with an offset, not imported" for name in skipped]
    return ImportedModel(linears, operands, {}, tuple(notes))


def _linear(source: Source, name: str, w_bits: int | None, a_bits: int | None) -> ImportedLinear:
    weight = source.tensor(f"{name}.weight")
    interval, N, bits = source.tensor(f"{name}.w_interval"), weight.shape[0], _bits(source, f"{name}.w_bit", w_bits)
    if weight.dim() == 2 and interval.dim() == 4 and interval.shape[2] != 1:
        raise source.refused(f"{name}.w_interval", f"has n_H={interval.shape[2]} scales along the inputs, expected 1")
    if N % interval.numel():
        raise source.refused(f"{name}.w_interval", f"has {interval.numel()} values for {N} output features")
    scale = source.scale(f"{name}.w_interval", interval.numel()).repeat_interleave(N // interval.numel())
    x = None if weight.dim() == 4 else _input(source, name, a_bits)
    return layers.linear(source, name, scale, torch.full((N,), 2.0 ** (bits - 1)), bits, x)


def _input(source: Source, name: str, a_bits: int | None) -> Uniform | Codebook:
    key, bits = f"{name}.a_interval", _bits(source, f"{name}.a_bit", a_bits)
    both = source.get(key)
    if isinstance(both, list | tuple):  # the variant that keeps its two intervals in one list
        positive, negative = (float(t) for t in both)
    elif source.has(f"{name}.a_neg_interval"):
        positive, negative = float(source.scale(key)), float(source.scale(f"{name}.a_neg_interval"))
    elif name.endswith("fc2") and source.method == "ptq4vit" and isinstance(source.origin, Mapping):
        raise source.refused(f"{name}.a_neg_interval", "is missing: whether its input has twin codes cannot be told")
    else:
        return layers.symmetric(source.scale(key), bits)
    return source.build(key, twin.gelu, bits, positive, negative)


def _matmul(source: Source, name: str, a_bits: int | None) -> ImportedMatmul:
    a = _softmax(source, name, a_bits) if source.has(f"{name}.split") else _operand(source, name, "A", a_bits)
    return ImportedMatmul(name, a, _operand(source, name, "B", a_bits))


def _softmax(source: Source, name: str, a_bits: int | None) -> Codebook:
    split, bits = float(source.scale(f"{name}.split")), _bits(source, f"{name}.A_bit", a_bits)
    interval, expected = float(source.scale(f"{name}.A_interval")), split / (2 ** (bits - 1) - 1)
    if abs(interval - expected) > 1e-5 * expected:
        reason = f"is {interval}, but split={split} in {bits} bits makes it {expected}"
        raise source.refused(f"{name}.A_interval", reason)
    return source.build(f"{name}.split", twin.softmax, bits, split)


def _operand(source: Source, name: str, which: str, a_bits: int | None) -> Uniform:
    key = f"{name}.{which}_interval"
    interval = source.tensor(key)
    groups = interval.shape[1] if interval.dim() == 7 else 1
    if interval.numel() != groups:
        raise source.refused(key, f"has shape {tuple(interval.shape)}: scales within a head; expected one per head")
    return layers.symmetric(source.scale(key, groups), _bits(source, f"{name}.{which}_bit", a_bits))


def _bits(source: Source, key: str, given: int | None) -> int:
    if source.has(key):
        return source.bits(key)
    if given is None:
        raise source.refused(key, "is missing, as in any state_dict; give w_bits and a_bits")
    return given
