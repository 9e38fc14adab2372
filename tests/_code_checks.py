"""What the table of _gates.py asks of machine code beside its columns: functions of a Code that assert."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from _code import Code
from _triton import triton


def words_are_whole(code: Code) -> None:
    """An unpacking instruction shifts its four bytes by as much, so they are the four inputs of one word.

    Triton groups what a thread holds in the order of its registers, so the last dimension must come first there.
    """
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.*)$", code.ttgir, re.M))
    shifting = [line for line in code.ttgir.splitlines() if "elementwise_inline_asm" in line and "shf.r" in line]
    for name in {name for line in shifting for name in re.findall(r"x4xi8, (#\w+)>", line)}:
        layout = layouts[name]
        if "#ttg.linear" in layout:
            assert re.search(r"register = \[\[0, 0, 0, 0, 1\], \[0, 0, 0, 0, 2\]", layout), layout
        else:
            assert re.search(r"sizePerThread = \[\d+, \d+, \d+, \d+, 4\].*order = \[4, ", layout), layout


class UnpacksFourBits:
    """Three instructions for eight weights, between shared memory and wgmma's registers, and nothing else on that way.

    words: of a thread in a step.
    """

    def __init__(self, words: int):
        self.words = words

    def __call__(self, code: Code) -> None:
        masked = re.findall(r"LOP3\.LUT .*0xf0f0f0f0.*0x6a", code.sass)
        assert len(masked) == 2 * self.words
        unpack = [line for line in re.findall(r"// begin inline asm\s+(.*)", code.ptx) if "0xF0F0F0F0" in line]
        assert len(unpack) == self.words
        assert all(len(re.findall(r"\b(shl|lop3)\.b32", line)) == 3 and line.count(";") == 4 for line in unpack)
        loop = code.sass[code.sass.index(masked[0]) : code.sass.index("IGMMA")]
        assert not re.search(r"STS|STSM|LDSM|SHFL", loop)
        assert loop.count("PRMT") <= 1  # of a mask


def has_no_fma(code: Code) -> None:
    """Without a division, whose expansion needs them, not even the machine code has a fused multiply-add."""
    if ".target sm_100" in code.ptx and triton.__version__.startswith("3.6"):
        pytest.skip("ptxas 12.9 contracts f32x2 pairs against --fmad=false; kernels/_common.py says so")
    assert code.count["FMUL"] and code.count["FADD"] and not code.count["FFMA"]


def sums_32_products(code: Code) -> None:
    """Each fp8 wgmma starts anew: no sum of more than 32 products, which Hopper's 13 bits hold exactly."""
    dots = [rest for _, name, _, rest in code.instructions if name == "QGMMA"]
    assert dots and all(", RZ, !UPT" in dot for dot in dots)


class Promotes:
    """Sums of 128 inputs are added to float32 sums before the loop goes on, `adds` of a thread."""

    def __init__(self, adds: int):
        self.adds = adds

    def __call__(self, code: Code) -> None:
        assert code.count["FADD"] == self.adds


def ends_early(code: Code) -> None:
    """A block of rows that are left out does nothing."""
    assert code.count["EXIT"] > 1


def takes_two_bytes(code: Code) -> None:
    """Bytes of probabilities are made two at a time."""
    assert code.count["VIADDMNMX"]


class Logits:
    """At most `limit` instructions a logit but the tensor core's: loads, addresses and waits too; two bytes at a time.

    Counted from the scores of a tile to their last product with v: of the loop over keys, or of its only turn.
    """

    def __init__(self, keys: int, limit: float):
        self.logits, self.limit = 64 * keys / 128, limit  # of a thread in a turn

    def __call__(self, code: Code) -> None:
        takes_two_bytes(code)
        products = [at for at, name, _, _ in code.instructions if name == "QGMMA"]
        branches = [
            (int(re.search(r"0x([0-9a-f]+)", rest)[1], 16), at)
            for at, name, _, rest in code.instructions
            if name == "BRA" and "0x" in rest
        ]
        loops = [(start, end) for start, end in branches if any(start < at < end for at in products)]
        first = min(at for at, name, _, _ in code.instructions if name == "IGMMA")
        start, end = loops[0] if loops else (first, products[-1])
        count = Counter(name for at, name, _, _ in code.instructions if start <= at <= end)
        each = sum(n for name, n in count.items() if not name.endswith("GMMA")) / self.logits
        parts = {name: round(n / self.logits, 2) for name, n in count.most_common(8)}
        print(f"{each:.2f} instructions a logit outside the tensor core: {parts}")
        assert each <= self.limit


def copies_asynchronously(code: Code) -> None:
    """mma.sync kernels: tiles by cp.async, operands by ldmatrix."""
    assert code.count["LDGSTS"] and code.count["LDSM"]


def multiplies_in_groups(code: Code) -> None:
    """wgmma kernels: tiles by TMA, and groups of products: those that ptxas serialises end a group each."""
    products = [rest for _, name, _, rest in code.instructions if name.endswith("GMMA")]
    assert code.count["UTMALDG"]
    assert 2 * sum("gsb0" in rest for rest in products) <= len(products)


def multiplies_without_pause(code: Code) -> None:
    """A group of products is under way while the operands of the next are prepared; only at a tile's end are none."""
    multiplies_in_groups(code)
    waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\w+)", code.sass)
    assert waits.count("0x1") >= 4 and waits.count("0x0") <= 2
