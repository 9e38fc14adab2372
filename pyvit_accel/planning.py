"""Plans of the blocks of a model: folds and formats first, then the searches, which see what the blocks before give.

    observed --build.plan_block--> plans --calibrate.refine, .reconstruct--> plans --build.pack_block--> modules

Each block is searched on the outputs of the quantized blocks before it, so that later ones make up for what earlier
ones lost. Blocks that calibration could not keep the inputs of (a mask came with them) are not searched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from pyvit_accel import adapters, calibrate
from pyvit_accel.adapters import BLOCKS
from pyvit_accel.calibrate import BlockPlan, Kept, Observed, Reconstruction
from pyvit_accel.errors import Unsupported
from pyvit_accel.modules import build
from pyvit_accel.modules.build import Scheme

MOST_IMAGES = 256  # that searches see


@dataclass(frozen=True)
class Calibration:
    """What calibration found for one model under one scheme; plans by the float block they stand for."""

    observed: Observed
    scheme: Scheme
    plans: Mapping[nn.Module, BlockPlan]


def is_block(module: nn.Module) -> bool:
    return adapters.find(BLOCKS, module) is not None


def calibrated(
    scheme: Scheme, search: bool, reconstruction: Reconstruction | None, model: nn.Module, batches: Any
) -> Calibration:
    """Watch the model on the batches and plan its blocks. search: whether codes, clips and biases are searched."""
    searched = search or reconstruction is not None
    observed = calibrate.observe(model, batches, keep=is_block if searched else None, images=MOST_IMAGES)
    scheme = scheme.with_observed(observed)
    plans: dict[nn.Module, BlockPlan] = {}
    with torch.no_grad():
        for i, chain in enumerate(_chains(observed.blocks)):
            plans |= _plan_chain(chain, scheme, search, _of_chain(i, reconstruction))
    return Calibration(observed, scheme, plans)


def _chains(blocks: Iterable[Kept]) -> Iterator[list[Kept]]:
    """Runs of blocks, each fed by the one before."""
    chain: list[Kept] = []
    for kept in blocks:
        if kept.inputs is not None and chain:
            yield chain
            chain = []
        chain.append(kept)
    if chain:
        yield chain


def _of_chain(i: int, reconstruction: Reconstruction | None) -> Reconstruction | None:
    """A checkpoint belongs to one chain: those after the first have a number behind its name."""
    if reconstruction is None or reconstruction.checkpoint is None or i == 0:
        return reconstruction
    return replace(reconstruction, checkpoint=f"{reconstruction.checkpoint}.{i}")


def _plan_chain(
    chain: list[Kept], scheme: Scheme, search: bool, reconstruction: Reconstruction | None
) -> dict[nn.Module, BlockPlan]:
    """A chain ends at a block that cannot be planned: its float form would not be what follows it."""
    if search:
        scheme = replace(scheme, bias_correction=False)  # refine corrects them, for the codes that it finds
    plans: dict[nn.Module, BlockPlan] = {}
    x = inputs = chain[0].inputs
    for kept in progress(chain, "calibrating") if search else chain:
        parts = _parts(kept.block)
        if parts is None:
            break
        plan = build.plan_block(parts, scheme)
        if search:
            plan = calibrate.refine(plan, x)
            x = calibrate.block_output(plan, x)
        plans[kept.block] = plan
    if reconstruction is None or not plans:
        return plans
    blocks, given = [_tensor_out(block) for block in plans], list(plans.values())
    with torch.enable_grad():
        learned = calibrate.reconstruct(given, blocks, inputs, reconstruction, progress=progress)
    return dict(zip(plans, learned, strict=True))


def _parts(block: nn.Module) -> Any:
    """What the block is made of; None where block_output does not say what it computes."""
    try:
        parts = adapters.find(BLOCKS, block).parts(block)
    except Unsupported:
        return None
    attention = parts.attention
    return None if attention.q_norm is not None or attention.k_norm is not None else parts


def _tensor_out(block: nn.Module) -> Any:
    """The block as a function of one tensor: some return a tuple."""

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = block(x.to(next(block.parameters()).dtype))
        return (y[0] if isinstance(y, (tuple, list)) else y).float()

    return call


def progress(items: Iterable, label: str) -> Iterable:
    """items, behind a progress bar when stderr is a terminal and tqdm is installed."""
    if find_spec("tqdm") is None:
        return items
    from tqdm import tqdm

    return tqdm(items, desc=label, leave=False, disable=None)
