"""What the Triton launchers launch for chosen arguments, recorded without a GPU: the cases that _gates.py lists."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from _matching import even_and_odd
from _triton import Recorder, launches
from test_triton_codebook_linear import arguments as codebook_arguments
from test_triton_codebook_linear import on
from test_triton_lowbit_linear import TILES, use
from test_triton_lowbit_linear import arguments as lowbit_arguments
from test_triton_quant_attention import problem
from test_triton_weight_only_linear import weight

Launch = Callable[[str, int], tuple]  # of a kernel by name on an architecture: Triton's source and options


def of(module: str, call: Callable) -> Launch:
    """The one launch of the kernel that `call` makes, given the module of the launcher."""

    def record(kernel, architecture):
        names = [name for name in vars(import_module(f"pyvit_accel.kernels.{module}")) if name.endswith("_kernel")]
        (launch,) = (launch for launch in launches(module, call, *names) if launch[0].name == kernel)
        return launch

    return record


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def ints(*shape: int) -> torch.Tensor:
    return zeros(*shape, dtype=torch.int32)


def method(module: str, name: str, *args, **kwargs) -> Launch:
    return of(module, lambda m: getattr(m, name)(*args, **kwargs))


# ---- matmuls

FULL = {"parts": "rbl+", "activation": "gelu", "x_zero_point": 3, "out_columns": 768, "out_bits": 4}


def lowbit(tile: str, w_bits: int, fp8: bool = False, rows: str = "", **epilogue) -> Launch:
    """rows: "" as they are, "gathered" by an index, "added" to rows by an index as well."""
    M, N = TILES[tile]

    def record(kernel, architecture):
        args, index = lowbit_arguments(M, N, 768, w_bits, gap=0, **epilogue), ints(M)
        into = zeros(M, N)

        def call(m):
            if rows == "added":
                m.lowbit_linear_scatter(into, index, *args[:8], index)
            else:
                m.lowbit_linear(*args, *[index] * (rows == "gathered"))

        with use(tile, fp8):
            return of("lowbit_linear", call)(kernel, architecture)

    return record


def lowbit_odd() -> Launch:
    args = lowbit_arguments(12607, 773, 101, 6, 8, "gelu", 3, "rbl+", 773)
    return method("lowbit_linear", "lowbit_linear", *args)


def codebook(operand: str, w_bits: int, levels: int, M: int, *epilogue, **kwargs) -> Launch:
    def record(kernel, architecture):
        args = codebook_arguments(operand, w_bits, levels, M, 768, 768, *epilogue, **kwargs)
        with on(architecture):
            return method("codebook_linear", "codebook_linear", *args)(kernel, architecture)

    return record


def weight_only(form: str, bits: int, dtype: torch.dtype, M: int) -> Launch:
    def record(kernel, architecture):
        args = zeros(M, 768, dtype=dtype), *weight(form, bits, 768, 768, 12)[0], zeros(768)
        return method("weight_only_linear", "weight_only_linear", *args)(kernel, architecture)

    return record


# ---- attention


def attention(
    form: str | None, N: int = 197, D: int = 64, parts: str = "", sequences: bool = False, **kwargs
) -> Launch:  # fmt: skip
    """sequences: two of them, packed, rather than two images."""
    B = 1 if sequences else 2
    if sequences:
        ends = torch.tensor([0, 100, N]).int()
        kwargs |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends}

    def record(kernel, architecture):
        new = problem(form, B=B, H=3, Nq=N, Nk=N, D=D, parts=parts, **kwargs)
        new["k_scale"] = new["k_scale"] if "t" in parts else torch.rand(1).expand(B, 3, N)
        values, module = (import_module(f"pyvit_accel.kernels.{name}") for name in ("_values", "quant_attention"))
        prepare = Recorder(values._prepare_kernel)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(values, "_prepare_kernel", prepare)
            patch.setattr(module, "_capability", lambda q: divmod(architecture, 10))
            found = launches("quant_attention", lambda m: m.quant_attention(*new.values()), "_quant_attention_kernel")
        (launch,) = prepare.launches if kernel == "_prepare_kernel" else found
        return launch

    return record


# ---- rows

X, COLUMN = zeros(197, 768), zeros(768)


def quantize(*args) -> Launch:
    return method("quantize", "quantize", X, *args)


def dynamic(*args) -> Launch:
    return method("quantize", "quantize_dynamic", X, *args)


def norm(name: str, *args) -> Launch:
    return method("norm_quant", name, X, COLUMN, COLUMN, *args)


# ---- tokens


def class_row(D: int, per_token: bool) -> Launch:
    q, k = zeros(2, 197, 3, 12, D, dtype=torch.int8).permute(2, 0, 3, 1, 4)[:2]
    scale = torch.ones(2, 12, 197) if per_token else torch.ones(1).expand(2, 12, 197)
    return method("class_row", "class_row", q, k, scale, scale, 0.125, zeros(2, 197) if per_token else None)


def propagate(N: int, dtype: torch.dtype, iterations: int) -> Launch:
    q = zeros(2, 12, N, 64, dtype=dtype)
    return method("propagate", "propagate", q, q, zeros(2, 12, N), 0.125, iterations, zeros(2, N))


def local_assign() -> Launch:
    x, centres = zeros(2, 14, 14, 1280), zeros(2, 9, 9, 1280)
    return method("local_assign", "local_assign", x, centres, 5, "l2", 0.01, 1, "mask")


def match(metric: str, topk: int, C: int = 768, dtype: torch.dtype = torch.float32, exclude: bool = False) -> Launch:
    a, b = even_and_odd(zeros(4, 197, C, dtype=dtype)) if C < 768 else [zeros(4, 197, C, dtype=dtype)] * 2
    return method("match_tokens", "match_tokens", a, b, metric, topk, int(exclude), ints(4, 197) if exclude else None)


def merge() -> Launch:
    return method("match_tokens", "merge_pairs", zeros(4, 99), ints(4, 99), 197, 13, 0)


def mean_heads() -> Launch:
    codes = zeros(4, 197, 3, 12, 64, dtype=torch.int8)[:, :, 1].transpose(1, 2)
    return method("match_tokens", "mean_heads", codes, torch.ones(4, 12, 197))


def mix(reduce: str) -> Launch:
    col, x = ints(8, 197), zeros(8, 197, 768)
    if reduce == "mlerp":
        args = x.bfloat16(), col, ints(8, 185), zeros(8, 197), None, 1
    else:
        args = x, col, None, None, x, 1
    return method("mix_tokens", "mix_tokens", *args, reduce)


def select(N: int, order: str) -> Launch:
    return method("select_tokens", "select_tokens", zeros(4, N).bfloat16(), N // 2, 1, order)


def split(N: int) -> Launch:
    return method("select_tokens", "split_tokens", zeros(4, N).bool(), 1)


def group(N: int) -> Launch:
    return method("select_tokens", "group_tokens", ints(4, N), N - 13, zeros(4, N))
