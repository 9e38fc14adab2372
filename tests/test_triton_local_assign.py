"""The Triton launcher local_assign against its reference in float64."""

from __future__ import annotations

import pytest
import torch
from _triton import kernel, run
from test_local_assign import FORMS, exact

from pyvit_accel.reference.local_assign import candidates

SIZES = [(1, 1, 1, 1, 3, 1), (1, 5, 1, 2, 1, 3), (5, 7, 3, 4, 65, 3), (4, 4, 2, 2, 200, 5)]


def check_one_iteration(h, w, gh, gw, C, window, metric, border, dtype):
    torch.manual_seed(0)
    x, centres = torch.randn(2, h, w, C).to(dtype), torch.randn(2, gh, gw, C).to(dtype)
    weight, index, moved = kernel("local_assign", x, centres, window, metric, 1 / C, 1, border)
    truth, weight_error, moved_error = exact(x, centres, window, metric, 1 / C, border)
    assert weight.dtype == moved.dtype == torch.float32 and index.dtype == torch.int32
    assert torch.equal(index, truth[1])
    assert ((weight.double() - truth[0]).abs() <= weight_error).all()
    assert ((moved.double() - truth[2]).abs() <= moved_error).all()


def check_iterations():
    """Two are twice one; another run and swapped images give the same bits."""
    torch.manual_seed(0)
    x, centres = torch.randn(2, 3, 4, 20), torch.randn(2, 2, 2, 20)
    expected = kernel("local_assign", x, centres, 3, "l2", 0.1, 2, "mask")
    order, moved = torch.tensor([1, 0]), centres
    for _ in range(2):
        weight, index, moved = kernel("local_assign", x.mT.contiguous().mT, moved, 3, "l2", 0.1, 1, "mask")
    permuted = kernel("local_assign", x[order], centres[order], 3, "l2", 0.1, 2, "mask")
    for truth, once, other in zip(expected, (weight, index, moved), permuted, strict=True):
        assert torch.equal(once, truth) and torch.equal(other, truth[order])


def check_edges():
    """Far tokens, whose exponentials underflow; NaN; no image."""
    x = torch.zeros(1, 4, 4, 8)
    x[0, 2:] = 100.0
    centres = torch.tensor([0.0, 1000.0, 100.0, 2000.0]).view(1, 2, 2, 1).expand(1, 2, 2, 8)
    weight, _, moved = kernel("local_assign", x, centres, 3, "l2", 1.0, 1, "mask")
    assert weight.sum() == 16 and weight.amax(-1).eq(1).all()
    assert torch.equal(moved[0, :, 0, 0], torch.tensor([0.0, 100.0])) and not moved[0, :, 1].any()
    x[0, 0, 0, 0] = torch.nan
    weight, _, _ = kernel("local_assign", x, centres, 1, "dot", 1.0, 1, "zero")
    assert weight.isnan().flatten().tolist() == [True] + 15 * [False]
    for result, shape in zip(kernel("local_assign", x[:0], centres[:0], 3, "l2", 1.0, 1, "mask"), (
        (0, 16, 9), (0, 16, 9), (0, 2, 2, 8)
    ), strict=True):  # fmt: skip
        assert result.shape == shape


def check_published():
    x = torch.tensor([[0.0, 0, 10, 10], [0, 1, 10, 9], [5, 5, 0, 0], [5, 4, 0, 1]])[None, :, :, None]
    centres = torch.tensor([0.25, 9.75, 4.75, 0.25]).view(1, 2, 2, 1)
    moved = kernel("local_assign", x, centres, 3, "l2", 0.1, 2, "mask")[2].flatten()
    truth = torch.tensor([0.778093, 9.373155, 4.413258, 0.778093])
    torch.testing.assert_close(moved, truth, rtol=0, atol=2e-6)
    x = torch.tensor([[0.0, 0, 2, 2], [0, 1, 2, 1], [1, 1, 0, 0], [1, 0, 0, 2]])[None, :, :, None]
    centres = torch.tensor([0.25, 1.75, 0.75, 0.5]).view(1, 2, 2, 1)
    weight, _, moved = kernel("local_assign", x, centres, 3, "dot", 1.0, 1, "zero")
    q = (0.063274, 0.063274, 0.063274, 0.063274, 0.081245, 0.364115, 0.063274, 0.133950, 0.104321)
    torch.testing.assert_close(weight[0, 5], torch.tensor(q), rtol=0, atol=2e-6)
    truth = torch.tensor([0.518770, 1.376964, 0.783481, 0.643179])
    torch.testing.assert_close(moved.flatten(), truth, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("metric", "border"), FORMS)
@pytest.mark.parametrize("size", SIZES)
def test_within_rounding_of_float64(size, metric, border):
    run(check_one_iteration, *size, metric, border, torch.float32)


def test_computes_in_float32():
    run(check_one_iteration, 4, 4, 3, 3, 20, 9, "l2", "mask", torch.float16)


def test_iterations_agree():
    run(check_iterations)


def test_edges():
    run(check_edges)


def test_published_maps():
    run(check_published)


@pytest.mark.parametrize("cells", [1, 2, 3, 5, 7, 14])
def test_rectangles_hold_every_candidate(cells):
    """The launcher's bound on the rows of tokens whose home is in reach."""
    h, window = 14, 3
    index = candidates(h, 1, cells, 1, window, torch.device("cpu"))
    rows = max(int((index == centre).any(1).sum()) for centre in range(cells))
    assert rows <= min(h, -(-window * h // cells))
