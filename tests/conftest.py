"""Fixtures shared by all tests: a seed, and the implementations of the ops that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from _implementations import IMPLEMENTATIONS, Implementation, available


@pytest.fixture
def two_threads() -> Iterator[None]:
    """How work is divided is tested too, however many threads the process was started with."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=list(IMPLEMENTATIONS))
def impl(request, two_threads) -> Implementation:
    """Every implementation, the reference among them: for comparisons with float64."""
    return available(request.param)


@pytest.fixture(params=[name for name in IMPLEMENTATIONS if name != "reference"])
def kernel(request, two_threads) -> Implementation:
    """Every implementation that is not the reference: for comparisons with it, bit for bit."""
    return available(request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
