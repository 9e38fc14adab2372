"""One plain ViT with timm's parameter names, its weight files, and a small trained model."""

from pyvit_accel.models.digits import digits_data, digits_model
from pyvit_accel.models.vit import (
    ARCHITECTURES,
    Attention,
    Block,
    LayerScale,
    Mlp,
    PatchEmbed,
    VisionTransformer,
    ViTConfig,
    create_vit,
)
from pyvit_accel.models.weights import infer_config, load_weights, read_config, read_weights, save_weights

__all__ = [
    "ARCHITECTURES",
    "Attention",
    "Block",
    "LayerScale",
    "Mlp",
    "PatchEmbed",
    "ViTConfig",
    "VisionTransformer",
    "create_vit",
    "digits_data",
    "digits_model",
    "infer_config",
    "load_weights",
    "read_config",
    "read_weights",
    "save_weights",
]
