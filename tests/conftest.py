"""Fixtures shared by all tests: a seed, and the implementations of the ops that this machine has."""

from __future__ import annotations

import pytest
import torch
from _implementations import IMPLEMENTATIONS, Implementation, available


@pytest.fixture(params=list(IMPLEMENTATIONS))
def impl(request) -> Implementation:
    """Every implementation, the reference among them: for comparisons with float64."""
    return available(request.param)


@pytest.fixture(params=[name for name in IMPLEMENTATIONS if name != "reference"])
def kernel(request) -> Implementation:
    """Every implementation that is not the reference: for comparisons with it, bit for bit."""
    return available(request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
