"""AdaLog (Wu et al., arXiv:2407.12951): its published state_dicts, which are complete but for the numbers of bits.

The bits of softmax and GELU outputs are those of their tables; of weights and uniform activations they are in the name
of the file, deit_tiny_w4_a4_s4_calibsize_32.pth. Weights are asymmetric per output feature, q, k and v per head; zero
points are rounded when used. Norms and, with `bias_reparamed`, the shift of the GELU are folded already.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pyvit_accel.formats import log
from pyvit_accel.formats.codebook import Codebook

from . import layers
from .records import ImportedLinear, ImportedMatmul, ImportedModel, Uniform
from .source import Source


def bits_of_file(name: str) -> tuple[int, int, int]:
    """Bits of weights, activations and softmax outputs from the name of a checkpoint."""
    found = re.search(r"_w(\d)_a(\d)_s(\d)(?=_|\.|$)", name)
    if found is None:
        raise ValueError(f"adalog: {name!r} does not tell the bits as <model>_w4_a4_s4_...; give w_bits and a_bits")
    return tuple(int(bits) for bits in found.groups())


def adalog(
    state_dict: Mapping[str, Tensor], w_bits: int, a_bits: int, head_a_bits: int | None = None
) -> ImportedModel:
    """w_bits, a_bits: of weights and uniform activations, see bits_of_file; head_a_bits: of the head's input, a_bits.

    Raises Unsupported, naming the tensor, for what is missing or contradicts the bits.
    """
    source = Source("adalog", state_dict)
    linears, notes = {}, []
    for name in source.layers("w_quantizer"):
        N = source.tensor(f"{name}.weight").shape[0]
        scale = source.scale(f"{name}.w_quantizer.scale", N)
        zero_point = source.vector(f"{name}.w_quantizer.zero_point", N).round()
        x = None if source.tensor(f"{name}.weight").dim() == 4 else _input(source, name, a_bits, head_a_bits or a_bits)
        linears[name] = layers.linear(source, name, scale, zero_point, w_bits, x)
        if isinstance(x, Codebook) and not source.number(f"{name}.a_quantizer.bias_reparamed"):
            linears[name] = _fold_shift(linears[name], source.number(f"{name}.a_quantizer.shift"))
            notes.append(f"{name}: bias_reparamed is False; the shift of its input was folded into the bias here")
    matmuls = {name: _matmul(source, name, a_bits) for name in layers.matmuls(linears)}
    notes += layers.storage_notes(linears.values()) + layers.not_quantized(linears.values())
    return ImportedModel(linears, matmuls, layers.norms(source, linears), tuple(notes))


def _input(source: Source, name: str, a_bits: int, head_a_bits: int) -> Uniform | Codebook:
    quantizer = f"{name}.a_quantizer"
    if _is_log(source, quantizer):
        codebook = _log(source, quantizer, source.number(f"{quantizer}.shift"))
        if codebook.bits != a_bits:
            raise source.refused(f"{quantizer}.table1", f"has {2**codebook.bits} entries, but a_bits={a_bits}")
        return codebook
    return _uniform(source, quantizer, head_a_bits if "head" in name else a_bits)


def _matmul(source: Source, name: str, bits: int) -> ImportedMatmul:
    a, b = f"{name}.A_quantizer", f"{name}.B_quantizer"
    return ImportedMatmul(
        name, _log(source, a) if _is_log(source, a) else _uniform(source, a, bits), _uniform(source, b, bits)
    )


def _is_log(source: Source, quantizer: str) -> bool:
    if any(source.has(f"{quantizer}.{part}") for part in ("q", "table1", "table2")):
        return True
    if source.has(f"{quantizer}.zero_point"):
        return False
    raise source.refused(f"{quantizer}.zero_point", "is missing, and so are q, table1 and table2")


def _uniform(source: Source, quantizer: str, bits: int) -> Uniform:
    length = source.tensor(f"{quantizer}.scale").numel()
    if length > 1 and quantizer.endswith("a_quantizer"):
        raise source.refused(f"{quantizer}.scale", f"has {length} values: save the model after its scales are folded")
    scale = source.scale(f"{quantizer}.scale", length)
    return layers.uniform(scale, source.vector(f"{quantizer}.zero_point", length).round(), bits)


def _log(source: Source, quantizer: str, shift: float = 0.0) -> Codebook:
    """Level c is scale * table2[c] * 2^-table1[c]; the tables have to be those of q."""
    q, scale = int(source.number(f"{quantizer}.q")), float(source.scale(f"{quantizer}.scale"))
    bits = len(source.tensor(f"{quantizer}.table1")).bit_length() - 1
    shifts, mantissas, D = source.build(quantizer, log.adalog_table, bits, q)
    for table, truth in (("table1", shifts.float()), ("table2", mantissas / D)):
        held = source.vector(f"{quantizer}.{table}", 2**bits)
        wrong = (held - truth).abs() > 1e-6
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise source.refused(
                f"{quantizer}.{table}", f"is {float(held[at])} at {at}, but q={q} makes it {float(truth[at])}"
            )
    return source.build(quantizer, log.adalog, bits, q, scale, shift)


def _fold_shift(linear: ImportedLinear, shift: float) -> ImportedLinear:
    """The input becomes x + shift, at least 0; what the linear adds for that is taken from its bias."""
    extra = linear.codes.double().sum(1) * linear.w_scale.double() * shift
    bias = torch.zeros_like(linear.w_scale) if linear.bias is None else linear.bias
    return replace(linear, bias=(bias.double() - extra).float())
