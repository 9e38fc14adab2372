"""Token plans: which tokens a block keeps, drops or merges. Each method is a short file over the token ops."""

from . import diffrate, evit, tome
from .schedule import METHODS, TokenSchedule, macs, snap_schedule

__all__ = ["METHODS", "TokenSchedule", "diffrate", "evit", "macs", "snap_schedule", "tome"]
