"""The part `ops`: every op and every implementation against the reference on the CPU.

Each call runs on poisoned memory of two patterns, then again and again, on another stream beside other work, and in a
CUDA graph: all must give the same bits, leave margins and inputs alone, and agree with the reference: bit for bit where
the contract says so, else (FLOAT) within a bound; tests/test_triton_*.py have the derived ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from bench.gpu import launchers
from bench.gpu.guarded import LARGE, NAN, Guarded
from bench.gpu.task import Task
from pyvit_accel import backends

FLOAT = ("weight_only_linear", "propagate", "local_assign", "class_row", "match_tokens", "linear mantissa",
         "sparse24_linear of floats")  # fmt: skip
BOUND = 2e-3  # |result - truth| / |truth| of these
CODE_SHARE = 0.02  # of their codes that may be one off
REPEATS = 6


def calls(root: Path, device: str) -> dict[str, Callable]:
    """A name and a call of a public op, on the CPU: those of the tests, and awkward ones."""
    sys.path.insert(0, str(root / "tests"))
    from _problems import one_call_of_each

    from bench.gpu.awkward import awkward_calls

    return one_call_of_each() | awkward_calls(few=device != "cuda")


def items(found: dict[str, Callable], device: str) -> list[tuple[str, str]]:
    """(implementation, call): the owner of every op, others for the ops they have, single kernels for matmuls."""
    pairs = [("owner", name) for name in found]
    for backend in ("triton", "cuda"):
        has = launchers.available(device).get(backend, {})
        pairs += [(backend, name) for name in found if name.split()[0] in has]
    of_bits = {bits: [n for n in found if n.startswith("lowbit_linear") and f", {bits} bits" in n] for bits in (4, 8)}
    pairs += [(config, name) for bits in (8, 4) for config in launchers.configs(bits) for name in of_bits[bits]]
    sparse = {name: call.args[1].dtype for name, call in found.items() if name.startswith("sparse24_linear")}
    return pairs + [(c, name) for name, dtype in sparse.items() for c in launchers.sparse24_configs(dtype)]


def truth_of(call) -> list[Tensor]:
    with backends.use_reference():
        return _results(call())


def check(call, backend: str, device: str, exact: bool, truth: list[Tensor] | None = None) -> dict:
    truth, first = truth or truth_of(call), None
    for fill in (NAN, LARGE):
        guard = Guarded(fill)
        there = moved(call, lambda t, guard=guard: guard.place(t, device), device)
        before = [t.clone() for t in tree_leaves((there.args, there.kwargs)) if isinstance(t, Tensor)]
        with guard, launchers.Using(backend, device):
            results = _results(there())
        guard.check()
        after = [t for t in tree_leaves((there.args, there.kwargs)) if isinstance(t, Tensor)]
        if any(not _same(a, b) for a, b in zip(after, before, strict=True)):
            raise AssertionError("an input was written to")
        compare(results, truth, exact)
        first = first or results
        _same_bits(results, first, "memory with another pattern")
    if device == "cuda":
        _again(there, backend, first)
    return {"implementation": backend, "elements": sum(t.numel() for t in truth), "exact": exact}


def _again(call, backend: str, first: list[Tensor]) -> None:
    """Other streams, and graphs."""
    noise, stream = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    for _ in range(REPEATS):
        noise @ noise
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), launchers.Using(backend, "cuda"):
            results = call()
        noise @ noise
        torch.cuda.synchronize()
        _same_bits(_results(results), first, "another run, on another stream")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), launchers.Using(backend, "cuda"):
        results = call()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    _same_bits(_results(results), first, "a replay of a CUDA graph")


def moved(call, place: Callable[[Tensor], Tensor], device: str):
    """The call with its tensors where `place` puts them."""
    args, kwargs = tree_map_only(Tensor, place, (call.args, call.kwargs))
    if (form := kwargs.get("softmax")) is not None:
        kwargs = kwargs | {"softmax": form.to(device)}
    return type(call)(call.op, args, kwargs)


def _results(result) -> list[Tensor]:
    return [t.cpu() for t in tree_leaves(result) if isinstance(t, Tensor)]


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, whatever is not a number included."""
    a, b = (t.contiguous() for t in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _same_bits(results: list[Tensor], first: list[Tensor], what: str) -> None:
    for a, b in zip(results, first, strict=True):
        if a.numel() and not _same(a, b):
            raise AssertionError(f"{what} gave other bits: {int((a != b).sum())} of {a.numel()}")


def compare(results: list[Tensor], truth: list[Tensor], exact: bool) -> None:
    if len(results) != len(truth):
        raise AssertionError(f"{len(results)} results came, not {len(truth)}")
    for a, b in zip(results, truth, strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise AssertionError(f"{a.dtype} {tuple(a.shape)} came, not {b.dtype} {tuple(b.shape)}")
        if torch.equal(a, b):
            continue
        far = (a.double() - b.double()).abs()
        said = f"{int((a != b).sum())} of {a.numel()} differ, first at {(a != b).nonzero()[0].tolist()}"
        if exact:
            raise AssertionError(f"{said}, by up to {far.max():.4g}")
        if a.is_floating_point():
            known = b.isfinite()
            error = float(far[known].norm() / b[known].double().norm().clamp_min(1e-30))
            if not error <= BOUND or not torch.equal(a.isfinite(), known):
                raise AssertionError(f"{said}: {error:.3g} of the norm")
        elif not (far.max() <= 1 and (far > 0).double().mean() <= CODE_SHARE):
            raise AssertionError(f"{said}, by up to {far.max():.4g}")


def main() -> None:
    task = Task.current()
    torch.set_num_threads(max(1, torch.get_num_threads() // task.shards))
    with torch.inference_mode():
        found = calls(Path(task.root), task.device)
        mine = list(found)[task.shard :: task.shards]  # of one call all implementations: they share compiled kernels
        truth = cache(lambda name: truth_of(found[name]))

        def one(backend: str, name: str) -> dict:
            return check(found[name], backend, task.device, not any(f in name for f in FLOAT), truth(name))

        pairs = [pair for pair in items(found, task.device) if pair[1] in mine]
        task.run({f"{name}, {backend}": partial(one, backend, name) for backend, name in pairs})


if __name__ == "__main__":
    main()
