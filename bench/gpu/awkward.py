"""Calls of the large ops at sizes that are no multiple of anything, every epilogue and number of bits among them."""

from __future__ import annotations

import itertools

import torch

from pyvit_accel import ops
from pyvit_accel.formats import packed, sparse24
from pyvit_accel.formats.softmax import DEFAULT_SOFTMAX

ROWS = (1, 5, 33, 64, 129, 197, 300, 1579)
FEATURES = (1, 16, 50, 97, 257, 771)
INPUTS = (1, 31, 64, 100, 768, 1021, 3072)
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu")
HEADS = ((1, 32), (63, 64), (65, 64), (197, 64), (257, 80), (577, 64), (130, 96), (50, 128))  # tokens, channels
CASES = 40
BITS = (8, 4, 8, 4, 8, 4, 2, 3, 5, 6)
SPARSE24 = ((1, 1, 1), (33, 97, 100), (64, 257, 31), (129, 130, 1021), (197, 771, 768), (300, 50, 3072))  # M, N, K


def awkward_calls(few: bool) -> dict:
    """few: the small ones only."""
    from _problems import Call

    state = torch.get_rng_state()
    torch.manual_seed(11)
    found = {}
    sizes = list(itertools.product(ROWS, FEATURES, INPUTS))
    picked = [sizes[i] for i in torch.randperm(len(sizes))[:CASES].tolist()]
    for place, (M, N, K) in enumerate(picked):
        if not few or M * N * K < 1e6:
            bits = BITS[place % len(BITS)]
            name = f"lowbit_linear {M} x {K} x {N}, {bits} bits"
            found[name] = Call(ops.lowbit_linear, *_linear(M, N, K, bits, int(torch.randint(32, ()))))
    for place, (M, N, K) in enumerate(SPARSE24):
        if not few or M * N * K < 1e6:
            for kind, dtype in (("int8", torch.int8), ("of floats", (torch.float16, torch.bfloat16)[place % 2])):
                args, kwargs = _sparse24(M, N, K, dtype, 7 * place)
                found[f"sparse24_linear {kind} {M} x {K} x {N}"] = Call(ops.sparse24_linear, args, kwargs)
    for M, C in ((1, 7), (197, 768), (1000, 1280), (50, 1023)):
        x, weight, bias = torch.randn(M, C) * 3 + 1, torch.randn(C), torch.randn(C)
        found[f"norm_quant_dynamic {M} x {C}"] = Call(ops.norm_quant, (x, weight, bias))
        found[f"norm_quant {M} x {C}"] = Call(ops.norm_quant, (x, weight, bias, torch.rand(C) + 0.01))
        found[f"quantize_dynamic {M} x {C}"] = Call(ops.quantize, (x,))
    for place, (N, D) in enumerate(HEADS):
        if not few or N < 100:
            q, k, v = torch.randint(-128, 128, (2, N, 3, 3, D), dtype=torch.int8).permute(2, 0, 3, 1, 4)
            scales = (torch.rand(1) * 0.02, torch.rand(3, 1) * 0.05, torch.rand(3, 1) * 0.1)
            out = {"out_scale": torch.rand(1) * 0.05 + 0.05} if place % 2 else {}
            args = (q, k, v, *scales, D**-0.5)
            found[f"quant_attention {N} tokens d{D}"] = Call(ops.quant_attention, args, out)
            form = out | {"softmax": DEFAULT_SOFTMAX}
            found[f"quant_attention {N} tokens d{D}, linear mantissa"] = Call(ops.quant_attention, args, form)
    torch.set_rng_state(state)
    return found


def _sparse24(M: int, N: int, K: int, dtype: torch.dtype, parts: int) -> tuple[tuple, dict]:
    """As _linear; of every four inputs two at most."""
    (x, x_scale, _, w_scale, bias), kwargs = _linear(M, N, K, 8, parts)
    w = torch.randint(-128, 128, (N, K), dtype=torch.int8) * ((torch.arange(K) + parts) % 4 < 2)
    kwargs["out_features"] = N
    if dtype != torch.int8:
        kwargs["x_zero_point"] = 0
        return (x.to(dtype) / 64, *sparse24.pack(w.to(dtype) / (64 * K**0.5)), bias), kwargs
    scales = {"x_scale": x_scale, "w_scale": w_scale, "w_sum": w.sum(1, dtype=torch.int32)}
    return (x, *sparse24.pack(w), bias), kwargs | scales


def _linear(M: int, N: int, K: int, bits: int, parts: int) -> tuple[tuple, dict]:
    """Arguments, with the parts of the epilogue that its bits say; rows of x and residual lie apart."""
    q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (N, K), dtype=torch.int8)
    x = torch.randint(-128, 128, (M, K + 3), dtype=torch.int8)[:, :K]
    x_scale = torch.rand(M if parts & 1 else 1) * 0.02 + 1e-3
    kwargs = {"activation": ACTIVATIONS[parts // 2 % 4], "x_zero_point": (0, -37)[parts // 4 % 2]}
    if parts & 2:
        kwargs["layer_scale"] = torch.randn(N)
    if parts & 4:
        kwargs["residual"] = torch.randn(M, N + 5)[:, :N]
    if parts & 8:
        kwargs |= {"out_scale": torch.rand(N if parts & 16 else 1) * 0.1 + 0.05, "out_zero_point": -3}
    w_scale = (torch.rand(N) + 0.1) * 2.0 ** (8 - bits) / 128
    return (x, x_scale, packed.pack(q, bits), w_scale, torch.randn(N) if parts % 3 else None), kwargs
