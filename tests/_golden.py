"""The golden network: a DeiT-Ti trained with 3-bit weights and activations (HG-PIPE, arXiv:2407.17879), in integers.

Its 98 matmuls, those of attention among them, are calls of the low-bit matmul under test with all scales 1; everything
between them is integer arithmetic on int64 tensors. T = 196 tokens, C = 192, H = 3 heads of D = 64.

    weights, k and v       -4..3 in 3 bits; -128..127 in 8 bits for the patch embedding and the head
    activations            -4..3; attention probabilities and GELU outputs u = 0..7 go in as u - 4 with zero point -4
    requantise             table[clip((x + b) >> s, 0, bound)], the GELU inside its table
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyvit_accel.formats.packed import pack

FILE = "w3a3_deit_tiny_golden.npz"
BLOCKS = 12


def load(folder: Path) -> dict[str, Tensor]:
    """All arrays by name, int64, under their other names too."""
    with np.load(folder / FILE) as file:
        arrays = {name: torch.from_numpy(file[name].astype(np.int64)) for name in file.files}
    aliases = json.loads(bytes(arrays.pop("__aliases__").tolist()))
    return arrays | {alias: arrays[name] for alias, name in aliases.items()}


class Network:
    """Replays `arrays` over linear(x, x_scale, w_packed, w_scale, bias, x_zero_point, residual) -> (M, N) float32.

    seen     every intermediate result, by the name that the trace gives it
    matmuls  names of the matmuls done, in order
    """

    def __init__(self, arrays: dict[str, Tensor], linear: Callable[..., Tensor]) -> None:
        self.arrays, self.linear = arrays, linear
        self.seen: dict[str, Tensor] = {}
        self.matmuls: list[str] = []

    def logits(self) -> Tensor:
        """(1000,) of the traced image."""
        x = self.patch_embed()
        for block in range(BLOCKS):
            x = self.block(block, x)
        x = self.layer_norm("head_lnq", x[0])
        return self.parameters_linear("head_matmul", x[None], bits=8)[0]

    def block(self, n: int, x: Tensor) -> Tensor:
        return self.mlp(f"mlp_{n}", self.attention(f"attn_{n}", x))

    def patch_embed(self) -> Tensor:
        """(T, C). What is added differs by token, for it holds the position: the matmul's residual."""
        a = self.arrays
        x, w, position = (a[f"patch_embed_matmul_{part}"] for part in ("input", "weight", "bias"))
        y = self.matmul("patch_embed_matmul", x, w, 8, residual=position)
        y[0] = a["patch_embed_cls"]
        return self.saw("patch_embed_output", rounded_shift(y, int(a["patch_embed_scalars"][0])))

    def attention(self, name: str, x: Tensor) -> Tensor:
        self.saw(f"{name}_input", x)
        y = self.layer_norm(f"{name}_lnq", x)
        q, k, v = (self.table(f"{name}_{p}_q", self.parameters_linear(f"{name}_gen_{p}_matmul", y)) for p in "qkv")
        q, k, v = (p.unflatten(1, (3, 64)).transpose(0, 1) for p in (q, k, v))
        p = self.softmax(f"{name}_softmaxq", self.matmul(f"{name}_gen_r_matmul", q, k, 3))
        y = self.table(f"{name}_a_q", self.matmul(f"{name}_gen_a_matmul", p, v.mT, 3, lowest=0))
        y = self.parameters_linear(f"{name}_gen_o_matmul", y.transpose(0, 1).flatten(1))
        return self.residual(name, y, x)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        self.saw(f"{name}_input", x)
        y = self.parameters_linear(f"{name}_matmul1", self.layer_norm(f"{name}_lnq", x))
        y = self.parameters_linear(f"{name}_matmul2", self.table(f"{name}_geluq", y), lowest=0)
        return self.residual(name, y, x)

    def parameters_linear(self, name: str, x: Tensor, bits: int = 3, lowest: int = -4) -> Tensor:
        return self.matmul(name, x, self.arrays[f"{name}_weight"], bits, lowest, self.arrays[f"{name}_bias"])

    def matmul(
        self, name: str, x: Tensor, w: Tensor, bits: int, lowest: int = -4,
        bias: Tensor | None = None, residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x @ w.T + bias + residual for x (..., T, K) and w (..., N, K), a call for each head."""
        self.matmuls.append(name)
        self.saw(f"{name}_input", x), self.saw(f"{name}_weight", w)
        zero_point = -4 - lowest
        if x.dim() == 3:
            y = torch.stack([self._call(*head, bits, zero_point) for head in zip(x, w, strict=True)])
        else:
            y = self._call(x, w, bits, zero_point, bias, residual)
        return self.saw(f"{name}_output", y)

    def _call(
        self, x: Tensor, w: Tensor, bits: int, zero_point: int,
        bias: Tensor | None = None, residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        codes, packed, one = (x + zero_point).to(torch.int8), pack(w.to(torch.int8), bits), torch.ones(())
        bias, residual = (t if t is None else t.float() for t in (bias, residual))
        y = self.linear(codes, one.expand(1), packed, one.repeat(len(w)), bias, zero_point, residual)
        assert y.abs().max() < 2**24 and torch.equal(y, y.round()), "float32 holds every integer below 2^24"
        return y.long()

    def table(self, name: str, x: Tensor) -> Tensor:
        """Requantise."""
        b, s, bound = self.arrays[f"{name}_scalars"].tolist()
        traced = name.replace("_q_q", "_qq").replace("_k_q", "_kq").replace("_v_q", "_vq").replace("_a_q", "_aq")
        self.saw(f"{traced}_input", x)
        return self.saw(f"{traced}_output", self.arrays[f"{name}_table_m"][((x + b) >> s).clamp(0, bound)])

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        a = self.arrays
        m, ms, b, s1, bound, s2, bits = a[f"{name}_scalars"].tolist()
        self.saw(f"{name}_input", x)
        d = x - rounded_shift(x.sum(-1, keepdim=True) * m, ms)
        r = a[f"{name}_rsqrt_table_m"][((d.square().sum(-1, keepdim=True) + b) >> s1).clamp(0, bound)]
        y = (d * r * a[f"{name}_lnw_m"] + a[f"{name}_lnb_m"]) >> s2
        return self.saw(f"{name}_output", y.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))

    def softmax(self, name: str, x: Tensor) -> Tensor:
        """Two tables of reciprocals: a fine one for small sums, a coarse one beyond it."""
        a = self.arrays
        b1, s1, n1, b2, s2, n2, b3, s3, c2, t2, m2, c3, t3, bits = a[f"{name}_scalars"].tolist()
        one, two = (a[f"{name}_recip_scaled_table_m_{part}"] for part in ("one", "two"))
        self.saw(f"{name}_input", x)
        e = a[f"{name}_exp_opp_table_m"][((x.amax(-1, keepdim=True) - x + b1) >> s1).clamp(0, n1)]
        total = e.sum(-1, keepdim=True)
        i = (total + b2) >> s2
        fine = (e * one[i.clamp(0, n2)] + b3) >> s3
        coarse = (e * two[((total + c2) >> t2).clamp(0, m2)] + c3) >> t3
        return self.saw(f"{name}_output", torch.where(i <= n2, fine, coarse).clamp(0, 2**bits - 1))

    def residual(self, name: str, branch: Tensor, x: Tensor) -> Tensor:
        multiplier, shift = self.arrays[f"{name}_scalars"].tolist()
        return self.saw(f"{name}_output", branch + rounded_shift(x * multiplier, shift))

    def saw(self, name: str, x: Tensor) -> Tensor:
        self.seen[name] = x.clone()
        return x


def rounded_shift(x: Tensor, bits: int) -> Tensor:
    """x / 2^bits, rounded half up."""
    return (x + 2 ** (bits - 1)) >> bits
