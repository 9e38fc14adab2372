"""Token plans: which tokens a block keeps, drops or merges. Each method is a short file over the token ops."""

from . import clustering, diffrate, evit, super_tokens, tome
from .schedule import METHODS, TokenSchedule, macs, snap_schedule

__all__ = [
    "METHODS",
    "TokenSchedule",
    "clustering",
    "diffrate",
    "evit",
    "macs",
    "snap_schedule",
    "super_tokens",
    "tome",
]
