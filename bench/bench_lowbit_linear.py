"""The matmuls beside F.linear in float32 and torch's own oneDNN int8 linear: 8 to 2 bits, float activations, levels."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TOKENS

from pyvit_accel import ops, reference
from pyvit_accel.formats import affine, packed
from pyvit_accel.formats.fp8 import fp8
from pyvit_accel.formats.pow2 import ps_weight
from pyvit_accel.formats.twin import uniform

LAYERS = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}  # inputs and outputs, in widths


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "implementation",
    ["float32", "onednn_int8", "w8", "w8_gelu", "w6", "w5", "w4", "w3", "w2", "w8a16", "w4a16", "fp8", "pow2"],
)
def bench_linear(measure, batch, width, layer, implementation):
    M, (K, N) = batch * TOKENS, (width * n for n in LAYERS[layer])
    x, weight, bias = torch.randn(M, K), torch.randn(N, K), torch.randn(N)
    codes, scale = ops.quantize(x)
    bits = int(implementation[1]) if implementation[0] == "w" else 8
    q, w_scale = affine.quantize_weight(weight, bits)
    w_packed = packed.pack(q, bits)
    if implementation == "float32":
        fn = lambda: F.linear(x, weight, bias)  # noqa: E731
    elif implementation == "onednn_int8":  # unsigned activations, one static scale, scale and bias in its epilogue
        prepacked = torch.ops.onednn.qlinear_prepack(q, [M, K])
        unsigned, zero = (codes.short() + 128).to(torch.uint8), torch.zeros(N, dtype=torch.int32)
        arguments = (unsigned, 0.02, 128, prepacked, w_scale, zero, bias, 1.0, 0, torch.float32, "none", [], "")
        fn = lambda: torch.ops.onednn.qlinear_pointwise(*arguments)  # noqa: E731
    elif implementation.endswith("a16"):
        fn = lambda: ops.weight_only_linear(x, w_packed, w_scale, bias)  # noqa: E731
    elif implementation in ("fp8", "pow2"):
        w_format = fp8("e4m3") if implementation == "fp8" else ps_weight(bits=4)
        x_format = fp8("e4m3") if implementation == "fp8" else uniform(8, 1.0, zero_point=128)
        operand = "e4m3" if implementation == "fp8" else "fp16"
        levels = [book.with_operand(operand).operand_lut() for book in (x_format, w_format)]
        x_codes, w_codes = x_format.quantize(x / 4), w_format.quantize(weight / 4).int() - 2 ** (w_format.bits - 1)
        w_packed = packed.pack(w_codes.to(torch.int8), w_format.bits)
        arguments = (x_codes, scale, levels[0], w_packed, w_scale, levels[1], bias)
        fn = lambda: ops.codebook_linear(*arguments, operand=operand)  # noqa: E731
    else:
        activation = "gelu" if implementation.endswith("gelu") else "none"
        arguments = (codes, scale, w_packed, w_scale, bias, 0, activation, None, None, None, 0, 8)
        if M * N * K < 2e8:  # right first, then fast; the large shapes are the same code
            assert torch.equal(torch.ops.pyvit_accel.lowbit_linear(*arguments), reference.lowbit_linear(*arguments))
        fn = lambda: ops.lowbit_linear(codes, scale, w_packed, w_scale, bias, activation=activation)  # noqa: E731
    measure(fn, M * K * N)
