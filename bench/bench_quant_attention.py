"""quant_attention on int8 views of a qkv matmul beside scaled_dot_product_attention in float32."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TOKENS

from pyvit_accel import backends, ops


@pytest.mark.parametrize("implementation", ["sdpa_float32", "quant_attention"])
def bench_attention(measure, batch, width, implementation):
    D, H = 64, width // 64
    codes = torch.randint(-127, 128, (batch, TOKENS, 3, H, D), dtype=torch.int8)
    q, k, v = codes.permute(2, 0, 3, 1, 4).unbind(0)
    scale = torch.tensor([0.02])
    if implementation == "sdpa_float32":
        floats = [t.float() * scale for t in (q, k, v)]
        fn = lambda: F.scaled_dot_product_attention(*floats)  # noqa: E731
    else:
        fn = lambda: ops.quant_attention(q, k, v, scale, scale, scale, D**-0.5)  # noqa: E731
        with backends.use_reference():
            truth = fn()
        assert torch.equal(fn(), truth)
    measure(fn, 2 * batch * H * TOKENS**2 * D)
