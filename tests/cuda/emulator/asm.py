"""Finds inline assembly in CUDA C and writes C++ in its place: the form; the instructions are in ptx.py."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from .errors import EmulationError
from .ptx import Operand, instruction

_ASM = re.compile(r"\b(?:asm|__asm__)\s*(?:volatile|__volatile__)?\s*\(")
_STRING = re.compile(r'\s*(R"\((.*?)\)"|"(?:[^"\\]|\\.)*")', re.DOTALL)
_BINDING = re.compile(r'^"([=+]?)&?([a-zA-Z])"\s*\((.*)\)$', re.DOTALL)
_CARRIERS = {"r": "uint32_t", "l": "uint64_t", "h": "uint16_t", "f": "float", "d": "double"}
_REGISTERS = {"pred": "bool", "f32": "float", "f64": "double", "b8": "uint8_t", "u8": "uint8_t", "s8": "int8_t"}
_REGISTERS |= {f"{k}{n}": f"{'int' if k == 's' else 'uint'}{n}_t" for k in "bus" for n in (16, 32, 64)}
_DECLARATION = re.compile(r"^\.reg\s+\.(\w+)\s+(.*)$", re.DOTALL)
_GUARD = re.compile(r"^@(!?)(\S+)\s+(.*)$", re.DOTALL)


@dataclass
class Statement:
    """An asm statement. bindings: by number: direction ("", "=", "+"), constraint letter, C expression."""

    text: str
    bindings: list[tuple[str, str, str]] = field(default_factory=list)


def replace_asm(source: str) -> str:
    """The source with every asm statement replaced by C++ on the same lines."""
    pieces, position = [], 0
    for start, end, statement in _statements(source):
        pieces += [source[position:start], _translate(statement), "\n" * source.count("\n", start, end)]
        position = end
    return "".join([*pieces, source[position:]])


def _statements(source: str) -> Iterator[tuple[int, int, Statement]]:
    position = 0
    while match := _ASM.search(source, position):
        if source.rfind("#define", 0, match.start()) > source.rfind("\n", 0, match.start()):
            position = match.end()
            continue
        cursor, text = match.end(), ""
        while string := _STRING.match(source, cursor):
            text += string[2] if string[2] is not None else ast.literal_eval(string[1].replace("\n", "\\n"))
            cursor = string.end()
        sections, end = _sections(source, cursor)
        bindings = []
        for binding in [b for section in sections[:2] for b in section]:
            parsed = _BINDING.match(binding)
            if not parsed or parsed[2] not in _CARRIERS:
                raise EmulationError(f"asm operand {binding} is not understood, of: {text}")
            bindings.append((parsed[1], parsed[2], parsed[3]))
        end = source.index(";", end) + 1
        yield match.start(), end, Statement(text.strip(), bindings)
        position = end


def _sections(source: str, cursor: int) -> tuple[list[list[str]], int]:
    """What stands between the colons, split at commas, and where the statement's parenthesis closes."""
    sections: list[list[str]] = []
    depth, begin = 0, cursor
    quoted = False
    while True:
        c = source[cursor]
        if c == '"' and source[cursor - 1] != "\\":
            quoted = not quoted
        elif quoted:
            pass
        elif depth == 0 and c in ":,)":
            if sections and (item := source[begin:cursor].strip()):
                sections[-1].append(item)
            if c == ")":
                return sections, cursor + 1
            if c == ":":
                sections.append([])
            begin = cursor + 1
        else:
            depth += (c in "([{") - (c in ")]}")
        cursor += 1


def _translate(statement: Statement) -> str:
    """C++ of the statement: operands in, the instructions one by one, operands out."""
    operands = {}
    before, after = ["const int emu_here = emu_line ? emu_line : __builtin_LINE(); (void)emu_here;"], []
    for number, (direction, letter, expression) in enumerate(statement.bindings):
        carrier = _CARRIERS[letter]
        name = f"asm_{number}"
        pointer = letter == "l" and not direction
        value = f"emu::pun<{carrier}>({expression})"
        if pointer:
            value = f"(uint64_t)({expression})"
        elif letter == "h" or letter == "r" or letter == "l":
            value = f"({carrier})({expression})"
        before.append(f"{carrier} {name} = {value};" if direction != "=" else f"{carrier} {name} = 0;")
        if direction:
            after.append(f"({expression}) = emu::pun<__typeof__({expression})>({name});")
        operands[f"%{number}"] = Operand(name, carrier)
    body = [_instruction(text, operands, statement.text) for text in _instructions(statement.text)]
    return "{ " + " ".join([*before, *body, *after]) + " }"


def _instructions(text: str) -> Iterator[str]:
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL).strip()
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1]
    for piece in text.replace("%%", "%").split(";"):
        if piece := " ".join(piece.split()):
            yield piece


def _instruction(text: str, operands: dict[str, Operand], whole: str) -> str:
    if declaration := _DECLARATION.match(text):
        kind, names = declaration[1], [n.strip() for n in declaration[2].split(",")]
        if kind not in _REGISTERS or not all(re.fullmatch(r"%?\w+", n) for n in names):
            raise EmulationError(f"registers {text} are not understood, of: {whole}")
        for name in names:
            operands[name] = Operand(f"reg_{name.lstrip('%')}", _REGISTERS[kind])
        return " ".join(f"{_REGISTERS[kind]} {operands[n].name} = 0;" for n in names)
    if guard := _GUARD.match(text):
        if guard[2] not in operands:
            raise EmulationError(f"predicate {guard[2]} is not known, of: {whole}")
        return f"if ({guard[1]}{operands[guard[2]].name}) {{ {_instruction(guard[3], operands, whole)} }}"
    opcode, _, rest = text.partition(" ")
    try:
        return instruction(opcode, _arguments(rest, operands))
    except EmulationError as error:
        raise EmulationError(f"{error}, of the asm statement: {whole}") from None


def _arguments(text: str, operands: dict[str, Operand]) -> list[Operand | list[Operand]]:
    """The operands of an instruction; one in braces is a list; `[a+16]` is the address a+16."""
    arguments: list[Operand | list[Operand]] = []
    for item in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text):
        if item.startswith("{"):
            arguments.append([_operand(part.strip(), operands) for part in item[1:-1].split(",")])
        else:
            arguments.append(_operand(item.strip(), operands))
    return arguments


def _operand(text: str, operands: dict[str, Operand]) -> Operand:
    if text.startswith("["):
        base, sign, offset = re.fullmatch(r"\[\s*([%\w]+)\s*([+-]?)\s*(\w*)\s*\]", text).groups()  # type: ignore[union-attr]
        inner = _operand(base, operands)
        return Operand(f"({inner.name} {sign} {offset})", inner.carrier) if sign else inner
    if text in operands:
        return operands[text]
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Operand(f"({text})", "int64_t")
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Operand(f"emu::pun<float>(0x{text[2:]}u)", "float")
    if text == "_":
        return Operand("", "")
    return Operand(text, "special")
