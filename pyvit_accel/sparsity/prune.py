"""Prune the linears of a trained model to 2:4: masked dense weights, ready to be packed, and what that did to each.

    pruned = prune(model, ["blocks.*.mlp.*", "blocks.*.attn.*"], batches)      in place

magnitude    the two largest weights of every chunk; needs no batch, uses them for bias and report if there are some
wanda        the same of |w| times the norm of the input
sparsegpt    masks and values that make good what goes (sparsegpt.py)
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from pyvit_accel.errors import Unsupported, some
from pyvit_accel.sparsity import masks
from pyvit_accel.sparsity.moments import Moments
from pyvit_accel.sparsity.permute import pair_of
from pyvit_accel.sparsity.sparsegpt import refit, sparsegpt
from pyvit_accel.sparsity.stream import Stream

METHODS = ("magnitude", "wanda", "sparsegpt")


@dataclass(frozen=True)
class Pruned:
    """What became of one layer.

    kept_energy   share of the sum of squares of its weights that the mask keeps
    output_error  norm of the error of its output over the norm of its output, bias apart, on the calibration inputs,
                  tokens weighed as they were for it; None without batches
    permuted      by what factor a permutation of its inputs enlarged the score kept; None: not permuted
    reason        why not, where it was asked for
    """

    name: str
    method: str
    kept_energy: float
    output_error: float | None
    permuted: float | None = None
    reason: str = ""


@torch.no_grad()
def prune(
    model: nn.Module,
    layers: str | Iterable[str],
    batches: Tensor | Mapping | Iterable = (),
    method: str = "sparsegpt",
    *,
    permute: bool | Container[str] = False,
    sequential: bool = True,
    correct_bias: bool = True,
    weigh_tokens: bool = True,
    refits: bool = True,
    progress: Callable[[Iterable, str], Iterable] | None = None,
) -> list[Pruned]:
    """Prune the linears whose dotted names match `layers` (globs), in place; one Pruned for each, in their order.

    batches       calibration, as of observe; all are kept, for every group of layers is run on them
    permute       first order the inputs of layers whose producer can follow (permute.pair_of): all, or these names
    sequential    a group of layers (those of one block) is calibrated on what the pruned groups before it give; False:
                  all of them on the float model, in one pass
    correct_bias  the bias takes up the mean of the error, so that sparsegpt minds its variance alone
    weigh_tokens  tokens count by what an error in them does (stream.py), where a block is calibrated after the other
    refits        sparsegpt's values are fitted once more, all that are kept together (sparsegpt.refit)
    progress      progress(groups, label) iterates the groups

    Raises ValueError for a method or name that is not known and for weights that are not finite, naming the layer;
    Unsupported, naming it too, for a layer that no batch reached or that has its mask (Sparse24Training), for a weight
    that is computed from others (torch.nn.utils.parametrize) and for one without values (on meta).
    """
    if method not in METHODS:
        raise ValueError(f"prune: method={method!r}; use one of {', '.join(METHODS)}")
    names = _matching(model, [layers] if isinstance(layers, str) else list(layers))
    batches = [batches] if isinstance(batches, (Tensor, Mapping)) else list(batches)
    if not batches and method != "magnitude":
        raise ValueError(f"prune: {method} needs calibration batches; magnitude alone does without")
    for name in names:
        _check_weight(model.get_submodule(name), name)
    stream = Stream(model, batches, names, sequential, weigh_tokens)
    found: list[Pruned] = []
    for block, group in stream.groups if progress is None else progress(stream.groups, method):
        moments = stream.moments(block, group) if batches else {}
        for name in group:
            moves = permute if isinstance(permute, bool) else name in permute
            found.append(_prune_layer(model, name, moments, method, moves, correct_bias, refits))
        stream.advance(block)
    return found


def output_error(w: Tensor, new: Tensor, moments: Moments, centred: bool = False) -> float:
    """|x (w - new)^T| / |x w^T| over the inputs x of the moments; centred: of the errors less their mean."""
    gram, change = moments.gram.double(), (w - new).detach().double()
    total = ((w.double() @ gram) * w.double()).sum()
    error = ((change @ (moments.centred.double() if centred else gram)) * change).sum().clamp(min=0)
    return float((error / total).sqrt()) if total > 0 else 0.0


def _prune_layer(
    model: nn.Module,
    name: str,
    moments: dict[str, Moments],
    method: str,
    permute: bool,
    correct_bias: bool,
    refits: bool,
) -> Pruned:
    layer = model.get_submodule(name)
    seen, permuted, reason = moments.get(name), None, ""
    if permute:
        try:
            pair = pair_of(model, name)
        except Unsupported as refused:
            reason = str(refused)
        else:
            found = pair.search(_score(layer.weight, seen, method))
            pair.fold(model, found.order)
            permuted = found.after / found.before
            seen = None if seen is None else seen.permuted(found.order)
    w, centred = layer.weight.detach().float().clone(), correct_bias and layer.bias is not None and seen is not None
    if method == "sparsegpt":
        gram = seen.centred if centred else seen.gram
        new = sparsegpt(w, gram)
        mask = new != 0
        if refits:
            new = refit(w, mask, gram, new)
    else:
        mask = masks.largest_two(_score(w, seen, method))
        new = w * mask
    if centred:
        layer.bias += ((w - new) @ seen.mean).to(layer.bias.dtype)
    layer.weight.copy_(new)
    error = None if seen is None else output_error(w, new, seen, centred)
    return Pruned(name, method, masks.kept_energy(w, mask), error, permuted, reason)


def _score(w: Tensor, seen: Moments | None, method: str) -> Tensor:
    """Squares of magnitudes or of Wanda's scores: what keeping a weight saves."""
    energy = w.detach().float().square()
    return energy if method == "magnitude" else energy * seen.gram.diagonal()


def _check_weight(layer: nn.Linear, name: str) -> None:
    w = layer.weight
    if "weight" not in layer._parameters:
        raise Unsupported(f"{name}: its weight is computed from others and cannot be written to; remove that first")
    if "mask" in layer._buffers:
        raise Unsupported(f"{name}: a {type(layer).__name__} has its own mask; accelerate(model, SPARSE24) packs it")
    if w.is_meta:
        raise Unsupported(f"{name}: its weight is on the meta device and has no values; load the checkpoint first")
    if not bool((finite := w.isfinite()).all()):
        row, k = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"{name}: row {row}, chunk {k // masks.CHUNK} holds {w[row, k].item()}; weights must be finite"
        )


def _matching(model: nn.Module, patterns: list[str]) -> list[str]:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not patterns:
        raise ValueError(f"prune: no layers are named; they are {some(names)}")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"prune: {pattern!r} matches no Linear of the model; they are {some(names)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
