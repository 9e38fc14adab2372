"""Models as the papers' code leaves them: the names, shapes and kinds of attributes, filled with random numbers.

None of their code is here. `fake_*` are the formulas of the publications (simulated quantization), in the dtype of x;
codes are taken in float32, as they do it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

C, HEADS, HIDDEN, CLASSES, PATCH = 24, 3, 40, 5, 4
SHIFT = 0.16997124254703522
BLOCK = "blocks.0"
LINEARS = ("patch_embed.proj", *(f"{BLOCK}.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")), "head")


def positive(*shape: int) -> Tensor:
    return torch.rand(shape) * 0.02 + 0.01


def integers(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape).float()


class Holder(nn.Module):
    """Attributes and nothing else: plain ones, parameters and buffers as each paper's code has them."""

    def __init__(self, **attributes) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


class Vit(nn.Module):
    """One block with timm's names around layers made by linear(in, out, name), conv() and matmul(name)."""

    def __init__(self, linear: Callable, conv: Callable, matmul: Callable) -> None:
        super().__init__()
        attn = Holder(
            qkv=linear(C, 3 * C, "qkv"),
            proj=linear(C, C, "proj"),
            matmul1=matmul("matmul1"),
            matmul2=matmul("matmul2"),
        )
        mlp = Holder(fc1=linear(C, HIDDEN, "fc1"), fc2=linear(HIDDEN, C, "fc2"))
        block = Holder(norm1=nn.LayerNorm(C), attn=attn, norm2=nn.LayerNorm(C), mlp=mlp)
        self.patch_embed = Holder(proj=conv())
        self.blocks = nn.ModuleList([block])
        self.norm, self.head = nn.LayerNorm(C), linear(C, CLASSES, "head")
        for norm in (block.norm1, block.norm2, self.norm):
            nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias)


def conv2d() -> nn.Conv2d:
    return nn.Conv2d(3, C, PATCH, PATCH)


def with_parts(module: nn.Module, **parts) -> nn.Module:
    for name, value in parts.items():
        setattr(module, name, value)
    return module


# ---- AdaLog: parameters and buffers, so that state_dict() is complete


def parameters(**tensors: Tensor) -> Holder:
    return Holder(**{name: nn.Parameter(t) for name, t in tensors.items()})


def adalog_tables(quantizer: nn.Module, bits: int, q: int) -> nn.Module:
    code, D = torch.arange(2**bits), 2 ** (bits + 1) - 2
    mantissa = torch.round(2 ** (-((code * q) % 37) / 37.0).double() * D) / D
    for name, t in (("q", torch.tensor([q])), ("table1", (code * q // 37).float()), ("table2", mantissa.float())):
        quantizer.register_buffer(name, t)
    return quantizer


def adalog_model(w_bits: int = 4, a_bits: int = 4, s_bits: int = 3, reparamed: bool = True) -> Vit:
    def zero_point(bits: int, *shape: int) -> Tensor:
        return integers(2 ** (bits - 1) - 2, 2 ** (bits - 1) + 3, *shape) + 0.2 * torch.rand(*shape)

    def weight_quantizer(runs: int, rows: int) -> Holder:
        return parameters(scale=positive(runs, rows, 1), zero_point=zero_point(w_bits, runs, rows, 1))

    def linear(K: int, N: int, name: str) -> nn.Linear:
        runs = 3 if name == "qkv" else 1
        if name == "fc2":
            a = adalog_tables(parameters(scale=torch.tensor([3.2]), shift=torch.tensor([SHIFT])), a_bits, 20)
            a.register_buffer("bias_reparamed", torch.tensor(reparamed))
        else:
            a = parameters(scale=positive(1) * 10, zero_point=zero_point(a_bits, 1))
        return with_parts(nn.Linear(K, N), w_quantizer=weight_quantizer(runs, N // runs), a_quantizer=a)

    def conv() -> nn.Conv2d:
        w = parameters(scale=positive(C, 1), zero_point=zero_point(w_bits, C, 1))
        return with_parts(conv2d(), w_quantizer=w, a_quantizer=parameters(scale=torch.zeros(1, 1, 1, 1)))

    def operand() -> Holder:
        shape = (1, HEADS, 1, 1)
        return parameters(scale=positive(*shape) * 10, zero_point=zero_point(a_bits, *shape))

    def matmul(name: str) -> Holder:
        a = operand() if name == "matmul1" else adalog_tables(parameters(scale=torch.ones(1, 1, 1, 1)), s_bits, 25)
        return Holder(A_quantizer=a, B_quantizer=operand())

    return Vit(linear, conv, matmul)


# ---- RepQ-ViT and I&S-ViT: plain attributes


def quantizer(bits: int, *shape: int, scale: float = 1.0, whole: bool = True) -> Holder:
    zero_point = integers(2 ** (bits - 1) - 2, 2 ** (bits - 1) + 3, *shape) + (0.0 if whole else 0.3)
    return Holder(n_bits=bits, delta=positive(*shape) * scale, zero_point=zero_point, inited=True)


def repq_model(bits: int = 4, whole: bool = False) -> Vit:
    """After scale reparameterization: the zero points of qkv and fc1 are means, no integers unless `whole`."""

    def linear(K: int, N: int, name: str) -> nn.Linear:
        exact = whole or name not in ("qkv", "fc1")
        parts = {"weight_quantizer": quantizer(bits, N, 1), "input_quantizer": quantizer(bits, scale=10, whole=exact)}
        return with_parts(nn.Linear(K, N), **parts)

    def conv() -> nn.Conv2d:
        return with_parts(conv2d(), weight_quantizer=quantizer(bits, C, 1, 1, 1), input_quantizer=quantizer(8))

    def matmul(name: str) -> Holder:
        softmax = Holder(n_bits=bits, delta=torch.tensor(0.9), inited=True)
        return Holder(quantizer_A=quantizer(bits) if name == "matmul1" else softmax, quantizer_B=quantizer(bits))

    return Vit(linear, conv, matmul)


def is_vit_model(bits: int = 4) -> Vit:
    model = repq_model(bits)
    for part in model.modules():
        if hasattr(part, "inited"):
            part.inited = torch.ones(1)
    eta = torch.tensor(0.01)
    ends = {"minv": eta.log2(), "maxv": (1 + eta).log2()}
    sulq = Holder(n_bits=bits, delta=eta, base=2, inited=torch.ones(1), **ends)
    model.blocks[0].attn.matmul2.quantizer_A = sulq
    del model.patch_embed.proj.input_quantizer
    return model


# ---- PTQ4ViT: plain attributes; TinySAM: the same as buffers, bits nowhere


def ptq4vit_model(bits: int = 8, listed: bool = False) -> Vit:
    """listed: the variant that keeps both intervals of GELU outputs in one list."""
    qmax = 2 ** (bits - 1)

    def linear(K: int, N: int, name: str) -> nn.Linear:
        runs = 3 if name == "qkv" else 1
        parts = {"w_bit": bits, "a_bit": bits, "w_interval": positive(runs, 1, 1, 1) / 4, "a_interval": positive(1, 1)}
        if name == "fc2" and listed:
            parts["a_interval"] = [positive(1, 1), SHIFT / qmax]
        elif name == "fc2":
            parts["a_neg_interval"] = SHIFT / qmax
        return with_parts(nn.Linear(K, N), **parts)

    def conv() -> nn.Conv2d:
        return with_parts(conv2d(), w_bit=bits, a_bit=32, w_interval=positive(C, 1, 1, 1) / 4, a_interval=positive(1))

    def matmul(name: str) -> Holder:
        operands = {"A_bit": bits, "B_bit": bits, "B_interval": positive(1, HEADS, 1, 1, 1, 1, 1)}
        if name == "matmul1":
            return Holder(A_interval=positive(1, HEADS, 1, 1, 1, 1, 1), **operands)
        split = torch.tensor(2.0**-4)
        return Holder(split=split, A_interval=split / (qmax - 1), **operands)

    return Vit(linear, conv, matmul)


def tinysam_state() -> dict[str, Tensor]:
    """Buffers of the same layers under names of their own, and a convolution with an offset."""
    model, state = ptq4vit_model(), {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key.endswith("interval") or key == "split":
                state[f"image_encoder.{name}.{key}"] = torch.as_tensor(value)
    state |= {f"image_encoder.{name}": t for name, t in model.state_dict().items()}
    return state | {"image_encoder.patch_embed.proj.a_bias": torch.tensor(0.1)}


# ---- the formulas


def fake_uniform(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Asymmetric, unsigned codes."""
    codes = (torch.round(x.float() / scale) + zero_point).clamp(0, 2**bits - 1)
    return ((codes - zero_point).double() * scale.double()).to(x.dtype)


def fake_adalog(x: Tensor, bits: int, q: int, scale: float) -> Tensor:
    z = (x / scale).clamp(1e-15, 1)
    k = torch.round(-z.log2() * 37 / q)
    code = k.clamp(0, 2**bits - 1)
    D = 2 ** (bits + 1) - 2
    mantissa = torch.round(2 ** (-((code * q) % 37) / 37) * D) / D
    return torch.where(k < 2**bits, scale * mantissa * 2 ** -torch.floor(code * q / 37), 0)


def fake_log_sqrt2(x: Tensor, bits: int, delta: float) -> Tensor:
    k = torch.round(-2 * (x / delta).log2())
    code = k.clamp(0, 2**bits - 1)
    value = delta * 2 ** -torch.ceil(code / 2) * torch.where(code % 2 == 1, 2**0.5, 1.0)
    return torch.where(k < 2**bits, value, 0)


def fake_sulq(x: Tensor, bits: int, eta: float, minv: float, maxv: float) -> Tensor:
    d = (maxv - minv) / 2**bits
    code = torch.round(((x + eta).log2() - minv) / d).clamp(0, 2**bits)
    return 2 ** torch.round(code * d + minv) - eta


def fake_twin_gelu(x: Tensor, bits: int, interval: float) -> Tensor:
    qmax = 2 ** (bits - 1)
    n = SHIFT / qmax
    return torch.round(x / interval).clamp(0, qmax - 1) * interval + torch.round(x / n).clamp(-qmax, 0) * n


def fake_twin_softmax(x: Tensor, bits: int, split: float) -> Tensor:
    top = 2 ** (bits - 1) - 1
    d = split / top
    high = torch.round(x.clamp(split, 1) * top).clamp(0, top) / top
    return high + torch.round(x.clamp(0, split) / d).clamp(0, top) * d
