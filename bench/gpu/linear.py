"""Low-bit matmuls, and what people would run instead. Weights, biases and scales lie ready; the rest is timed.

w8a8 w4a8 w4a4   lowbit_linear from int8 codes, as norm_quant leaves them, to codes with the next scale, or to floats
w8a8 floats in   x is float32 and quantised by row first, a launch more; out are floats: a layer on its own
bf16 fp16        F.linear, and F.gelu where the job has one
int_mm           torch._int_mm from codes, then scales, bias and the next scale in one compiled pass
scaled_mm        torch._scaled_mm from e4m3, a scale per row and per feature, to bf16
cusparselt       torch._cslt_sparse_mm, 2:4 int8 weights, to int8 codes or bf16, without scales per feature or bias
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import launchers
from bench.gpu.made import Absent, Made, about, assert_close, assert_equal, sample
from bench.gpu.shapes import Linear
from bench.gpu.timing import copies
from pyvit_accel import ops, reference
from pyvit_accel.formats import packed

OURS = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4), "w8a8 floats in": (8, 8)}
BASELINES = ("bf16", "fp16", "int_mm", "scaled_mm", "cusparselt")
X_SCALE, OUT_SCALE = 0.02, 0.05


def names(job: Linear, place: int, device: str) -> list[str]:
    """Implementations worth timing for a job: everything for the first ones, then ours and cuBLAS."""
    backends = launchers.of("lowbit_linear", device)
    first = place < 2 or device != "cuda"
    ours = [f"{name} {b}" for name in (list(OURS) if first else list(OURS)[:2]) for b in backends]
    return [*ours, *(BASELINES if first else ("bf16",) if place > 3 else ("bf16", "scaled_mm"))]


def make(job: Linear, name: str, device: str) -> Made:
    if name in BASELINES:
        return _baseline(job, name, device)
    name, _, backend = name.rpartition(" ")
    return _ours(job, name, backend, device)


def _ours(job: Linear, name: str, backend: str, device: str) -> Made:
    (w_bits, x_bits), (M, K, N) = OURS[name], (job.M, job.K, job.N)
    from_floats = name.endswith("floats in")
    to_codes = job.to_codes and not from_floats
    x_bytes, y_bytes = (4 if from_floats else 1), (1 if to_codes else 4)
    bytes = M * K * x_bytes + N * K * w_bits // 8 + M * N * y_bytes
    out_scale = torch.tensor([OUT_SCALE], device=device) if to_codes else None
    x_scale, sets = torch.tensor([X_SCALE], device=device), []
    for _ in range(copies(bytes, device)):
        x = torch.randn(M, K, device=device) if from_floats else random_codes(x_bits, M, K, device=device)
        w = packed.pack(random_codes(w_bits, N, K, device=device), w_bits)
        w_scale = (torch.rand(N, device=device) + 0.5) * 2.0 ** (8 - w_bits) / (128 * K**0.5)
        sets.append((x, w, w_scale, torch.randn(N, device=device)))

    def call(x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor) -> Tensor:
        with launchers.Using(backend, device):
            codes, scale = ops.quantize(x) if from_floats else (x, x_scale)
            return ops.lowbit_linear(codes, scale, w, w_scale, bias, activation=job.activation, out_scale=out_scale)

    def check() -> None:
        x, w, w_scale, bias = (t.cpu() for t in sets[0])
        rows, scale = sample(M), x_scale.cpu()
        x = x[rows]
        if from_floats:
            x, scale = reference.quantize_dynamic(x, None, 8, 1.0, None)
        truth = reference.lowbit_linear(x, scale, w, w_scale, bias, 0, job.activation, None, None,
                                        None if out_scale is None else out_scale.cpu(), 0, 8)  # fmt: skip
        assert_equal(call(*sets[0])[rows.to(device)], truth)

    calls = [lambda args=args: call(*args) for args in sets]
    return Made(calls, check, about(job, name, backend, "int8", 2 * M * N * K, bytes))


def random_codes(bits: int, *shape: int, device: str) -> Tensor:
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8, device=device)


def _baseline(job: Linear, name: str, device: str) -> Made:
    M, K, N = job.M, job.K, job.N
    size = 2 if name in ("bf16", "fp16") else 1
    y_bytes = 1 if name in ("int_mm", "cusparselt") and job.to_codes else 4 if name == "int_mm" else 2
    w_bytes = N * K * size * 5 // 8 if name == "cusparselt" else N * K * size
    bytes = M * K * size + w_bytes + M * N * y_bytes
    floats = [
        tuple(torch.randn(*shape, device=device) for shape in ((M, K), (N, K), (N,)))
        for _ in range(copies(bytes, device))
    ]
    build = {"int_mm": _int_mm, "scaled_mm": _scaled_mm, "cusparselt": _cusparselt}.get(name, _float)
    made = [build(job, name, *tensors) for tensors in floats]

    def check() -> None:
        rows = sample(M).to(device)
        x, w, bias = (t.double() for t in floats[0])
        y = x[rows] @ (w * kept(floats[0][1])).T if name == "cusparselt" else x[rows] @ w.T + bias
        result = made[0]()[rows]
        steps = STEP * K**0.5 if result.dtype == torch.int8 or name == "cusparselt" else 1.0
        assert_close(result.float() * steps, F.gelu(y) if job.activation == "gelu" else y, 0.1)

    kind = {"scaled_mm": "fp8", "int_mm": "int8", "cusparselt": "int8 2:4"}.get(name, name)
    return Made(made, check, about(job, name, None, kind, 2 * M * N * K, bytes))


STEP = 1 / 32  # of the codes a baseline writes, in standard deviations of its sums
CODES_A_UNIT = 30  # of the codes of random normals, which then reach +-4


def _float(job: Linear, name: str, x: Tensor, w: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    x, w, bias = (t.to(torch.bfloat16 if name == "bf16" else torch.float16) for t in (x, w, bias))
    if job.activation == "gelu":
        return lambda: F.gelu(F.linear(x, w, bias))
    return lambda: F.linear(x, w, bias)


def _codes(t: Tensor) -> Tensor:
    return (t * CODES_A_UNIT).round().clamp(-127, 127).to(torch.int8)


def _int_mm(job: Linear, name: str, x: Tensor, w: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    x, w = _codes(x), _codes(w)
    scale = torch.full((w.shape[0],), CODES_A_UNIT**-2.0, device=x.device)
    torch._dynamo.reset()  # few versions of one function's code are kept
    finish = torch.compile(_finish_codes if job.to_codes else _finish_floats, dynamic=False)
    step = STEP * job.K**0.5
    return lambda: finish(torch._int_mm(x, w.T), scale, bias, step, job.activation)


def _scaled(acc: Tensor, scale: Tensor, bias: Tensor, activation: str) -> Tensor:
    y = acc.float() * scale + bias
    return F.gelu(y) if activation == "gelu" else y


def _finish_codes(acc: Tensor, scale: Tensor, bias: Tensor, step: float, activation: str) -> Tensor:
    return (_scaled(acc, scale, bias, activation) / step).round().clamp(-128, 127).to(torch.int8)


def _finish_floats(acc: Tensor, scale: Tensor, bias: Tensor, step: float, activation: str) -> Tensor:
    return _scaled(acc, scale, bias, activation)


def _scaled_mm(job: Linear, name: str, x: Tensor, w: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    x, w, bias = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn), bias.bfloat16()
    rows, columns = torch.ones(x.shape[0], 1, device=x.device), torch.ones(1, w.shape[0], device=x.device)

    def call() -> Tensor:
        y = torch._scaled_mm(x, w.T, rows, columns, bias, out_dtype=torch.bfloat16, use_fast_accum=True)
        return F.gelu(y) if job.activation == "gelu" else y

    return call


def kept(w: Tensor) -> Tensor:
    """The two largest of every four inputs."""
    groups = w.abs().view(w.shape[0], -1, 4)
    return torch.zeros_like(groups).scatter_(2, groups.topk(2, dim=2).indices, 1.0).view_as(w)


def _cusparselt(job: Linear, name: str, x: Tensor, w: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    if not torch.backends.cusparselt.is_available():
        raise Absent("this torch has no cuSPARSELt")
    compressed, x = torch._cslt_compress(_codes(w * kept(w))), _codes(x)
    alpha = torch.tensor(CODES_A_UNIT**-2.0 / (STEP * job.K**0.5), device=x.device)
    out = None if job.to_codes else torch.bfloat16
    return lambda: torch._cslt_sparse_mm(compressed, x.T, alpha=alpha, out_dtype=out, transpose_result=True)
