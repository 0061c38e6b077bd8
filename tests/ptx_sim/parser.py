"""PTX text to instructions: the statements of one entry, with scopes flattened.

Only the documented text form is read. Registers and labels that a `{ ... }` scope declares get
names of their own, so that everything after this module sees one flat list.
"""

import re
from dataclasses import dataclass, field

from ptx_sim.errors import Unsupported


@dataclass(frozen=True)
class Register:
    """A register, with the prefix that gives its width: %p, %rs, %r or %rd."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A literal; floating-point ones by their bits."""

    value: int


@dataclass(frozen=True)
class Symbol:
    """The address of a parameter or of shared memory, or a special register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset], or [base, {coordinates}] of a tensor map."""

    base: "Register | Symbol"
    offset: int = 0
    coordinates: "tuple[Operand, ...]" = ()


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}"""

    items: "tuple[Operand, ...]"


Operand = Register | Immediate | Symbol | Address | Vector


@dataclass(frozen=True)
class Instruction:
    """One statement: `@guard opcode operands;`."""

    line: int
    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None = None
    negated: bool = False

    @property
    def parts(self) -> list[str]:
        """The opcode, split at its dots."""
        return self.opcode.split(".")


@dataclass(frozen=True)
class Label:
    """A branch target."""

    name: str


@dataclass(frozen=True)
class Param:
    """A kernel parameter."""

    name: str
    bytes: int


@dataclass
class Entry:
    """A kernel: parameters, threads of a CTA, statements."""

    name: str
    params: list[Param]
    threads: int
    body: list[Instruction | Label]
    text: list[str] = field(repr=False)  # the source, for messages

    def source(self, line: int) -> str:
        """A line of the PTX, with its number."""
        return f"line {line}: {' '.join(self.text[line - 1].split())}"


PARAM = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?")
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", re.DOTALL)
SIZES = {"b8": 1, "b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8}


def parse(ptx: str) -> Entry:
    """The only entry of a PTX module."""
    text = re.sub(r"//[^\n]*", "", ptx)
    heads = list(ENTRY.finditer(text))
    if len(heads) != 1:
        raise Unsupported(f"{len(heads)} entries in one module")
    head = heads[0]
    params = [
        Param(name, SIZES[kind] * int(count or 1)) for kind, name, count in PARAM.findall(head[2])
    ]
    threads = re.search(r"\.reqntid\s+(\d+)", head[3])
    if threads is None:
        raise Unsupported("an entry without .reqntid")
    body = _Statements(text, head.end()).read()
    return Entry(head[1], params, int(threads[1]), body, ptx.splitlines())


class _Statements:
    """Reads statements from the entry's opening brace to its closing one."""

    def __init__(self, text: str, start: int):
        self.text = text
        self.at = start
        self.line = text.count("\n", 0, start) + 1
        self.scopes = 0

    def read(self) -> list[Instruction | Label]:
        return self._scope({})

    def _scope(self, names: dict[str, str]) -> list[Instruction | Label]:
        """The statements up to the scope's closing brace; `names` renames what it declares."""
        body: list[Instruction | Label] = []
        end = self._closing()
        inner = self.text[self.at : end]
        if self.scopes:
            for kind, declared in re.findall(r"\.reg\s+\.(\w+)\s+([\w$]+)\s*;", inner):
                names = {**names, declared: f"{PREFIX[kind]}_scope{self.scopes}_{declared}"}
            for label in re.findall(r"([\w$]+):(?!:)", inner):
                names = {**names, label: f"{label}_scope{self.scopes}"}
        self.scopes += 1
        while True:
            self._skip_space()
            if self.at >= end:
                self.at = end + 1
                return body
            if self.text[self.at] == "{":
                self.at += 1
                body += self._scope(names)
                continue
            label = re.compile(r"([\w$]+):(?!:)").match(self.text, self.at)
            if label:
                self.at = label.end()
                body.append(Label(names.get(label[1], label[1])))
                continue
            stop = self.text.index(";", self.at)
            statement, line = self.text[self.at : stop], self.line
            self.line += statement.count("\n")
            self.at = stop + 1
            if not statement.startswith("."):
                body.append(_instruction(statement, line, names))

    def _closing(self) -> int:
        """Where the scope that is open here closes."""
        depth = 1
        for match in re.compile(r"[{}]").finditer(self.text, self.at):
            depth += 1 if match[0] == "{" else -1
            if depth == 0:
                return match.start()
        raise Unsupported("a scope that does not close")

    def _skip_space(self) -> None:
        while self.text[self.at].isspace():
            self.line += self.text[self.at] == "\n"
            self.at += 1


PREFIX = {"pred": "%p", "b16": "%rs", "b32": "%r", "f32": "%r", "b64": "%rd"}
STATEMENT = re.compile(r"(?:@(!?)(\S+)\s+)?([\w.:]+)\s*(.*)", re.DOTALL)


def _instruction(statement: str, line: int, names: dict[str, str]) -> Instruction:
    match = STATEMENT.fullmatch(statement.strip())
    if match is None:
        raise Unsupported(f"line {line}: {statement!r}")
    negated, guard, opcode, rest = match.groups()
    operands = tuple(
        operand
        for text in _split(rest)
        for operand in (_operand(t, names) for t in text.split("|"))
    )
    register = Register(names.get(guard, guard)) if guard else None
    return Instruction(line, opcode, operands, register, negated == "!")


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets and braces."""
    pieces, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "[{") - (char in "]}")
        if char == "," and depth == 0:
            pieces.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*pieces, last] if last else pieces


def _operand(text: str, names: dict[str, str]) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return Vector(tuple(_operand(t, names) for t in _split(text[1:-1])))
    if text.startswith("["):
        parts = _split(text[1:-1])
        base, _, offset = parts[0].partition("+")
        coordinates = _operand(parts[1], names).items if len(parts) > 1 else ()
        return Address(_operand(base, names), int(offset or "0", 0), coordinates)
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Immediate(int(text[2:], 16))
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    text = names.get(text, text)
    if re.fullmatch(r"%(p|rs|r|rd)(\d+|_scope\w+)", text):
        return Register(text)
    return Symbol(text)
