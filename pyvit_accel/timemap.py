"""Where the time of an accelerated ViT on the CPU goes: every phase beside its floor, the least time this CPU allows.

    floor = max(MACs / dot_peak,  weights / batch / read_rate + activations / read_rate)

Everything is per image. A phase's time is thread time divided by threads, so the phases and `other` (Python, dispatch,
waiting for the slowest thread, final norm and head) add up to the wall time. N tokens, C = dim, F hidden features,
T tokens that the last block computes.

Williams, Waterman, Patterson, Roofline: An Insightful Visual Performance Model, CACM 52(4), 2009.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from statistics import median

import torch
from torch import Tensor, nn

from pyvit_accel.backends import HAS_CPU_KERNELS
from pyvit_accel.models import ViTConfig
from pyvit_accel.output import progress, table

MATMULS = ("patch_embed", "qkv", "attention", "proj", "fc1", "fc2")
PHASES = ("patch_embed", "norm", "qkv", "attention", "quantize", "proj", "fc1", "activation", "fc2")
KIB, MIB = 2**10, 2**20
READ_SIZES = (16 * KIB, 256 * KIB, 4 * MIB, 128 * MIB)
ROOF_ROUNDS = 3
CODE, FLOAT = 1, 4  # bytes
HEADER = ("phase", "ms/image", "share", "floor ms", "time/floor", "GMAC/s", "MACs/byte")


@dataclass(frozen=True)
class Work:
    """What a phase has to do, over all blocks.

    macs         multiply-adds of one image
    weights      bytes, read once per batch
    activations  bytes of one image, read and written
    """

    macs: int = 0
    weights: int = 0
    activations: int = 0

    def bytes(self, batch: int) -> float:
        return self.weights / batch + self.activations


def count_work(
    config: ViTConfig, last_tokens: int | None = None, static_qkv: bool = True, static_hidden: bool = False
) -> dict[str, Work]:
    """The work of every phase.

    last_tokens    T, of the last block's queries, projection and MLP; None: all N
    static_qkv     q, k, v leave their matmul as codes; else as floats, which `quantize` turns into codes
    static_hidden  likewise the MLP's hidden layer, with `activation`
    """
    C, F, P = config.dim, int(config.dim * config.mlp_ratio), config.num_patches
    N = P + config.num_prefix_tokens
    rows = N * config.depth  # of the norm and matmul before the attention
    last = N if last_tokens is None else last_tokens
    later = rows - N + last  # of everything after it
    patch = config.in_channels * config.patch_size**2
    q = CODE if static_qkv else FLOAT
    h = CODE if static_hidden else FLOAT
    return {
        "patch_embed": Work(P * patch * C, patch * C, P * (CODE * patch + FLOAT * C)),
        "norm": Work(activations=(rows + later) * C * (FLOAT + CODE)),
        "qkv": Work(rows * 3 * C * C, config.depth * 3 * C * C, rows * C * (CODE + 3 * q)),
        "attention": Work(2 * later * N * C, 0, (later * (CODE + FLOAT) + rows * 2 * CODE) * C),
        "quantize": Work(activations=(later + (0 if static_qkv else 3 * rows)) * C * (FLOAT + CODE)),
        "proj": Work(later * C * C, config.depth * C * C, later * C * (CODE + 2 * FLOAT)),  # 2: residual, sum
        "fc1": Work(later * C * F, config.depth * C * F, later * (CODE * C + h * F)),
        "activation": Work(activations=0 if static_hidden else later * F * (FLOAT + CODE)),
        "fc2": Work(later * F * C, config.depth * F * C, later * (CODE * F + 2 * FLOAT * C)),
    }


def full_macs(config: ViTConfig) -> int:
    """All multiply-adds of one image: every token in every block, and the head."""
    heads = 2 if config.distilled else 1
    return sum(work.macs for work in count_work(config).values()) + heads * config.dim * config.num_classes


def work_of(model: nn.Module) -> dict[str, Work]:
    """The work of an accelerated VisionTransformer.

    Raises ValueError when its blocks are not fused: then no phases are timed.
    """
    if not all(getattr(block, "fusable", False) for block in model.blocks):
        raise ValueError("--breakdown needs int8 blocks, whose phases are timed; use recipe W8A8 or W8A8_DYNAMIC")
    config, last = model.config, model.blocks[-1]
    static_hidden = last.mlp.fc2.x_scale is not None
    return count_work(config, config.head_tokens, last.attention.head_scale is not None, static_hidden)


@dataclass(frozen=True)
class Roofs:
    """What this CPU does at most, on `threads` threads together.

    dot_peak    multiply-adds per second of the int8 dot product, from registers
    read_rates  bytes per second, by the bytes that each thread reads again and again
    """

    dot_peak: float
    read_rates: dict[int, float]
    threads: int

    def read_rate(self, size: float) -> float:
        """Of data of `size` bytes, an equal part of it in each thread's cache.

        The measured size nearest in ratio counts. READ_SIZES thus change over at 64 KiB, 1 MiB and 23 MiB a thread,
        about where L1, L2 and a share of L3 end on today's server cores.
        """
        part = max(size / self.threads, 1)
        return self.read_rates[min(self.read_rates, key=lambda measured: abs(math.log(measured / part)))]

    def floor(self, work: Work, batch: int, all_weights: int) -> float:
        """Seconds per image.

        Weights come from the level that holds all of the model's, since those are read between two uses; activations
        from the level that holds what the phase reads and writes.
        """
        read = work.weights / batch / self.read_rate(all_weights) + work.activations / self.read_rate(work.activations)
        return max(work.macs / self.dot_peak, read)

    def __str__(self) -> str:
        rates = ", ".join(f"{size_text(size)} {rate / 1e9:.0f}" for size, rate in self.read_rates.items())
        return f"int8 dot product {self.dot_peak / 1e9:.0f} GMAC/s; GB/s read, by bytes per thread: {rates}"

    def to_dict(self) -> dict:
        rates = [{"bytes_per_thread": size, "gb_per_s": rate / 1e9} for size, rate in self.read_rates.items()]
        return {"dot_peak_gmacs": self.dot_peak / 1e9, "read_rates": rates}


def size_text(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def measure_roofs() -> Roofs:
    """The best of several rounds, as other work on the machine can only slow one down.

    Raises ValueError when the CPU kernels were not built.
    """
    if not HAS_CPU_KERNELS:
        raise ValueError("--breakdown times the CPU kernels, which were not built; reinstall with a C++ compiler")
    from pyvit_accel import _C

    peak, rates = 0.0, dict.fromkeys(READ_SIZES, 0.0)
    for _ in progress(range(ROOF_ROUNDS), "roofs"):
        peak = max(peak, _C.dot_peak())
        rates = {size: max(rate, _C.read_rate(size)) for size, rate in rates.items()}
    return Roofs(peak, rates, torch.get_num_threads())


@dataclass(frozen=True)
class PhaseTime:
    """One phase of one image; bytes includes the image's share of the weights."""

    name: str
    ms: float
    floor_ms: float
    macs: int
    bytes: float

    @property
    def gmacs(self) -> float:
        """GMAC/s."""
        return self.macs / (1e6 * self.ms) if self.ms else 0.0

    @property
    def intensity(self) -> float:
        """Arithmetic intensity, MACs per byte."""
        return self.macs / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class TimeMap:
    """A model at one batch size; milliseconds per image.

    ms             wall time, the median of rounds without profiling
    profiled_ms    the median of rounds with it, from which the phases are
    full_floor_ms  all MACs of the full model at dot_peak
    """

    model: str
    recipe: str
    batch: int
    ms: float
    profiled_ms: float
    full_floor_ms: float
    phases: tuple[PhaseTime, ...]

    @property
    def name(self) -> str:
        return f"{self.model}, {self.recipe}, batch {self.batch}"

    @property
    def other_ms(self) -> float:
        return self.ms - sum(phase.ms for phase in self.phases)

    @property
    def floor_ms(self) -> float:
        return sum(phase.floor_ms for phase in self.phases)

    def to_dict(self) -> dict:
        phases = [
            {**asdict(p), "share": p.ms / self.ms, "ratio": _ratio(p.ms, p.floor_ms), "gmacs": p.gmacs,
             "macs_per_byte": p.intensity}
            for p in self.phases
        ]
        return {**asdict(self), "phases": phases, "other_ms": self.other_ms, "floor_ms": self.floor_ms}

    def __str__(self) -> str:
        rows = [
            (p.name, *_times(p.ms, self.ms), f"{p.floor_ms:.4f}", f"{_ratio(p.ms, p.floor_ms):.2f}",
             *((f"{p.gmacs:.0f}", f"{p.intensity:.1f}") if p.macs else ("", "")))
            for p in self.phases if p.bytes
        ]
        rows.append(("other", *_times(self.other_ms, self.ms), "", "", "", ""))
        rows.append(("total", *_times(self.ms, self.ms), f"{self.floor_ms:.4f}",
                     f"{_ratio(self.ms, self.floor_ms):.2f}", "", ""))
        return (
            f"{self.name}\n{table(HEADER, rows)}\nall MACs of the full model at peak: {self.full_floor_ms:.3f} ms; "
            f"measured {_ratio(self.ms, self.full_floor_ms):.2f} times that"
        )

    @property
    def profiling_cost(self) -> float:
        """By what share the profiled rounds were slower."""
        return self.profiled_ms / self.ms - 1


def _ratio(ms: float, floor_ms: float) -> float:
    return ms / floor_ms if floor_ms else 0.0


def _times(ms: float, whole: float) -> tuple[str, str]:
    return f"{ms:.3f}", f"{100 * ms / whole:.1f} %"


def map_time(
    name: str, recipe: str, model: nn.Module, images: Tensor, roofs: Roofs, rounds: int = 20, warmup: int = 3
) -> TimeMap:
    """Run the model on images in rounds without and with profiling, in turn and in alternating order."""
    from pyvit_accel import _C

    batch, work = len(images), work_of(model)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    counted: list[dict[str, float]] = []
    with torch.inference_mode():
        for i in progress(range(warmup + rounds), f"{name} batch {batch}: phases"):
            for profiled in (False, True)[:: 1 if i % 2 else -1]:
                _C.profile(profiled)
                start = time.perf_counter()
                try:
                    model(images)
                finally:
                    elapsed, phases = time.perf_counter() - start, _C.profile(False)
                if i >= warmup:
                    seconds[profiled].append(elapsed)
                    counted += [phases] if profiled else []
    thread_seconds = {phase: median(phases[phase] for phases in counted) for phase in PHASES}
    wall, slower = (1e3 * median(seconds[profiled]) / batch for profiled in (False, True))
    full_floor = 1e3 * full_macs(model.config) / roofs.dot_peak
    return TimeMap(name, recipe, batch, wall, slower, full_floor, phase_times(thread_seconds, work, batch, roofs))


def phase_times(
    thread_seconds: dict[str, float], work: dict[str, Work], batch: int, roofs: Roofs
) -> tuple[PhaseTime, ...]:
    """thread_seconds: of a whole batch, summed over threads."""
    all_weights = sum(of.weights for of in work.values())
    return tuple(
        PhaseTime(
            phase,
            1e3 * thread_seconds[phase] / (roofs.threads * batch),
            1e3 * roofs.floor(of, batch, all_weights),
            of.macs,
            of.bytes(batch),
        )
        for phase, of in work.items()
    )
