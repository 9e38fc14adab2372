"""The table of machine code: every kernel on every architecture, with what its machine code must have.

What it must not have is the same in every row, and stands in test_machine_code.py: spills, exponentials, calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import _code_checks as check
import _launches as of
import torch
from _code import Code
from _launches import FULL, attention, lowbit

ARCHITECTURES = (80, 89, 90, 100)


@dataclass(frozen=True)
class Gate:
    """A row.

    kernel     the jit function, or the function of the CUDA library
    case       what tells this launch of it from others
    launch     of a Triton kernel; None when the CUDA library has it
    matmuls    by architecture: the tensor core instructions, all of them, with shape and types; "" is none
    registers  of a thread, at most
    contracts  dot products of floats may add with one rounding
    doubles    a division and a square root are in float64
    also       by architecture: what else is asked; it asserts
    """

    kernel: str
    case: str
    launch: of.Launch | None
    matmuls: dict[int, str]
    registers: int
    contracts: bool = False
    doubles: bool = False
    also: dict[int, Callable[[Code], None]] = field(default_factory=dict)


def by(*matmuls: str) -> dict[int, str]:
    """One for each architecture, in order."""
    return dict(zip(ARCHITECTURES, matmuls, strict=True))


def on(matmuls: dict[int, str], *architectures: int) -> dict[int, str]:
    return {architecture: matmuls[architecture] for architecture in architectures}


def int8(n: int) -> dict[int, str]:
    """n: of wgmma, as the launcher's tile has it."""
    return by(*["IMMA.16832.S8.S8.SAT"] * 2, f"IGMMA.64x{n}x32.S8.S8", "IMMA.16832.S8.S8.SAT")


def fp8(n: int, types: str = "E4M3.E4M3") -> dict[int, str]:
    """sm_80 has no such unit: float16."""
    return by("HMMA.16816.F32", f"QMMA.16832.F32.{types}", f"QGMMA.64x{n}x32.F32.{types}", "UTCQMMA")


def fp16(n: int) -> dict[int, str]:
    return by(*["HMMA.16816.F32"] * 2, f"HGMMA.64x{n}x16.F32", "UTCHMMA")


def bf16(n: int) -> dict[int, str]:
    return by(*["HMMA.16816.F32.BF16"] * 2, f"HGMMA.64x{n}x16.F32.BF16", "UTCHMMA")


TF32 = by(*["HMMA.1688.F32.TF32"] * 2, "HGMMA.64x64x8.F32.TF32", "UTCHMMA")
NONE = by("", "", "", "")
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32

# ---- matmuls of codes. Full: all in the epilogue, GELU, requantised per column. Tiles: 128 x 128, 64 x 64, 32 x 64

LOWBIT = "_lowbit_linear_kernel"
LOWBIT_GATES = (
    Gate(LOWBIT, "large tile, 2 bits, full", lowbit("large", 2, **FULL), on(int8(128), 80, 90), 208),
    Gate(LOWBIT, "large tile, 3 bits, full", lowbit("large", 3, **FULL), on(int8(128), 80, 89, 90), 208),
    Gate(LOWBIT, "large tile, 4 bits, full", lowbit("large", 4, **FULL), on(int8(128), 80, 89, 90), 224,
         also={90: check.UnpacksFourBits(words=8)}),
    Gate(LOWBIT, "large tile, 5 bits, full", lowbit("large", 5, **FULL), on(int8(128), 80, 90), 232),
    Gate(LOWBIT, "large tile, 6 bits, full", lowbit("large", 6, **FULL), on(int8(128), 80, 90, 100), 232),
    Gate(LOWBIT, "large tile, 8 bits, full", lowbit("large", 8, **FULL), int8(128), 224),
    Gate(LOWBIT, "middle tile, 8 bits, full", lowbit("middle", 8, **FULL), on(int8(64), 80, 90, 100), 176),
    Gate(LOWBIT, "middle tile, 4 bits, full", lowbit("middle", 4, **FULL), on(int8(64), 90), 176,
         also={90: check.UnpacksFourBits(words=8)}),
    Gate(LOWBIT, "small tile, 6 bits, full", lowbit("small", 6, **FULL), on(int8(32), 80, 90, 100), 112),
    Gate(LOWBIT, "small tile, 4 bits, full", lowbit("small", 4, **FULL), on(int8(32), 90), 96,
         also={90: check.UnpacksFourBits(words=8)}),
    Gate(LOWBIT, "large tile, 4 bits, gelu_tanh", lowbit("large", 4, **FULL | {"activation": "gelu_tanh"}),
         on(int8(128), 90), 168),
    Gate(LOWBIT, "large tile, 4 bits, quick_gelu", lowbit("large", 4, **FULL | {"activation": "quick_gelu"}),
         on(int8(128), 90), 168),
    # GELU needs registers, and a float32 result more of them than codes do.
    Gate(LOWBIT, "large tile, 6 bits, to floats", lowbit("large", 6, activation="gelu", parts="rb"),
         on(int8(128), 80, 90, 100), 232),
    Gate(LOWBIT, "large tile, 6 bits, odd shapes", of.lowbit_odd(), on(int8(128), 80, 90, 100), 255),
    Gate(LOWBIT, "middle tile, 8 bits, no division", lowbit("middle", 8, parts="rbl+"), on(int8(64), 90, 100), 160,
         also={90: check.has_no_fma, 100: check.has_no_fma}),
    # The partial sums of fp8 dots are added up as fma(x, 1, y), which is exact.
    Gate(LOWBIT, "fp8, large tile, 5 bits, full", lowbit("large", 5, fp8=True, **FULL), on(fp8(64), 90, 100), 232,
         contracts=True, also={90: check.sums_32_products}),
    Gate(LOWBIT, "fp8, large tile, 2 bits, full", lowbit("large", 2, fp8=True, **FULL), on(fp8(64), 100), 152,
         contracts=True),
    Gate(LOWBIT, "fp8, middle tile, 3 bits, full", lowbit("middle", 3, fp8=True, **FULL), on(fp8(64), 89, 100), 176,
         contracts=True),
    Gate(LOWBIT, "fp8, small tile, 4 bits, full", lowbit("small", 4, fp8=True, **FULL), on(fp8(64), 100), 88,
         contracts=True),
)  # fmt: skip


def by_index(tile: str, w_bits: int, matmuls: dict[int, str], fp8: bool = False) -> tuple[Gate, Gate]:
    """Rows of x by an index, to codes with everything; then added to rows of the result by an index."""
    also, name = dict.fromkeys(matmuls, check.ends_early), f"{'fp8, ' * fp8}{tile} tile, {w_bits} bits, by index"
    return (
        Gate(LOWBIT, name, lowbit(tile, w_bits, fp8, "gathered", **FULL), matmuls, 232, fp8, also=also),
        Gate(LOWBIT, f"{name}, added", lowbit(tile, w_bits, fp8, "added", **FULL), matmuls, 240, fp8, also=also),
    )


BY_INDEX_GATES = (
    *by_index("large", 8, on(int8(128), 80)),
    *by_index("middle", 4, on(int8(64), 89)),
    *by_index("large", 4, on(int8(128), 90)),
    *by_index("large", 4, on(fp8(64), 100), fp8=True),
)

LOOKUP, CODEBOOK, WEIGHTS = "_decode_kernel", "_codebook_linear_kernel", "_weight_only_linear_kernel"
EPILOGUE = ("gelu", "rbl+", 768, 4, 0)
HALVES, LEVELS, ALL, FEW = (
    of.codebook(*args, *EPILOGUE)
    for args in (("fp16", 4, 17, 197), ("bf16", 3, 17, 8), ("e4m3", 8, 256, 197), ("e5m2", 4, 16, 197))
)
FLOAT_GATES = (
    Gate(LOOKUP, "fp16", HALVES, NONE, 48),
    Gate(CODEBOOK, "fp16, 17 levels x 4 bits, full", HALVES, fp16(64), 176, contracts=True),
    Gate(LOOKUP, "bf16", LEVELS, NONE, 48),
    Gate(CODEBOOK, "bf16, 17 levels x 3 bits, full", LEVELS, bf16(32), 120, contracts=True),
    Gate(LOOKUP, "e4m3, all its bytes", ALL, on(NONE, 80), 48),  # they need no lookup where there is fp8
    Gate(CODEBOOK, "e4m3, all its bytes, full", ALL, fp8(64), 176, contracts=True),
    Gate(LOOKUP, "e5m2", FEW, NONE, 48),
    Gate(CODEBOOK, "e5m2, 16 levels x 4 bits, full", FEW, fp8(64, "E5M2.E5M2"), 176, contracts=True),
    # Hopper's and Ada's units keep 13 bits of a sum: a thread has 32, which leave the unit every 128 inputs.
    Gate(CODEBOOK, "e4m3, all its bytes", of.codebook("e4m3", 8, 256, 197, gap=0), on(fp8(64), 89, 90, 100), 152,
         contracts=True, also={89: check.Promotes(32), 90: check.Promotes(32), 100: check.Promotes(0)}),
    Gate(WEIGHTS, "fp16, 4 bits, groups, zero points", of.weight_only("zero_point", 4, F16, 197), fp16(64), 160,
         contracts=True),
    Gate(WEIGHTS, "fp16, 4 bits, groups, 8 tokens", of.weight_only("zero_point", 4, F16, 8), fp16(32), 112,
         contracts=True),
    Gate(WEIGHTS, "bf16, 3 bits, groups, zero points", of.weight_only("zero_point", 3, BF16, 197), bf16(64), 168,
         contracts=True),
    Gate(WEIGHTS, "fp16, 8 bits, columns", of.weight_only("column", 8, F16, 197), fp16(64), 136, contracts=True),
    Gate(WEIGHTS, "fp32, 4 bits, groups", of.weight_only("scale", 4, F32, 197), TF32, 232, contracts=True),
)  # fmt: skip

# ---- attention: the scores, P times v, and where P's bytes are added up by the tensor core, 16 columns of ones

ATTENTION = "_quant_attention_kernel"


def exp_free(form: str, v: str, N: int, also: Callable[[Code], None] = check.takes_two_bytes) -> Gate:
    """168 registers are three programs on a multiprocessor."""
    p = "E5M2" if form.startswith("log2") else "E4M3"
    matmuls = f"IGMMA.64x128x32.S8.S8 QGMMA.64x16x32.F32.{p}.{p} QGMMA.64x64x32.F32.{p}.E4M3"
    launch = attention(form, N, v=v, parts="O")
    return Gate(ATTENTION, f"{form}, v {v}, {N} keys", launch, {90: matmuls}, 168, contracts=True, also={90: also})


def attends(case: str, launch: of.Launch, *matmuls: str, registers: int = 255) -> Gate:
    return Gate(ATTENTION, case, launch, by(*matmuls), registers, contracts=True)


IMMA, HMMA, QMMA = "IMMA.16832.S8.S8.SAT", "HMMA.16816.F32", "QMMA.16832.F32"
SUMMED = (  # bytes of e4m3
    f"{IMMA} {HMMA}", f"{IMMA} {QMMA}.E4M3.E4M3",
    "IGMMA.64x64x32.S8.S8 QGMMA.64x16x32.F32.E4M3.E4M3 QGMMA.64x64x32.F32.E4M3.E4M3", f"{IMMA} UTCQMMA",
)  # fmt: skip
FLOATS = [f"{IMMA} {HMMA}"] * 2  # on sm_80 and 89; on sm_100 too where tiles have 32 queries, of which tcgen05 has 64
MANTISSA = "linear mantissa 3"
ATTENTION_GATES = (
    exp_free(MANTISSA, "e4m3", 197, check.Logits(keys=197, limit=9.8)),
    exp_free(MANTISSA, "int8", 197),
    exp_free(MANTISSA, "e4m3", 577, check.Logits(keys=128, limit=8.3)),
    exp_free(MANTISSA, "int8", 577),
    exp_free("log2 4", "e4m3", 197),
    exp_free("log2 4", "int8", 577),
    attends("e4m3, emits", attention(MANTISSA, parts="e"), *SUMMED),
    attends("e4m3, emits, 577 keys", attention(MANTISSA, 577, parts="e"), *SUMMED),
    attends("e4m3, biases, scales of tokens, codes out", attention(MANTISSA, parts="btkO"), *SUMMED),
    attends("e4m3, two sequences", attention(MANTISSA, parts="eO", sequences=True), *SUMMED),
    attends("e5m2, lse, bias", attention("log2 4, lse", v="e4m3", parts="bto"),
            f"{IMMA} {HMMA}", f"{IMMA} {QMMA}.E5M2.E4M3", "IGMMA.64x64x32.S8.S8 QGMMA.64x64x32.F32.E5M2.E4M3",
            f"{IMMA} UTCQMMA"),
    attends("fp16, head dimension 80", attention("log2 5", D=80, v="fp16"),
            *FLOATS, "IGMMA.64x16x32.S8.S8 HGMMA.64x16x16.F32 HGMMA.64x32x16.F32", f"{IMMA} {HMMA}", registers=232),
    attends("thresholds, lse, head dimension 128", attention("sulq, lse", 577, 128),
            *FLOATS, "IGMMA.64x16x32.S8.S8 HGMMA.64x64x16.F32", f"{IMMA} {HMMA}", registers=200),
    attends("v_scale of keys, head dimension 128", attention(MANTISSA, 577, 128, parts="s"),
            *FLOATS, "IGMMA.64x16x32.S8.S8 HGMMA.64x8x16.F32 HGMMA.64x64x16.F32", f"{IMMA} {HMMA}", registers=128),
    attends("uniform, lse, grid bias, emits", attention("uniform, lse", 196, parts="eg"),
            *FLOATS, "IGMMA.64x32x32.S8.S8 HGMMA.64x64x16.F32", f"{IMMA} UTCHMMA"),
    attends("bytes", attention(None), IMMA, IMMA, "IGMMA.64x64x32.S8.S8", IMMA, registers=248),
    attends("bytes, head dimension 128, bias, v_scale of keys", attention(None, 577, 128, parts="bs"),
            IMMA, IMMA, "IGMMA.64x16x32.S8.S8 IGMMA.64x64x32.S8.S8", IMMA, registers=224),
    Gate("_prepare_kernel", "two sequences", attention(MANTISSA, parts="eO", sequences=True), NONE, 128,
         contracts=True),
)  # fmt: skip

# ---- rows and tokens

SCALES, TABLE, ROWS = torch.ones(768), torch.zeros(256, dtype=torch.int8), of.ints(300)
QUANTIZE, DYNAMIC, NORM = "_quantize_kernel", "_quantize_dynamic_kernel", "_norm_quant_kernel"
CLASS_ROW, MATCH, MIX = "_class_row_kernel", "_match_kernel", "_mix_tokens_kernel"
ROW_GATES = (
    Gate(QUANTIZE, "scales of columns", of.quantize(SCALES, 3, 4), NONE, 56),
    Gate(QUANTIZE, "by index", of.quantize(SCALES, 3, 4, ROWS), NONE, 64),
    Gate(DYNAMIC, "4 bits", of.dynamic(-0.17, 4, 0.9, None), NONE, 32),
    Gate(DYNAMIC, "table", of.dynamic(-0.17, 8, 0.9, TABLE), NONE, 32),
    Gate(DYNAMIC, "table, by index", of.dynamic(-0.17, 8, 0.9, TABLE, ROWS), NONE, 32),
    Gate(NORM, "dynamic", of.norm("norm_quant_dynamic", 1e-6, 4, 0.9), NONE, 120, doubles=True),
    Gate(NORM, "static", of.norm("norm_quant", SCALES, 1e-6, 8), NONE, 120, doubles=True),
    Gate(NORM, "dynamic, by index", of.norm("norm_quant_dynamic", 1e-6, 4, 0.9, ROWS), NONE, 120, doubles=True),
    Gate(CLASS_ROW, "scales of tokens, key bias", of.class_row(64, True), NONE, 56),
    Gate(CLASS_ROW, "head dimension 80", of.class_row(80, False), NONE, 72),
    Gate("_mean_kernel", "", of.class_row(64, True), NONE, 40),
    Gate("_whole_kernel", "bf16", of.propagate(128, BF16, 30), bf16(128), 224),
    Gate("_rows_kernel", "bf16", of.propagate(197, BF16, 1), bf16(64), 168),
    Gate("_step_kernel", "bf16", of.propagate(197, BF16, 1), bf16(64), 176),
    Gate("_whole_kernel", "fp32", of.propagate(64, F32, 30), on(TF32, 89), 176),
    Gate("_rows_kernel", "fp32", of.propagate(197, F32, 1), on(TF32, 89), 224),
    Gate("_step_kernel", "fp32", of.propagate(197, F32, 1), on(TF32, 89), 224),
    Gate("_assign_kernel", "", of.local_assign(), NONE, 64),
    Gate("_move_kernel", "", of.local_assign(), NONE, 64),
    Gate(MATCH, "cosine", of.match("cosine", 1, 64), NONE, 120, contracts=True),
    Gate(MATCH, "dot, bf16, the first 32", of.match("dot", 32, dtype=BF16, exclude=True), NONE, 112, contracts=True),
    Gate(MATCH, "l2, the first 20", of.match("l2", 20), NONE, 112),
    Gate("_merge_kernel", "", of.merge(), NONE, 168),
    Gate("_mean_heads_kernel", "", of.mean_heads(), NONE, 40),
    Gate(MIX, "mlerp", of.mix("mlerp"), NONE, 80),
    Gate(MIX, "sum", of.mix("sum"), NONE, 64),
    Gate("_select_kernel", "197 tokens", of.select(197, "index"), NONE, 128),
    Gate("_split_kernel", "197 tokens", of.split(197), NONE, 32),
    Gate("_split_rows_kernel", "197 tokens", of.split(197), NONE, 24),
    Gate("_group_kernel", "197 tokens", of.group(197), NONE, 40),
    Gate("_select_kernel", "4096 tokens", of.select(4096, "rank"), on(NONE, 90), 128),
    Gate("_split_kernel", "4096 tokens", of.split(4096), on(NONE, 90), 40),
    Gate("_split_rows_kernel", "4096 tokens", of.split(4096), on(NONE, 90), 32),
    Gate("_group_kernel", "4096 tokens", of.group(4096), on(NONE, 90), 32),
)  # fmt: skip

# ---- the CUDA library. Tiles: features x tokens, and the registers of each, of two, three or four blocks of a
# multiprocessor. On Hopper they are those that a block starts with, for setmaxnreg moves them.

MMA_TILES = {"64x32": 128, "64x64": 168, "128x128": 255}
WGMMA_TILES = {"128x32": 128, "128x64": 128, "128x128": 128, "256x128": 168}
ROWS_TILES = {"128x128": 128, "256x128": 168}  # of weights from shared memory
LOWBIT_TILES = {"128x16": 128, **WGMMA_TILES, "256x176": 168}


def mma(name: str, matmul: str, tiles: dict[str, int]) -> tuple[Gate, ...]:
    matmuls, also = by(*[matmul] * 4), dict.fromkeys(ARCHITECTURES, check.copies_asynchronously)
    return tuple(Gate(f"{name}_{tile}", "as built", None, matmuls, n, also=also) for tile, n in tiles.items())


def wgmma(name: str, matmul: str, tiles: dict[str, int], also: Callable[[Code], None]) -> tuple[Gate, ...]:
    """n of the matmul is the tile's tokens."""
    of_n = {tile: {90: matmul.replace("N", tile.split("x")[1])} for tile in tiles}
    return tuple(Gate(f"{name}_{tile}", "as built", None, of_n[tile], n, also={90: also}) for tile, n in tiles.items())


CUDA_GATES = (
    *mma("lowbit_linear_sm80_w8", "IMMA.16832.S8.S8", MMA_TILES),
    *mma("lowbit_linear_sm80_w4", "IMMA.16832.S8.S8", MMA_TILES),
    *wgmma("lowbit_linear_sm90_w8", "IGMMA.64xNx32.S8.S8", LOWBIT_TILES, check.multiplies_without_pause),
    *wgmma("lowbit_linear_sm90_w4", "IGMMA.64xNx32.S8.S8", LOWBIT_TILES, check.multiplies_without_pause),
    *mma("sparse24_linear_sm80_s8", "IMMA.SP.16864.S8.S8", MMA_TILES),
    *mma("sparse24_linear_sm80_f16", "HMMA.SP.16832.F32", MMA_TILES),
    *mma("sparse24_linear_sm80_bf16", "HMMA.SP.16832.F32.BF16", MMA_TILES),
    *wgmma("sparse24_linear_sm90_s8", "IGMMA.SP.64xNx64.S8.S8", WGMMA_TILES, check.multiplies_in_groups),
    *wgmma("sparse24_linear_sm90_f16", "HGMMA.SP.64xNx32.F32", WGMMA_TILES, check.multiplies_in_groups),
    *wgmma("sparse24_linear_sm90_bf16", "HGMMA.SP.64xNx32.F32.BF16", WGMMA_TILES, check.multiplies_in_groups),
    *wgmma("sparse24_linear_sm90_s8_rows", "IGMMA.SP.64xNx64.S8.S8", ROWS_TILES, check.multiplies_in_groups),
    *wgmma("sparse24_linear_sm90_f16_rows", "HGMMA.SP.64xNx32.F32", ROWS_TILES, check.multiplies_in_groups),
    *wgmma("sparse24_linear_sm90_bf16_rows", "HGMMA.SP.64xNx32.F32.BF16", ROWS_TILES, check.multiplies_in_groups),
)

GATES = (*LOWBIT_GATES, *BY_INDEX_GATES, *FLOAT_GATES, *ATTENTION_GATES, *ROW_GATES, *CUDA_GATES)
