"""A model that a paper's own code calibrated, on low-bit kernels: its codes, its scales, its folded norms.

    record = importers.adalog(state_dict, w_bits=4, a_bits=4)
    fast, report = accelerate(float_model, imported(record))

float_model has the names and shapes of the record, and gives what is quantized nowhere: tokens, position embedding,
layer scales. Every nn.Linear that the record quantizes multiplies the published integer codes: uniform inputs in
lowbit_linear, inputs with the codes of a codebook (GELU outputs of AdaLog and PTQ4ViT) in codebook_linear, whose
float16 operands hold AdaLog's levels and round twin ones by 2^-11 at most, inputs that are not quantized in
weight_only_linear. Norms take the record's weights, convolutions the values of its codes, as floats. The two matmuls of
attention are a choice:

    "float"      q, k, v and the probabilities are not quantized; the report names the formats that are left out
    "published"  their published codes, in quant_attention (CodedAttention); a probability gets the code beside the
                 paper's where it lies within 0.15 % (197 tokens) of the border of the two
    "int8"       8 bits for q, k, v and the probabilities, whatever was published: the integer kernel, and whole blocks
                 fused where no input has codes of a codebook
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from pyvit_accel.adapters import ATTENTIONS, BLOCKS, Adapter, find
from pyvit_accel.calibrate.importers import ImportedBlock, ImportedLinear, ImportedModel, Uniform
from pyvit_accel.convert import Recipe, Replacement, Rule
from pyvit_accel.errors import Unsupported
from pyvit_accel.formats import packed
from pyvit_accel.formats.twin import uniform
from pyvit_accel.modules import CodebookLinear, CodedAttention, QuantAttention, QuantLinear, WeightOnlyLinear
from pyvit_accel.modules.build import pack_block
from pyvit_accel.modules.parts import AttentionParts, BlockParts
from pyvit_accel.recipes import LINEAR, plain

NORM = frozenset({"torch.nn.modules.normalization.LayerNorm"})
CONV = frozenset({"torch.nn.modules.conv.Conv2d"})
ATTENTION = ("float", "published", "int8")


def imported(record: ImportedModel, attention: str = "float") -> Recipe:
    """The recipe that puts the record's linears and norms in place of the float model's, by name.

    accelerate raises Unsupported for a model that lacks one of them or has it in another shape. Convolutions keep their
    arithmetic and are listed, as is what attention leaves out.
    """
    if attention not in ATTENTION:
        raise ValueError(f"imported: attention={attention!r} is not one of {', '.join(ATTENTION)}")
    rules = []
    for block in record.blocks():
        if attention == "int8":
            rules.append(Rule(block, frozenset(BLOCKS), _adapted("BLOCKS", partial(_block, record, block))))
        make = partial(_attention, record, block, attention)
        rules.append(Rule(f"{block}.attn", frozenset(ATTENTIONS), _adapted("ATTENTIONS", make)))
    rules += [
        Rule(name, LINEAR, partial(plain, lambda linear, _, found=linear: linear_module(found, linear)), exact=True)
        for name, linear in record.linears.items()
    ]
    rules += [Rule(name, CONV, _keep(_convolution(linear))) for name, linear in record.linears.items()]
    rules += [Rule(name, NORM, _keep("its weights are those of the import")) for name in record.norms]
    name = "imported" if attention == "float" else f"imported, attention {attention}"
    return Recipe(name, tuple(rules), prepare=partial(_with_floats, record))


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


def _adapted(table: str, make: Callable[[Any], nn.Module]) -> Callable[[nn.Module, Any], Replacement]:
    """The conversion of a block or an attention by what it is made of."""

    def convert(module: nn.Module, observed: Any) -> Replacement:
        adapter: Adapter = find({"BLOCKS": BLOCKS, "ATTENTIONS": ATTENTIONS}[table], module)
        new = plain(lambda module, _: make(adapter.parts(module)), module, observed)
        wrapped = adapter.wrap(new.module, module.get_submodule(adapter.path))
        return replace(new, module=wrapped, path=adapter.path, spec=new.spec | {"adapter": table})

    return convert


def _found_block(record: ImportedModel, name: str, parts: AttentionParts) -> ImportedBlock:
    if parts.q_norm is not None or parts.k_norm is not None:
        raise Unsupported("norms of q and k, which no importer reads")
    if parts.has_position:
        raise Unsupported("relative or rotary position inside the attention, which no importer reads")
    return record.block(name, parts.num_heads)


def _block(record: ImportedModel, name: str, parts: BlockParts) -> nn.Module:
    plan = _found_block(record, name, parts.attention).plan(replace_attention=True)
    plan = replace(
        plan, softmax_scale=parts.attention.scale, activation=parts.mlp.activation,
        layer_scale1=_float(parts.layer_scale1), layer_scale2=_float(parts.layer_scale2),
    )  # fmt: skip
    return pack_block(plan, parts)


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().float().clone()


def _attention(record: ImportedModel, name: str, choice: str, parts: AttentionParts) -> nn.Module:
    block = _found_block(record, name, parts)
    if choice == "float":
        raise Unsupported(f"its matmuls are float: {'; '.join(block.limits())}")
    linears = QuantLinear.from_plan(block.qkv.plan()), QuantLinear.from_plan(block.proj.plan())
    if choice == "int8":
        return QuantAttention(*linears, parts.num_heads, parts.scale)
    softmax = block.softmax
    if isinstance(softmax, Uniform):
        softmax = uniform(softmax.bits, softmax.scale, int(softmax.zero_point) + 2 ** (softmax.bits - 1))
    heads = [(t.scale, t.zero_point, t.bits) for t in (block.q, block.k, block.v)]
    return CodedAttention.from_formats(*linears, parts.num_heads, parts.scale, heads, softmax)


def _convolution(found: ImportedLinear) -> str:
    left_out = "" if found.x is None else f", the {found.x.bits}-bit codes of its input left out"
    return f"a convolution; its weight holds the values of the published {found.published_bits}-bit codes{left_out}"


def _keep(reason: str) -> Callable[[nn.Module, Any], Replacement]:
    def convert(module: nn.Module, observed: Any) -> Replacement:
        raise Unsupported(reason)

    return convert


@contextmanager
def _with_floats(record: ImportedModel, model: nn.Module) -> Iterator[None]:
    """Norms and convolutions take the record's weights; the model's are put back when what follows raises."""
    modules, taken = dict(model.named_modules()), dict(record.norms)
    for name, linear in record.linears.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or weight.flatten(1).shape != linear.codes.shape:
            got = "is not in the model" if weight is None else f"is {tuple(weight.shape)}"
            raise Unsupported(f"imported: {name} {got}; the import has {tuple(linear.codes.shape)}")
        if weight.dim() > 2:
            values = (linear.codes.double() * linear.w_scale.double()[:, None]).view_as(weight)
            taken[name] = values, linear.bias
    before = {}
    try:
        for name, tensors in taken.items():
            module = modules.get(name)
            if module is None or module.weight is None or module.weight.shape != tensors[0].shape:
                raise Unsupported(f"imported: the model has no norm {name} of {tuple(tensors[0].shape)}")
            before[module] = module.weight, module.bias
            like = module.weight
            module.weight, module.bias = (
                None if t is None else nn.Parameter(t.to(like), requires_grad=like.requires_grad) for t in tensors
            )
        yield
    except BaseException:
        for module, (weight, bias) in before.items():
            module.weight, module.bias = weight, bias
        raise
