"""norm_quant, per token and static, beside F.layer_norm in float32 alone and followed by a quantisation in PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TOKENS

from pyvit_accel import ops, reference


@pytest.mark.parametrize(
    "implementation", ["layer_norm", "layer_norm_then_quantize", "norm_quant", "norm_quant_static"]
)
def bench_norm_quant(measure, batch, width, implementation):
    x, scale = torch.randn(batch * TOKENS, width), torch.tensor([0.03])
    weight, bias = torch.rand(width), torch.randn(width)
    if implementation == "layer_norm":
        fn = lambda: F.layer_norm(x, (width,), weight, bias)  # noqa: E731
    elif implementation == "layer_norm_then_quantize":
        fn = lambda: reference.quantize_dynamic(F.layer_norm(x, (width,), weight, bias))  # noqa: E731
    else:
        static = scale if implementation.endswith("static") else None
        if static is None:
            truth = reference.norm_quant_dynamic(x, weight, bias, 1e-6)[0]
        else:
            truth = reference.norm_quant(x, weight, bias, scale, 1e-6)
        assert torch.equal(ops.norm_quant(x, weight, bias, static)[0], truth)
        fn = lambda: ops.norm_quant(x, weight, bias, static)  # noqa: E731
    measure(fn)
