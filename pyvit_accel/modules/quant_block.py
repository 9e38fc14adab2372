"""QuantBlock: a pre-norm transformer block whose codes stay integers from each norm to the residual.

    norm -> int8 -> qkv matmul -> int8 -> attention -> int8 -> projection + residual -> float32
    norm -> int8 -> fc1 matmul + GELU -> int8 -> fc2 matmul + residual -> float32
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyvit_accel import ops
from pyvit_accel.formats.softmax import SoftmaxFormat
from pyvit_accel.formats.sparse24 import Sparse24Operand

from .quant_attention import QuantAttention, QuantHeads
from .quant_linear import QuantLinear
from .quant_mlp import QuantMlp
from .token_block import ReducingBlock
from .token_step import Lists


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm._parameters["weight"], norm._parameters["bias"], norm.eps


def _weight(linear: QuantLinear) -> Tensor | Sparse24Operand:
    packed = linear._buffers.get("w_packed")
    return linear.operand if packed is None else packed


def _feed_forward(mlp: QuantMlp) -> tuple:
    """What quant_block and quant_mlp read of the MLP."""
    fc1_in, fc2_in = mlp._modules["fc1"], mlp._modules["fc2"]
    fc1, fc2 = fc1_in._buffers, fc2_in._buffers
    return (
        *(fc1["x_scale"], fc1_in.x_bits, fc1_in.x_clip),
        *(_weight(fc1_in), fc1["w_scale"], fc1["bias"], mlp.activation),
        *(fc2["x_scale"], fc2_in.code_bits, fc2_in.x_clip, fc2_in.x_zero_point, fc2_in.x_minimum, fc2["x_table"]),
        *(_weight(fc2_in), fc2["w_scale"], fc2["bias"]),
    )


def _probabilities(softmax: SoftmaxFormat | None) -> tuple[Tensor | None, float, str]:
    return (None, 0.0, "") if softmax is None else (softmax.values, softmax.steps, softmax.operand)


class QuantBlock(ReducingBlock):
    """x (B, N, C) float in and out; attn_mask as in F.scaled_dot_product_attention.

    With a TokenStep inside (token_block.py) it runs in four ops instead of one, and in the one wherever no token of an
    earlier block was merged.
    """

    computes_first_tokens = True  # what a model asks before it passes `tokens`

    def __init__(
        self,
        norm1: nn.LayerNorm,
        attention: QuantAttention,
        norm2: nn.LayerNorm,
        mlp: QuantMlp,
        layer_scale1: Tensor | None = None,
        layer_scale2: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = norm1, attention, norm2, mlp
        self.register_buffer("layer_scale1", layer_scale1)
        self.register_buffer("layer_scale2", layer_scale2)
        self.requires_grad_(False)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, tokens: int | None = None) -> Tensor:
        """tokens: only the first ones of every image are wanted, (B, tokens, C); the others are not computed."""
        dtype, x = x.dtype, x.float()
        if self.state is not None and self._reduces(x, attn_mask):
            return self.reduced(x, tokens).to(dtype)
        if attn_mask is None and self.fusable:
            return self._fused(x, tokens).to(dtype)
        heads = self.heads(x)
        attended = self.attention.weigh(heads, attn_mask)
        y = self.project(attended, x, None, None)
        return self.feed_forward(y[:, :tokens]).to(dtype)

    def _reduces(self, x: Tensor, attn_mask: Tensor | None) -> bool:
        """Whether tokens are left out or merged here or were merged before; starts the state."""
        if attn_mask is not None:
            raise ValueError("QuantBlock: attn_mask came to a block whose tokens are reduced; call the model without")
        if self.restores or self.step_for(x) is not None:
            return True
        if self.is_first:
            self.state.start(x)
        return self.state.size is not None

    def heads(self, x: Tensor) -> QuantHeads:
        codes = self.attention.qkv.quantize_norm(self.norm1, x)
        return self.attention.heads(*codes, None if self.state is None else self.state.key_bias)

    def attend(self, heads: QuantHeads, index: Tensor | None) -> Tensor:
        return self.attention.weigh(heads, index=index)

    def project(self, attended: Tensor, x: Tensor, index: Tensor | None, lists: Lists | None) -> Tensor:
        proj = self.attention.proj
        if proj.x_scale is None:
            moved = {"col": index} if lists is None else vars(lists)
            formats = {"x_bits": proj.x_bits, "x_clip": proj.x_clip, "layer_scale": self.layer_scale1}
            return ops.quant_project(attended, x, proj.operand, proj.w_scale, proj.bias, **moved, **formats)
        if lists is not None:
            attended, x = lists.mean(attended), lists.mean(x)
        elif index is not None:
            x = ops.mix_tokens(x, index)
        return proj.matmul(*proj.quantize(attended), layer_scale=self.layer_scale1, residual=x)

    def feed_forward(self, y: Tensor) -> Tensor:
        norm, mlp = self._modules["norm2"], self._modules["mlp"]
        return ops.quant_mlp(y.contiguous(), *_norm(norm), *_feed_forward(mlp), self._buffers["layer_scale2"])

    @property
    def fusable(self) -> bool:
        """Whether ops.quant_block can stand for the block when there is no mask."""
        attention = self._modules["attention"]
        x_scale = attention._modules["proj"]._buffers["x_scale"]
        softmax = attention.softmax
        of_maximum = softmax is None or (softmax.anchor == "max" and softmax.thresholds is None and softmax.offset == 0)
        return x_scale is None and of_maximum and attention.q_norm is None and attention.k_norm is None

    def _fused(self, x: Tensor, tokens: int | None) -> Tensor:
        # Reading the dictionaries of the modules takes 3 us where 40 attributes take 30: a tenth of a block of ViT-Ti.
        modules, layer_scale = self._modules, self._buffers
        attention, mlp = modules["attention"], modules["mlp"]
        qkv_in, proj_in = attention._modules["qkv"], attention._modules["proj"]
        qkv, proj = qkv_in._buffers, proj_in._buffers
        return ops.quant_block(
            x,
            *_norm(modules["norm1"]),
            *(qkv["x_scale"], qkv_in.x_bits, qkv_in.x_clip, _weight(qkv_in), qkv["w_scale"], qkv["bias"]),
            *(attention.num_heads, attention.scale, attention._buffers["head_scale"]),
            *(attention.head_bits, *_probabilities(attention.softmax)),
            *(proj_in.x_bits, proj_in.x_clip),
            *(_weight(proj_in), proj["w_scale"], proj["bias"], layer_scale["layer_scale1"]),
            *_norm(modules["norm2"]),
            *_feed_forward(mlp),
            *(layer_scale["layer_scale2"], tokens),
        )

    def config(self) -> dict:
        return {
            "dim": self.norm1.weight.shape[0],
            "norm1": self.norm1.eps,
            "norm2": self.norm2.eps,
            "attention": self.attention.config(),
            "mlp": self.mlp.config(),
            "layer_scale1": self.layer_scale1 is not None,
            "layer_scale2": self.layer_scale2 is not None,
        }

    @classmethod
    def from_config(cls, config: dict) -> QuantBlock:
        C = config["dim"]
        attention, mlp = QuantAttention.from_config(config["attention"]), QuantMlp.from_config(config["mlp"])
        scales = [torch.ones(C) if config[name] else None for name in ("layer_scale1", "layer_scale2")]
        return cls(nn.LayerNorm(C, config["norm1"]), attention, nn.LayerNorm(C, config["norm2"]), mlp, *scales)
