"""find_schedule: which tokens a model can do without, by what they cost on this machine and what it loses without them.

    found = find_schedule(model, images, labels, max_drop=0.01)
    found.save_chart("curve.png")
    found.save("schedule.json")
    reduce_tokens(model, found.schedule)

    time of the parts of a block, by tokens   measured once; says how many tokens a family may keep at a speed
    families, slower to faster                until one loses too much
    the fastest that does not                 its counts of single blocks, at the same time, by the least divergence

Of every schedule that is tried the loss is measured on all images, and the latency beside the model with all tokens.
"""

from __future__ import annotations

import bisect
import copy
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from pyvit_accel.adapters.tokens import token_layout
from pyvit_accel.modules.token_block import ReducingBlock
from pyvit_accel.modules.token_step import Rows
from pyvit_accel.planning import progress
from pyvit_accel.schedule_curve import FoundSchedule, Point
from pyvit_accel.schedule_families import FAMILIES
from pyvit_accel.token_reduction import reduce_tokens
from pyvit_accel.tokens import TokenSchedule, macs

METHODS = ("tome", "tome, falling", "tome, late", "diffrate", "diffrate, ending", "diffrate, merging", "evit")
TARGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the blocks' time
COUNTS = 9  # token counts at which a block is timed; between them its time is on a line
TABLE_ROUNDS = 15
HALVINGS = 14  # of `part`: below one token of thousands
TURNED = (1.5, 1 / 1.5)  # a block's weight, up and down
BUSY = 1.5
FASTER = 0.97  # a refined schedule is driven on while it stays within max_drop, to this part of its time each time


def find_schedule(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    labels: Tensor | Sequence | None = None,
    *,
    max_drop: float = 0.01,
    methods: Sequence[str] | None = None,
    candidates: Sequence[TokenSchedule] = (),
    batch: int = 8,
    rounds: int = 9,
    refine: int = 24,
) -> FoundSchedule:
    """The fastest schedule for a model, float or accelerated, that loses at most max_drop; the model is not changed.

    images      as the model takes them, one tensor or batches; what is lost is known to 1 / their number
    labels      (n,) class indices, or a batch of them for each of the images; None: what counts is agreement
    max_drop    part of the images by which top-1 may be lower: 0.01 is one point
    methods     of FAMILIES; None: METHODS, or those that merge where the head may read patches
    candidates  more schedules to try
    batch       images at once when latency is measured; rounds: of that, medians count
    refine      schedules to try at most in finding better counts for single blocks; 0: none

    Calibrate and search on other images than those you report on. Raises ValueError for images, labels and numbers that
    do not fit, a model in training mode or one that gives no classes; Unsupported for one without blocks to reduce.
    """
    _check(model, max_drop, batch, rounds, methods)
    plain, work = copy.deepcopy(model), copy.deepcopy(model)
    reduce_tokens(plain, None)
    search = _Search(plain, work, *_read(images, labels), max_drop, batch, rounds)
    names = METHODS if methods is None else methods
    if methods is None and not search.layout.reads_first:
        names = tuple(name for name in METHODS if not FAMILIES[name].drops)
    for schedule in candidates:
        schedule.rows(search.depth, search.num_tokens, search.prefix)
        search.add(schedule.method, schedule)
    for name in progress(names, "families of schedules"):
        search.walk(name)
    search.refine(refine)
    if search.stumbled:
        warnings.warn("find_schedule: median latencies are far above the fastest; other work runs here", stacklevel=2)
    best = search.fastest()
    schedule = None if best is None else best.schedule
    return FoundSchedule(schedule, tuple(search.points.values()), max_drop, search.images, len(search.few))


def _check(model: nn.Module, max_drop: float, batch: int, rounds: int, methods: Sequence[str] | None) -> None:
    if not 0 <= max_drop < 1:
        raise ValueError(f"find_schedule: max_drop={max_drop}; use a part of the images in 0..1, 0.01 is one point")
    if batch < 1 or rounds < 1:
        raise ValueError(f"find_schedule: batch={batch} and rounds={rounds} must be positive")
    if model.training:
        raise ValueError("find_schedule: the model is in training mode; call model.eval() first")
    unknown = [name for name in methods or () if name not in FAMILIES]
    if unknown:
        raise ValueError(f"find_schedule: methods {', '.join(unknown)} are not among {'; '.join(FAMILIES)}")


def _read(images: Tensor | Iterable[Tensor], labels: Tensor | Sequence | None) -> tuple[list[Tensor], Tensor | None]:
    """Batches, and the labels (n,) int64 of all."""
    batches = list(images.split(32)) if isinstance(images, Tensor) else list(images)
    strange = next((type(b).__name__ for b in batches if not isinstance(b, Tensor)), None)
    if strange is not None or sum(len(b) for b in batches) == 0:
        came = "no images" if strange is None else f"a batch that is a {strange}"
        raise ValueError(f"find_schedule: {came}; pass a tensor of images, or batches of them, and labels apart")
    if labels is None:
        return batches, None
    if not isinstance(labels, Tensor):
        labels = torch.cat([torch.zeros(0, dtype=torch.long), *(torch.as_tensor(part).reshape(-1) for part in labels)])
    count = sum(len(b) for b in batches)
    if labels.shape != (count,) or labels.is_floating_point():
        came = f"labels {tuple(labels.shape)} of {labels.dtype} for {count} images"
        raise ValueError(f"find_schedule: {came}; pass one class index for each")
    return batches, labels.cpu().long()


class _Search:
    """plain keeps its tokens, work gets the schedules; points by schedule, in the order they were tried."""

    def __init__(
        self, plain: nn.Module, work: nn.Module, batches: list[Tensor], labels: Tensor | None, max_drop: float,
        batch: int, rounds: int,
    ) -> None:  # fmt: skip
        self.plain, self.work, self.batches, self.labels = plain, work, batches, labels
        self.max_drop, self.rounds = max_drop, rounds
        self.stumbled = False  # whether a latency was measured while other work ran
        self.images = sum(len(b) for b in batches)
        self.few = torch.cat([b[:batch] for b in batches[:batch]])[:batch]
        self.points: dict[str, Point] = {}
        self.weights: dict[str, list[float]] = {}  # of the families' schedules
        reduce_tokens(work, TokenSchedule("tome", {"r": 0}))
        self.blocks = [m for m in work.modules() if isinstance(m, ReducingBlock)]
        self.depth, self.layout = len(self.blocks), token_layout(work)
        self.prefix = self.layout.num_prefix_tokens
        self.truth = self._log_probabilities(plain)
        self.correct = self._right(self.truth)
        self.seconds = self._block_seconds()

    def _log_probabilities(self, model: nn.Module) -> Tensor:
        with torch.inference_mode():
            logits = torch.cat([_logits(model(batch)).double().cpu() for batch in self.batches])
        if not logits.isfinite().all():
            raise ValueError("find_schedule: the model gave NaN or infinite outputs; check its weights")
        return logits.log_softmax(1)

    def _right(self, found: Tensor) -> int | None:
        if self.labels is None:
            return None
        right = int((found.argmax(1) == self.labels).sum())
        if right == 0:
            raise ValueError(f"find_schedule: none of {self.images} labels is what the model says; check their indices")
        return right

    def _block_seconds(self) -> dict[int, tuple[float, float]]:
        """By tokens: up to the attention, and from the projection on, of the block in the middle; fastest rounds."""
        block, inputs = self.blocks[self.depth // 2], []
        hook = block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        try:
            with torch.inference_mode():
                self.work(self.few)
        finally:
            hook.remove()
        x = inputs[0]
        self.num_tokens, self.dim = x.shape[1], x.shape[2]
        first = min(self.prefix + 1, self.num_tokens)
        counts = {first + round(i / (COUNTS - 1) * (self.num_tokens - first)) for i in range(COUNTS)}
        fastest = dict.fromkeys(sorted(counts), (float("inf"), float("inf")))
        with torch.inference_mode():
            for _ in range(TABLE_ROUNDS):
                for n, before in fastest.items():
                    rows = x[:, :n].contiguous()
                    start = _now(rows)
                    attended = block.attend(block.heads(rows), None)
                    middle = _now(rows)
                    block.feed_forward(block.project(attended, rows, None, None))
                    times = middle - start, _now(rows) - middle
                    fastest[n] = (min(before[0], times[0]), min(before[1], times[1]))
        for few, more in list(zip(fastest, list(fastest)[1:], strict=False))[::-1]:  # whatever else ran meanwhile
            fastest[few] = tuple(map(min, fastest[few], fastest[more]))
        return fastest

    def _cost(self, rows: Sequence[Rows]) -> float:
        """Seconds of the blocks of one batch, by the table."""
        counts = list(self.seconds)

        def at(n: int, place: int) -> float:
            i = min(max(bisect.bisect_left(counts, n), 1), len(counts) - 1) if len(counts) > 1 else 0
            low, high = counts[i - 1], counts[i]
            start, end = self.seconds[low][place], self.seconds[high][place]
            return start if high <= low else start + (n - low) / (high - low) * (end - start)

        return sum(at(r.keys, 0) + at(r.out, 1) for r in rows)

    def _rows(self, schedule: TokenSchedule) -> list[Rows]:
        return schedule.rows(self.depth, self.num_tokens, self.prefix)

    def _made(self, family: str, cost: float, weights: Sequence[float]) -> TokenSchedule:
        """The schedule of a family that the table gives about this cost, and its part."""
        make, low, high = FAMILIES[family].make, 0.0, 1.0

        def at(part: float) -> TokenSchedule:
            return make(part, weights, self.depth, self.num_tokens, self.prefix)

        for _ in range(HALVINGS):
            part = (low + high) / 2
            low, high = (part, high) if self._cost(self._rows(at(part))) > cost else (low, part)
        return at(high)

    def add(self, family: str, schedule: TokenSchedule) -> Point:
        """Measure it, once."""
        if schedule.name in self.points:
            return self.points[schedule.name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of heads that read patches: what is lost shows it
            reduce_tokens(self.work, schedule)
        found = self._log_probabilities(self.work)
        agreement = float((found.argmax(1) == self.truth.argmax(1)).double().mean())
        lost = 1 - agreement
        if self.labels is not None:
            lost = (self.correct - int((found.argmax(1) == self.labels).sum())) / self.images
        divergence = float((self.truth.exp() * (self.truth - found)).sum(1).mean())
        whole = self.depth * macs([Rows(*[self.num_tokens] * 4)], self.dim)
        part = macs(self._rows(schedule), self.dim) / whole
        point = Point(family, schedule, part, lost, agreement, divergence, *self._latency())
        self.points[schedule.name] = point
        return point

    def _latency(self) -> tuple[float, float]:
        """ms of an image with the schedule and with all tokens, in turn and in alternating order."""
        times: dict[nn.Module, list[float]] = {self.work: [], self.plain: []}
        with torch.inference_mode():
            for i in range(self.rounds + 1):
                for model in list(times)[:: 1 if i % 2 else -1]:
                    start = _now(self.few)
                    model(self.few)
                    times[model].append(1e3 * (_now(self.few) - start) / len(self.few))
        self.stumbled = self.stumbled or any(median(of[1:]) > BUSY * min(of[1:]) for of in times.values())
        ms, plain_ms = (median(of[1:]) for of in times.values())
        return ms, plain_ms

    def walk(self, family: str) -> None:
        """Slower to faster until one loses too much, and halfway back."""
        whole = self._cost([Rows(*[self.num_tokens] * 4)] * self.depth)
        good = 1.0
        for target in (*TARGETS, None):
            goal = target if target is not None else good - 0.05
            if self._try(family, goal * whole, [1.0] * self.depth).lost <= self.max_drop:
                good = goal
            elif target is not None and good - target > 0.05:
                self._try(family, (good + target) / 2 * whole, [1.0] * self.depth)
                return
            else:
                return

    def _try(self, family: str, cost: float, weights: list[float]) -> Point:
        schedule = self._made(family, cost, weights)
        self.weights.setdefault(schedule.name, weights)
        return self.add(family, schedule)

    def refine(self, tries: int) -> None:
        """Turn the weights of single blocks at the same cost while the divergence falls; then go faster with them."""
        best = self.fastest(weighted=True)
        if best is None:
            return
        family, weights = best.family, self.weights[best.schedule.name]
        cost = self._cost(self._rows(best.schedule))
        for layer, turn in progress(_turns(self.depth, tries - tries // 4), "counts of single blocks"):
            turned = [w * turn if i == layer else w for i, w in enumerate(weights)]
            point = self._try(family, cost, turned)
            reached = self._cost(self._rows(point.schedule)) <= cost  # not when all that can merge does
            if reached and point.divergence < best.divergence:
                best, weights = point, turned
        for _ in range(tries // 4):
            cost *= FASTER
            if self._try(family, cost, weights).lost > self.max_drop:
                return

    def fastest(self, weighted: bool = False) -> Point | None:
        """Of those within max_drop that are faster than all tokens; weighted: whose counts can be refined."""
        allowed = [p for p in self.points.values() if p.lost <= self.max_drop and p.speedup > 1]
        if weighted:
            allowed = [p for p in allowed if p.schedule.name in self.weights and FAMILIES[p.family].weighted]
        return max(allowed, key=lambda p: p.speedup, default=None)


def _now(x: Tensor) -> float:
    """Seconds, when the device of x has done what it was given."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def _turns(depth: int, tries: int) -> Iterator[tuple[int, float]]:
    """Blocks in turn and how to turn their weight, up for all of them first."""
    steps = [(layer, turn) for turn in TURNED for layer in range(depth)]
    return iter((steps * (tries // len(steps) + 1))[:tries])


def _logits(y: object) -> Tensor:
    """(B, classes), also of what stands first in a tuple or a model output. Raises ValueError for anything else."""
    if not isinstance(y, Tensor):
        y = y["logits"] if isinstance(y, Mapping) and "logits" in y else next(iter(y), None)
    if not isinstance(y, Tensor) or y.dim() != 2:
        came = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"find_schedule: the model gives {came}; it compares classes, (images, classes)")
    return y
