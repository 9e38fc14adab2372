"""quant_project: the bits of mix_tokens, quantize and lowbit_linear, for any division of rows over threads."""

from __future__ import annotations

import pytest
import torch
from _problems import assert_same_bits, block, projection, reference

from pyvit_accel import ops

SHAPES = [(1, 1, 16, 1), (2, 5, 36, 3), (3, 70, 32, 2), (5, 197, 48, 3)]


def problem(shape, vectors=True):
    return projection(block(*shape, 16, vectors=vectors))


def lists(B: int, N: int, groups: int) -> dict:
    """Groups of any size, empty ones and tokens in none among them."""
    assign = torch.randint(-1, groups, (B, N)).int()
    return dict(zip(("ptr", "col", "weight"), ops.group_tokens(assign, groups, torch.rand(B, N) + 0.1), strict=False))


@pytest.mark.parametrize("shape", SHAPES)
def test_plain(kernel, shape):
    args = problem(shape)
    assert_same_bits(kernel(ops.quant_project, **args), reference(ops.quant_project, **args))


@pytest.mark.parametrize("shape", SHAPES)
def test_gather(kernel, shape):
    args, (B, N) = problem(shape), shape[:2]
    M = max(1, N * 2 // 3)
    col = torch.stack([torch.randperm(N)[:M] for _ in range(B)]).int()
    args |= {"col": col, "x": args["x"][:, :M]}
    y = kernel(ops.quant_project, **args)
    assert_same_bits(y, reference(ops.quant_project, **args))
    rows = args["residual"].gather(1, col.long()[..., None].expand(-1, -1, shape[2]))
    plain = {name: value for name, value in args.items() if name != "col"} | {"residual": rows}
    assert_same_bits(y, kernel(ops.quant_project, **plain))


@pytest.mark.parametrize("shape", SHAPES)
def test_lists(kernel, shape):
    args = problem(shape) | lists(*shape[:2], max(1, shape[1] * 2 // 3))
    assert_same_bits(kernel(ops.quant_project, **args), reference(ops.quant_project, **args))


def test_merging_commutes_with_the_projection():
    """Of floats: means of rows, then the projection and its bias, are the means of the projected rows."""
    args = problem((2, 20, 32, 2)) | lists(2, 20, 12)
    merged = ops.quant_project(**args)
    after = {name: value for name, value in args.items() if name not in ("ptr", "col", "weight")}
    means = ops.mix_tokens(ops.quant_project(**after), args["col"], args["ptr"], args["weight"], reduce="mean")
    some = (args["ptr"][:, 1:] > args["ptr"][:, :-1])[..., None]
    error = torch.where(some, merged - means, 0.0)
    # Both round x to 255 codes of its range, with a scale of up to the largest row's.
    step = args["x"].abs().max() / 127
    weight = ops.lowbit_linear(
        torch.eye(32, dtype=torch.int8), torch.ones(1), args["w"], args["w_scale"]
    )  # (32, 32), transposed
    bound = 2 * step * weight.abs().sum(0) * args["layer_scale"].abs() + 1e-4
    assert (error.abs() <= bound).all()


def test_indices_outside_are_refused(kernel):
    args = problem((2, 5, 16, 2))
    gather = args | {"col": torch.full((2, 5), 5, dtype=torch.int32)}
    listed = args | lists(2, 5, 3)
    listed["ptr"] = listed["ptr"] + 5
    for bad in (gather, listed):
        with pytest.raises(ValueError, match=r"has \d+, outside"):
            kernel(ops.quant_project, **bad)


def test_errors():
    args = problem((2, 5, 16, 2))
    with pytest.raises(ValueError, match=r"quant_project: x has 4 rows, expected 5"):
        ops.quant_project(**args | {"x": args["x"][:, :4]})
    with pytest.raises(ValueError, match=r"lists are col, ptr and weight; a gather is col alone"):
        ops.quant_project(**args | {"ptr": torch.zeros(2, 3, dtype=torch.int32)})
    with pytest.raises(TypeError, match=r"residual must be torch.float32, got torch.float16"):
        ops.quant_project(**args | {"residual": args["residual"].half()})
