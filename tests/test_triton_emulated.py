"""The Triton kernels as compiled: their PTX run on the CPU, by the checks their tests make in Triton's interpreter.

That is what the interpreter leaves out: inline assembly, layouts, barriers, copies ahead of loops, wgmma. On sm_80,
sm_89 and sm_90; for sm_100 Triton uses tcgen05, which is not emulated.
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from _emulated import emulated
from _triton import DEVICE

if DEVICE == "cuda":
    pytest.skip("the kernels themselves run here", allow_module_level=True)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
EVERY, FP8 = (80, 90), (89, 90)

# By file of kernels/: the checks (file of the tests, function, arguments) and architectures.
CHECKS = {
    "quantize": [
        ("rows", "check_quantize", (5, 33, True, 3, 8), EVERY), ("rows", "check_dynamic", (5, 53, 8, 0.7), EVERY),
        ("rows", "check_minimum", (5, 53, -0.1701, 4, 0.7), EVERY), ("rows", "check_table", (-0.1701, 1.0), EVERY),
        ("token_rows", "check_rows", ("repeats, none between",), EVERY),
    ],
    "norm_quant": [("rows", "check_norm_quant", (5, 96, 1e-6, 8, 1.0), EVERY)],
    "lowbit_linear": [
        *(("lowbit_linear", "check", ("small", 37, 33, 140, bits, 8, "gelu", 3, "rbl+", 33, 8), on)
          for bits, on in ((2, EVERY), (3, EVERY), (4, EVERY), (5, (90,)), (6, (80,)), (8, EVERY))),
        ("lowbit_linear", "check", ("large", 130, 140, 260, 4, 8, "gelu_tanh", 3, "rb"), EVERY),
        ("lowbit_linear", "check_extremes", ("middle", 8, -128), EVERY),
        ("token_rows", "check_gather", ("packed", "small", "rbl+", None, 4, False), EVERY),
    ],
    "weight_only_linear": [
        ("weight_only_linear", "check_product", ("zero_point", 4, F16, 5, 33, 96, 3, True), EVERY),
        ("weight_only_linear", "check_product", ("column", 3, BF16, 40, 33, 96, 1, False), EVERY),
        ("weight_only_linear", "check_identity", ("zero_point", 5, F16, 96, 3), EVERY),
        ("weight_only_linear", "check_identity", ("scale", 3, F32, 96, 3), EVERY),
    ],
    "codebook_linear": [
        ("codebook_linear", "check", ("e4m3", 4, 16, 35, 37, 159), FP8),
        ("codebook_linear", "check", ("fp16", 3, 17, 35, 37, 159, "gelu", "rb+"), EVERY),
    ],
    "quant_attention": [
        ("quant_attention", "check", ("linear mantissa 3",), (90,)), ("quant_attention", "check", ("log2 4",), (90,)),
        ("quant_attention", "check", (None,), EVERY),
    ],
    "select_tokens": [
        ("select_tokens", "check_select", (37, 1, "index"), EVERY), ("select_tokens", "check_split", (37, 1), EVERY),
        ("select_tokens", "check_group", (37, 5), EVERY),
    ],
    "match_tokens": [
        ("match_tokens", "check_ties", ("cosine", 20, 17, 1), EVERY), ("match_tokens", "check_merge", (37, 1), EVERY),
        ("match_tokens", "check_mean", (37, 3, 16), EVERY),
    ],
    "mix_tokens": [
        ("mix_tokens", "check_equals", (37, 20, 9, "mean", F32), EVERY),
        ("mix_tokens", "check_mlerp", (37, 20, 9, F32), EVERY),
    ],
    "propagate": [
        ("propagate", "check_iterations", (37, 16, 2, F32), EVERY),
        ("propagate", "check_sums_and_images", (140,), EVERY),
    ],
    "local_assign": [("local_assign", "check_one_iteration", (6, 6, 3, 3, 20, 9, "l2", "mask", F32), EVERY)],
    "class_row": [
        ("class_row", "check_row", (5, 2, 16, True), EVERY), ("class_row", "check_hidden_and_images", (37,), EVERY),
    ],
}  # fmt: skip


def cases():
    for file, checks in CHECKS.items():
        for architecture in (80, 89, 90):
            if any(architecture in on for *_, on in checks):
                yield file, architecture


@pytest.mark.parametrize("file, architecture", cases())
def test_compiled_kernels(file, architecture):
    with emulated(architecture) as kernels:
        for tests, name, args, architectures in CHECKS[file]:
            if architecture in architectures:
                getattr(import_module(f"test_triton_{tests}"), name)(*args)
    ran = {name for name, kernel in kernels.items() if kernel.count}
    if architecture == 90:
        assert {name for name in kernels if name.startswith(f"{file}.")} <= ran


def test_every_file_of_kernels_is_run():
    with emulated(90) as kernels:
        files = {name.partition(".")[0] for name in kernels}
    assert files - {"_values", "_attention"} == set(CHECKS)
