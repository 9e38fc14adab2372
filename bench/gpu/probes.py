"""The part `probes`: rates of the pipes, measured by csrc/cuda/probes, beside those that the design assumes."""

from __future__ import annotations

import subprocess
from pathlib import Path

from bench.gpu.stream import run_all
from bench.gpu.task import Task

ASSUMED = {  # a multiprocessor and clock: multiply-adds (sparse ones count what is left out), lanes, bytes; GB/s of HBM
    "int8": 4096, "fp8": 4096, "bf16": 2048, "int8_sparse": 8192, "bf16_sparse": 4096,
    "pipe ex2": 16, "pipe ffma": 128, "pipe fadd": 128, "pipe fmul": 128, "pipe imad": 64, "pipe lop3": 64,
    "pipe prmt": 64, "pipe max.s32": 64, "pipe max.f32": 64, "pipe cvt.rni.s32.f32": 16,
    "shared memory reads": 128, "l2 loads": 46, "hbm copy": 4300,
}  # fmt: skip
CEILINGS = {"int8 ss n256": "int8", "int8 rs n256": "int8", "fp8 ss n256": "fp8", "fp8 rs n256": "fp8",
            "bf16 ss n256": "bf16", "bf16 rs n256": "bf16"}  # fmt: skip
NONE_WRONG = "is exact"  # ends the names of probes whose value counts wrong sums


def names(program: Path) -> list[str]:
    return subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()


def assumed(name: str) -> float | None:
    return ASSUMED.get(name) or ASSUMED.get(name.split(" ")[0] if " ss " in name or " rs " in name else "")


def row_of(name: str, measured: dict, lines: list[str]) -> dict:
    """status and values of a probe, from the line it printed."""
    if "failed" in measured:
        return {"status": "failed", "why": measured["failed"]}
    if "absent" in measured:
        return {"status": "not run", "why": measured["absent"]}
    if name.endswith(NONE_WRONG) and measured["value"]:
        return {"status": "failed", "why": f"{measured['value']:.0f} {measured['unit']}"} | measured
    notes = [f"{key} {measured[key]:.4g}" for key in measured if key not in ("value", "unit")]
    row = measured | {"status": "ok", "note": ", ".join(notes)}
    if (expected := assumed(name)) is not None:
        row["assumed"] = expected
    return row | ({"ceiling": CEILINGS[name]} if name in CEILINGS else {})


def main() -> None:
    task = Task.current()
    program = Path(task.work) / "probes"
    if task.device != "cuda" or not program.exists():
        task.row("probes", "not run", why="a rehearsal has no GPU" if program.exists() else "they were not built")
        return
    run_all(lambda left: [str(program), *left], task.plan(names(program)), task, row_of)


if __name__ == "__main__":
    main()
