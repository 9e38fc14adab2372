"""Packed weights and float16 activations, for one image and for one token, beside F.linear in float16."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import launchers
from bench.gpu.linear import random_codes
from bench.gpu.made import Made, about, assert_close, sample
from bench.gpu.shapes import Linear
from bench.gpu.timing import copies
from pyvit_accel import ops, reference
from pyvit_accel.formats import packed

TOKENS = ("image", "token")
BITS = {"w4a16": 4, "w8a16": 8}


def names(job: Linear, device: str) -> list[str]:
    ours = [f"{name} {b}" for name in BITS for b in launchers.of("weight_only_linear", device)]
    return [f"{rows}: {name}" for rows in TOKENS for name in (*ours, "fp16")]


def make(job: Linear, name: str, device: str) -> Made:
    rows, _, name = name.partition(": ")
    M, K, N = (job.M if rows == "image" else 1), job.K, job.N
    ours, _, backend = name.rpartition(" ")
    bits = BITS.get(ours, 16)
    groups = K // 64
    bytes = 2 * M * K + N * K * bits // 8 + (4 * N * groups if bits < 16 else 0) + 2 * M * N
    sets = []
    for _ in range(copies(bytes, device)):
        x, bias = torch.randn(M, K, device=device).half(), torch.randn(N, device=device)
        if bits == 16:
            sets.append((x, torch.randn(N, K, device=device).half(), None, bias.half()))
        else:
            w = packed.pack(random_codes(bits, N, K, device=device), bits)
            sets.append((x, w, (torch.rand(N, groups, device=device) + 0.5) * 2.0**-bits, bias))

    def call(x: Tensor, w: Tensor, scale: Tensor | None, bias: Tensor) -> Tensor:
        if scale is None:
            return F.linear(x, w, bias)
        with launchers.Using(backend, device):
            return ops.weight_only_linear(x, w, scale, bias)

    def check() -> None:
        x, w, scale, bias = (None if t is None else t.cpu() for t in sets[0])
        chosen = sample(M)
        if scale is None:
            truth = x[chosen].double() @ w.double().T + bias.double()
        else:
            truth = reference.weight_only_linear(x[chosen].float(), w, scale, None, bias)
        assert_close(call(*sets[0])[chosen.to(device)], truth, 2e-3)

    calls = [lambda args=args: call(*args) for args in sets]
    kind = "fp16"
    return Made(calls, check, about(f"{job}, one {rows}", ours or name, backend if ours else None, kind,
                                    2 * M * N * K, bytes))  # fmt: skip
