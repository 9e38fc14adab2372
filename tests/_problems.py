"""Inputs and comparisons shared by the tests of the ops."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import wraps

import torch
from torch import Tensor

from pyvit_accel import backends, ops
from pyvit_accel.formats import affine, packed, sparse24
from pyvit_accel.formats.softmax import SoftmaxFormat

U32 = 2.0**-24  # unit roundoff of float32
CODES = ("random", "lowest", "highest", "zeros", "alternating")


def codes(kind: str, *shape: int) -> Tensor:
    """int8 codes: random, or the extremes that overflow what is too narrow."""
    if kind == "random":
        return torch.randint(-128, 128, shape, dtype=torch.int8)
    if kind == "alternating":
        return torch.where(torch.arange(shape[-1]) % 2 == 0, -128, 127).to(torch.int8).expand(shape).contiguous()
    return torch.full(shape, {"lowest": -128, "highest": 127, "zeros": 0}[kind], dtype=torch.int8)


def weights(N: int, K: int, kind: str = "random", bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (N, K) of `bits` bits, but -127..127 for 8, their packed form, and a scale (N,)."""
    q = (codes(kind, N, K) >> (8 - bits)).clamp(min=affine.weight_range(bits)[0])
    return q, packed.pack(q, bits), torch.rand(N) * 0.01 + 1e-4


def sparse_codes(N: int, K: int, kind: str = "random") -> Tensor:
    """int8 codes (N, K), of which two of every four inputs, any two, are zero."""
    keep = torch.rand(N, -(-K // 4), 4).argsort(dim=-1).argsort(dim=-1) < 2
    return codes(kind, N, K).clamp(min=-127) * keep.flatten(1)[:, :K]


def padded(x: Tensor) -> Tensor:
    """The same values in rows that lie apart, between values that must not be read."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), 77, dtype=x.dtype)
    wide[..., 2:-3] = x
    return wide[..., 2:-3]


def transposed(x: Tensor) -> Tensor:
    """The same values, rows varying fastest."""
    return x.mT.contiguous().mT


def reference(op, *args, **kwargs):
    with backends.use_reference():
        return op(*args, **kwargs)


def assert_same_bits(actual, expected) -> None:
    """Equal in shape, dtype and every value; only the sign of zero is free, and nothing is NaN."""
    actual, expected = ((t,) if isinstance(t, Tensor) else t for t in (actual, expected))
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert torch.equal(a, b), f"{(a != b).sum()} of {a.numel()} differ, first at {(a != b).nonzero()[0].tolist()}"


def assert_nearest_codes(q: Tensor, value: Tensor, error: Tensor) -> None:
    """q is value rounded and clipped to int8, where value (float64) is known up to error: off by one only near ties."""
    assert q.dtype == torch.int8
    assert ((q.double() - value.clamp(-128, 127)).abs() <= 0.5 + error).all()


def block(
    B: int, N: int, C: int, H: int, hidden: int, static: bool = False, activation: str = "gelu", vectors: bool = True,
    w_bits: int = 8, x_bits: int = 8, head_bits: int = 8,
    softmax: SoftmaxFormat | None = None,
) -> dict:  # fmt: skip
    """Arguments of ops.quant_block. vectors: biases and layer scales; static: scales that calibration found."""
    inner = C // H * H

    def linear(name: str, features: int, inputs: int) -> dict:
        _, w_packed, w_scale = weights(features, inputs, bits=w_bits)
        return {f"{name}_w": w_packed, f"{name}_w_scale": w_scale, f"{name}_bias": vector(features)}

    def vector(n: int) -> Tensor | None:
        return torch.randn(n) if vectors else None

    norms = {f"{n}_{part}": torch.rand(C) + 0.5 for n in ("norm1", "norm2") for part in ("weight", "bias")}
    codes_of = {
        "qkv_x_scale": torch.rand(C) * 0.1 + 0.01 if static else None,
        "head_scale": torch.rand(3, H, 1) * 0.1 + 0.01 if static else None,
        "fc1_x_scale": torch.rand(1) * 0.1 + 0.01 if static else None,
        "fc2_x_scale": torch.rand(hidden) * 0.1 + 0.01 if static else None,
        "fc2_x_zero_point": -100 if static else -(2 ** (x_bits - 1)),
        "head_bits": head_bits,
        "p_values": None if softmax is None else softmax.values,
        "p_steps": 0.0 if softmax is None else softmax.steps,
        "p_operand": "" if softmax is None else softmax.operand,
        **{f"{name}_x_bits": x_bits for name in ("qkv", "proj", "fc1", "fc2")},
        **{f"{name}_x_clip": 1.0 if x_bits == 8 else 0.7 for name in ("qkv", "proj", "fc1", "fc2")},
        "fc2_x_minimum": None if static else -0.1701,
        "fc2_x_table": None,
    }
    return {
        "x": torch.randn(B, N, C) * 2,
        **norms,
        **linear("qkv", 3 * inner, C),
        **linear("proj", C, inner),
        **linear("fc1", hidden, C),
        **linear("fc2", C, hidden),
        **codes_of,
        "norm1_eps": 1e-6,
        "norm2_eps": 1e-5,
        "num_heads": H,
        "softmax_scale": (C // H) ** -0.5,
        "activation": activation,
        "layer_scale1": vector(C),
        "layer_scale2": vector(C),
    }


def mlp(args: dict) -> dict:
    """Arguments of ops.quant_mlp, of those of ops.quant_block."""
    new = {"norm_weight": "norm2_weight", "norm_bias": "norm2_bias", "norm_eps": "norm2_eps"}
    new |= {name: name for name in ("x", "activation", *(k for k in args if k.startswith(("fc1", "fc2"))))}
    return {name: args[old] for name, old in new.items()} | {"layer_scale": args["layer_scale2"]}


def projection(args: dict) -> dict:
    """Arguments of ops.quant_project, of those of ops.quant_block."""
    new = {"w": "proj_w", "w_scale": "proj_w_scale", "bias": "proj_bias", "x_bits": "proj_x_bits"}
    new |= {"residual": "x", "x_clip": "proj_x_clip", "layer_scale": "layer_scale1"}
    B, N, C = args["x"].shape
    inner = C // args["num_heads"] * args["num_heads"]
    return {name: args[old] for name, old in new.items()} | {"x": torch.randn(B, N, inner)}


@dataclass(frozen=True)
class Call:
    """A call of a public op that reaches every one of its tensors."""

    op: object
    args: tuple
    kwargs: dict = field(default_factory=dict)

    def __call__(self):
        return self.op(*self.args, **self.kwargs)


@wraps(ops.lowbit_linear_scatter)
def scattered(out, *args, **kwargs):
    """What the op makes of a copy of out."""
    out = out.clone()
    ops.lowbit_linear_scatter(out, *args, **kwargs)
    return out


def one_call_of_each() -> dict[str, Call]:
    """A small call of every op of backends.OPS, in float-out and codes-out form where there are both."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(7)
    M, K, N, B, H, D = 13, 37, 19, 2, 3, 24
    _, w_packed, w_scale = weights(N, K)
    x, x_codes, vector = torch.randn(M, K), codes("random", M, K), torch.rand(K) + 0.1
    epilogue = {
        "x_zero_point": 3,
        "activation": "gelu",
        "layer_scale": torch.randn(N),
        "residual": torch.randn(M, N),
    }
    index = torch.tensor([4, -1, 0, 4, M - 1, -1], dtype=torch.int32)
    places = torch.tensor([2, 0, -1, 5, 1, 3], dtype=torch.int32)
    linear = (x_codes, torch.rand(M) * 0.1, w_packed, w_scale, torch.randn(N))
    epilogue_of_floats = {name: value for name, value in epilogue.items() if name != "x_zero_point"}
    epilogue_of_sums = {name: value for name, value in epilogue.items() if name != "residual"}
    levels = torch.arange(256).float() - 128
    codebook = (x_codes.view(torch.uint8), torch.rand(M) * 0.1, levels, w_packed, w_scale, levels, torch.randn(N))
    q, k, v = codes("random", 3, B, M, H, D).transpose(2, 3)
    attention = (q, k, v, torch.rand(1) * 0.01, torch.rand(H, 1) * 0.1, torch.rand(B, H, M), D**-0.5)
    biases = {"bias": torch.randn(H, M, M), "mask": torch.rand(M, M) > 0.2, "key_bias": torch.randn(B, M)}
    _, patch_packed, patch_scale = weights(N, 3 * 4 * 4)
    images = torch.randint(0, 256, (B, 3, 8, 12), dtype=torch.uint8)
    calls = {
        "quantize": Call(ops.quantize, (x, vector, 3)),
        "quantize_dynamic": Call(ops.quantize, (x,)),
        "quantize_dynamic above a minimum": Call(ops.quantize, (x - x.min(),), {"minimum": 0.0}),
        "quantize_dynamic with a table": Call(ops.quantize, (x,), {"table": codes("random", 256)}),
        "quantize by an index": Call(ops.quantize, (x, vector, 3), {"index": index}),
        "quantize_dynamic by an index": Call(ops.quantize, (x,), {"index": index}),
        "norm_quant": Call(ops.norm_quant, (x, vector, vector, vector)),
        "norm_quant_dynamic": Call(ops.norm_quant, (x, vector, vector)),
        "norm_quant by an index": Call(ops.norm_quant, (x, vector, vector, vector), {"index": index}),
        "norm_quant_dynamic by an index": Call(ops.norm_quant, (x, vector, vector), {"index": index}),
        "lowbit_linear": Call(ops.lowbit_linear, linear, epilogue),
        "lowbit_linear to codes": Call(ops.lowbit_linear, linear, epilogue | {"out_scale": torch.rand(N) + 0.1}),
        "lowbit_linear by an index": Call(
            ops.lowbit_linear, linear, epilogue | {"residual": torch.randn(6, N), "index": index}
        ),
        "lowbit_linear_scatter": Call(
            scattered, (torch.randn(7, N), places, *linear), epilogue_of_sums | {"index": index}
        ),
        "codebook_linear": Call(ops.codebook_linear, codebook, epilogue_of_floats),
        "codebook_linear to codes": Call(ops.codebook_linear, codebook, epilogue_of_floats | {"out_scale": vector[:1]}),
        "weight_only_linear": Call(ops.weight_only_linear, (x, w_packed, w_scale, torch.randn(N))),
        "quant_attention": Call(ops.quant_attention, attention, biases),
        "quant_attention to codes": Call(ops.quant_attention, attention, biases | {"out_scale": torch.rand(1) + 0.1}),
        "quant_patch_embed": Call(ops.quant_patch_embed, (images, patch_packed, patch_scale, torch.randn(6, N), 4)),
    }
    calls |= sparse_calls(M, K, N, epilogue)
    calls["quant_block"] = Call(ops.quant_block, (), block(2, 7, 48, 2, 80) | {"tokens": 5})
    calls["quant_mlp"] = Call(ops.quant_mlp, (), mlp(block(2, 7, 48, 2, 80)))
    lists = (torch.randint(0, 4, (2, 7)).int(), 4, torch.rand(2, 7) + 0.1)
    merged = dict(zip(("ptr", "col", "weight"), ops.group_tokens(*lists), strict=False))
    calls["quant_project"] = Call(ops.quant_project, (), projection(block(2, 7, 48, 2, 80)) | merged)
    calls |= token_calls(B, M, H, D)
    torch.set_rng_state(generator_state)
    return calls


def sparse_calls(M: int, K: int, N: int, epilogue: dict) -> dict[str, Call]:
    w = sparse_codes(N, K)
    scales = {"x_scale": torch.rand(M) * 0.1, "w_scale": torch.rand(N) * 0.1, "w_sum": w.sum(1, dtype=torch.int32)}
    shared = epilogue | {"out_features": N}
    floats = (torch.randn(M, K).half(), *sparse24.pack(w.half() / 64), torch.randn(N))
    integers = (codes("random", M, K), *sparse24.pack(w), torch.randn(N))
    return {
        "sparse24_linear of floats": Call(ops.sparse24_linear, floats, shared | {"x_zero_point": 0}),
        "sparse24_linear": Call(ops.sparse24_linear, integers, shared | scales),
        "sparse24_linear to codes": Call(ops.sparse24_linear, integers, shared | scales | {"out_scale": torch.rand(1)}),
    }


def token_calls(B: int, N: int, H: int, D: int) -> dict[str, Call]:
    scores, tokens, mask = torch.randn(B, N), torch.randn(B, N, D), torch.rand(B, N) > 0.4
    groups = torch.randint(-1, 4, (B, N)).int()
    even, odd = tokens[:, ::2].contiguous(), tokens[:, 1::2].contiguous()
    best, which = torch.rand(B, even.shape[1]), torch.randint(0, N // 2, (B, even.shape[1])).int()
    heads, grid = torch.randn(B, H, N, D), torch.randn(B, 4, 6, D)
    lists = (torch.randint(-1, N, (B, 12)).int(), None, torch.rand(B, 12))
    return {
        "select_tokens": Call(ops.select_tokens, (scores, 5, 1, "index")),
        "split_tokens": Call(ops.split_tokens, (mask, 1)),
        "group_tokens": Call(ops.group_tokens, (groups, 4, torch.rand(B, N))),
        "match_tokens": Call(ops.match_tokens, (even, odd, "cosine", 2, 1)),
        "merge_pairs": Call(ops.merge_pairs, (best, which, N, 3, 1)),
        "mean_heads": Call(ops.mean_heads, (heads, torch.rand(H, 1))),
        "mix_tokens": Call(ops.mix_tokens, (tokens, *lists), {"width": 3, "base": torch.randn(B, 4, D)}),
        "propagate": Call(ops.propagate, (heads, heads * 2, torch.rand(B, H, N), D**-0.5, 3)),
        "local_assign": Call(ops.local_assign, (grid, grid[:, ::2, ::2].contiguous(), 3)),
        "class_row": Call(
            ops.class_row, (heads.char(), heads.char() + 1, torch.rand(1), torch.rand(H, 1), D**-0.5, torch.randn(B, N))
        ),
    }
