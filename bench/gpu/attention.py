"""Attention on int8 codes, as the qkv matmul leaves them, to the codes that the projection reads; and torch's.

bytes            quant_attention with diffused bytes: an exponential per score
linear mantissa  with DEFAULT_SOFTMAX: none
flash, cudnn, efficient, math    scaled_dot_product_attention in bf16, views of one qkv tensor as models have them
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu import launchers
from bench.gpu.made import Absent, Made, about, assert_close, assert_equal
from bench.gpu.shapes import Attention
from bench.gpu.timing import copies
from pyvit_accel import backends, ops
from pyvit_accel.formats.softmax import DEFAULT_SOFTMAX

OURS = {"bytes": None, "linear mantissa": DEFAULT_SOFTMAX}
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}  # fmt: skip
SCALE, OUT_SCALE = 0.02, 0.004
PAIRS = 2**30  # of queries and keys that the math backend holds at most


def names(job: Attention, device: str) -> list[str]:
    ours = [f"{name} {b}" for name in OURS for b in launchers.of("quant_attention", device)]
    return [*ours, *(name for name in SDPA if name != "math" or job.B * job.H * job.N**2 < PAIRS)]


def make(job: Attention, name: str, device: str) -> Made:
    work = 4 * job.B * job.H * job.N**2 * job.D
    elements = 4 * job.B * job.H * job.N * job.D
    if name in SDPA:
        return _baseline(job, name, device, work, elements)
    name, _, backend = name.rpartition(" ")
    one = torch.tensor([SCALE], device=device)
    out_scale = torch.tensor([OUT_SCALE], device=device)
    shape = (job.B, job.N, 3, job.H, job.D)
    sets = [
        torch.randint(-127, 128, shape, dtype=torch.int8, device=device).permute(2, 0, 3, 1, 4).unbind(0)
        for _ in range(copies(elements, device))
    ]

    softmax = OURS[name] and OURS[name].to(device)

    def attend(q, k, v, one, out_scale, softmax):
        return ops.quant_attention(q, k, v, one, one, one, job.D**-0.5, softmax=softmax, out_scale=out_scale)

    def call(q, k, v):
        with launchers.Using(backend, device):
            return attend(q, k, v, one, out_scale, softmax)

    def check() -> None:  # of two heads of an image
        result, few = call(*sets[0])[:1, :, : 2 * job.D], [t[:1, :2].cpu() for t in sets[0]]
        with backends.use_reference():
            truth = attend(*few, one.cpu(), out_scale.cpu(), OURS[name])
        if OURS[name] is None:
            assert_equal(result, truth)
        else:  # sums are floats: a code may lie beside a tie
            assert_close(result, truth, 5e-3)

    calls = [lambda args=args: call(*args) for args in sets]
    return Made(calls, check, about(job, name, backend, "int8", work, elements))


def _baseline(job: Attention, name: str, device: str, work: int, elements: int) -> Made:
    shape = (job.B, job.N, 3, job.H, job.D)
    sets = [
        torch.randn(shape, device=device, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4).unbind(0)
        for _ in range(copies(2 * elements, device))
    ]

    def call(q, k, v):
        with sdpa_kernel(SDPA[name]):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(job.B, job.N, -1)

    try:
        call(*sets[0])
    except RuntimeError as error:
        if "No viable backend" in str(error) or "No available kernel" in str(error):
            raise Absent(f"scaled_dot_product_attention has no {name} here") from error
        raise

    def check() -> None:
        q, k, v = (t[:1].double() for t in sets[0])
        truth = (q @ k.mT * job.D**-0.5).softmax(-1) @ v
        assert_close(call(*sets[0])[:1], truth.transpose(1, 2).reshape(1, job.N, -1), 0.03)

    calls = [lambda args=args: call(*args) for args in sets]
    return Made(calls, check, about(job, name, None, "bf16", work, 2 * elements))
