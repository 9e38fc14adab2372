"""What can be measured: calls that do one job on buffers of their own, and how their result is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLED = 96  # rows whose results are checked


class Absent(RuntimeError):
    """A baseline that this machine does not have."""


@dataclass(frozen=True)
class Made:
    """calls: the same on different buffers; about: job, implementation, backend or none for a baseline, kind of
    multiplication, ops and bytes, which make the floor."""

    calls: list[Callable[[], object]]
    check: Callable[[], None]
    about: dict


def about(job: object, implementation: str, backend: str | None, kind: str, ops: int, bytes: int) -> dict:
    return {"job": str(job), "implementation": implementation, "backend": backend, "kind": kind, "ops": ops,
            "bytes": bytes}  # fmt: skip


def sample(M: int) -> Tensor:
    """Rows from both ends and between, on the CPU."""
    if M <= SAMPLED:
        return torch.arange(M)
    between = torch.randint(0, M, (SAMPLED - 64,))
    return torch.cat([torch.arange(32), between, torch.arange(M - 32, M)])


def assert_equal(result: Tensor, truth: Tensor) -> None:
    """Bit for bit."""
    result = result.cpu()
    if (result.shape, result.dtype) != (truth.shape, truth.dtype):
        raise AssertionError(f"{result.dtype} {tuple(result.shape)} came, not {truth.dtype} {tuple(truth.shape)}")
    if not torch.equal(result, truth):
        worst = (result.double() - truth.double()).abs().max().item()
        raise AssertionError(f"{int((result != truth).sum())} of {truth.numel()} differ, by up to {worst:.4g}")


def assert_close(result: Tensor, truth: Tensor, bound: float) -> None:
    """|result - truth| / |truth| below a bound: for baselines and sums in floats."""
    result, truth = result.cpu().double(), truth.cpu().double()
    error = float((result - truth).norm() / truth.norm())
    if not error <= bound:
        raise AssertionError(f"off by {error:.3g} of the norm, more than {bound}")
