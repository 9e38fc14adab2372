"""Where 2:4 weights pay: what a layer gains on a GPU, from a model of its time, or that it loses.

    dense   max(2 M N K / rate, bytes / bandwidth)
    sparse  max(2 M N K / (rate gain), bytes / bandwidth) + START      the weight with 9/16 or 10/16 of its bytes

M rows x N features x K inputs; rate is what dense products sustain, gain what published sparse ones reach of their 2.
The model knows no tiles and is too kind to small results: below OUTPUTS[capability] = M N, published measurements of
cuSPARSELt on ViT-like shapes show a loss (H100 PCIe 0.60 to 0.97 below 4 M outputs, 1.3 and more above 6 M).
Numbers of data sheets and publications, none measured with these kernels.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import partial

from pyvit_accel.errors import Unsupported

START = 2e-6  # s a sparse kernel needs more than a dense one
SUSTAINED = 0.8  # of the peak rate, by dense products
GAIN = {2: 1.5, 1: 1.4}  # by bytes of an operand
LEAST = 1.05  # speed-up that is worth a change of the weights
ROWS = 32 * 197  # of a batch of 32 images, where a caller says nothing
OUTPUTS = {80: 1.5e6, 86: 1.5e6, 87: 1.5e6, 89: 1.5e6}
OTHER_OUTPUTS = 6e6
MOST_ROWS = 2**24  # that a batch is imagined to have
# Names of layers that read one row per image.
CLASSIFIERS = ("head", "head.*", "heads.*", "head_dist", "classifier", "*.classifier", "cls_classifier", "fc")


@dataclass(frozen=True)
class Gpu:
    """Peak rates of dense products, 16-bit and int8, in operations/s, and bandwidth in bytes/s."""

    floats: float
    integers: float
    bandwidth: float


GPUS = {80: Gpu(312e12, 624e12, 1.94e12), 89: Gpu(181e12, 362e12, 0.86e12), 90: Gpu(989e12, 1979e12, 3.35e12)}


def speed_up(rows: int, out_features: int, in_features: int, capability: int, integer: bool = False) -> float:
    """Of 2:4 over dense, modelled. integer: int8 operands and a float32 result, else 16 bits all.

    capability  10 major + minor; those without numbers of their own count as the next lower one
    """
    gpu = GPUS[max(known for known in GPUS if known <= max(capability, 80))]
    size, out = (1, 4) if integer else (2, 2)
    rate = SUSTAINED * (gpu.integers if integer else gpu.floats)
    work = 2 * rows * out_features * in_features / rate
    weight = size * out_features * in_features
    rest = size * rows * in_features + out * rows * out_features
    packed = weight * (10 / 16 if integer else 9 / 16)
    dense = max(work, (rest + weight) / gpu.bandwidth)
    return dense / (max(work / GAIN[size], (rest + packed) / gpu.bandwidth) + START)


def check(rows: int, out_features: int, in_features: int, capability: int, integer: bool = False) -> None:
    """Raise Unsupported, with the numbers, where a dense layer is the faster one."""
    sm = f"sm_{capability}"
    if capability < 80:
        raise Unsupported(f"{sm} has no sparse units, they came with sm_80; it stays dense")
    outputs, least = rows * out_features, OUTPUTS.get(capability, OTHER_OUTPUTS)
    gain = speed_up(rows, out_features, in_features, capability, integer)
    if outputs >= least and gain >= LEAST:
        return
    enough = _rows_that_pay(out_features, in_features, capability, integer)
    otherwise = "no batch is large enough" if enough is None else f"from {enough} rows a call on it does (rows=)"
    if outputs < least:
        raise Unsupported(
            f"{rows} rows x {out_features} features are {outputs / 1e6:.2g} M outputs, 2:4 pays from "
            f"{least / 1e6:.2g} M on ({sm}); {otherwise}"
        )
    kind = "int8" if integer else "16-bit"
    raise Unsupported(
        f"{rows} rows x {out_features} features x {in_features} inputs, {kind}: 2:4 is modelled at {gain:.2f} "
        f"times dense speed on {sm}, {LEAST} is asked for; reads and writes bound it, not products; {otherwise}"
    )


def _rows_that_pay(out_features: int, in_features: int, capability: int, integer: bool) -> int | None:
    """The fewest rows with which check passes; None beyond MOST_ROWS. The speed-up grows with them."""
    few = math.ceil(OUTPUTS.get(capability, OTHER_OUTPUTS) / out_features)
    many = max(few, MOST_ROWS)
    if speed_up(many, out_features, in_features, capability, integer) < LEAST:
        return None
    pays = partial(speed_up, out_features=out_features, in_features=in_features, capability=capability, integer=integer)
    return few + bisect_left(range(few, many), True, key=lambda rows: pays(rows) >= LEAST)
