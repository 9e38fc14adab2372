"""Adapters: what foreign blocks are made of, and how an accelerated module takes their place.

    adapter = find(BLOCKS, module)
    parts = adapter.parts(module)               # BlockParts, or Unsupported with the reason
    replacement = adapter.wrap(accelerated, module)

The tables are keyed by dotted class name, matched against the MRO, so no foreign library is imported.
"""

from pyvit_accel.adapters import multihead, timm, torchvision, transformers, vit
from pyvit_accel.adapters._common import Adapter, find
from pyvit_accel.adapters.multihead import unpack_attention

BLOCKS: dict[str, Adapter] = timm.BLOCKS | transformers.BLOCKS | torchvision.BLOCKS | vit.BLOCKS
ATTENTIONS: dict[str, Adapter] = timm.ATTENTIONS | transformers.ATTENTIONS | multihead.ATTENTIONS | vit.ATTENTIONS
MLPS: dict[str, Adapter] = timm.MLPS | transformers.MLPS | torchvision.MLPS | vit.MLPS
PATCH_EMBEDS: dict[str, Adapter] = timm.PATCH_EMBEDS | torchvision.PATCH_EMBEDS | vit.PATCH_EMBEDS

__all__ = ["ATTENTIONS", "BLOCKS", "MLPS", "PATCH_EMBEDS", "Adapter", "find", "unpack_attention"]
