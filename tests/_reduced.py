"""Token reduction written out in float64, image by image, as the papers have it: A materialised, rows moved after the
projection; and the same model made of TokenBlocks with the steps of tokens/."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from _vits import pixels, vit
from torch import Tensor
from torch._subclasses import FakeTensorMode

from pyvit_accel.adapters import BLOCKS, find
from pyvit_accel.models import VisionTransformer
from pyvit_accel.modules.token_block import TokenBlock
from pyvit_accel.modules.token_step import TokenState
from pyvit_accel.tokens import TokenSchedule

VARIANTS = {
    "class": {},
    "distilled, layer scale": {"distilled": True, "layer_scale": True},
    "registers, qk norm": {"num_registers": 2, "no_embed_class": True, "qk_norm": True},
}
DEPTH = 5


def small_vit(**overrides) -> VisionTransformer:
    """5 blocks, 2 heads of 24 channels, 5 x 5 patches."""
    return vit(**{"image_size": 20, "patch_size": 4, "dim": 48, "depth": DEPTH, "num_heads": 2} | overrides)


def small_images() -> Tensor:
    return pixels(3, size=20)


@dataclass
class Heads:
    """q, k and probabilities as a test has them, for a step called alone."""

    row: Tensor | None = None
    key: Tensor | None = None
    scale: float = 1.0

    def class_row(self) -> Tensor:
        return self.row

    def mean_key(self) -> Tensor:
        return self.key


def reduced(
    model: VisionTransformer, schedule: TokenSchedule, keeps_dropped: bool = False, restores: bool = False
) -> tuple[VisionTransformer, TokenState]:
    """A copy of the model made of TokenBlocks."""
    model = copy.deepcopy(model)
    state = TokenState(model.num_prefix_tokens, keeps_dropped)
    steps = schedule.steps(len(model.blocks))
    for i, (block, step) in enumerate(zip(model.blocks, steps, strict=True)):
        model.blocks[i] = TokenBlock(find(BLOCKS, block).parts(block))
        model.blocks[i].reduce(step, state, is_first=i == 0, restores=restores and i == len(steps) - 1)
    return model, state


def tokens_of(model: VisionTransformer, images: Tensor) -> Tensor:
    """(B, M, C) that the last block gives."""
    with torch.inference_mode():
        x = model._embed(images)
        for block in model.blocks:
            x = block(x)
    return x


@dataclass
class Image:
    """Of one image between two blocks: size (N,) or None, parts[m] the first tokens that row m is made of, held what a
    dropped token last was."""

    prefix: int
    size: Tensor | None
    parts: list[list[int]]
    held: dict[int, Tensor] = field(default_factory=dict)

    def drop(self, rows: list[int], x: Tensor) -> None:
        for row in rows:
            self.held |= {token: x[row] for token in self.parts[row]}

    def keep(self, rows: list[int], x: Tensor) -> None:
        """x (N, C) holds what the other rows last were."""
        self.drop(sorted(set(range(len(self.parts))) - set(rows)), x)
        self.parts = [self.parts[row] for row in rows]
        self.size = None if self.size is None else self.size[rows]


@dataclass
class Seen:
    """Of one block: x that came in, y after attention and residual, both (N, C), q and k (H, N, D), A (H, N, N)."""

    x: Tensor
    y: Tensor
    q: Tensor
    k: Tensor
    A: Tensor
    scale: float


Rule = Callable[[int, Seen, Image], Tensor]  # what goes into the block's MLP


def eager(model: VisionTransformer, images: Tensor, rule: Rule) -> list[tuple[Tensor, Image]]:
    """Of every image the rows that leave the last block, and where they come from."""
    model = copy.deepcopy(model).double()
    with torch.inference_mode():
        embedded = model._embed(images)
        return [_eager_image(model, x, rule) for x in embedded]


def _eager_image(model: VisionTransformer, x: Tensor, rule: Rule) -> tuple[Tensor, Image]:
    image = Image(model.num_prefix_tokens, None, [[i] for i in range(len(x))])
    for layer, block in enumerate(model.blocks):
        a = block.attn
        q, k, v = a.qkv(block.norm1(x)).view(len(x), 3, a.num_heads, -1).permute(1, 2, 0, 3)
        q, k = a.q_norm(q), a.k_norm(k)
        logits = q @ k.mT * a.scale
        if image.size is not None:
            logits = logits + image.size.log()
        A = logits.softmax(-1)
        y = x + block.ls1(a.proj((A @ v).transpose(0, 1).flatten(1)))
        y = rule(layer, Seen(x, y, q, k, A, a.scale), image)
        x = y + block.ls2(block.mlp(block.norm2(y)))
    return x, image


def ranked(scores: Tensor, first: int) -> list[int]:
    """Rows from `first` on, by descending score, equal ones by index."""
    return sorted(range(first, len(scores)), key=lambda j: (-scores[j].item(), j))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a / a.norm(dim=-1, keepdim=True)) @ (b / b.norm(dim=-1, keepdim=True)).mT


def pairs(seen: Seen, prefix: int, r: int) -> list[list[int]]:
    """The rows that each new row is made of after r merges, the one that is no source last."""
    N = len(seen.x)
    r = min(r, (N - prefix) // 2)
    similarity = cosine(seen.k.mean(0), seen.k.mean(0))
    odd = [b for b in range(N) if b % 2 and b >= prefix]
    even = [a for a in range(N) if a % 2 == 0 and a >= prefix]
    partner = {a: max(odd, key=lambda b, a=a: (similarity[a, b].item(), -b)) for a in even}
    merged = sorted(even, key=lambda a: (-similarity[a, partner[a]].item(), a))[:r]
    new = [[row] for row in [*range(prefix), *(a for a in even if a not in merged), *odd]]
    for a in sorted(merged, reverse=True):
        next(rows for rows in new if rows[-1] == partner[a]).insert(0, a)
    return new


def merge_rows(image: Image, new: list[list[int]], y: Tensor, size: Tensor, mean: Callable) -> Tensor:
    image.parts = [[token for row in rows for token in image.parts[row]] for rows in new]
    return torch.stack([mean(y[rows], size[rows]) for rows in new])


def weighted_mean(rows: Tensor, size: Tensor) -> Tensor:
    return (size[:, None] * rows).sum(0) / size.sum()


def mlerp(rows: Tensor, size: Tensor) -> Tensor:
    mean = rows.mean(0)
    return mean / mean.norm() * rows.norm(dim=1).max()


def tome_rule(r: int, proportional: bool = True) -> Rule:
    def rule(layer: int, seen: Seen, image: Image) -> Tensor:
        size = torch.tensor([float(len(tokens)) for tokens in image.parts]).double()
        new = pairs(seen, image.prefix, r)
        y = merge_rows(image, new, seen.y, size, weighted_mean)
        image.size = torch.stack([size[rows].sum() for rows in new]) if proportional else None
        return y

    return rule


def tofu_rule(r: int, switch: int) -> Rule:
    def rule(layer: int, seen: Seen, image: Image) -> Tensor:
        new = pairs(seen, image.prefix, r)
        if layer < switch:
            rows = [members[-1] for members in new]
            image.keep(rows, seen.x)
            return seen.y[rows]
        size = torch.ones(len(seen.y)).double() if image.size is None else image.size
        y = merge_rows(image, new, seen.y, size, mlerp)
        image.size = torch.stack([size[rows].sum() for rows in new])
        return y

    return rule


def evit_rule(rate: float, layers: tuple[int, ...], fuse: bool) -> Rule:
    def rule(layer: int, seen: Seen, image: Image) -> Tensor:
        if layer not in layers:
            return seen.y
        p, N = image.prefix, len(seen.y)
        a = seen.A[:, 0].mean(0)
        kept = ranked(a, p)[: math.ceil(rate * (N - p))]
        dropped = sorted(set(range(p, N)) - set(kept))
        image.keep([*range(p), *kept], seen.y if fuse else seen.x)
        y = seen.y[[*range(p), *kept]]
        if not fuse:
            return y
        image.parts.append([])
        return torch.cat([y, (a[dropped, None] * seen.y[dropped]).sum(0, keepdim=True)])

    return rule


def diffrate_rule(prune: tuple[int, ...], merge: tuple[int, ...]) -> Rule:
    def rule(layer: int, seen: Seen, image: Image) -> Tensor:
        p, N = image.prefix, len(seen.y)
        kept = min(prune[layer], N)
        left = min(merge[layer], kept)
        order = [*range(p), *ranked(seen.A[:, 0].mean(0), p)][:kept]
        image.keep(order, seen.x)
        y, size = seen.y[order], torch.ones(kept).double() if image.size is None else image.size
        if left == kept:
            return y
        similarity = cosine(y, y)
        new = [[row] for row in range(left)]
        total = size[:left].clone()
        for source in range(left, kept):
            best = max(range(p, left), key=lambda b, a=source: (similarity[a, b].item(), -b))
            new[best].append(source)
            total[best] += size[source] * similarity[source, best]
        y = merge_rows(image, new, y, size, lambda rows, _: rows.mean(0))
        image.size = total
        return y

    return rule


def importance(q: Tensor, k: Tensor, scale: float, iterations: int, low: float = 0.01, high: float = 0.7) -> Tensor:
    """Zero-TPrune's scores (N,) of q and k (H, N, D), the class token's first vote sqrt(N) times the others'."""
    N = q.shape[1]
    A = (q @ k.mT * scale).softmax(-1)
    start = torch.full((N,), 1 / N).double()
    start[0] *= math.sqrt(N)
    heads = []
    for of_head in A:
        s = start
        for _ in range(iterations):
            s = torch.stack([sum(of_head[j, i] * s[j] for j in range(N)) for i in range(N)])
        heads.append(s)
    passing = [s for s in heads if low <= ((N * s - (N * s).mean()) ** 2).mean() <= high] or heads
    return (sum(s**2 for s in passing) / len(passing)).sqrt()


def zero_tprune_rule(rate: float, similar: int, layers: tuple[int, ...], iterations: dict[int, int]) -> Rule:
    def rule(layer: int, seen: Seen, image: Image) -> Tensor:
        if layer not in layers:
            return seen.y
        p, N = image.prefix, len(seen.y)
        left = list(range(N))
        order = ranked(importance(seen.q, seen.k, seen.scale, 1), p)
        half = math.ceil(len(order) / 2)
        better, worse = order[:half], order[half:]
        keys = seen.k.transpose(0, 1).flatten(1)
        likeness = cosine(keys[worse], keys[better]).max(1).values
        gone = [worse[i] for i in ranked(likeness, 0)[:similar]]
        left = [row for row in left if row not in gone]
        scores = importance(seen.q[:, left], seen.k[:, left], seen.scale, iterations[layer])
        kept = ranked(scores, p)[: math.ceil(rate * (N - p))]
        rows = [*range(p), *sorted(left[j] for j in kept)]
        image.keep(rows, seen.x)
        return seen.y[rows]

    return rule


def unreduced(layer: int, seen: Seen, image: Image) -> Tensor:
    return seen.y


@functools.cache
def model_of(variant: str) -> tuple[VisionTransformer, Tensor, float]:
    """A model, images, and how far its float32 tokens are from float64 when none is reduced."""
    model, images = small_vit(**VARIANTS[variant]), small_images()
    truth = torch.stack([x for x, _ in eager(model, images, unreduced)])
    return model, images, (tokens_of(model, images) - truth).abs().max().item()


def check(variant: str, schedule: TokenSchedule, rule: Rule, keeps_dropped: bool = True) -> None:
    """TokenBlocks give the rows, their origin and the restored map that the rule gives.

    Rounding: fewer rows pass through the same matmuls, so 4 times the error of all rows leaves room for what the
    steps add, a mean or two per row; the wrong row, weight or size is further off by orders of magnitude.
    """
    model, images, error = model_of(variant)
    new, state = reduced(model, schedule, keeps_dropped)
    x = tokens_of(new, images)
    truth = eager(model, images, rule)
    assert (x - torch.stack([rows for rows, _ in truth])).abs().max() <= 4 * error
    N = state.shape[1]
    assert state.origin().tolist() == [origin(image, N) for _, image in truth]
    if keeps_dropped:
        whole = torch.stack([restored(rows, image, N) for rows, image in truth])
        assert (state.restore(x) - whole).abs().max() <= 4 * error
        last, _ = reduced(model, schedule, True, restores=True)
        assert torch.equal(tokens_of(last, images), state.restore(x))
    head = model.config.head_tokens
    assert (new(images) - _logits(model, truth, head)).abs().max() <= 4 * error * model.head.weight.abs().sum(1).max()


def _logits(model: VisionTransformer, truth: list[tuple[Tensor, Image]], head: int) -> Tensor:
    model = copy.deepcopy(model).double()
    with torch.inference_mode():
        return model.forward_head(model.norm(torch.stack([rows[:head] for rows, _ in truth])))


def check_batch(schedule: TokenSchedule) -> None:
    """Two runs are the same bits, images do not see each other, and nothing is read back by the host."""
    model, images, _ = model_of("class")
    new, _ = reduced(model, schedule)
    x = tokens_of(new, images)
    assert torch.equal(tokens_of(new, images), x)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(tokens_of(new, images[order]), x[order])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # raises where a value would be read
        assert tokens_of(new, mode.from_tensor(images)).shape == x.shape


def check_config(schedule: TokenSchedule) -> None:
    """Every step is rebuilt from its config, which survives JSON, and its weights."""
    for step in filter(None, schedule.steps(DEPTH)):
        new = type(step)(**json.loads(json.dumps(step.config())))
        assert new.config() == step.config() and new.rows(26, 1) == step.rows(26, 1)
        new.load_state_dict(step.state_dict())
    assert TokenSchedule.from_json(schedule.to_json()) == schedule


def restored(x: Tensor, image: Image, num_tokens: int) -> Tensor:
    """(N, C) of the first tokens: the row they are part of now, or what they last were."""
    rows = {token: x[row] for row, tokens in enumerate(image.parts) for token in tokens} | image.held
    return torch.stack([rows[token] for token in range(num_tokens)])


def origin(image: Image, num_tokens: int) -> list[int]:
    rows = {token: row for row, tokens in enumerate(image.parts) for token in tokens}
    return [rows.get(token, -1) for token in range(num_tokens)]
