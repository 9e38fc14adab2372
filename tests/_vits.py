"""Small float models with weights that hide nothing, and how far an accelerated one is from them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyvit_accel.models import VisionTransformer, ViTConfig

SMALL = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 64, "depth": 2, "num_heads": 2}
VARIANTS = {
    "plain": {},
    "distilled": {"distilled": True},
    "registers": {"num_registers": 4, "no_embed_class": True},
    "layer scale": {"layer_scale": True},
    "qk norm": {"qk_norm": True},
    "average pool": {"pool": "avg"},
    "gray, tanh, no qkv bias": {
        "in_channels": 1, "mean": (0.5,), "std": (0.25,), "activation": "gelu_tanh", "qkv_bias": False,
    },
    "no head": {"num_classes": 0},
}


def spread(model: nn.Module) -> nn.Module:
    """Random weights of a trained model's size; no bias, gamma or norm weight is 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.2 * noise)
    return model.eval()


def vit(**overrides) -> VisionTransformer:
    torch.manual_seed(0)
    return spread(VisionTransformer(ViTConfig(**(SMALL | overrides))))


def pixels(batch: int = 4, channels: int = 3, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, channels, size, size), dtype=torch.uint8, generator=generator)


def relative_error(y: Tensor, truth: Tensor) -> float:
    assert y.shape == truth.shape
    return ((y - truth).double().norm() / truth.double().norm()).item()


def module_names(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.modules()]


CODEBOOK = "CodebookLinear"
# How many times the error of W8A8 the weights and activations of other recipes may make on random models.
COARSER = {"W6A6": 3, "W4A8": 6, "W4A4": 8, "W3A3": 14, "W4A16": 6, "FP8": 2, "POW2": 9, "SPARSE24": 6.5}


def linear_class(recipe) -> str | None:
    """What each nn.Linear becomes, with recipes that build no blocks."""
    others = {"FP8": CODEBOOK, "POW2": CODEBOOK, "SPARSE24": "Sparse24Linear"}
    return "WeightOnlyLinear" if recipe.name.endswith("A16") else others.get(recipe.name)
