"""PTX text to instructions: registers resolved to rows of banks, labels to positions, variables to addresses.

A register lives in the bank of its width (1 for predicates, 16, 32 or 64 bits), in a row of its own. Names are scoped
by braces, as the compiler leaves them around inline assembly.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from dataclasses import dataclass, field

from .report import NotEmulated

WIDTHS = {"pred": 1} | {f"{kind}{bits}": bits for kind in "bsuf" for bits in (8, 16, 32, 64)}
WIDTHS |= {"f16x2": 32, "bf16x2": 32, "bf16": 16}
LINE_DIRECTIVES = (".loc", ".file", ".version", ".target", ".address_size", ".minnctapersm", ".maxntid", ".reqntid",
                   ".maxnreg", ".noreturn", ".reqnctapercluster", ".explicitcluster", ".maxclusterrank")  # fmt: skip


@dataclass(frozen=True)
class Reg:
    bank: int  # bits, 1 for predicates
    row: int
    negated: bool = False


@dataclass(frozen=True)
class Imm:
    bits: int  # two's complement of integers, the pattern of floats
    kind: str = "int"  # "int", "f32", "f64"


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(frozen=True)
class Symbol:
    name: str


@dataclass(frozen=True)
class Address:
    base: object  # Reg, Symbol, Imm
    offset: int
    coordinates: tuple = ()  # of a tensor map


@dataclass(frozen=True)
class Vector:
    items: tuple


@dataclass(frozen=True)
class Pair:
    """a|b: two destinations."""

    first: object
    second: object


SINK = Symbol("_")


@dataclass
class Instruction:
    opcode: str
    mods: tuple[str, ...]
    operands: list
    guard: Reg | None
    line: int
    text: str
    loc: tuple | None  # (file, line), and where that is inlined
    target: int = -1  # position of a branch

    @property
    def source(self) -> str:
        """ "file.cu:12", or "file.cuh:3 < file.cu:12" of what is inlined there."""
        return " < ".join(f"{file}:{line}" for file, line in self.loc or ())


@dataclass
class Variable:
    name: str
    space: str  # shared, global, const, local, param
    align: int
    size: int  # 0: extern shared, as much as the launch gives
    values: bytes = b""


@dataclass
class Entry:
    name: str
    params: list[Variable]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=lambda: {1: 0, 16: 0, 32: 0, 64: 0})


def parse(ptx: str, kernel: str | None = None) -> tuple[list[Entry], dict[str, Variable]]:
    """The entries of the text, or only the one named, and the variables of the module."""
    return _Parser(ptx, kernel).module()


def _clean(ptx: str) -> str:
    """Comments become blanks; lines stay where they are."""
    ptx = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), ptx, flags=re.S)
    return re.sub(r"//[^\n]*", "", ptx)


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "[{(") - (c in "]})")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last or parts else []


class _Parser:
    def __init__(self, ptx: str, kernel: str | None):
        self.text, self.at, self.kernel = _clean(ptx), 0, kernel
        self.files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]*)"', self.text, re.M))
        self.loc: tuple | None = None
        self.globals: dict[str, Variable] = {}
        self.starts = [0, *(m.end() for m in re.finditer("\n", self.text))]
        self.entry: Entry | None = None
        self.scopes: list[dict] = []

    def line(self, at: int) -> int:
        return bisect_right(self.starts, at)

    def blank(self) -> bool:
        """Skip blanks; whether anything is left."""
        m = re.compile(r"\s*").match(self.text, self.at)
        self.at = m.end()
        return self.at < len(self.text)

    def until(self, pattern: str) -> str:
        m = re.compile(pattern).search(self.text, self.at)
        found = self.text[self.at : m.start()]
        self.at = m.end()
        return found

    def module(self) -> tuple[list[Entry], dict[str, Variable]]:
        entries = []
        while self.blank():
            start = self.at
            word = re.compile(r"[.\w$]+").match(self.text, self.at)
            if word is None:
                raise NotEmulated(self.line(start), self.text[start : start + 60].split("\n")[0])
            if word[0] in LINE_DIRECTIVES:
                self.directive(self.until(r"\n|$"))
                continue
            head = re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.(entry|func)\b").match(self.text, self.at)
            if head:
                entries += self.function(head)
            elif word[0] == ".section":
                self.until(r"\{")
                self.until(r"\}")
            elif re.match(r"\.(visible|weak|extern|common|shared|global|const)", word[0]):
                self.variable(self.until(";"), self.globals)
            else:
                raise NotEmulated(self.line(start), self.text[start : start + 60].split("\n")[0])
        return entries, self.globals

    def directive(self, text: str) -> None:
        words = text.split()
        if words[0] == ".loc":
            places = [words[1:3], *([words[-3:-1]] if "inlined_at" in words else [])]
            self.loc = tuple((self.files.get(file, "?"), int(line)) for file, line in places)

    def variable(self, text: str, where: dict) -> None:
        """.shared .align 16 .b8 name[128] (= {1, 2}): one, or several without values."""
        text, _, values = text.partition("=")
        space = re.search(r"\.(shared|global|const|local|param)\b", text)[1]
        kind = re.search(r"\.([bsuf](?:8|16|32|64))\b", text)
        if kind is None or re.search(r"\.(v[248]|attribute|managed)\b", text):
            raise NotEmulated(self.line(self.at), text, "a variable of another form")
        kind = kind[1]
        align = re.search(r"\.align\s+(\d+)", text)
        for part in _split(text[re.search(r"\.[bsuf](?:8|16|32|64)\b", text).end() :]):
            name, *dims = re.findall(r"[\w$.%]+|\[\s*\d*\s*\]", part)
            count, extern = 1, False
            for dim in dims:
                inner = dim.strip("[] \n")
                extern |= not inner
                count *= int(inner or 0)
            width = WIDTHS[kind] // 8
            data = b""
            if values.strip():
                numbers = [self.operand(v.strip(), self.line(self.at)) for v in re.sub(r"[{}]", " ", values).split(",")]
                wanted = {"f32": "f32", "f64": "f64"}.get(kind, "int")
                if any(not isinstance(v, Imm) or v.kind != wanted for v in numbers):
                    raise NotEmulated(self.line(self.at), text, "an initialiser of another form")
                data = b"".join((v.bits % (1 << 8 * width)).to_bytes(width, "little") for v in numbers)
                data = data.ljust(width * count, b"\0")
            where[name] = Variable(name, space, int(align[1]) if align else width, 0 if extern else width * count, data)

    def function(self, head: re.Match) -> list[Entry]:
        self.at = head.end()
        if head[1] == "func":  # printf and assertions: only a call of one is an error
            self.blank()
            m = re.compile(r"[^;{]*").match(self.text, self.at)
            self.at = m.end()
            if self.text[self.at] == "{":
                self.body_end()
            else:
                self.at += 1
            return []
        self.blank()
        name = re.compile(r"[\w$]+").match(self.text, self.at)[0]
        self.at += len(name)
        self.blank()
        params = {}
        if self.text[self.at] == "(":
            self.at += 1
            for part in _split(self.until(r"\)")):
                self.variable(re.sub(r"\.ptr(\s+\.(global|shared|const|local))?(\s+\.align\s+\d+)?", "", part), params)
        while self.blank() and self.text[self.at] != "{":
            self.until(r"\n|(?=\{)")
        if self.kernel is not None and name != self.kernel:
            self.body_end()
            return []
        self.entry = Entry(name, list(params.values()))
        self.entry.variables |= params
        self.body()
        return [self.entry]

    def body_end(self) -> None:
        """Past the braces that open here."""
        depth = 0
        for m in re.compile(r"[{}]").finditer(self.text, self.at):
            depth += 1 if m[0] == "{" else -1
            if depth == 0:
                self.at = m.end()
                return

    def body(self) -> None:
        label, word = re.compile(r"([$\w]+)\s*:(?!:)"), re.compile(r"\.\w+")
        entry = self.entry
        self.scopes, branches = [], []
        while self.blank():
            c = self.text[self.at]
            if c == "{":
                self.scopes.append({})
                self.at += 1
                continue
            if c == "}":
                self.scopes.pop()
                self.at += 1
                if not self.scopes:
                    break
                continue
            m = label.match(self.text, self.at)
            if m:
                self.at = m.end()
                self.scopes[-1][m[1]] = len(entry.instructions)
                continue
            start = self.at
            m = word.match(self.text, start)
            if m and m[0] in LINE_DIRECTIVES:
                self.directive(self.until(r"\n"))
                continue
            text = " ".join(self.until(";").split())
            if text.startswith(".reg"):
                self.registers(text)
            elif re.match(r"\.(shared|local|global|const|param)\b", text):
                self.variable(text, entry.variables)
            elif text and not text.startswith(".pragma"):
                entry.instructions.append(self.instruction(text, self.line(start)))
                if entry.instructions[-1].opcode == "bra":
                    branches.append((entry.instructions[-1], list(self.scopes)))
        for ins, scopes in branches:
            name = ins.operands[-1].name
            found = [scope[name] for scope in reversed(scopes) if name in scope]
            if not found:
                raise NotEmulated(ins.line, ins.text, f"no label {name}")
            ins.target = found[0]

    def registers(self, text: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()
        if kind not in WIDTHS:
            raise NotEmulated(self.line(self.at), text)
        bank = max(WIDTHS[kind], 16) if kind != "pred" else 1
        for name in _split(names):
            m = re.fullmatch(r"([%\w$]+)<(\d+)>", name)
            for new in [f"{m[1]}{i}" for i in range(int(m[2]))] if m else [name]:
                self.scopes[-1][new] = Reg(bank, self.entry.rows[bank])
                self.entry.rows[bank] += 1

    def instruction(self, text: str, line: int) -> Instruction:
        guard, whole = None, text
        if text.startswith("@"):
            mark, text = text.split(None, 1)
            guard = self.operand(mark[1:], line)
        name, _, rest = text.partition(" ")
        opcode, *mods = name.split(".")
        operands = [self.operand(part, line) for part in _split(rest)]
        return Instruction(opcode, tuple(mods), operands, guard, line, whole, self.loc)

    def operand(self, text: str, line: int):
        if text.startswith("!"):
            inner = self.operand(text[1:].strip(), line)
            return Reg(inner.bank, inner.row, not inner.negated)
        for scope in reversed(self.scopes):
            if text in scope and isinstance(scope[text], Reg):
                return scope[text]
        if text[0] == "[":
            parts = _split(text[1:-1])
            base, _, offset = parts[0].partition("+")
            items = parts[1].strip("{} ") if len(parts) > 1 else ""
            coordinates = tuple(self.operand(part, line) for part in _split(items)) if items else ()
            return Address(self.operand(base.strip(), line), int(offset.strip() or "0", 0), coordinates)
        if text[0] in "{(":
            return Vector(tuple(self.operand(part, line) for part in _split(text[1:-1])))
        if "|" in text:
            return Pair(*(self.operand(part.strip(), line) for part in text.split("|")))
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return Imm(int(text[2:], 16), "f32")
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return Imm(int(text[2:], 16), "f64")
        number = re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|0[0-7]*|[1-9]\d*)U?", text)
        if number:
            octal = re.fullmatch(r"0[0-7]+", number[2])
            return Imm((-1 if number[1] else 1) * int(number[2], 8 if octal else 0))
        if re.fullmatch(r"-?\d+\.\d*", text):
            return Imm(struct.unpack("<Q", struct.pack("<d", float(text)))[0], "f64")
        if text == "WARP_SZ":
            return Imm(32)
        if re.fullmatch(r"%[\w.]+", text):
            return Special(text[1:])
        symbol = re.fullmatch(r"([\w$.]+)(?:\+(\d+))?", text)
        if symbol is None:
            raise NotEmulated(line, text, "an operand of no known form")
        return Symbol(text)
