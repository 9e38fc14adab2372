"""What is measured: layers and attention of vision transformers, the most important ones first."""

from __future__ import annotations

from dataclasses import dataclass

MODELS = {  # width, hidden, heads, head dimension, tokens
    "ViT-B/16": (768, 3072, 12, 64, 197),
    "ViT-L/16": (1024, 4096, 16, 64, 197),
    "ViT-H/14": (1280, 5120, 16, 80, 257),
}


@dataclass(frozen=True)
class Linear:
    """y (M, N) = x (M, K) w^T: a layer of a model at a batch, or of so many tokens, to int8 codes or to floats."""

    model: str
    layer: str
    batch: int = 1
    to_codes: bool = True
    activation: str = "none"
    tokens: int | None = None

    @property
    def M(self) -> int:
        return self.batch * _of(self.model)[4] if self.tokens is None else self.tokens

    @property
    def K(self) -> int:
        width, hidden, *_ = _of(self.model)
        return hidden if self.layer == "fc2" else width

    @property
    def N(self) -> int:
        width, hidden, *_ = _of(self.model)
        return {"qkv": 3 * width, "proj": width, "fc1": hidden, "fc2": width}[self.layer]

    def __str__(self) -> str:
        size = f"x{self.batch}" if self.tokens is None else f"{self.tokens} tokens"
        return f"{self.model} {self.layer}{'+' + self.activation if self.activation != 'none' else ''} {size}"


@dataclass(frozen=True)
class Attention:
    """B images of H heads of N tokens, D channels a head."""

    B: int
    H: int
    N: int
    D: int

    def __str__(self) -> str:
        return f"attention {self.N} tokens d{self.D} h{self.H} x{self.B}"


@dataclass(frozen=True)
class Rows:
    """The tokens of a model at a batch, all of them or the part `keep`."""

    model: str
    batch: int
    keep: float = 1.0

    @property
    def R(self) -> int:
        return self.batch * _of(self.model)[4]

    @property
    def M(self) -> int:
        return int(self.R * self.keep)

    @property
    def C(self) -> int:
        return _of(self.model)[0]

    def __str__(self) -> str:
        return f"{self.model} norm x{self.batch}{f' keep {self.keep}' if self.keep < 1 else ''}"


def _of(model: str) -> tuple[int, ...]:
    return REHEARSAL if model == "tiny" else MODELS[model]


REHEARSAL = (64, 128, 2, 32, 17)
B, L, H = MODELS

LINEARS = (
    Linear(B, "qkv", 64), Linear(B, "fc2", 64, to_codes=False), Linear(B, "fc1", 64), Linear(B, "qkv", 8),
    Linear(B, "fc1", 1), Linear(L, "fc1", 64), Linear(B, "fc1", 64, activation="gelu"),
    Linear(B, "fc2", 8, to_codes=False), Linear(B, "fc1", 8), Linear(B, "proj", 8, to_codes=False),
    Linear(H, "fc1", 64), Linear(B, "fc2", 1, to_codes=False), Linear(L, "fc2", 64, to_codes=False),
    Linear(B, "qkv", 1), Linear(B, "proj", 64, to_codes=False), Linear(H, "fc2", 64, to_codes=False),
)  # fmt: skip
ATTENTIONS = (
    Attention(64, 12, 197, 64), Attention(64, 16, 257, 80), Attention(8, 12, 197, 64), Attention(64, 16, 257, 64),
    Attention(16, 12, 577, 64), Attention(8, 16, 1024, 64), Attention(1, 12, 197, 64), Attention(2, 12, 4096, 64),
)  # fmt: skip
ROWS = (Rows(B, 64), Rows(B, 64, 0.5), Rows(L, 64), Rows(B, 8), Rows(H, 64), Rows(H, 64, 0.5))
WEIGHT_ONLY = (Linear(B, "fc1", 1, to_codes=False), Linear(L, "fc1", 1, to_codes=False))
SPARSE24 = (  # whether weights come from registers or from shared memory is decided by M, N and K
    *(Linear(model, layer, to_codes=layer in ("qkv", "fc1"), tokens=tokens)
      for layer in ("fc1", "fc2", "qkv", "proj") for tokens in (197, 64, 788) for model in (B, L)),
    Linear(B, "fc2", 64, to_codes=False), Linear(L, "fc1", 64),
)  # fmt: skip
TINY = {
    "linear": (Linear("tiny", "qkv", 2), Linear("tiny", "fc2", 2, to_codes=False)),
    "attention": (Attention(2, 2, 17, 32),),
    "rows": (Rows("tiny", 2), Rows("tiny", 2, 0.5)),
    "weight_only": (Linear("tiny", "fc1", 1, to_codes=False),),
    "sparse24": (Linear("tiny", "fc1", tokens=5), Linear("tiny", "fc2", tokens=7, to_codes=False)),
}
ALL = {"linear": LINEARS, "attention": ATTENTIONS, "rows": ROWS, "weight_only": WEIGHT_ONLY,
       "sparse24": SPARSE24}  # fmt: skip


def chosen(kind: str, device: str, quick: bool) -> tuple:
    """The shapes of a kind: all, the first two, or tiny ones where no GPU is."""
    if device != "cuda":
        return TINY[kind]
    return ALL[kind][:2] if quick else ALL[kind]
