"""Attention of ViT-B on a CPU: every form of the probabilities beside scaled_dot_product_attention in float32.

    python bench/attention_cpu.py --json attention.json

12 heads of 64; q, k, v are int8 views of what a qkv matmul writes, as in a model, and float32 for what takes floats:
exp_free_attention quantizes them in the time measured. Then whole models, W8A8 with each form; then peak memory of one
image with 2 heads, against the number of tokens. All in one run, taking turns.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from pyvit_accel import accelerate, exp_free_attention, ops, recipes
from pyvit_accel.formats import log, softmax
from pyvit_accel.measure import build_model, compare_latency, machine, random_images
from pyvit_accel.output import table, write_json

HEADS, HEAD_DIM = 12, 64
SHAPES = [(batch, tokens) for tokens in (197, 577, 1024) for batch in (1, 8)]
FORMS = {
    "bytes": None,
    "linear mantissa 3, max": softmax.linear_mantissa(3),
    "linear mantissa 1, max": softmax.linear_mantissa(1),
    "log2 4, max": softmax.log2(4),
    "log2 3, max": softmax.log2(3),
    "log2 4, lse": softmax.log2(4, "lse"),
    "log-sqrt2 4, lse": softmax.of_codebook(log.log_sqrt2(4)),
}
SDPA, FLOATS = "SDPA float32", "exp_free_attention"
MODEL, MODELS = "vit_base_patch16_224", ("bytes", "linear mantissa 3, max", "log2 3, max")
TOKENS = (512, 1024, 2048, 4096)
MEMORY = """
import torch
from pyvit_accel import ops
from pyvit_accel.formats import softmax
from pyvit_accel.measure import peak_mib
torch.set_num_threads(1)
q, k, v = torch.randint(-127, 128, (3, 1, 2, {tokens}, 64), dtype=torch.int8)
one, form = torch.ones(1) * 0.01, softmax.linear_mantissa(3)
ops.quant_attention(q[:, :, :20], k[:, :, :20], v[:, :, :20], one, one, one, 0.1, softmax=form)
before = peak_mib()
ops.quant_attention(q, k, v, one, one, one, 0.1, softmax=form)
print(round(1024 * (peak_mib() - before)))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {
        "machine": machine(),
        "rounds": args.rounds,
        "attention_ms": [attention(batch, tokens, args.rounds) for batch, tokens in SHAPES],
        "model_ms_an_image": models(args.rounds),
        "peak_kib": {tokens: peak(tokens) for tokens in TOKENS},
    }
    rows = found["attention_ms"]
    print(table(("batch", "tokens", *(name for name in rows[0]["ms"])), [cells(row) for row in rows]))
    for batch, row in found["model_ms_an_image"].items():
        print(f"{MODEL}, batch {batch}, ms an image: " + ", ".join(f"{n} {ms:.1f}" for n, ms in row.items()))
    print("KiB beside the operands: " + ", ".join(f"{n} tokens {kib}" for n, kib in found["peak_kib"].items()))
    if args.json:
        write_json(args.json, found)


def attention(batch: int, tokens: int, rounds: int) -> dict:
    codes = torch.randint(-127, 128, (batch, tokens, 3, HEADS, HEAD_DIM), dtype=torch.int8)
    q, k, v = codes.permute(2, 0, 3, 1, 4).unbind(0)
    scale = torch.full((HEADS, 1), 0.02)
    floats = [t.float() * 0.02 for t in (q, k, v)]
    fns = {SDPA: lambda: F.scaled_dot_product_attention(*floats), FLOATS: lambda: exp_free_attention(*floats)}
    for name, form in FORMS.items():
        fns[name] = lambda form=form: ops.quant_attention(q, k, v, scale, scale, scale, HEAD_DIM**-0.5, softmax=form)
    with torch.inference_mode():
        latency = compare_latency(fns, rounds, label=f"attention, batch {batch}, {tokens} tokens")
    return {"batch": batch, "tokens": tokens, "ms": {name: latency[name].median for name in fns}}


def models(rounds: int) -> dict[int, dict[str, float]]:
    """Random weights; bytes of an exponential, and two formats without one."""
    model = build_model(MODEL)
    images = random_images(model, 8)
    fast = {name: accelerate(model, recipes.integer(8, 8, softmax=FORMS[name]), [images])[0] for name in MODELS}
    found = {}
    for batch in (1, 8):
        fns = {name: lambda net=net, x=images[:batch]: net(x) for name, net in fast.items()}
        with torch.inference_mode():
            latency = compare_latency(fns, rounds, label=f"{MODEL}, batch {batch}")
        found[batch] = {name: latency[name].median / batch for name in fns}
    return found


def peak(tokens: int) -> int:
    script = MEMORY.format(tokens=tokens)
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout)


def cells(row: dict) -> tuple[str, ...]:
    sdpa = row["ms"][SDPA]
    return (str(row["batch"]), str(row["tokens"]), *(f"{ms:.2f} ({sdpa / ms:.1f}x)" for ms in row["ms"].values()))


if __name__ == "__main__":
    main()
