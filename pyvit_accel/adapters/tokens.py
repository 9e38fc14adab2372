"""What a whole model does with its tokens: how many come first that are no patches, and which its head reads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

# Parameters of one token each, or of (1, n, C), by the last part of their name.
PREFIX = (
    "cls_token",
    "class_token",
    "class_embedding",
    "dist_token",
    "distillation_token",
    "reg_token",
    "register_tokens",
)
POSITIONS = ("pos_embed", "pos_embedding", "position_embeddings", "position_embedding.weight")
READ_FIRST = (
    "torchvision.models.vision_transformer.VisionTransformer",
    "transformers.models.vit.modeling_vit.ViTForImageClassification",
    "transformers.models.vit_msn.modeling_vit_msn.ViTMSNForImageClassification",
    "transformers.models.deit.modeling_deit.DeiTForImageClassification",
    "transformers.models.deit.modeling_deit.DeiTForImageClassificationWithTeacher",
)


@dataclass(frozen=True)
class TokenLayout:
    """num_tokens: of an image, None where it is not known; reads_first: the head reads tokens of the prefix only."""

    num_prefix_tokens: int
    num_tokens: int | None
    reads_first: bool


def token_layout(model: nn.Module) -> TokenLayout:
    parameters = dict(model.named_parameters())
    prefix = sum(
        p.shape[1] if p.dim() == 3 else 1 for name, p in parameters.items() if name.rpartition(".")[2] in PREFIX
    )
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(model).__mro__}
    config, pool = getattr(model, "config", None), getattr(model, "global_pool", None)
    reads_first = pool == "token" or getattr(config, "head_tokens", None) is not None or bool(names & set(READ_FIRST))
    return TokenLayout(prefix, _num_tokens(model, parameters, prefix), reads_first)


def _num_tokens(model: nn.Module, parameters: dict[str, nn.Parameter], prefix: int) -> int | None:
    """From the grid of patches, or from position embeddings that the prefix has too."""
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    patches = getattr(getattr(model, "config", None), "num_patches", None) if patches is None else patches
    if patches is not None:
        return patches + prefix
    shapes = [p.shape[-2] for name, p in parameters.items() if name.endswith(POSITIONS)]
    return shapes[0] if len(shapes) == 1 else None
