"""lowbit_linear and weight_only_linear beside F.linear in float32 and torch's own oneDNN int8 linear."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TOKENS

from pyvit_accel import ops, reference
from pyvit_accel.formats import affine, packed

LAYERS = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}  # inputs and outputs, in widths


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "implementation", ["float32", "onednn_int8", "lowbit_linear", "lowbit_linear_gelu", "weight_only"]
)
def bench_linear(measure, batch, width, layer, implementation):
    M, (K, N) = batch * TOKENS, (width * n for n in LAYERS[layer])
    x, weight, bias = torch.randn(M, K), torch.randn(N, K), torch.randn(N)
    codes, scale = ops.quantize(x)
    q, w_scale = affine.quantize_weight(weight)
    w_packed = packed.pack(q)
    if implementation == "float32":
        fn = lambda: F.linear(x, weight, bias)  # noqa: E731
    elif implementation == "onednn_int8":  # unsigned activations, one static scale, scale and bias in its epilogue
        prepacked = torch.ops.onednn.qlinear_prepack(q, [M, K])
        unsigned, zero = (codes.short() + 128).to(torch.uint8), torch.zeros(N, dtype=torch.int32)
        arguments = (unsigned, 0.02, 128, prepacked, w_scale, zero, bias, 1.0, 0, torch.float32, "none", [], "")
        fn = lambda: torch.ops.onednn.qlinear_pointwise(*arguments)  # noqa: E731
    elif implementation == "weight_only":
        fn = lambda: ops.weight_only_linear(x, w_packed, w_scale, bias)  # noqa: E731
    else:
        activation = "gelu" if implementation.endswith("gelu") else "none"
        arguments = (codes, scale, w_packed, w_scale, bias, 0, activation, None, None, None, 0)
        if M * N * K < 2e8:  # right first, then fast; the large shapes are the same code
            assert torch.equal(torch.ops.pyvit_accel.lowbit_linear(*arguments), reference.lowbit_linear(*arguments))
        fn = lambda: ops.lowbit_linear(codes, scale, w_packed, w_scale, bias, activation=activation)  # noqa: E731
    measure(fn, M * K * N)
