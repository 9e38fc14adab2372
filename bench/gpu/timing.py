"""Time on the device: CUDA graphs replayed over rotating buffers, at settled power; eager calls on a CPU."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from bench.gpu.task import reason, spoil

SETTLE_S = 1.5
ROUND_S = 4e-3  # of a replay: the time around it is then below one part in a hundred
MAX_CALLS = 1000  # in a graph
Call = Callable[[], object]


class Clock:
    """A timer that moves only by what the device took, so that pytest-benchmark records seconds of a single call."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


class Rounds:
    """Calls that do the same on different buffers; one round runs all of them, several times, and moves the clock.

    graph  False where the calls cannot be captured: why_not says why, and rounds are eager launches
    """

    def __init__(self, calls: Sequence[Call], device: str) -> None:
        self.calls, self.device, self.graph, self.why_not = list(calls), device, None, ""
        self.length = len(self.calls)
        if device == "cuda":
            self._prepare()

    def __call__(self) -> None:
        CLOCK.now += (self._on_gpu() if self.device == "cuda" else self._on_cpu()) / self.length

    def _on_cpu(self) -> float:
        start = time.perf_counter()
        for call in self.calls:
            call()
        return time.perf_counter() - start

    def _on_gpu(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._launch()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _launch(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        for i in range(self.length):
            self.calls[i % len(self.calls)]()

    def _prepare(self) -> None:
        """Compile, tune and warm up outside the graph, then choose its length by what a first one took."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in self.calls:
                call()
            for _ in range(2):
                self.calls[0]()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.length = max(4, len(self.calls))
        for _ in range(2):
            try:
                self._capture()
            except Exception as error:
                torch.cuda.synchronize()  # raises where the context is lost
                spoil()
                self.graph, self.why_not = None, reason(error)
            self._on_gpu()
            took = self._on_gpu()
            if took > ROUND_S / 3 or self.length >= MAX_CALLS or self.why_not:
                break
            self.length = min(MAX_CALLS, round(self.length * ROUND_S / took) + 1)

    def _capture(self) -> None:
        graph, kept = torch.cuda.CUDAGraph(), [None] * len(self.calls)
        with torch.cuda.graph(graph):
            for i in range(self.length):
                kept[i % len(kept)] = self.calls[i % len(kept)]()  # results live on, so that their buffers rotate too
        self.graph, self._kept = graph, kept

    def warm_up(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            self()


def measure(calls: Sequence[Call], device: str, rounds: int = 20) -> dict:
    """Seconds of one call, the median of the rounds, and the clock it ran at."""
    timed = Rounds(calls, device)
    timed.warm_up(0.15 if device == "cuda" else 0.0)
    times = []
    for _ in range(rounds):
        before = CLOCK.now
        timed()
        times.append(CLOCK.now - before)
    return {"seconds": median(times), "fastest": min(times), "clock_mhz": clock_mhz(timed)} | graph_of(timed)


def graph_of(timed: Rounds) -> dict:
    return {"eager": timed.why_not} if timed.why_not else {}


def clock_mhz(timed: Rounds) -> int | None:
    """The SM clock while rounds run."""
    if timed.device != "cuda":
        return None
    for _ in range(20):
        timed._launch()
    found = clocks()["sm_mhz"]
    torch.cuda.synchronize()
    return found


def clocks() -> dict:
    """SM clock in MHz, power in W, temperature; None where no tool says."""
    try:
        return {
            "sm_mhz": torch.cuda.clock_rate(), "power_w": torch.cuda.power_draw() / 1e3,
            "temperature_c": torch.cuda.temperature(),
        }  # fmt: skip
    except Exception:  # no NVML for Python, which torch asks with: any of its errors
        return _smi()


def _smi() -> dict:
    names = {"sm_mhz": "clocks.sm", "power_w": "power.draw", "temperature_c": "temperature.gpu"}
    command = ["nvidia-smi", f"--query-gpu={','.join(names.values())}", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        return dict(zip(names, (float(value) for value in printed.split(",")), strict=True))
    except (OSError, ValueError, subprocess.SubprocessError):
        return dict.fromkeys(names)


def settle(seconds: float = SETTLE_S) -> None:
    """Multiply until clocks and power are those of a card at work."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(20):
            a @ a
        torch.cuda.synchronize()


def copies(bytes: int, device: str) -> int:
    """How many sets of buffers of so many bytes it takes to move through twice the L2 cache before one comes again."""
    if device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(64, -(-2 * cache // bytes)))
