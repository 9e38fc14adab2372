"""PCSR: every pixel of a super-resolved image goes to a light or a heavy sampler, by how much the heavy one is worth.

    route   = argmax(p / cost^k)                                      k at run time: 0 asks for quality only
           or the upper of the two means of p_heavy of an image       adaptive
    y       = sampler[route](features) + residual
    refined = the 3 x 3 mean around a light pixel with a heavy one among its neighbours, not at the border

The means start at 0 and at the mean of p_heavy scaled to 0..1, per image; the published code scales over the batch.

Jeong et al., Accelerating Image Super-Resolution Networks with Pixel-Level Classification, arXiv:2407.21448.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit_accel import ops

from .routing import chosen

ITERATIONS = 20  # of the two means, as published


def route(probability: Tensor, cost: Sequence[float], k: float = 0.0) -> Tensor:
    """probability (..., R) and the cost of each of R samplers to (...,) int64: which one; of equal ones the first."""
    if probability.shape[-1:] != (len(cost),) or min(cost) <= 0:
        came = f"probability {tuple(probability.shape)} and cost {tuple(cost)}"
        raise ValueError(f"route: {came}; pass one cost above 0 for each of the probabilities")
    return torch.stack([p / c**k for p, c in zip(probability.float().unbind(-1), cost, strict=True)], -1).argmax(-1)


def adaptive_route(p_heavy: Tensor) -> Tensor:
    """(B, Q) to (B, Q) bool: the pixels of the upper of two means; none where all are equal."""
    p = p_heavy.float()
    low, high = p.amin(1, keepdim=True), p.amax(1, keepdim=True)
    p = (p - low) / (high - low).clamp(min=torch.finfo(p.dtype).tiny)
    light, heavy = torch.zeros_like(low), p.mean(1, keepdim=True)
    for _ in range(ITERATIONS):
        upper = (p - heavy).abs() < (p - light).abs()
        light, heavy = _mean(p, ~upper, light), _mean(p, upper, heavy)
    return (p - heavy).abs() < (p - light).abs()


def _mean(p: Tensor, mask: Tensor, otherwise: Tensor) -> Tensor:
    count = mask.sum(1, keepdim=True)
    return torch.where(count > 0, (p * mask).sum(1, keepdim=True) / count.clamp(min=1), otherwise)


def refine(image: Tensor, heavy: Tensor) -> Tensor:
    """image (B, C, H, W), heavy (B, H, W) bool: light pixels beside heavy ones become the mean of those around them."""
    if heavy.dtype != torch.bool or heavy.shape != (image.shape[0], *image.shape[2:]):
        raise ValueError(f"refine: heavy {heavy.dtype} {tuple(heavy.shape)} is not bool of image {tuple(image.shape)}")
    beside = F.max_pool2d(heavy[:, None].float(), 3, 1, padding=1) > 0
    inside = torch.zeros_like(beside)
    inside[:, :, 1:-1, 1:-1] = True
    mean = F.avg_pool2d(image, 3, 1, padding=1)  # at the border of zeros too, where it is not taken
    return torch.where(beside & inside & ~heavy[:, None], mean, image)


class PixelRouter(nn.Module):
    """features (B, Q, F) of H W = Q pixels to their values (B, Q, C).

    classifier   (B, Q, F) to logits (B, Q, 2), light and heavy; light, heavy: (B, K, F) to (B, K, C), row by row
    cost         of light and heavy, in any unit: only their ratio matters
    k, adaptive  may be set between calls
    capacity     the part of the pixels that the heavy sampler is run on: no count leaves the device, so this is what it
                 costs; where more are heavy, those with the lowest probability stay light. The light one is run on all
    """

    def __init__(
        self,
        classifier: nn.Module,
        light: nn.Module,
        heavy: nn.Module,
        cost: tuple[float, float],
        k: float = 0.0,
        adaptive: bool = False,
        capacity: float = 1.0,
        refinement: bool = True,
    ) -> None:
        super().__init__()
        if min(cost) <= 0 or not 0 < capacity <= 1:
            raise ValueError(f"PixelRouter: cost={cost}, capacity={capacity}; use costs above 0 and 0 < capacity <= 1")
        self.classifier, self.light, self.heavy = classifier, light, heavy
        self.cost, self.k, self.adaptive = cost, k, adaptive
        self.capacity, self.refinement = capacity, refinement

    def route(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Which pixels are heavy (B, Q) bool, and how probably they are."""
        probability = self.classifier(features).float().softmax(-1)
        p_heavy = probability[..., 1]
        return adaptive_route(p_heavy) if self.adaptive else route(probability, self.cost, self.k) == 1, p_heavy

    def forward(self, features: Tensor, size: tuple[int, int], residual: Tensor | None = None) -> Tensor:
        """size: H and W. residual (B, Q, C): of a plain interpolation."""
        B, Q, _ = features.shape
        if size[0] * size[1] != Q:
            raise ValueError(f"PixelRouter: {Q} pixels are no image of {size[0]} x {size[1]}")
        if self.training:
            probability = self.classifier(features).softmax(-1)
            y = probability[..., :1] * self.light(features) + probability[..., 1:] * self.heavy(features)
            return y if residual is None else y + residual
        wanted, p_heavy = self.route(features)
        index, inverse = chosen(wanted, p_heavy, math.ceil(self.capacity * Q))
        heavy = inverse >= 0
        sampled = ops.mix_tokens(self.heavy(ops.mix_tokens(features, index)), inverse)
        y = torch.where(heavy[..., None], sampled, self.light(features))
        y = y if residual is None else y + residual
        if not self.refinement:
            return y
        image = refine(y.transpose(1, 2).reshape(B, -1, *size), heavy.view(B, *size))
        return image.flatten(2).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"cost={self.cost}, k={self.k}, adaptive={self.adaptive}, capacity={self.capacity}"
