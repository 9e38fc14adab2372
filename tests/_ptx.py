"""Hand-written PTX for the emulator's tests: kernels around a body, tables of instructions, formats of floats."""

from __future__ import annotations

import struct
from fractions import Fraction
from math import inf, isinf, isnan, ldexp, nan

import numpy as np
from ptx_emulator import Memory, load, run

HEAD = """.version 8.7
.target sm_90a
.address_size 64
.file 1 "/somewhere/planted.cu"
"""
REGISTERS = """.reg .pred %p<16>; .reg .b16 %h<16>; .reg .b32 %r<64>; .reg .f32 %f<16>; .reg .b64 %d<32>; 
.reg .f64 %e<8>;
ld.param.u64 %d0, [in]; ld.param.u64 %d1, [out]; ld.param.u32 %r0, [n];
mov.u32 %r1, %tid.x; mul.wide.u32 %d2, %r1, 4; add.s64 %d3, %d1, %d2;
"""
SHARED = ".extern .shared .align 16 .b8 tile[];"  # as large as the launch says
STORE = "st.global.u32 [%d3], %r10;"


def kernel(body: str, module: str = "", params: str = "") -> str:
    """An entry with parameters in, out, n: %d0, %d1, %r0. %r1 is the thread, %d3 the address of its output word."""
    entry = ".visible .entry kernel(.param .u64 in, .param .u64 out, .param .u32 n" + params + ")\n{\n"
    return f"{HEAD}{module}\n{entry}{REGISTERS}{body}\nret;\n}}\n"


def lanes(n: int = 32) -> np.ndarray:
    """0 to n - 1, uint32."""
    return np.arange(n, dtype=np.uint32)


def filled(template: str, parts: dict[str, str]) -> str:
    """PTX has braces of its own: only {name} of the parts is replaced."""
    for name, text in parts.items():
        template = template.replace("{" + name + "}", text)
    return template


def execute(
    body: str, threads=32, grid=1, given=(0,), n=0, words=None, module="", shared=0, cluster=1, mode="write",
    complete=True, tensor=None, dependent=False,
) -> np.ndarray:  # fmt: skip
    """Runs the body; returns the output, uint32.

    given   what is behind `in`, an array or words
    words   of the output, one for every thread without it
    tensor  makes a tensor map of the addresses of input and output: it comes as a parameter `map`
    """
    memory = Memory()
    source = memory.allocate("in", given if isinstance(given, np.ndarray) else np.array(given, np.uint32))
    size = int(np.prod(threads)) * int(np.prod(grid)) if words is None else words
    out = memory.allocate("out", np.zeros(size, np.uint32), mode)
    params = struct.pack("<QQI", source, out, n)
    if tensor is not None:
        params = params.ljust(64, b"\0") + tensor(source, out).encode()
    program = load(kernel(body, module, "" if tensor is None else ", .param .align 64 .b8 map[128]"), "kernel")
    run(program, grid, threads, params, memory, shared=shared, cluster=cluster, complete=complete, dependent=dependent)
    return memory["out"].view(np.uint32)


def line_of(body: str, marked: str, module: str = "") -> int:
    """The PTX line of the one line of a body that contains the text."""
    (found,) = (i for i, text in enumerate(kernel(body, module).splitlines(), 1) if marked in text)
    return found


def table(instructions: list[tuple[str, str]], **sources: np.ndarray) -> list[np.ndarray]:
    """What instructions give for arrays of one length, a thread for every element, all in one kernel.

    instructions  (text, dtype of the result): {} is the destination, %a, %b, %c the sources named so, whose registers
                  have the widths of the arrays; a result of dtype "?" is a predicate
    """
    count = len(next(iter(sources.values())))
    memory, lines, registers, addresses = Memory(), [], [], []
    for name, array in sources.items():
        bits = "pred" if array.dtype == bool else f"b{8 * array.itemsize}"
        registers.append(f".reg .{bits} %{name}; .reg .b64 %at_{name};")
        raw = array.astype(np.uint32) if array.dtype == bool else array
        addresses.append(memory.allocate(name, raw))
        lines += [f"ld.param.u64 %x, [{name}];", f"mul.wide.u32 %y, %i, {raw.itemsize};", "add.s64 %x, %x, %y;"]
        if bits == "pred":
            lines += ["ld.global.u32 %w, [%x];", f"setp.ne.u32 %{name}, %w, 0;"]
        else:
            lines.append(f"ld.global.{bits} %{name}, [%x];")
    for k, (text, dtype) in enumerate(instructions):
        kind = np.dtype(dtype)
        size = 4 if kind == np.bool_ else kind.itemsize
        addresses.append(memory.allocate(f"z{k}", np.zeros(count * size, np.uint8), "write"))
        bits = "pred" if kind == np.bool_ else f"b{8 * size}"
        lines += ["{", f".reg .{bits} %z;", text.replace("{}", "%z"), f"ld.param.u64 %x, [z{k}];"]
        lines += [f"mul.wide.u32 %y, %i, {size};", "add.s64 %x, %x, %y;"]
        lines += ["selp.u32 %w, 1, 0, %z;", "st.global.u32 [%x], %w;", "}"] if kind == np.bool_ else [
            f"st.global.{bits} [%x], %z;", "}"]  # fmt: skip
    params = ", ".join(f".param .u64 {name}" for name in (*sources, *(f"z{k}" for k in range(len(instructions)))))
    body = "\n".join([*registers, ".reg .b64 %x, %y; .reg .b32 %i, %w; mov.u32 %i, %tid.x;", *lines])
    program = load(f"{HEAD}.visible .entry kernel({params})\n{{\n{body}\nret;\n}}\n", "kernel")
    run(program, 1, count, struct.pack(f"<{len(addresses)}Q", *addresses), memory)
    results = []
    for k, (_, dtype) in enumerate(instructions):
        kind = np.dtype(dtype)
        results.append(memory[f"z{k}"].view(np.uint32) != 0 if kind == np.bool_ else memory[f"z{k}"].view(kind))
    return results


def check(cases: list[tuple], **sources: np.ndarray) -> None:
    """cases: (instruction, dtype of the result, truth of the sources' Python integers); floats as bit patterns."""
    got = table([case[:2] for case in cases], **sources)
    rows = list(zip(*(array.tolist() for array in sources.values()), strict=True))
    for (text, dtype, truth), values in zip(cases, got, strict=True):
        bits = 8 * np.dtype(dtype).itemsize
        for row, value in zip(rows, values.tolist(), strict=True):
            wanted = truth(*row)
            wanted = bool(wanted) if dtype == "?" else wanted % (1 << bits)
            assert value == wanted, f"{text} of {[hex(x) for x in row]}: {value:#x}, should be {wanted:#x}"


def signed(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> bits - 1 else x


class Float:
    """A binary format: bits to numbers and back by exact fractions. infinite: e4m3 has no infinity."""

    def __init__(self, exponent: int, mantissa: int, nan_bits: int, infinite: bool = True):
        self.m, self.bias, self.nan, self.infinite = mantissa, (1 << exponent - 1) - 1, nan_bits, infinite
        self.top = ((1 << exponent) - 1 << mantissa) if infinite else nan_bits  # the first code that is no number
        self.sign = 1 << exponent + mantissa
        self.bits = 1 + exponent + mantissa

    def decode(self, code: int) -> float:
        """Exact: all formats up to float64 fit in a Python float."""
        magnitude, s = code & (self.sign - 1), -1.0 if code & self.sign else 1.0
        if magnitude >= self.top:
            return s * inf if magnitude == self.top and self.infinite else nan
        e, fraction = magnitude >> self.m, magnitude & ((1 << self.m) - 1)
        whole = fraction | (1 << self.m if e else 0)
        return s * ldexp(whole, max(e, 1) - self.bias - self.m)

    def encode(self, x, mode: str = "rn", negative_zero: bool = False) -> int:
        """A fraction, or a float, rounded once: rn, rna (ties away), rz, rm, rp."""
        if isinstance(x, float):
            if isnan(x):
                return self.nan
            if isinf(x):
                return self.top | (self.sign if x < 0 else 0)
            negative_zero = x == 0 and str(x)[0] == "-"
            x = Fraction(x)
        if x == 0:
            return self.sign if negative_zero else 0
        negative, n, d = x < 0, abs(x.numerator), x.denominator
        e = n.bit_length() - d.bit_length()
        e -= d << e > n if e >= 0 else d > n << -e
        e = max(e, 1 - self.bias)  # 2^e <= x < 2^(e+1), but for subnormal numbers
        n, d = (n << self.m - e, d) if self.m >= e else (n, d << e - self.m)
        whole, rest = divmod(n, d)
        up = {
            "rn": 2 * rest > d or (2 * rest == d and whole & 1), "rna": 2 * rest >= d,
            "rz": False, "rm": negative and rest > 0, "rp": not negative and rest > 0,
        }[mode]  # fmt: skip
        code = (e + self.bias - 1 << self.m) + whole + bool(up)
        if code >= self.top:
            stays = mode == "rz" or (mode == "rm" and not negative) or (mode == "rp" and negative)
            code = self.top - 1 if stays else self.top
        return code | (self.sign if negative else 0)

    def flushed(self, code: int) -> int:
        """A subnormal becomes a zero of its sign."""
        return code if code & (self.sign - 1) >= 1 << self.m else code & self.sign


F16, BF16 = Float(5, 10, 0x7FFF), Float(8, 7, 0x7FFF)
F32, F64 = Float(8, 23, 0x7FFFFFFF), Float(11, 52, 0x7FF8000000000000)
E4M3, E5M2 = Float(4, 3, 0x7F, infinite=False), Float(5, 2, 0x7F)
FORMATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}


def specials(f: Float) -> list[int]:
    one = f.bias << f.m
    plus = [
        0,
        1,
        (1 << f.m) - 1,
        1 << f.m,
        one,
        one + 1,
        one - 1,
        one + (3 << f.m),
        f.top - 1,
        f.top,
        f.top + (1 << f.m - 1),
    ]
    return plus + [code | f.sign for code in plus]
