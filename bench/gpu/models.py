"""The part `models`: images a second of whole vision transformers, random weights, uint8 pixels in, in CUDA graphs.

W8A8           static scales, calibrated on random images     W8A8_DYNAMIC   a scale per row, found on the way
W8A8, bytes    attention with an exponential                   W4A8           for small batches
compiled bf16  torch.compile, block by block; "whole": of the whole model at once, at one batch
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bench.gpu import launchers
from bench.gpu.goals import BLOCKS_24
from bench.gpu.made import about
from bench.gpu.shapes import B, H, L
from bench.gpu.task import Task
from bench.gpu.timing import measure, settle
from pyvit_accel import accelerate, backends, recipes
from pyvit_accel.models import create_vit

NAMES = {B: "vit_base_patch16_224", L: "vit_large_patch16_224", H: "vit_huge_patch14_224"}
FLOAT, WHOLE, SPARSE = "compiled bf16", "compiled bf16, whole", BLOCKS_24
RECIPES = {
    "W8A8_DYNAMIC": recipes.W8A8_DYNAMIC,
    "W8A8": recipes.W8A8,
    "W8A8, bytes": recipes.integer(8, 8, softmax=None),
    "W4A8": recipes.integer(4, 8, search=False),
    SPARSE: recipes.SPARSE24(mask="magnitude") + recipes.W8A8_DYNAMIC,  # every layer: made on the CPU, without a gate
}
CASES = (  # of all models the first, then what each is known for
    *((B, batch, name) for batch in (64, 8, 1) for name in ("W8A8_DYNAMIC", FLOAT, "W8A8")),
    (L, 64, "W8A8_DYNAMIC"), (L, 64, FLOAT), (H, 64, "W8A8_DYNAMIC"), (H, 64, FLOAT), (B, 64, SPARSE),
    (L, 64, SPARSE), (B, 64, WHOLE), (B, 1, "W4A8"),
    (B, 64, "W8A8, bytes"), (B, 256, "W8A8_DYNAMIC"), (B, 256, FLOAT), (B, 256, "W8A8"),
    *((model, batch, name) for batch in (1, 8, 256) for model in (L, H) for name in ("W8A8_DYNAMIC", FLOAT)),
)  # fmt: skip
TINY = (("tiny", 2, "W8A8_DYNAMIC"), ("tiny", 2, "W8A8"), ("tiny", 2, FLOAT), ("tiny", 2, WHOLE), ("tiny", 2, "W4A8"),
        ("tiny", 2, SPARSE))  # fmt: skip
BYTES_OURS, BYTES_BF16 = 26, 44  # that a block moves for each token and channel, fused as well as can be
BYTES = {"W4A8": 0.5, SPARSE: 0.625}  # of a weight; else 1
ON_CPU = "on the CPU"
CHECKED = (B, "tiny")  # beside the float model, and beside the same codes on the CPU
FAR = 0.5  # of the norm of the float model's logits: random weights, whose logits say little
FAR_FROM_CPU = 0.05  # of the norm of the same model's logits there: sums in floats move a code now and then
CALIBRATION = 4  # images


def cases(task: Task) -> list[tuple[str, int, str]]:
    if task.device != "cuda":
        return list(TINY)
    more = [(B, 64, "W8A8_DYNAMIC on triton")] if len(launchers.of("lowbit_linear", "cuda")) > 1 else []
    return [*CASES[:3], *more, *([] if task.quick else CASES[3:])]


class Zoo:
    """Models as floats and by recipe, those of a name with the same weights."""

    def __init__(self, device: str) -> None:
        self.device, self.made = device, {}

    def float_model(self, name: str) -> nn.Module:
        """float32, on the CPU."""
        if name not in self.made:
            self.made[name] = random_model(name, self.device)
        return self.made[name]

    def get(self, name: str, implementation: str) -> nn.Module:
        key = name, implementation
        if key not in self.made:
            self.made[key] = self._make(name, implementation)
        return self.made[key]

    def _make(self, name: str, implementation: str) -> nn.Module:
        model = self.float_model(name)
        if implementation not in RECIPES:
            return nn.Module.to(create_like(model), self.device, torch.bfloat16)
        recipe = RECIPES[implementation]
        batches = [images(model, CALIBRATION, "cpu")] if recipe.needs_calibration else None
        made = accelerate(model, recipe, batches)[0]
        if name in CHECKED:
            self.made[ON_CPU, name, implementation] = copy.deepcopy(made)
        return made.to(self.device)


def random_model(name: str, device: str) -> nn.Module:
    """Weights are drawn where that is fast; norms begin as the identity."""
    if name == "tiny":
        return create_vit("vit_tiny_patch16_224", depth=2, image_size=64).eval().requires_grad_(False)
    with torch.device("meta"):
        model = create_vit(NAMES[name])
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for key, p in model.named_parameters():
        p.normal_(std=0.02)
        if p.dim() == 1 and key.endswith("weight"):
            p += 1
    return model.cpu()


def create_like(model: nn.Module) -> nn.Module:
    """A copy of a model that the copy's casts leave alone."""
    with torch.device("meta"):
        new = type(model)(model.config)
    new.load_state_dict(model.state_dict(), assign=True)
    return new.eval().requires_grad_(False)


def images(model: nn.Module, batch: int, device: str) -> Tensor:
    config = model.config
    shape = (batch, config.in_channels, config.image_size, config.image_size)
    return torch.randint(256, shape, dtype=torch.uint8, device=device)


def compiled(model: nn.Module, whole: bool):
    """Calls of a bf16 model. Forgets what was compiled before: of one block's code, few versions are kept."""
    torch._dynamo.reset()
    if whole:
        return torch.compile(model, dynamic=False)
    for block in model.blocks:
        block.compile(dynamic=False)
    return model


def bf16_pixels(pixels: Tensor) -> Tensor:
    """Normalised with the mean and deviation 0.5 of these models."""
    return (pixels.to(torch.bfloat16) - 127.5) / 127.5


def time_model(zoo: Zoo, name: str, batch: int, implementation: str) -> dict:
    model, device = zoo.float_model(name), zoo.device
    recipe, _, backend = implementation.partition(" on ")
    is_float = recipe in (FLOAT, WHOLE)
    row = work(model, name, batch, recipe, None if is_float else backend or "owner")
    sets = [images(model, batch, device) for _ in range(2)]
    if is_float:
        run = compiled(zoo.get(name, f"bf16 for {implementation} x{batch}"), implementation == WHOLE)
        call = lambda pixels: run(bf16_pixels(pixels))  # noqa: E731
    else:
        fast = zoo.get(name, recipe)

        def call(pixels: Tensor) -> Tensor:
            with launchers.Using(backend or "owner", device):
                return fast(pixels)

    few = sets[0][:2]
    checked = name in CHECKED
    truth = model(few.cpu()) if checked else None
    found = measure([lambda p=p: call(p) for p in sets], device, rounds=12 if device == "cuda" else 2)
    row |= {"ms": 1e3 * found.pop("seconds"), "fastest_ms": 1e3 * found.pop("fastest"), "images": batch, **found}
    logits = call(sets[0])[:2].float().cpu()
    if not bool(logits.isfinite().all()):
        raise AssertionError("logits that are not finite")
    if checked and recipe != SPARSE:  # half of random weights is another model
        row["logit_error"] = distance(logits, truth, FAR)
    if checked and not is_float and backends.HAS_CPU_KERNELS and (ON_CPU, name, recipe) in zoo.made:
        row["beside_cpu"] = distance(logits, zoo.made[ON_CPU, name, recipe](few.cpu()), FAR_FROM_CPU)
    return row


def distance(logits: Tensor, truth: Tensor, most: float) -> float:
    found = float((logits - truth).norm() / truth.norm())
    if not found <= most:
        raise AssertionError(f"logits are off by {found:.3g} of their norm, more than {most}")
    return found


def work(model: nn.Module, name: str, batch: int, implementation: str, backend: str | None) -> dict:
    """Operations of all matmuls and attention; bytes of the weights and of what blocks hand on."""
    config = model.config
    tokens, C = config.num_patches + config.num_prefix_tokens, config.dim
    hidden = int(C * config.mlp_ratio)
    macs = tokens * C * (4 * C + 2 * hidden) + 2 * tokens**2 * C
    parameters = sum(p.numel() for p in model.parameters())
    is_float = backend is None
    weights = parameters * (2 if is_float else BYTES.get(implementation, 1))
    moved = config.depth * batch * tokens * C * (BYTES_BF16 if is_float else BYTES_OURS)
    ops = 2 * batch * (config.depth * macs + config.num_patches * C * config.in_channels * config.patch_size**2)
    row = about(f"{name} model x{batch}", implementation, backend, "bf16" if is_float else "int8", ops, 0)
    return row | {"bytes": int(weights + moved)}


def main() -> None:
    task = Task.current()
    zoo = Zoo(task.device)
    with torch.inference_mode():
        if task.device == "cuda":
            settle()
        task.run({
            f"{name} x{batch}, {made}": lambda name=name, batch=batch, made=made: time_model(zoo, name, batch, made)
            for name, batch, made in cases(task)
        })  # fmt: skip


if __name__ == "__main__":
    main()
