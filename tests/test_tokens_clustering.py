"""Cluster centres and super tokens: the specification's vectors, and what holds for any input."""

from __future__ import annotations

import pytest
import torch
from _vits import vit

from pyvit_accel import ops
from pyvit_accel.tokens.clustering import ClusteredBlocks, Clusters, cluster, reconstruct
from pyvit_accel.tokens.super_tokens import SuperTokenAttention, sample

PRINTED = 1e-6  # half a unit of the vectors' last digit, and float32 in the sums of 16 values below 100

GRID = torch.tensor([[0, 0, 10, 10], [0, 1, 10, 9], [5, 5, 0, 0], [5, 4, 0, 1]]).float().view(1, 16, 1)
MAP = torch.tensor([[0, 0, 2, 2], [0, 1, 2, 1], [1, 1, 0, 0], [1, 0, 0, 2]]).float().view(1, 4, 4, 1)


def close(x, values, relative=PRINTED):
    torch.testing.assert_close(x.flatten(), torch.tensor(values), rtol=relative, atol=PRINTED)


def vector_clusters():
    return cluster(GRID, 4, 4, 2, 2, window=3, tau=0.1, iterations=2)


def test_centres_are_the_vectors():
    close(cluster(GRID, 4, 4, 2, 2, window=1, tau=0.1, iterations=2).centres, [0.25, 9.75, 4.75, 0.25])
    once = cluster(GRID, 4, 4, 2, 2, window=3, tau=0.1, iterations=1)
    close(once.centres, [0.665860, 9.439096, 4.584893, 0.665860])
    close(vector_clusters().centres, [0.778093, 9.373155, 4.413258, 0.778093])


def test_labels_are_the_vector():
    labels = vector_clusters().labels().view(4, 4)
    left_or_last = (labels == 0) | (labels == 3)  # these two centres tie
    assert left_or_last.tolist() == [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2
    assert (labels[:2, 2:] == 1).all() and (labels[2:, :2] == 2).all()


def test_reconstruction_is_the_vector():
    values = torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1)
    for norm, first, seventh in (("l2", 3.535534, 2.353165), ("l1", 2.5, 2.110083)):
        tokens = reconstruct(values, vector_clusters(), tau=0.1, k=2, norm=norm).flatten()
        close(tokens[[0, 7]], [first, seventh])


def test_means_survive_what_the_published_norm_does_not():
    """Far from every centre all of exp(-tau D) is 0 in float32; l1 then still is the nearest centre."""
    clusters = Clusters(torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[1000.0]]]))
    values = torch.tensor([[[3.0], [7.0]]])
    assert reconstruct(values, clusters, 0.01, norm="l2").item() == 0
    assert abs(reconstruct(values, clusters, 0.01, norm="l1").item() - 7) < 1e-6


def test_l1_reconstructs_a_constant():
    torch.manual_seed(0)
    clusters = cluster(torch.randn(2, 48, 5), 8, 6, 4, 3)
    tokens = reconstruct(torch.full((2, 12, 5), 1.5), clusters, k=4, norm="l1")
    torch.testing.assert_close(tokens, torch.full((2, 48, 5), 1.5))


def test_a_centre_per_token_far_apart_is_the_identity():
    """Window 1 leaves every token alone in its cell, and nothing else is near it."""
    x = 100 * torch.randperm(12, generator=torch.Generator().manual_seed(0)).float().view(1, 12, 1)
    clusters = cluster(x, 3, 4, 3, 4, window=1, tau=1.0)
    assert torch.equal(clusters.centres, x)
    values = torch.randn(1, 12, 5)
    for norm in ("l1", "l2"):
        assert torch.equal(reconstruct(values, clusters, 1.0, norm=norm), values)


def model_with_clusters(**options):
    model = vit(depth=4, image_size=48)  # 6 x 6 patches
    blocks = ClusteredBlocks(model.blocks, 1, 3, (6, 6), (3, 3), num_prefix_tokens=1, **options)
    model.blocks = torch.nn.Sequential(blocks)
    return model.eval(), blocks


def test_middle_blocks_see_centres_only():
    model, blocks = model_with_clusters(tau=0.05)
    seen = []
    for block in blocks.blocks:
        block.register_forward_hook(lambda module, args, y: seen.append(tuple(y.shape)))
    with torch.no_grad():
        y = model.forward_features(torch.rand(2, 3, 48, 48))
    assert seen == [(2, 37, 64), (2, 10, 64), (2, 10, 64), (2, 37, 64)] and y.shape == (2, 37, 64)
    assert y.isfinite().all()


def test_blocks_that_do_nothing_leave_prefix_and_centres():
    x = torch.randn(2, 2 + 48, 5, generator=torch.Generator().manual_seed(0))
    y = ClusteredBlocks([torch.nn.Identity()] * 3, 0, 2, (8, 6), (4, 3), tau=0.3, k=4, num_prefix_tokens=2)(x)
    clusters = cluster(x[:, 2:].contiguous(), 8, 6, 4, 3, tau=0.3)
    assert torch.equal(y, torch.cat([x[:, :2], reconstruct(clusters.centres, clusters, 0.3, 4)], 1))


def test_permuted_images_are_permuted_results():
    model, _ = model_with_clusters(tau=0.05, norm="l1")
    images, order = torch.rand(4, 3, 48, 48), [2, 0, 3, 1]
    with torch.no_grad():
        y, again = model(images), model(images)
        permuted = model(images[order])
    assert torch.equal(y, again)
    torch.testing.assert_close(permuted, y[order])  # matmuls of another order of rows may round differently
    x = torch.randn(4, 8, 6, 5)
    assert torch.equal(sample(x[order], (2, 3)).values, sample(x, (2, 3)).values[order])


def test_super_tokens_are_the_vector():
    tokens = sample(MAP, (2, 2), scale=1.0)
    close(tokens.values, [0.518770, 1.376964, 0.783481, 0.643179])
    row = [0.063274] * 4 + [0.081245, 0.364115, 0.063274, 0.133950, 0.104321]
    close(tokens.weight[0, 5], row)
    inside = torch.where(tokens.index < 0, 0.0, tokens.weight).flatten()
    mass = torch.zeros(4).index_add_(0, tokens.index.clamp(min=0).flatten().long(), inside)
    close(mass, [1.324427, 5.418841, 1.829242, 1.530901])
    corner = tokens.spread(tokens.values).view(4, 4)[:2, :2]
    close(corner, [0.369155, 0.369155, 0.369155, 0.715566])


def test_a_centre_far_from_the_border_gets_its_mass():
    """Zero vectors take 5 of 9 shares at a corner of a constant map that is 0, and none inside."""
    tokens = sample(torch.zeros(1, 6, 6, 3), (2, 2))
    ones = tokens.spread(torch.ones(1, 9, 1)).view(6, 6)
    close(ones[[0, 0, 2], [0, 2, 2]], [4 / 9, 6 / 9, 1.0])


def test_super_token_attention_is_attention_among_super_tokens():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 8)
    attention = torch.nn.Linear(8, 8).requires_grad_(False)
    assert torch.equal(SuperTokenAttention(attention, (1, 1))(x), attention(x.flatten(1, 2)).view(x.shape))
    tokens = sample(x, (2, 3), iterations=2)
    assert tokens.values.shape == (2, 4, 8)
    assert torch.equal(tokens.weight, sample(x, (2, 3), 2, 8**-0.5).weight)
    col, weight = tokens.index.flatten(1), tokens.weight.flatten(1)
    expected = ops.mix_tokens(attention(tokens.values), col, None, weight, width=9)
    assert torch.equal(SuperTokenAttention(attention, (2, 3), iterations=2)(x), expected.view(x.shape))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cluster(GRID, 4, 3, 2, 2), "16 tokens, a grid of 4 x 3 has 12"),
        (lambda: cluster(GRID, 4, 4, 5, 2), r"\(5, 2\) centres of \(4, 4\)"),
        (lambda: cluster(GRID, 4, 4, 2, 2, window=4), "window=4"),
        (lambda: reconstruct(torch.zeros(1, 3, 1), vector_clusters()), r"\(1, 3, 1\); expected .* like \(1, 4, 1\)"),
        (lambda: reconstruct(torch.zeros(1, 4, 1), vector_clusters(), norm="l3"), "norm='l3' is not one of l2, l1"),
        (lambda: reconstruct(torch.zeros(1, 4, 1), vector_clusters(), k=0), "k=0"),
        (lambda: ClusteredBlocks([], 0, 1, (4, 4), (2, 2)), "alpha=0, beta=1; expected 0 <= alpha < beta <= 0"),
        (lambda: ClusteredBlocks([torch.nn.ReLU()], 0, 1, (4, 4), (5, 2)), r"\(5, 2\) clusters of a grid of \(4, 4\)"),
        (lambda: sample(MAP, (3, 2)), "4 x 4 tokens is not whole cells of 3 x 2"),
        (lambda: SuperTokenAttention(torch.nn.Identity(), (2, 2), iterations=0), "iterations=0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
