"""What all engines get for one model: the same weights, calibration images and evaluation images, as files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from peers.worker import outputs
from pyvit_accel.images import ImageFolder
from pyvit_accel.models import VisionTransformer, create_vit, load_weights, save_weights

CALIBRATION, RANDOM_IMAGES, EVALUATION_BATCH = 32, 8, 10
LABELLED, UNLABELLED, LABELS = "imagenet_val_227", "imagenet_train_256", "labels.json"


@dataclass(frozen=True)
class Inputs:
    """In `folder`: weights.safetensors (float32), and images and calibration in both pixel types.

    labels  of the images; None where weights and images are random
    logits  of the images, by torch in float32
    """

    folder: Path
    labels: np.ndarray | None
    logits: np.ndarray

    @property
    def weights(self) -> str:
        return str(self.folder / "weights.safetensors")

    def images(self, pixels: str) -> str:
        return str(self.folder / f"images.{pixels}.npy")

    def calibration(self, pixels: str) -> str:
        return str(self.folder / f"calibration.{pixels}.npy")


def write_inputs(name: str, data: Path | None, count: int, cache: Path) -> Inputs:
    """Real weights and `count` labelled images when data has weights for the model, else seeded random ones."""
    weights = data and data / "weights" / f"{name}.fp16.safetensors"
    real = weights is not None and weights.is_file()
    torch.manual_seed(0)
    model = (load_weights(name, weights) if real else create_vit(name)).eval().requires_grad_(False)
    config, labels = model.config, None
    if real:
        folder = ImageFolder.open(data / LABELLED, data / LABELS, config.num_classes)
        images, labels = read(folder.sample(count)[0], model)
        calibration, _ = read(ImageFolder.open(data / UNLABELLED).subset(range(CALIBRATION)), model)
    else:
        shape = (RANDOM_IMAGES + CALIBRATION, config.in_channels, config.image_size, config.image_size)
        images, calibration = torch.randint(256, shape, dtype=torch.uint8).split([RANDOM_IMAGES, CALIBRATION])
    folder = cache / f"{name}-{'real' if real else 'random'}"
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder / "weights.safetensors", torch.float32)
    with torch.inference_mode():
        for kind, pixels in (("images", images), ("calibration", calibration)):
            np.save(folder / f"{kind}.uint8.npy", pixels.numpy())
            np.save(folder / f"{kind}.float32.npy", model.patch_embed.normalize(pixels).numpy())
        logits = outputs(lambda part: model(torch.from_numpy(part)).numpy(), images.numpy(), EVALUATION_BATCH)
    return Inputs(folder, None if labels is None else labels.numpy(), logits)


def read(folder: ImageFolder, model: VisionTransformer) -> tuple[Tensor, Tensor | None]:
    """All images of a folder at once."""
    return next(folder.batches(model.config.image_size, model.config.in_channels, len(folder)))
