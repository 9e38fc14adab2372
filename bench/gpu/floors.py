"""The least time a job can take: its operations or its bytes, at the rates measured on this card."""

from __future__ import annotations

NOMINAL = {"bf16": 990.0, "fp16": 990.0, "int8": 1979.0, "fp8": 1979.0, "float32": 67.0, "copy": 4800.0}
"""H200, TOP/s and GB/s by its data sheet: where nothing was measured. A plain float32 add is one operation."""
SPARSE_GAIN = 2.0


def ceilings(rows: list[dict]) -> dict[str, float]:
    """Measured TOP/s by kind, and GB/s of copies: the best of library and probe; without those that were not run."""
    found: dict[str, float] = {}
    for row in rows:
        if row["status"] == "ok" and row["part"] == "device" and row.get("value"):
            kind, value = row["item"].removeprefix("matmul "), row["value"]
        elif row["status"] == "ok" and row.get("ceiling"):
            kind, value = row["ceiling"], row["tops"]
        else:
            continue
        found[kind] = max(found.get(kind, 0.0), value)
    return found


def floor_ms(row: dict, measured: dict[str, float]) -> float:
    """of a row with ops, bytes and a kind of multiplication."""
    kind = row["kind"]
    gain = SPARSE_GAIN if kind.endswith("2:4") else 1.0
    rates = NOMINAL | measured
    rate = rates[kind.removesuffix(" 2:4")] * gain
    return max(row["ops"] / rate / 1e9, row["bytes"] / rates["copy"] / 1e6)
