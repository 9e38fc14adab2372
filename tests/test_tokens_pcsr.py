"""Pixels routed to a light or a heavy sampler: the specification's vectors, and every pixel by its own sampler."""

from __future__ import annotations

import pytest
import torch
from _routing import NoSync
from torch import nn

from pyvit_accel.tokens.pcsr import PixelRouter, adaptive_route, refine, route


def pixel_router(**options):
    torch.manual_seed(3)
    classifier, light = nn.Linear(6, 2), nn.Linear(6, 3)
    heavy = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    return PixelRouter(classifier, light, heavy, (1, 3), **options).requires_grad_(False).eval()


def test_routes_are_the_vectors():
    p = torch.tensor([[0.7, 0.3], [0.45, 0.55], [0.2, 0.8]])
    for k, expected in ((0, [0, 1, 1]), (0.5, [0, 0, 1]), (1, [0, 0, 1]), (1.5, [0, 0, 0])):
        assert route(p, (0.25, 0.75), k).tolist() == route(p, (1, 3), k).tolist() == expected


def test_adaptive_routes_are_the_two_groups():
    p = torch.tensor([[0.9, 0.1, 0.15, 0.8, 0.12], [0.5] * 5, [0.51, 0.5, 0.52, 0.5, 0.52]])
    expected = [[True, False, False, True, False], [False] * 5, [True, False, True, False, True]]
    assert adaptive_route(p).tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"k": 0.3}, {"adaptive": True}, {"capacity": 0.25}])
def test_pixels_get_their_sampler(options):
    method, x = pixel_router(refinement=False, **options), torch.randn(2, 24, 6)
    residual = torch.randn(2, 24, 3)
    wanted, p_heavy = method.route(x)
    with NoSync():
        y = method(x, (4, 6), residual)
    best = p_heavy.masked_fill(~wanted, -1).topk(6, dim=1).indices
    fits = wanted & (torch.zeros(2, 24).scatter(1, best, 1.0) > 0 if "capacity" in options else wanted)
    assert 0 < fits.sum() < 48
    torch.testing.assert_close(y, torch.where(fits[..., None], method.heavy(x), method.light(x)) + residual)
    assert torch.equal(method(x[[1, 0]], (4, 6), residual[[1, 0]])[[1, 0]], y)


@torch.no_grad()
def test_refinement_by_hand():
    torch.manual_seed(0)
    image, heavy = torch.randn(2, 3, 5, 7), torch.rand(2, 5, 7) > 0.8
    expected = image.clone()
    for b in range(2):
        for i in range(1, 4):
            for j in range(1, 6):
                near = (b, slice(i - 1, i + 2), slice(j - 1, j + 2))
                if heavy[near].any() and not heavy[b, i, j]:
                    expected[b, :, i, j] = image[b][:, i - 1 : i + 2, j - 1 : j + 2].mean((1, 2))
    assert not torch.equal(expected, image)
    torch.testing.assert_close(refine(image, heavy), expected)
    method, x = pixel_router(), torch.randn(2, 35, 6)
    plain = pixel_router(refinement=False)(x, (5, 7)).transpose(1, 2).reshape(2, 3, 5, 7)
    refined = refine(plain, method.route(x)[0].view(2, 5, 7)).flatten(2).transpose(1, 2)
    assert torch.equal(method(x, (5, 7)), refined)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: route(torch.rand(3, 2), (1, 2, 3)), r"\(3, 2\) and cost \(1, 2, 3\)"),
        (lambda: route(torch.rand(3, 2), (0, 1)), r"cost \(0, 1\)"),
        (lambda: refine(torch.rand(1, 3, 4, 4), torch.ones(1, 4, 5).bool()), r"\(1, 4, 5\) is not bool of image"),
        (lambda: pixel_router(capacity=0), "capacity=0"),
        (lambda: pixel_router()(torch.rand(1, 12, 6), (3, 5)), "12 pixels are no image of 3 x 5"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
