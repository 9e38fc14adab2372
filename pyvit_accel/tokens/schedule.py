"""TokenSchedule: which step each block of a model gets. It knows its method and arguments, and is JSON-able."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyvit_accel.modules.token_step import Rows, TokenStep

Steps = list[TokenStep | None]
METHODS: dict[str, Callable[..., Callable[[int], Steps]]] = {}


def method(make: Callable[..., Callable[[int], Steps]]) -> Callable[..., Callable[[int], Steps]]:
    """Register make(**arguments), which returns depth -> steps, under its name."""
    METHODS[make.__name__] = make
    return make


@dataclass(frozen=True)
class TokenSchedule:
    """A method of METHODS with its arguments: TokenSchedule("tome", {"r": 13}).

    Raises ValueError for an unknown method, arguments it does not take, and, in steps, a depth it does not fit.
    """

    method: str
    arguments: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"TokenSchedule: method {self.method!r} is not one of {', '.join(sorted(METHODS))}")
        try:
            object.__setattr__(self, "arguments", json.loads(json.dumps(self.arguments)))
        except TypeError as error:
            raise ValueError(f"TokenSchedule: {self.method}: {error}; pass numbers, strings or lists") from None
        self._make()

    def _make(self) -> Callable[[int], Steps]:
        try:
            return METHODS[self.method](**self.arguments)
        except TypeError as error:
            raise ValueError(f"TokenSchedule: {error}") from None

    @property
    def name(self) -> str:
        """TOME(r=13)."""
        return f"{self.method.upper()}({', '.join(f'{k}={v}' for k, v in self.arguments.items())})"

    def steps(self, depth: int) -> Steps:
        """One for every block, None where its tokens stay."""
        return self._make()(depth)

    def rows(self, depth: int, num_tokens: int, num_prefix_tokens: int = 1) -> list[Rows]:
        """How many tokens the parts of every block see, of num_tokens with the prefix. Raises for counts that grow."""
        rows, N = [], num_tokens
        for layer, step in enumerate(self.steps(depth)):
            new = Rows(N, N, N, N) if step is None else step.rows(N, num_prefix_tokens)
            if not num_prefix_tokens <= new.out <= N:
                came = f"block {layer} gets {N} tokens, {num_prefix_tokens} of them prefix, and {new.out} leave it"
                raise ValueError(f"{self.name}: {came}; counts must not grow nor cut the prefix")
            rows.append(new)
            N = new.out
        return rows

    def to_json(self) -> str:
        return json.dumps({"method": self.method, "arguments": self.arguments})

    @classmethod
    def from_json(cls, text: str) -> TokenSchedule:
        """Raises ValueError for a text that is not one of to_json."""
        values = json.loads(text)
        if not isinstance(values, dict) or set(values) != {"method", "arguments"}:
            raise ValueError(f"TokenSchedule: {text[:80]!r} is no object of method and arguments, as to_json writes it")
        return cls(values["method"], values["arguments"])

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> TokenSchedule:
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def at_layers(layers: Sequence[int], depth: int, make: Callable[[int], TokenStep]) -> Steps:
    """make(stage) at each of the layers, counted from 0, None elsewhere."""
    outside = [layer for layer in layers if not 0 <= layer < depth]
    if outside or sorted(set(layers)) != list(layers):
        raise ValueError(f"layers {tuple(layers)} must ascend within 0..{depth - 1}: the model has {depth} blocks")
    steps: Steps = [None] * depth
    for stage, layer in enumerate(layers):
        steps[layer] = make(stage)
    return steps


def macs(rows: Sequence[Rows], dim: int, mlp_ratio: float = 4.0) -> float:
    """Multiply-adds of the blocks for one image."""
    C = dim
    each = (3 * r.keys * C + 2 * r.queries * r.keys + r.projected * C + 2 * mlp_ratio * r.out * C for r in rows)
    return float(C * sum(each))


def snap_schedule(counts: Sequence[int], batch: int, tile: int) -> list[int]:
    """Counts of tokens, each lowered to the most whose rows fill whole tiles only; one that fills no tile is kept.

    counts  tokens of every layer, which cost ceil(batch count / tile) tiles
    batch   images; tile: rows of a matmul's tile
    """
    if batch < 1 or tile < 1 or any(count < 1 for count in counts):
        raise ValueError(f"snap_schedule: counts {list(counts)}, batch={batch}, tile={tile} must be positive")
    snapped = []
    for count in counts:
        full = batch * count // tile * tile // batch
        snapped.append(full or count)
    return snapped
