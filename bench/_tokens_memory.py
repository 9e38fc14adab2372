"""Memory that the blocks of a W8A8 model need beside their weights and input, with and without a schedule."""

from __future__ import annotations

import json
import subprocess
import sys

TOKENS, HEADS = 4097, 3
SCHEDULES = {
    "all tokens": None,
    "ToMe": {"method": "tome", "arguments": {"r": 200}},
    "ToFu": {"method": "tofu", "arguments": {"r": 200, "switch": 2}},
    "EViT": {"method": "evit", "arguments": {"rate": 0.7, "layers": [1, 2]}},
    "DiffRate": {
        "method": "diffrate",
        "arguments": {"prune": [4000, 3600, 3200, 2800], "merge": [3800, 3400, 3000, 2600]},
    },
    "Zero-TPrune": {"method": "zero_tprune", "arguments": {"rate": 0.8, "similar": 100, "layers": [1, 2]}},
}
SCRIPT = """
import json, sys
import torch
from pyvit_accel import TokenSchedule, accelerate, recipes, reduce_tokens
from pyvit_accel.measure import peak_mib
from pyvit_accel.models import VisionTransformer, ViTConfig

request = json.loads(sys.argv[1])
torch.set_num_threads(1)
config = ViTConfig(image_size=512, patch_size=8, dim=192, num_heads=request["heads"], depth=4, num_classes=10)
model, _ = accelerate(VisionTransformer(config).eval(), recipes.W8A8_DYNAMIC)
x = torch.randn(1, request["tokens"], 192)
with torch.inference_mode():
    model.blocks(x[:, :50].contiguous())
    if request["schedule"]:
        reduce_tokens(model, TokenSchedule(**request["schedule"]), restore=False)
    before = peak_mib()
    model.blocks(x)
    print(peak_mib() - before)
"""


def measure_memory() -> dict[str, float]:
    """MiB above what was held before, of one forward of four blocks, each in a process of its own."""
    found = {}
    for name, schedule in SCHEDULES.items():
        request = json.dumps({"schedule": schedule, "tokens": TOKENS, "heads": HEADS})
        done = subprocess.run([sys.executable, "-c", SCRIPT, request], capture_output=True, check=True, text=True)
        found[name] = float(done.stdout.splitlines()[-1])
    return found
