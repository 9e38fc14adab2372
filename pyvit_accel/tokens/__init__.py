"""Token plans: which tokens a block keeps, drops or merges. Each method is a short file over the token ops."""

from . import (
    clustering,
    diffrate,
    dynamic_vit,
    evit,
    patch_dropout,
    prumerge,
    sit,
    super_tokens,
    tofu,
    tome,
    top_vim,
    zero_tprune,
)
from .schedule import METHODS, TokenSchedule, macs, snap_schedule

__all__ = [
    "METHODS",
    "TokenSchedule",
    "clustering",
    "diffrate",
    "dynamic_vit",
    "evit",
    "macs",
    "patch_dropout",
    "prumerge",
    "sit",
    "snap_schedule",
    "super_tokens",
    "tofu",
    "tome",
    "top_vim",
    "zero_tprune",
]
