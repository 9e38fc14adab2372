"""Rows: LayerNorm and quantisation in one pass, of all tokens or of those an index names; and torch's.

static, by row         norm_quant, float32 rows to int8 codes
compiled               torch.compile of F.layer_norm and the same quantisation by row, of the same float32 rows
compiled, bf16         torch.compile of F.layer_norm alone, bf16 to bf16: what a bf16 model does
gather                 for an index: index_select, then compiled LayerNorm and quantisation
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import launchers
from bench.gpu.made import Made, about, assert_close, assert_equal, sample
from bench.gpu.shapes import Rows
from bench.gpu.timing import copies
from pyvit_accel import ops, reference

OURS = ("static", "by row")
EPS = 1e-6


def names(job: Rows, device: str) -> list[str]:
    ours = [f"{name} {b}" for name in OURS for b in launchers.of("norm_quant", device)]
    return [*ours, *(("gather",) if job.keep < 1 else ("compiled", "compiled, bf16"))]


def make(job: Rows, name: str, device: str) -> Made:
    M, R, C = job.M, job.R, job.C
    width = (2, 2) if name.endswith("bf16") else (4, 1)
    bytes = M * C * sum(width)
    vectors = torch.rand(2, C, device=device) + 0.5
    scale = torch.tensor([0.03], device=device)
    sets = []
    for _ in range(copies(bytes, device)):
        index = torch.randperm(R, device=device)[:M].sort().values.int() if job.keep < 1 else None
        sets.append((torch.randn(R, C, device=device) * 2 + 0.5, index))
    if name.endswith("bf16"):
        sets = [(x.bfloat16(), index) for x, index in sets]

    backend = name.rpartition(" ")[2] if name.startswith(OURS) else None
    static = name.startswith("static")
    torch._dynamo.reset()  # few versions of one function's code are kept
    compiled = torch.compile(_norm if name.endswith("bf16") else _norm_quantize, dynamic=False)

    def call(x: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        if backend is not None:
            with launchers.Using(backend, device):
                return ops.norm_quant(x, *vectors, scale if static else None, EPS, index=index)
        if name.endswith("bf16"):
            return compiled(x, *vectors.bfloat16()), scale
        return compiled(x if index is None else x.index_select(0, index), *vectors)

    def check() -> None:
        x, index = sets[0]
        rows = sample(M).to(device)
        picked = (x[rows] if index is None else x[index[rows].long()]).cpu()
        codes, scales = call(x, index)
        on_cpu = vectors.cpu()
        if backend is None:
            got = codes[rows].float() * (1 if name.endswith("bf16") else scales[rows, None])
            assert_close(got, F.layer_norm(picked.double(), (C,), *on_cpu.double(), EPS), 0.02)
        elif static:
            assert_equal(codes[rows], reference.norm_quant(picked, *on_cpu, scale.cpu(), EPS, 8))
        else:
            truth = reference.norm_quant_dynamic(picked, *on_cpu, EPS, 8, 1.0)
            assert_equal(codes[rows], truth[0])
            assert_equal(scales[rows], truth[1])

    implementation = name.rpartition(" ")[0] if backend else name
    calls = [lambda args=args: call(*args) for args in sets]
    return Made(calls, check, about(job, implementation, backend, "float32", 10 * M * C, bytes))


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def _norm_quantize(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    y = F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    scale = y.abs().amax(dim=1) / 127
    return (y / scale[:, None]).round().to(torch.int8), scale
