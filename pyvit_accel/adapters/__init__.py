"""Adapters: what foreign blocks are made of, and how an accelerated module takes their place.

    adapter = find(BLOCKS, module)
    parts = adapter.parts(module)               # BlockParts, or Unsupported with the reason
    replacement = adapter.wrap(accelerated, module)

The tables are keyed by dotted class name, matched against the MRO, so no foreign library is imported.
"""

from pyvit_accel.adapters import multihead, timm, torchvision, transformers, transformers_positions, vit
from pyvit_accel.adapters._common import Adapter, find
from pyvit_accel.adapters.multihead import unpack_attention

_SOURCES = (timm, transformers, transformers_positions, torchvision, multihead, vit)


def _table(name: str) -> dict[str, Adapter]:
    return {key: adapter for source in _SOURCES for key, adapter in getattr(source, name, {}).items()}


BLOCKS, ATTENTIONS, MLPS, PATCH_EMBEDS = map(_table, ("BLOCKS", "ATTENTIONS", "MLPS", "PATCH_EMBEDS"))

__all__ = ["ATTENTIONS", "BLOCKS", "MLPS", "PATCH_EMBEDS", "Adapter", "find", "unpack_attention"]
