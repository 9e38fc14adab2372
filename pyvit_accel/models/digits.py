"""A small trained ViT for handwritten digits, which ships with the package, and the data it is measured on.

The data are the 1797 8x8 digits of scikit-learn (Optical Recognition of Handwritten Digits, UCI repository,
CC BY 4.0). Every pixel is repeated 4 x 4 times to 32 x 32; two thirds, drawn with a fixed seed, trained the
model (bench/train_digits.py), the other third is for measuring.
"""

from __future__ import annotations

from importlib.resources import as_file, files

import torch
from torch import Tensor

from pyvit_accel.models.vit import VisionTransformer, ViTConfig
from pyvit_accel.models.weights import load_weights, read_config

DIGITS_CONFIG = ViTConfig(
    image_size=32, patch_size=4, in_channels=1, num_classes=10, dim=96, depth=4, num_heads=3, mean=(0.5,), std=(0.5,)
)
SPLIT_SEED = 0


def digits_model() -> VisionTransformer:
    """The trained model, in eval mode; takes what digits_data returns."""
    with as_file(files("pyvit_accel.models") / "digits.safetensors") as path:
        return load_weights(VisionTransformer(read_config(path)), path).eval()


def digits_data(split: str = "test") -> tuple[Tensor, Tensor]:
    """Images (n, 1, 32, 32) uint8 and labels (n,) int64; 'train' is what the model was trained on, 'test' the rest."""
    if split not in ("train", "test"):
        raise ValueError(f"digits_data: split={split!r}; use 'train' or 'test'")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('digits_data needs scikit-learn; run pip install "pyvit_accel[cli]"') from error
    digits = load_digits()
    pixels = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)  # 8 x 8, 0..16
    images = pixels[:, None].repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out = len(images) // 3
    index = order[:held_out] if split == "test" else order[held_out:]
    return images[index], torch.from_numpy(digits.target)[index].long()
