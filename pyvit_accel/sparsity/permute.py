"""Orders of input channels under which 2:4 keeps more, found by swaps and folded into the layers around.

A permutation regroups the inputs of a layer into chunks of four. It costs nothing where the layer that makes these
inputs can make them in the other order:

    fc2    its inputs are the rows of fc1, with an elementwise activation in between           fold_hidden
    proj   its inputs are the rows of v in qkv; they can move within their head                fold_values
    qkv, fc1, head    their inputs are the residual stream, which all of them share: not alone

Pool and Yu, Channel Permutations for N:M Sparsity, NeurIPS 2021.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyvit_accel.errors import Unsupported
from pyvit_accel.sparsity.masks import CHUNK, largest_two

LEAST = 1e-5  # of what a chunk holds, that a swap must gain: float32 sums of many rows know no less
BLOCK = {"cpu": 2**18}  # elements compared at a time: on a CPU they stay in the cache
OTHER_BLOCK = 2**26


@dataclass(frozen=True)
class Permutation:
    """order (K,): new input i is old input order[i]; energy: the share of score 2:4 kept before, and keeps now."""

    order: Tensor
    before: float
    after: float


@torch.no_grad()
def search(score: Tensor, rounds: int = 100) -> Permutation:
    """Swaps of two inputs of different chunks until none helps, or for so many rounds; score (N, K) not negative.

    A round takes the swaps that gain most and have no chunk in common: their gains add up, so no round loses. Inputs
    beyond the last whole chunk stay where they are. Raises ValueError for scores that are negative or not finite.
    """
    if score.dim() != 2 or not bool((score.isfinite() & (score >= 0)).all()):
        raise ValueError(f"search: scores {tuple(score.shape)} must be (rows, inputs), finite and not negative")
    K = score.shape[1]
    G = K // CHUNK
    order = torch.arange(K, device=score.device)
    total = float(score.sum(dtype=torch.float64))
    before = _kept(score)
    if G > 1 and total > 0:
        s = score[:, : G * CHUNK].float() * (len(score) * G / total)  # a chunk of one row has 1: gains are no rounding
        s = s.T.contiguous()
        kept = torch.empty(G * CHUNK, G * CHUNK, device=score.device)
        touched = torch.arange(G, device=score.device)
        for _ in range(rounds):
            grouped = order[: G * CHUNK]
            _update(kept, s, grouped.view(G, CHUNK)[touched])
            swaps = _best_swaps(kept[grouped][:, grouped], s[grouped])
            if not swaps:
                break
            for i, j in swaps:
                order[[i, j]] = order[[j, i]]
            touched = torch.tensor(sorted({place // CHUNK for swap in swaps for place in swap}), device=score.device)
    after = _kept(score[:, order])
    if after < before:  # rounding of the gains
        order, after = torch.arange(K, device=score.device), before
    return Permutation(order, before / total if total > 0 else 1.0, after / total if total > 0 else 1.0)


def _kept(score: Tensor) -> float:
    return float((score.double() * largest_two(score)).sum())


def _update(kept: Tensor, s: Tensor, chunks: Tensor) -> None:
    """kept[i, j], of inputs: what the chunk of i keeps with j in its place; anew for the inputs of chunks (G, 4).

    That is the best of the other three, and the larger of the second of them and j. s (K, N).
    """
    others = torch.tensor([[j for j in range(CHUNK) if j != i] for i in range(CHUNK)], device=s.device)
    first, second = s[chunks[:, others]].topk(2, dim=2).values.flatten(0, 1).unbind(1)  # (4 G, N)
    kept[chunks.flatten()] = first.sum(1)[:, None] + _larger(second, s)


def _larger(a: Tensor, b: Tensor) -> Tensor:
    """Sums over N of the larger of a (I, N) and b (J, N): (I, J). A third of the time of torch.cdist, on a CPU."""
    height = CHUNK
    width = max(1, BLOCK.get(a.device.type, OTHER_BLOCK) // (height * a.shape[1]))
    found = a.new_empty(len(a), len(b))
    for rows, own in zip(a[:, None].split(height), found.split(height), strict=True):
        for columns, part in zip(b.split(width), own.split(width, dim=1), strict=True):
            torch.sum(torch.maximum(rows, columns), -1, out=part)
    return found


def _best_swaps(kept: Tensor, s: Tensor) -> list[tuple[int, int]]:
    """Swaps (i, j) in falling order of gain, no chunk twice; kept (K, K) and s (K, N) in the current order."""
    K = len(kept)
    now = s.unflatten(0, (-1, CHUNK)).topk(2, dim=1).values.sum((1, 2)).repeat_interleave(CHUNK)
    gain = kept + kept.T - now[:, None] - now
    # The best swap of every pair of chunks is enough: others of the pair are left out once it is taken.
    blocks = gain.view(K // CHUNK, CHUNK, K // CHUNK, CHUNK).transpose(1, 2).flatten(2)
    best, where = blocks.max(-1)
    pairs = (best > LEAST * s.shape[1]).triu(1).nonzero()
    if not len(pairs):
        return []
    order = best[pairs[:, 0], pairs[:, 1]].argsort(descending=True, stable=True)
    found, taken = [], set()
    for (a, b), place in zip(pairs[order].tolist(), where[pairs[order, 0], pairs[order, 1]].tolist(), strict=True):
        if a not in taken and b not in taken:
            taken |= {a, b}
            found.append((a * CHUNK + place // CHUNK, b * CHUNK + place % CHUNK))
    return found


@torch.no_grad()
def fold_hidden(fc1: nn.Linear, fc2: nn.Linear, order: Tensor) -> None:
    """fc2(act(fc1(x))) as before, in place, with the inputs of fc2 in the new order (K,). Raises ValueError for an
    order that is no permutation of them."""
    _check_order("fold_hidden", order, fc2.in_features)
    if fc1.out_features != fc2.in_features:
        raise ValueError(f"fold_hidden: fc1 makes {fc1.out_features} features, fc2 takes {fc2.in_features}")
    _move(fc1.weight, order, 0)
    if fc1.bias is not None:
        _move(fc1.bias, order, 0)
    _move(fc2.weight, order, 1)


@torch.no_grad()
def fold_values(qkv: nn.Linear, proj: nn.Linear, heads: int, order: Tensor) -> None:
    """The attention of qkv (rows: q, k, v; heads in each) and proj as before, in place, with the inputs of proj in the
    new order (C,). Raises ValueError for an order that moves an input out of its head."""
    C = proj.in_features
    _check_order("fold_values", order, C)
    if qkv.out_features != 3 * C or C % heads:
        raise ValueError(f"fold_values: qkv makes {qkv.out_features} features, {heads} heads of proj take {C}")
    D = C // heads
    moved = (order // D != torch.arange(C, device=order.device) // D).nonzero().flatten()
    if len(moved):
        at = int(moved[0])
        raise ValueError(
            f"fold_values: input {int(order[at])} of head {int(order[at]) // D} would come to place {at} of head "
            f"{at // D}; values can move within their head alone"
        )
    rows = torch.cat([torch.arange(2 * C, device=order.device), 2 * C + order])
    _move(qkv.weight, rows, 0)
    if qkv.bias is not None:
        _move(qkv.bias, rows, 0)
    _move(proj.weight, order, 1)


@dataclass(frozen=True)
class Pair:
    """Two layers of which the second one's inputs can be permuted; heads: within as many heads."""

    producer: str
    consumer: str
    heads: int = 1

    def search(self, score: Tensor) -> Permutation:
        """Of the consumer's scores (N, K)."""
        D = score.shape[1] // self.heads
        found = [search(part) for part in score.split(D, dim=1)]
        shares = [float(part.sum(dtype=torch.float64)) for part in score.split(D, dim=1)]
        order, total = torch.cat([one.order + i * D for i, one in enumerate(found)]), sum(shares)
        if not total:
            return Permutation(order, 1.0, 1.0)
        before, after = (
            sum(value * share for value, share in zip(values, shares, strict=True)) / total
            for values in ([one.before for one in found], [one.after for one in found])
        )
        return Permutation(order, before, after)

    def fold(self, model: nn.Module, order: Tensor) -> None:
        layers = model.get_submodule(self.producer), model.get_submodule(self.consumer)
        if self.heads == 1:
            fold_hidden(*layers, order)
        else:
            fold_values(*layers, self.heads, order)


def pair_of(model: nn.Module, name: str) -> Pair:
    """What has to be permuted with the inputs of a layer of our ViT or timm's. Raises Unsupported with the reason."""
    parent, _, own = name.rpartition(".")
    module = model.get_submodule(parent)
    parameters = {key.split(".")[0] for key, _ in module.named_parameters()}
    if own == "fc2" and isinstance(getattr(module, "fc1", None), nn.Linear):
        act, gated = getattr(module, "act", None), module.fc1.out_features != module.fc2.in_features
        if gated or parameters != {"fc1", "fc2"} or not _any_order(act, module.fc1):
            raise Unsupported(f"{name}: its inputs do not follow the rows of fc1, through {type(act).__name__}")
        _check_own(model, name, module, ("fc1", "fc2"))
        return Pair(f"{parent}.fc1", name)
    if own == "proj" and isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "num_heads"):
        plain = parameters <= {"qkv", "proj", "q_norm", "k_norm"}
        if not plain or module.qkv.out_features != 3 * module.proj.in_features:
            raise Unsupported(f"{name}: this {type(module).__name__} is no plain attention of qkv and proj")
        _check_own(model, name, module, ("qkv", "proj"))
        return Pair(f"{parent}.qkv", name, module.num_heads)
    raise Unsupported(f"{name}: its inputs are shared with other layers; the inputs of fc2 and proj alone can move")


def _check_own(model: nn.Module, name: str, module: nn.Module, layers: tuple[str, str]) -> None:
    """Raise Unsupported where these layers of the module hold more than weight and bias, or share them."""
    for layer in layers:
        linear = module.get_submodule(layer)
        held = {key for key, _ in (*linear.named_parameters(), *linear.named_buffers())}
        if not held <= {"weight", "bias"}:
            raise Unsupported(f"{name}: {layer} is a {type(linear).__name__}, of which more would have to be moved")
    own = {id(parameter) for layer in layers for parameter in module.get_submodule(layer).parameters()}
    for other_name, other in model.named_modules():
        if other is not module and any(id(p) in own for child in other.children() for p in child._parameters.values()):
            raise Unsupported(f"{name}: {layers[0]} or {layers[1]} share weights with {other_name or 'the model'}")


def _any_order(act: nn.Module | None, fc1: nn.Linear) -> bool:
    """Whether the activation lets channels pass in any order."""
    if not isinstance(act, nn.Module):
        return False
    x = torch.linspace(-4, 4, 3 * fc1.out_features, device=fc1.weight.device).view(3, -1)
    order = torch.arange(fc1.out_features - 1, -1, -1, device=x.device)
    y = act(x)
    return y.shape == x.shape and torch.allclose(y[:, order], act(x[:, order]), atol=1e-6)


def _check_order(what: str, order: Tensor, K: int) -> None:
    if order.shape != (K,) or not torch.equal(order.sort().values, torch.arange(K, device=order.device)):
        raise ValueError(f"{what}: order {tuple(order.shape)} is no permutation of the {K} inputs")


def _move(parameter: Tensor, order: Tensor, dim: int) -> None:
    parameter.copy_(parameter.index_select(dim, order.to(parameter.device)))
