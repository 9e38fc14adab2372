"""2:4 training from dense weights: the digits model, in the three forms of the backward pass.

    python bench/train_sparse24.py [epochs]

The Linears of the blocks become Sparse24Training, masks by magnitude anew every four steps; at the end SPARSE24 packs
them with the masks they have. Prints the accuracy on the held-out third, dense, pruned without training, and after
every epoch. Four epochs take a minute for every form on one CPU core that has nothing else to do.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit_accel import accelerate, recipes
from pyvit_accel.models import digits_data, digits_model
from pyvit_accel.modules import train_sparse24
from pyvit_accel.modules.sparse24_training import BACKWARDS

SEED, EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, EVERY = 0, 4, 100, 5e-4, 0.01, 4
DECAYS = (0.0, 2e-4)  # of SR-STE


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * (model.eval()(images).argmax(1) == labels).double().mean().item()


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    model.train()
    for index in torch.randperm(len(images)).split(BATCH):
        loss = F.cross_entropy(model(images[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(epochs: int) -> None:
    train, test = digits_data("train"), digits_data("test")
    print(f"dense {accuracy(digits_model(), *test):.2f} %")
    for mask in ("magnitude", "sparsegpt"):
        pruned, _ = accelerate(digits_model(), recipes.SPARSE24(mask=mask), [train[0][:256]])
        print(f"pruned by {mask}, not trained {accuracy(pruned, *test):.2f} %")
    for backward in BACKWARDS:
        for decay in DECAYS:
            torch.manual_seed(SEED)
            model = digits_model().requires_grad_()
            train_sparse24(model, "blocks.*", backward=backward, decay=decay, every=EVERY)
            optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
            found = [accuracy(model, *test)]
            for _ in range(epochs):
                epoch(model, optimizer, *train)
                found.append(accuracy(model, *test))
            packed, _ = accelerate(model.eval(), recipes.SPARSE24(mask="magnitude"))
            steps = ", ".join(f"{a:.2f}" for a in found)
            print(f"{backward}, decay {decay}: {steps}; packed {accuracy(packed, *test):.2f} %", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else EPOCHS)
