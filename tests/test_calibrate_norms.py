"""norms: RepBN and Unified Normalization disappear into the linears around them, exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyvit_accel.calibrate.norms import NormAffine, fold_after, fold_before, fold_branch, norm_affine, undo_after
from pyvit_accel.errors import Unsupported

C = 12
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64 sums of a dozen terms


class RepBN(nn.Module):
    """Attribute names and eval mode as published with SLAB."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.bn = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x.transpose(1, 2)).transpose(1, 2) + self.alpha * x


class LinearNorm(nn.Module):
    """The same: in eval mode its second norm."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), RepBN(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(x)


class UN(nn.Module):
    """Attribute names and eval mode as published with Unified Normalization."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("ema_gz", torch.full((channels,), torch.nan))  # of training only
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x / (self.running_var + self.eps).sqrt()) + self.bias


def trained(norm: nn.Module) -> nn.Module:
    """Every parameter and running statistic random, in float64 and eval mode."""
    for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
        if "running_var" in name:
            tensor.data.uniform_(0.2, 3)
        elif tensor.is_floating_point() and "gz" not in name:
            tensor.data.normal_()
    return norm.double().eval()


@pytest.fixture(params=[RepBN, LinearNorm, UN], ids=lambda kind: kind.__name__)
def norm(request) -> nn.Module:
    return trained(request.param(C))


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias).double()


def test_the_affine_is_the_norm(norm):
    x = torch.randn(2, 5, C, dtype=torch.float64)
    torch.testing.assert_close(norm_affine(norm)(x), norm(x), **EXACT)


def test_repbn_by_hand():
    norm = RepBN(1)
    norm.alpha.data.fill_(0.5)
    norm.bn.weight.data.fill_(6.0)
    norm.bn.bias.data.fill_(1.0)
    norm.bn.running_mean.fill_(2.0)
    norm.bn.running_var.fill_(9.0)
    norm.bn.eps = 0.0
    affine = norm_affine(norm)
    assert affine.scale == 2.5 and affine.shift == -3  # 6/3 + 0.5, 1 - 6/3 * 2


@pytest.mark.parametrize("bias", [True, False])
def test_fold_after_is_exact(norm, bias):
    x, after = torch.randn(3, 5, C, dtype=torch.float64), linear(C, 7, bias)
    folded = F.linear(x, *fold_after(norm_affine(norm), after.weight, after.bias))
    torch.testing.assert_close(folded, after(norm(x)), **EXACT)
    pooled = F.linear(x.mean(1), *fold_after(norm_affine(norm), after.weight, after.bias))  # as a head
    torch.testing.assert_close(pooled, after(norm(x).mean(1)), **EXACT)


@pytest.mark.parametrize("bias", [True, False])
def test_fold_before_is_exact(norm, bias):
    x, before = torch.randn(3, 5, 9, dtype=torch.float64), linear(9, C, bias)
    folded = F.linear(x, *fold_before(norm_affine(norm), before.weight, before.bias))
    torch.testing.assert_close(folded, norm(before(x)), **EXACT)


def test_a_patch_embedding_keeps_alpha_times_bias():
    norm = trained(RepBN(C))
    images, patches = torch.randn(2, 3, 8, 8, dtype=torch.float64), nn.Conv2d(3, C, 4, 4).double()
    affine = norm_affine(norm)
    weight, bias = fold_before(affine, patches.weight, patches.bias)
    folded = F.conv2d(images, weight, bias, stride=4).flatten(2).transpose(1, 2)
    truth = norm(patches(images).flatten(2).transpose(1, 2))
    torch.testing.assert_close(folded, truth, **EXACT)
    released = (affine.scale - norm.alpha) * patches.bias + affine.shift  # gamma (bias - mean) / sigma + beta
    torch.testing.assert_close(bias - released, norm.alpha * patches.bias, **EXACT)


def test_a_final_norm_goes_backwards_through_the_stream(norm):
    """start -> (+ fc2(gelu(fc1(.)))) twice -> norm -> head, and the same without the norm."""
    start, head = linear(9, C), linear(C, 4)
    mlps = [(linear(C, 16), linear(16, C, bias=index == 0)) for index in range(2)]
    x = torch.randn(3, 5, 9, dtype=torch.float64)

    stream = start(x)
    for fc1, fc2 in mlps:
        stream = stream + fc2(F.gelu(fc1(stream)))
    truth = head(norm(stream))

    affine = norm_affine(norm)
    stream = F.linear(x, *fold_before(affine, start.weight, start.bias))
    for fc1, fc2 in mlps:
        hidden = F.gelu(F.linear(stream, *undo_after(affine, fc1.weight, fc1.bias)))
        stream = stream + F.linear(hidden, *fold_branch(affine, fc2.weight, fc2.bias))
    scale = affine.scale.abs()
    lost = float(scale.max() / scale.min())  # a small scale is multiplied and divided: relative to it, sums lose digits
    torch.testing.assert_close(head(stream), truth, rtol=0, atol=1e-13 * lost)


def test_a_zero_scale_cannot_be_undone():
    affine = NormAffine(torch.tensor([1.0, 0.0]).double(), torch.zeros(2).double())
    with pytest.raises(Unsupported, match=r"the norm's scale\[1\] is 0"):
        undo_after(affine, torch.ones(3, 2), None)


def test_weights_keep_their_dtype_and_are_rounded_once():
    norm, after = trained(UN(C)), linear(C, 6)
    affine = norm_affine(norm)
    weight, bias = fold_after(affine, after.weight.float(), after.bias.float())
    assert weight.dtype == bias.dtype == torch.float32
    assert torch.equal(weight, (after.weight.float().double() * affine.scale).float())


def test_a_batch_norm_without_weights_is_read():
    bn = trained(nn.BatchNorm1d(C, affine=False))
    x = torch.randn(7, C, dtype=torch.float64)
    torch.testing.assert_close(norm_affine(bn)(x), bn(x), **EXACT)


def test_what_is_not_affine_is_refused():
    with pytest.raises(Unsupported, match="LayerNorm has no running_var; it is not affine at inference"):
        norm_affine(nn.LayerNorm(C))
    with pytest.raises(
        Unsupported, match="Identity has no weight, bias, running_var; expected RepBN, LinearNorm or UN"
    ):
        norm_affine(nn.Identity())
    norm = RepBN(C)
    norm.bn = nn.BatchNorm1d(C, track_running_stats=False)
    with pytest.raises(Unsupported, match=r"RepBN.bn has no running_var: it normalises by the batch"):
        norm_affine(norm)
    affine = norm_affine(trained(UN(C)))
    with pytest.raises(ValueError, match="fold_after: the linear takes 5 channels but the norm has 12"):
        fold_after(affine, torch.ones(3, 5), None)
    with pytest.raises(ValueError, match="fold_before: the linear makes 3 channels but the norm has 12"):
        fold_before(affine, torch.ones(3, 5), None)
