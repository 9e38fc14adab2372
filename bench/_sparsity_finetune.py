"""A short fine-tune of a pruned model: its logits towards those of the float model on the calibration images."""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit_accel.output import progress

BATCH, RATE, WARM = 16, 1e-4, 0.1


def finetuned(sparse: nn.Module, model: nn.Module, images: Tensor, layers: list[str], epochs: int) -> nn.Module:
    """A copy of `sparse`, trained; in `layers` what is zero stays zero. images (B, Cin, H, W), flipped at random."""
    trained = deepcopy(sparse).requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    masks = {trained.get_submodule(name).weight: trained.get_submodule(name).weight != 0 for name in layers}
    optimizer = torch.optim.AdamW(trained.parameters(), lr=RATE, weight_decay=0)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=WARM)
    for _ in progress(range(epochs), "fine-tune"):
        for some in torch.randperm(len(images), generator=generator).split(BATCH):
            flip = torch.rand(len(some), 1, 1, 1, generator=generator) < 0.5
            x = torch.where(flip, images[some].flip(-1), images[some])
            with torch.no_grad():
                target = model(x).log_softmax(-1)
            loss = F.kl_div(trained(x).log_softmax(-1), target, log_target=True, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for weight, mask in masks.items():
                    weight.mul_(mask)
    return trained.requires_grad_(False)
