"""What block reconstruction has decided so far, in a file that only the same call reads.

A file holds an identity, name -> value, of all that the decisions follow from (settings, digests of plans and data),
and the decisions of each finished block: codes, scales, biases, clips, norms.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import pickle
import tempfile
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from pyvit_accel.calibrate.plan import BlockPlan, LinearPlan

LINEARS = ("qkv", "proj", "fc1", "fc2")
DECIDED = ("codes", "w_scale", "bias", "x_scale", "x_clip")
VERSION = 1


def digest_of(what: Tensor | BlockPlan) -> str:
    """SHA-256 of a tensor, or of all that decides what a plan computes."""
    digest = hashlib.sha256()
    for value in [what] if isinstance(what, Tensor) else _values(what):
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            value = value.detach().cpu().contiguous()
            digest.update((ctypes.c_char * value.nbytes).from_address(value.data_ptr()))
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def _values(plan: BlockPlan) -> list[object]:
    found: list[object] = []
    for field in fields(plan):
        value = getattr(plan, field.name)
        if isinstance(value, LinearPlan):
            found += [getattr(value, inner.name) for inner in fields(value) if inner.name != "seen"]
        else:
            found += value if isinstance(value, tuple) else [value]
    return found


def decisions_of(plan: BlockPlan) -> dict[str, object]:
    """What reconstruction decided, in types that torch.load reads without running code."""
    linears = {name: getattr(plan, name) for name in LINEARS}
    return {
        "norm1": plan.norm1,
        "norm2": plan.norm2,
        "head_scale": plan.head_scale,
        **{name: {key: getattr(linear, key) for key in DECIDED} for name, linear in linears.items()},
    }


def restored(plan: BlockPlan, decisions: dict) -> BlockPlan:
    """The plan with these decisions."""
    linears = {name: replace(getattr(plan, name), **decisions[name]) for name in LINEARS}
    return replace(plan, **(decisions | linears))


def write_checkpoint(path: Path, identity: dict[str, object], blocks: dict[int, dict]) -> None:
    """The file appears whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"version": VERSION, "identity": identity, "blocks": blocks}, file)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_checkpoint(path: Path, identity: dict[str, object]) -> dict[int, dict]:
    """Decisions by block; {} when there is no file yet. Raises ValueError when another call wrote it, or none."""
    if not path.parent.is_dir():
        raise ValueError(f"reconstruct: {path.parent} does not exist; create it, the checkpoint goes there")
    if not path.exists():
        return {}
    advice = "delete it or name another checkpoint"
    try:
        content = torch.load(path, weights_only=True)
        version, came, blocks = content["version"], content["identity"], content["blocks"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"reconstruct: {path} is not a checkpoint of a reconstruction ({error}); {advice}") from None
    if version != VERSION:
        raise ValueError(f"reconstruct: {path} has version {version}, expected {VERSION}; {advice}")
    different = [_difference(key, came, identity) for key in {**came, **identity} if came.get(key) != identity.get(key)]
    if different:
        raise ValueError(f"reconstruct: {path} was written with another {', '.join(different)}; {advice}")
    return blocks


def _difference(key: str, came: dict[str, object], here: dict[str, object]) -> str:
    """The name, and the two values where they say something to a reader: digests do not."""
    digests = any(isinstance(identity.get(key), str) for identity in (came, here))
    return key if digests else f"{key} ({came.get(key)} there, {here.get(key)} here)"
