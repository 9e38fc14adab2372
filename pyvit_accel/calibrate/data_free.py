"""Calibration images made from the model alone: pictures of chosen classes, learned from noise.

pixels = sigmoid(sum over k of up_k(z_k))                     z_k is noise of 1/2^k of the resolution; all are learned
loss   = CE(model(pixels), class) + PATCHES spread + IMAGES likeness + SMOOTH variation

content    the class; style, the noise an image starts from: colours and layout differ between images of one class
spread     -log std of the cosines between the patches of an image: objects differ from background, noise does not
likeness   mean square of the cosines between mean patches, less the batch's mean, of different images of a batch
variation  mean |difference| of neighbouring pixels

DeiT-Ti calibrated on 16 images, points of top-1 lost on 650 at W8A8, W4A8, W4A4: real 0.2, 1.9, 4.0; made in 50 steps
-0.3, 3.9, 7.2; 4 made in 10 steps 0.0, 6.2, 9.7; white noise -0.2, 7.1, 15.7. W8A8 takes anything.

Every step sees the images shifted and some of them mirrored. Causal-DFQ (Shang et al., arXiv:2309.13682) has published
no code: this is a reading of it, images in place of its generator. The patch term is that of PSAQ-ViT (Li et al.,
arXiv:2203.02250) with a normal distribution for its density estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit_accel.errors import Unsupported

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEVELS, LR, SHIFT = 6, 0.1, 8  # octaves of noise, Adam's rate, pixels an image moves at most
PATCHES, IMAGES, SMOOTH = 0.1, 0.1, 0.5
FEATURES = 4  # norms whose outputs the patch terms look at, evenly spaced over the depth


def synthesize(
    model: nn.Module,
    images: int = 32,
    classes: int | Sequence[int] | None = None,
    steps: int = 100,
    seed: int = 0,
    progress: Callable[[Iterable, str], Iterable] | None = None,
    *,
    size: tuple[int, int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 16,
) -> Tensor:
    """(images, C, H, W) float32, normalised: (pixels - mean) / std with pixels in 0..1.

        accelerate(model, recipes.W8A8, [calibrate.synthesize(model)])

    classes         how many there are, evenly spaced ones being drawn; or the class of image i, over and over; None: as
                    many as the model tells apart
    progress        progress(steps, label) iterates the steps of one batch
    size, mean, std of the images (C, H, W) that the model takes; None: as its .config says (image_size, in_channels,
                    mean, std), else 3 x 224 x 224 and those of ImageNet

    The same seed gives the same images. The model is left as it is; it returns logits (B, classes), or an object with
    them in .logits. Raises ValueError when numbers do not fit or the loss is not finite, Unsupported for a model whose
    LayerNorms give no tokens (B, N, C).
    """
    if model.training:
        raise ValueError("synthesize: the model is in training mode; call model.eval()")
    if images < 1 or steps < 1 or batch_size < 1:
        raise ValueError(f"synthesize: images={images}, steps={steps}, batch_size={batch_size}; all at least 1")
    size, mean, std = _taken(model, size, mean, std)
    if not len(mean) == len(std) == size[0]:
        raise ValueError(f"synthesize: {len(mean)} means and {len(std)} stds for {size[0]} channels")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    middle, spread = (torch.tensor(t, device=device).view(1, -1, 1, 1) for t in (mean, std))
    generator = torch.Generator().manual_seed(seed)
    if classes is None:
        with torch.no_grad():
            classes = _logits(model(torch.zeros(1, *size, device=device))).shape[1]
    wanted = _classes(classes, images)
    made = []
    for start in range(0, images, batch_size):
        batch = wanted[start : start + batch_size].to(device)
        noise = [z.to(device).requires_grad_() for z in _noise(len(batch), size, generator)]
        indices: Iterable[int] = range(steps)
        if progress is not None:
            indices = progress(indices, f"images {start + 1}-{start + len(batch)} of {images}")
        optimizer = torch.optim.Adam(noise, lr=LR)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in indices:
            pixels = _pixels(noise, size)
            seen = (_moved(pixels, generator) - middle) / spread
            loss = _loss(model, seen, batch) + SMOOTH * _variation(pixels)
            if not bool(loss.isfinite()):
                raise ValueError(
                    f"synthesize: the loss is {loss.item()} at step {step} of images from {start + 1} on; "
                    "look for weights that are not finite"
                )
            for z, gradient in zip(noise, torch.autograd.grad(loss, noise), strict=True):
                z.grad = gradient
            optimizer.step()
            schedule.step()
        made.append(((_pixels(noise, size).detach() - middle) / spread).cpu())
    return torch.cat(made)


def _taken(
    model: nn.Module,
    size: tuple[int, int, int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[tuple[int, int, int], Sequence[float], Sequence[float]]:
    """What is not given, from the model's config."""
    config = getattr(model, "config", None)
    side = getattr(config, "image_size", 224)
    size = (getattr(config, "in_channels", 3), side, side) if size is None else size
    mean = getattr(config, "mean", IMAGENET_MEAN) if mean is None else mean
    return size, mean, getattr(config, "std", IMAGENET_STD) if std is None else std


def _classes(classes: int | Sequence[int], count: int) -> Tensor:
    """The class of each image, (count,)."""
    if isinstance(classes, int):
        if classes < 1:
            raise ValueError(f"synthesize: classes={classes}; give their number, or a list of them")
        return torch.arange(count) * classes // count if count <= classes else torch.arange(count) % classes
    if not len(classes) or min(classes) < 0:
        raise ValueError(f"synthesize: classes={list(classes)}; give one or more, from 0 on")
    return torch.tensor([classes[i % len(classes)] for i in range(count)])


def _noise(count: int, size: tuple[int, int, int], generator: torch.Generator) -> list[Tensor]:
    """One tensor an octave, finest first."""
    channels, height, width = size
    octaves = min(LEVELS, int(math.log2(min(height, width))) + 1)
    sizes = [(math.ceil(height / 2**k), math.ceil(width / 2**k)) for k in range(octaves)]
    return [torch.randn(count, channels, h, w, generator=generator) for h, w in sizes]


def _pixels(noise: list[Tensor], size: tuple[int, int, int]) -> Tensor:
    """(B, C, H, W) in 0..1. Amplitudes grow with the wavelength, as in photographs, and their squares add up to 1."""
    unit = math.sqrt(sum(4.0**k for k in range(len(noise))))
    parts = (z if k == 0 else F.interpolate(z, size[1:], mode="bilinear") for k, z in enumerate(noise))
    return torch.sigmoid(sum(part * (2**k / unit) for k, part in enumerate(parts)))


def _moved(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted around the edges, all alike; every second image, by chance, mirrored."""
    down, right = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator).tolist()
    mirrored = (torch.rand(len(pixels), 1, 1, 1, generator=generator) < 0.5).to(pixels.device)
    pixels = pixels.roll((down, right), (2, 3))
    return torch.where(mirrored, pixels.flip(3), pixels)


def _variation(pixels: Tensor) -> Tensor:
    return pixels.diff(dim=2).abs().mean() + pixels.diff(dim=3).abs().mean()


def _loss(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    logits, features = _watched(model, images, classes)
    loss = F.cross_entropy(logits, classes)
    for y in features:
        y = F.normalize(y - y.mean((0, 1)), dim=-1)
        cosines = y @ y.transpose(1, 2)
        loss = loss - PATCHES / len(features) * cosines.flatten(1).std(dim=1).clamp_min(1e-6).log().mean()
        if len(y) > 1:
            centre = F.normalize(y.mean(1) - y.mean((0, 1)), dim=-1)
            others = ~torch.eye(len(y), dtype=torch.bool, device=y.device)
            loss = loss + IMAGES / len(features) * (centre @ centre.T)[others].square().mean()
    return loss


def _watched(model: nn.Module, images: Tensor, classes: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, classes) and, from FEATURES of the norms, tokens (B, N, C)."""
    tokens: list[Tensor] = []

    def hook(module, args, output):
        if output.dim() == 3:
            tokens.append(output)

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.LayerNorm)]
    try:
        with torch.enable_grad():
            output = model(images)
    finally:
        for handle in handles:
            handle.remove()
    logits = _logits(output)
    if int(classes.max()) >= logits.shape[1]:
        wanted = int(classes.max())
        raise ValueError(f"synthesize: asked for class {wanted}, but the model has {logits.shape[1]}")
    if not tokens:
        raise Unsupported("synthesize: no LayerNorm of the model gave tokens (B, N, C); is it a transformer?")
    return logits, [tokens[round(i * (len(tokens) - 1) / FEATURES)] for i in range(1, FEATURES + 1)]


def _logits(output: object) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise Unsupported(f"synthesize: the model gave {came}; expected logits (B, classes)")
    return logits
