"""The machine code of the Triton kernel quant_attention: tensor core instructions, exponentials, registers, spills."""

from __future__ import annotations

import re
from collections import Counter
from importlib import import_module

import pytest
import torch
from _triton import ARCHITECTURES, Code, Recorder, launches
from test_triton_quant_attention import FORMATS, problem

MMA = {  # of the scores, of 8-bit P, of float16 P
    80: ("IMMA", "HMMA", "HMMA"), 89: ("IMMA", "QMMA", "HMMA"),
    90: ("IGMMA", "QGMMA", "HGMMA"), 100: ("IMMA", "UTCQMMA", "UTCHMMA"),
}  # fmt: skip
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w+)(.*)", re.M)


def compiled(form, architecture, folder, N=197, D=64, **kwargs):
    new = problem(form, B=2, H=3, Nq=N, Nk=N, D=D, **kwargs)
    new["k_scale"] = new["k_scale"] if "t" in kwargs.get("parts", "") else torch.rand(1).expand(2, 3, N)
    values = import_module("pyvit_accel.kernels._values")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values, "_prepare_kernel", Recorder(values._prepare_kernel))
        module = import_module("pyvit_accel.kernels.quant_attention")
        patch.setattr(module, "_capability", lambda q: divmod(architecture, 10))
        (launch,) = launches("quant_attention", lambda m: m.quant_attention(*new.values()), "_quant_attention_kernel")
    return Code(launch, architecture, folder)


def registers(code):
    return int(re.search(r"REG:(\d+)", code.sass)[1])


def main_loop(code):
    """Instructions from the scores of a tile to their last product with v: of the loop, or of the only tile."""
    lines = [(int(at, 16), name, rest) for at, name, rest in INSTRUCTION.findall(code.sass)]
    products = [at for at, name, _ in lines if name == "QGMMA"]
    branches = [(int(re.search(r"0x([0-9a-f]+)", rest)[1], 16), at) for at, name, rest in lines if name == "BRA"]
    loops = [(start, end) for start, end in branches if any(start < at < end for at in products)]
    start, end = loops[0] if loops else (min(at for at, name, _ in lines if name == "IGMMA"), products[-1])
    return Counter(name for at, name, _ in lines if start <= at <= end)


EXP_FREE = [
    ("linear mantissa 3", "e4m3", 197), ("linear mantissa 3", "int8", 197), ("linear mantissa 3", "e4m3", 577),
    ("linear mantissa 3", "int8", 577), ("log2 4", "e4m3", 197), ("log2 4", "int8", 577),
]  # fmt: skip


@pytest.mark.parametrize(("form", "v", "N"), EXP_FREE)
def test_exp_free_on_hopper(form, v, N, tmp_path):
    """Both matmuls on 8-bit wgmma, no exponential, no spill, and 168 registers: three programs on an SM."""
    code = compiled(form, 90, tmp_path, N=N, v=v, parts="O")
    code.assert_sound(uncontracted=False)  # partial sums of fp8 dots are added up as fma(x, 1, y), which is exact
    assert {op for op in code.count if "MMA" in op} == {"IGMMA", "QGMMA"}
    operand = "E5M2" if form.startswith("log2") else "E4M3"
    assert "IGMMA.64x128x32.S8.S8" in code.sass and f"QGMMA.64x64x32.F32.{operand}.E4M3" in code.sass
    assert "MUFU.EX2" not in code.sass and "ex2" not in code.ptx
    assert registers(code) <= 168
    assert code.count["VIADDMNMX"], "not two bytes at a time"


@pytest.mark.parametrize(("N", "limit"), [(197, 9.8), (577, 8.3)])
def test_instructions_per_logit(N, limit, tmp_path, capsys):
    """Of the loop over keys, all that is not a tensor core's: loads, addresses and waits too."""
    code = compiled("linear mantissa 3", 90, tmp_path, N=N, v="e4m3", parts="o")
    count = main_loop(code)
    logits = 64 * (128 if N > 256 else N) / 128  # of a thread
    others = sum(n for name, n in count.items() if not name.endswith("GMMA")) / logits
    with capsys.disabled():
        parts = {name: round(n / logits, 2) for name, n in count.most_common(8)}
        print(f"\n{N} keys: {others:.2f} instructions a logit outside the tensor core: {parts}")
    assert others <= limit


OTHERS = [
    ("linear mantissa 3", {"parts": "e"}), ("linear mantissa 3", {"N": 577, "parts": "e"}),
    ("linear mantissa 3", {"parts": "btkO"}), ("log2 4, lse", {"v": "e4m3", "parts": "bto"}),
    ("log2 5", {"D": 80, "v": "fp16"}),
    ("sulq, lse", {"D": 128, "N": 577}), ("linear mantissa 3", {"D": 128, "N": 577, "parts": "s"}),
    ("uniform, lse", {"parts": "eg", "N": 196}), (None, {}), (None, {"D": 128, "parts": "bs", "N": 577}),
]  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("form", "kwargs"), OTHERS)
def test_no_spills(form, kwargs, architecture, tmp_path):
    code = compiled(form, architecture, tmp_path, **kwargs)
    code.assert_sound(uncontracted=False)
    scores, eight, sixteen = MMA[architecture]
    p = scores
    if form is not None:
        p = sixteen if FORMATS[form].operand == "fp16" or "s" in kwargs.get("parts", "") else eight
    if architecture == 100 and p == sixteen and kwargs.get("D", 64) > 64:
        p = "HMMA"  # tiles of 32 queries; tcgen05 has 64
    assert {op for op in code.count if "MMA" in op} == {scores, p}
    assert "MUFU.EX2" not in code.sass


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_packed_sequences_compile(architecture, tmp_path):
    ends = torch.tensor([0, 100, 197], dtype=torch.int32)
    changes = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
    new = problem("linear mantissa 3", H=3, Nq=197, Nk=197, D=64, parts="eO", **changes)
    values = import_module("pyvit_accel.kernels._values")
    module = import_module("pyvit_accel.kernels.quant_attention")
    recorder = Recorder(values._prepare_kernel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values, "_prepare_kernel", recorder)
        patch.setattr(module, "_capability", lambda q: divmod(architecture, 10))
        found = launches("quant_attention", lambda m: m.quant_attention(*new.values()), "_quant_attention_kernel")
    for launch in (*found, *recorder.launches):
        Code(launch, architecture, tmp_path).assert_sound(uncontracted=False)
