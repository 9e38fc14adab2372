"""A model that a paper's own code calibrated, on low-bit kernels: its codes, its scales, its folded norms.

    record = importers.adalog(state_dict, w_bits=4, a_bits=4)
    fast, report = accelerate(float_model, imported(record))        float_model: the same names, any weights

Every nn.Linear that the record quantizes multiplies the published integer codes: uniform inputs in lowbit_linear,
inputs with the codes of a codebook (GELU outputs of AdaLog and PTQ4ViT) in codebook_linear, inputs that are not
quantized in weight_only_linear. Norms take the record's weights. The two matmuls of attention stay float: no kernel here runs the
published codes of softmax outputs, and none is put in their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from pyvit_accel.calibrate.importers import ImportedLinear, ImportedModel, Uniform
from pyvit_accel.convert import Recipe, Replacement, Rule
from pyvit_accel.errors import Unsupported
from pyvit_accel.formats import packed
from pyvit_accel.formats.twin import uniform
from pyvit_accel.modules import CodebookLinear, QuantLinear, WeightOnlyLinear
from pyvit_accel.recipes import LINEAR, plain

NORM = frozenset({"torch.nn.modules.normalization.LayerNorm"})
CONV = frozenset({"torch.nn.modules.conv.Conv2d"})


def imported(record: ImportedModel) -> Recipe:
    """The recipe that puts the record's linears and norms in place of the float model's, by name.

    accelerate raises Unsupported for a model that lacks one of them or has it in another shape. Convolutions keep their
    float weights and are listed.
    """
    rules = [
        Rule(name, LINEAR, partial(plain, lambda linear, _, found=linear: linear_module(found, linear)), exact=True)
        for name, linear in record.linears.items()
    ]
    rules += [Rule(name, CONV, _keep("a convolution; its float weights are the model's")) for name in record.linears]
    rules += [Rule(name, NORM, _keep("its weights are those of the import")) for name in record.norms]
    return Recipe("imported", tuple(rules), prepare=partial(_with_norms, record))


def linear_module(found: ImportedLinear, linear: nn.Linear) -> nn.Module:
    """The module with the codes of `found`, on the device of the Linear that it replaces."""
    if isinstance(found.x, Uniform):
        return QuantLinear.from_plan(found.plan()).to(linear.weight.device)
    weight = found.codes.double() * found.w_scale.double()[:, None]
    bias = found.bias
    if found.x is None:
        new = WeightOnlyLinear(*reversed(weight.shape), bias=bias is not None, w_bits=found.w_bits)
        new.w_packed, new.w_scale = packed.pack(found.codes, found.w_bits), found.w_scale
        new.bias = bias
        return new.to(linear.weight.device)
    if found.x.offset.item():  # its share of the product is in the bias of the record, and from_linear adds it
        bias = (bias.double() - weight.sum(1) * found.x.offset.double()).float()
    exact = nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta")
    exact.weight = nn.Parameter(weight.float(), requires_grad=False)
    exact.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    w_format = uniform(found.w_bits, 1.0, zero_point=2 ** (found.w_bits - 1))
    new = CodebookLinear.from_linear(exact, w_format, found.x, found.w_scale, found.x.scale)
    return new.to(linear.weight.device)


def _keep(reason: str) -> Any:
    def convert(module: nn.Module, observed: Any) -> Replacement:
        raise Unsupported(reason)

    return convert


@contextmanager
def _with_norms(record: ImportedModel, model: nn.Module) -> Iterator[None]:
    """The model's norms take the record's weights; they are put back when what follows raises."""
    modules = dict(model.named_modules())
    for name, linear in record.linears.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or weight.flatten(1).shape != linear.codes.shape:
            got = "is not in the model" if weight is None else f"is {tuple(weight.shape)}"
            raise Unsupported(f"imported: {name} {got}; the import has {tuple(linear.codes.shape)}")
    before = {}
    try:
        for name, tensors in record.norms.items():
            norm = modules.get(name)
            if norm is None or norm.weight is None or norm.weight.shape != tensors[0].shape:
                raise Unsupported(f"imported: the model has no norm {name} of {tuple(tensors[0].shape)}")
            before[norm] = norm.weight, norm.bias
            norm.weight, norm.bias = (
                nn.Parameter(t.to(old), requires_grad=old.requires_grad)
                for t, old in zip(tensors, before[norm], strict=True)
            )
        yield
    except BaseException:
        for norm, (weight, bias) in before.items():
            norm.weight, norm.bias = weight, bias
        raise
