"""PTX instructions as C++: one function per family, found by the first words of the opcode.

Those of a whole warp, and cp.async, are functions of the runtime (instructions.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .errors import EmulationError


@dataclass(frozen=True)
class Operand:
    """A register or a literal as a C++ expression, and the C++ type that carries it."""

    name: str
    carrier: str

    def as_type(self, c_type: str) -> str:
        """Its bits, as a value of the type, which is as wide; a literal becomes one of the type."""
        if self.carrier == "int64_t":
            return f"({c_type}){self.name}"
        if self.carrier == "special":
            raise EmulationError(f"operand {self.name} is not known")
        return f"emu::narrow<{c_type}>(emu::widen({self.name}))"


Arguments = list["Operand | list[Operand]"]

# In the order of mma_kinds in instructions.cpp.
MMA_KINDS = [
    *(f"{shape}.b1.{op}" for shape in ("m8n8k128", "m16n8k128", "m16n8k256") for op in ("xor", "and")),
    *(f"{s}.{a}.{b}" for s in ("m8n8k16", "m16n8k16", "m16n8k32") for a in ("s8", "u8") for b in ("s8", "u8")),
    *("m16n8k8.f16.f32", "m16n8k16.f16.f32", "m16n8k8.bf16.f32", "m16n8k16.bf16.f32"),
    *("m16n8k4.tf32.f32", "m16n8k8.tf32.f32", "m16n8k8.f16.f16", "m16n8k16.f16.f16"),
]

_TYPES = {"f32": "float", "f64": "double", "pred": "bool", "f16": "_Float16"}
_TYPES |= {f"{k}{n}": f"{'int' if k == 's' else 'uint'}{n}_t" for k in "bus" for n in (8, 16, 32, 64)}
_LINE = "emu_here"


def instruction(opcode: str, arguments: Arguments) -> str:
    """C++ of one instruction. Raises EmulationError for one that is not known."""
    words = opcode.split(".")
    for length in range(min(3, len(words)), 0, -1):
        if family := _FAMILIES.get(".".join(words[:length])):
            try:
                return family(words, arguments)
            except (ValueError, KeyError, AttributeError, IndexError, TypeError):
                break
    raise EmulationError(f"PTX instruction {opcode} is not emulated")


def _type(word: str) -> str:
    return _TYPES[word]


def _set(target: Operand, value: str) -> str:
    """Assigns the bits of the value; a wider register is filled with zeros or the sign, as the value's type says."""
    return f"{target.name} = emu::put<{target.carrier}>({value});" if target.name else ";"


def _binary(expression: str, modifier: str = "") -> Callable[[Sequence[str], Arguments], str]:
    def translate(words: Sequence[str], arguments: Arguments) -> str:
        _exactly(words[1:-1], modifier)
        d, a, b = _scalars(arguments, 3)
        t = _type(words[-1])
        return _set(d, f"({t})({expression.format(a=a.as_type(t), b=b.as_type(t), t=t, bits=words[-1][1:])})")

    return translate


def _unary(expression: str, result: str = "", modifier: str = "") -> Callable[[Sequence[str], Arguments], str]:
    def translate(words: Sequence[str], arguments: Arguments) -> str:
        _exactly(words[1:-1], modifier)
        d, a = _scalars(arguments, 2)
        t = _type(words[-1])
        return _set(d, f"({result or t})({expression.format(a=a.as_type(t), t=t)})")

    return translate


def _exactly(words: Sequence[str], *expected: str) -> None:
    """Modifiers change what an instruction does: one that is not known is refused."""
    if list(words) != [word for word in expected if word]:
        raise ValueError


def _scalars(arguments: Arguments, count: int) -> list[Operand]:
    if len(arguments) != count or any(isinstance(a, list) for a in arguments):
        raise ValueError
    return [a for a in arguments if isinstance(a, Operand)]


def _group(argument: Operand | list[Operand]) -> list[Operand]:
    return argument if isinstance(argument, list) else [argument]


def _words(name: str, group: Sequence[Operand]) -> str:
    return f"const uint32_t {name}[] = {{{', '.join(o.as_type('uint32_t') for o in group)}}};"


def _mma(words: Sequence[str], arguments: Arguments) -> str:
    # mma.sync.aligned.SHAPE.row.col.D.A.B.C[.op.popc]; integers wrap: .satfinite is not among the kinds
    shape, dtype, a, b, ctype, *rest = words[3], *words[6:10], *words[10:]
    if words[1:3] != ["sync", "aligned"] or words[4:6] != ["row", "col"]:
        raise ValueError
    if a == "b1":
        kind = f"{shape}.b1.{rest[0]}"
        if rest[1:] != ["popc"]:
            raise ValueError
    elif rest:
        raise ValueError
    else:
        kind = f"{shape}.{a}.{b}" if a in ("s8", "u8") else f"{shape}.{a}.{dtype}"
        if dtype != ctype or (a not in ("s8", "u8") and a != b):
            raise ValueError
    number = MMA_KINDS.index(kind)
    d, *inputs = map(_group, arguments)
    lines = [_words(f"mma_{n}", group) for n, group in zip("abc", inputs, strict=True)]
    lines.append(f"uint32_t mma_d[{len(d)}]; emu_mma({number}, mma_d, mma_a, mma_b, mma_c, {_LINE});")
    return "{ " + " ".join([*lines, *(_set(o, f"mma_d[{i}]") for i, o in enumerate(d))]) + " }"


def _ldmatrix(words: Sequence[str], arguments: Arguments) -> str:
    if words[1:4] != ["sync", "aligned", "m8n8"] or words[-1] != "b16":
        raise ValueError
    _exactly(words[5:-1], *(word for word in ("trans", "shared") if word in words))
    count = int(words[4][1:])
    out, address = _group(arguments[0]), arguments[1]
    if len(out) != count or isinstance(address, list):
        raise ValueError
    call = f"emu_ldmatrix({count}, {int('trans' in words)}, matrix, {address.as_type('uint32_t')}, {_LINE});"
    return f"{{ uint32_t matrix[{count}]; {call} {' '.join(_set(o, f'matrix[{i}]') for i, o in enumerate(out))} }}"


def _stmatrix(words: Sequence[str], arguments: Arguments) -> str:
    if words[1:4] != ["sync", "aligned", "m8n8"] or words[-1] != "b16":
        raise ValueError
    _exactly(words[5:-1], *(word for word in ("trans", "shared") if word in words))
    address, values = arguments[0], _group(arguments[1])
    if isinstance(address, list) or len(values) != int(words[4][1:]):
        raise ValueError
    call = f"emu_stmatrix({len(values)}, {int('trans' in words)}, matrix, {address.as_type('uint32_t')}, {_LINE});"
    return f"{{ {_words('matrix', values)} {call} }}"


def _cp_async(words: Sequence[str], arguments: Arguments) -> str:
    if set(words[3:]) - {"shared", "shared::cta", "global", "L2::64B", "L2::128B", "L2::256B"}:
        raise ValueError
    to, source, size, *more = (a for a in arguments if isinstance(a, Operand))
    filled = f"(uint32_t){size.name}"
    if more:  # how many bytes to read, or a predicate under which none are
        filled = f"({more[0].name} ? 0 : {filled})" if more[0].carrier == "bool" else more[0].as_type("uint32_t")
    if len(more) > 1 or len(more) + 3 != len(arguments):
        raise ValueError
    return f"emu_cp_async({to.as_type('uint32_t')}, (const void*){source.name}, {size.name}, {filled});"


def _shuffle(words: Sequence[str], arguments: Arguments) -> str:
    _exactly(words[3:], "b32")
    kind = ["up", "down", "bfly", "idx"].index(words[2])
    d, a, b, c, mask = _scalars(arguments, 5)
    values = ", ".join(o.as_type("uint32_t") for o in (b, c))
    call = f"emu_shuffle({kind}, {mask.as_type('uint32_t')}, {a.as_type('uint32_t')}, {values}, {_LINE})"
    return _set(d, f"(uint32_t){call}")


def _vote(words: Sequence[str], arguments: Arguments) -> str:
    d, p, mask = _scalars(arguments, 3)
    m = mask.as_type("uint32_t")
    call = f"emu_vote({m}, {p.name}, {_LINE})"
    return _set(d, {"ballot": call, "any": f"({call} != 0)", "all": f"({call} == {m})"}[words[2]])


def _redux(words: Sequence[str], arguments: Arguments) -> str:
    _exactly(words[1:2] + words[4:], "sync")
    names = ["add", "min.u32", "max.u32", "min.s32", "max.s32", "and", "or", "xor"]
    name = words[2] if words[2] in names else f"{words[2]}.{words[3]}"
    d, a, mask = _scalars(arguments, 3)
    values = f"{mask.as_type('uint32_t')}, {a.as_type('uint32_t')}"
    return _set(d, f"emu_reduce({names.index(name)}, {values}, {_LINE})")


def _barrier(words: Sequence[str], arguments: Arguments) -> str:
    (number,) = _scalars(arguments, 1)
    if number.name != "(0)":
        raise ValueError
    return f"emu_barrier(0, 0, {_LINE});"


def _setp(words: Sequence[str], arguments: Arguments) -> str:
    _exactly(words[2:-1])
    d, a, b = _scalars(arguments, 3)
    operator = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}[words[1]]
    t = _type(words[-1])
    return f"{d.name} = {a.as_type(t)} {operator} {b.as_type(t)};"


def _selp(words: Sequence[str], arguments: Arguments) -> str:
    _exactly(words[1:-1])
    d, a, b, p = _scalars(arguments, 4)
    t = _type(words[-1])
    return _set(d, f"{p.name} ? {a.as_type(t)} : {b.as_type(t)}")


def _mov(words: Sequence[str], arguments: Arguments) -> str:
    _exactly(words[1:-1])
    d, a = arguments
    t = _type(words[-1])
    if isinstance(d, list) and isinstance(a, Operand):
        bits = int(words[-1][1:]) // len(d)
        value = f"uint64_t whole = {a.as_type(t)};"
        return f"{{ {value} {' '.join(_set(o, f'(uint{bits}_t)(whole >> {i * bits})') for i, o in enumerate(d))} }}"
    if isinstance(a, list) and isinstance(d, Operand):
        bits = int(words[-1][1:]) // len(a)
        parts = [f"(uint64_t){o.as_type(f'uint{bits}_t')} << {i * bits}" for i, o in enumerate(a)]
        return _set(d, f"({t})({' | '.join(parts)})")
    d, a = _scalars(arguments, 2)
    if a.carrier == "special":
        return _set(d, f"({t})({_SPECIAL[a.name]})")
    return _set(d, a.as_type(t))


_SPECIAL = {
    f"%{name}.{axis}": f"{get}().{axis}"
    for name, get in (
        ("tid", "emu_thread_index"),
        ("ctaid", "emu_block_index"),
        ("ntid", "emu_block_dim"),
        ("nctaid", "emu_grid_dim"),
    )
    for axis in "xyz"
}
_RANK = "emu_thread_index().x + emu_block_dim().x * (emu_thread_index().y + emu_block_dim().y * emu_thread_index().z)"
_SPECIAL |= {"%laneid": f"({_RANK}) % 32", "%warpid": f"({_RANK}) / 32"}


def _lop3(words: Sequence[str], arguments: Arguments) -> str:
    _exactly(words[1:], "b32")
    d, a, b, c, table = _scalars(arguments, 5)
    return _set(d, f"emu::lop3({', '.join(o.as_type('uint32_t') for o in (a, b, c))}, {table.name})")


def _three(expression: str, modifier: str = "") -> Callable[[Sequence[str], Arguments], str]:
    def translate(words: Sequence[str], arguments: Arguments) -> str:
        _exactly(words[1:-1], modifier)
        d, a, b, c = _scalars(arguments, 4)
        t = _type(words[-1])
        return _set(d, f"({t})({expression.format(a=a.as_type(t), b=b.as_type(t), c=c.as_type(t))})")

    return translate


def _funnel(words: Sequence[str], arguments: Arguments) -> str:
    _exactly(words[2:], "wrap", "b32")
    d, a, b, c = _scalars(arguments, 4)
    return _set(d, f"__funnelshift_{words[1]}({', '.join(o.as_type('uint32_t') for o in (a, b, c))})")


def _dp4a(words: Sequence[str], arguments: Arguments) -> str:
    _exactly(words[3:])
    d, a, b, c = _scalars(arguments, 4)
    kinds = ", ".join({"s32": "int8_t", "u32": "uint8_t"}[w] for w in words[1:3])
    return _set(d, f"emu::dp4a<{kinds}>({a.as_type('uint32_t')}, {b.as_type('uint32_t')}, {c.as_type('int32_t')})")


def _cvt(words: Sequence[str], arguments: Arguments) -> str:
    if words[1:] == ["rn", "f16", "f32"]:
        d, a = _scalars(arguments, 2)
        return _set(d, f"__builtin_bit_cast(uint16_t, (_Float16){a.as_type('float')})")
    if words[1:] == ["rn", "f16x2", "f32"]:
        d, high, low = _scalars(arguments, 3)
        halves = [f"__builtin_bit_cast(uint16_t, (_Float16){o.as_type('float')})" for o in (high, low)]
        return _set(d, f"(uint32_t){halves[0]} << 16 | {halves[1]}")
    d, a = _scalars(arguments, 2)
    to, source = words[-2:]
    if words[1] == "rna" and (to, source) == ("tf32", "f32"):
        # Round to nearest, ties away from zero, to 10 bits of mantissa (PTX ISA 9.7.9.21).
        bits = a.as_type("uint32_t")
        return _set(d, f"({bits} << 1 > 0xff000000u ? 0x7fffffffu : ({bits} + 0x1000u) & 0xffffe000u)")
    if "f" in source[0] and "f" not in to[0]:
        modes = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}
        if (source, words[1]) not in {("f32", m) for m in modes} or to not in ("s32", "u32"):
            raise ValueError
        convert = "to_int" if to == "s32" else "to_uint"
        return _set(d, f"emu::{convert}({modes[words[1]]}f({a.as_type('float')}))")
    if set(words[1:-2]) - {"rn"}:
        raise ValueError
    return _set(d, f"({_type(to)})({a.as_type(_type(source))})")


# Spaces and widths, and caches, which are not emulated.
_WAYS = {"global", "shared", "v2", "v4", "nc", "ca", "cg", "cs", "L1::no_allocate", "L2::64B", "L2::128B", "L2::256B"}


def _load(words: Sequence[str], arguments: Arguments) -> str:
    t = _type(words[-1])
    out, address = _group(arguments[0]), arguments[1]
    if isinstance(address, list) or not {"global", "shared"} & set(words) or set(words[1:-1]) - _WAYS:
        raise ValueError
    place = _place(words, address, t, len(out))
    values = " ".join(_set(o, f"from[{i}]") for i, o in enumerate(out))
    return f"{{ auto from = {place}; {values} }}"


def _store(words: Sequence[str], arguments: Arguments) -> str:
    t = _type(words[-1])
    address, values = arguments[0], _group(arguments[1])
    if isinstance(address, list) or not {"global", "shared"} & set(words) or set(words[1:-1]) - _WAYS:
        raise ValueError
    place = _place(words, address, t, len(values))
    return f"{{ auto to = {place}; {' '.join(f'to[{i}] = {o.as_type(t)};' for i, o in enumerate(values))} }}"


def _place(words: Sequence[str], address: Operand, t: str, count: int) -> str:
    if "shared" in words:
        return f"({t}*)emu_at_shared({address.as_type('uint32_t')}, {count} * sizeof({t}))"
    return f"({t}*){address.name}"


def _nothing(words: Sequence[str], arguments: Arguments) -> str:
    return ";"


_FAMILIES: dict[str, Callable[[Sequence[str], Arguments], str]] = {
    "mma.sync": _mma,
    "ldmatrix": _ldmatrix,
    "stmatrix": _stmatrix,
    "cp.async.ca": _cp_async,
    "cp.async.cg": _cp_async,
    "cp.async.commit_group": lambda w, a: "emu_cp_async_commit();",
    "cp.async.wait_group": lambda w, a: f"emu_cp_async_wait({_scalars(a, 1)[0].name});",
    "cp.async.wait_all": lambda w, a: "emu_cp_async_wait_all();",
    "shfl.sync": _shuffle,
    "vote.sync": _vote,
    "redux.sync": _redux,
    "match.any.sync": lambda w, a: _set(
        _scalars(a, 3)[0],
        f"emu_match({_scalars(a, 3)[2].as_type('uint32_t')}, {_scalars(a, 3)[1].as_type(_type(w[-1]))}, {_LINE})",
    ),
    "activemask": lambda w, a: _set(_scalars(a, 1)[0], f"emu_activemask({_LINE})"),
    "bar.warp.sync": lambda w, a: f"emu_syncwarp({_scalars(a, 1)[0].as_type('uint32_t')}, {_LINE});",
    "bar.sync": _barrier,
    "barrier.sync": _barrier,
    "barrier.cta.sync": _barrier,
    # One thread of the host: what is written is seen. Caches and launches of a next kernel are not emulated.
    "membar": _nothing,
    "fence": _nothing,
    "prefetch": _nothing,
    "griddepcontrol": _nothing,
    "trap": lambda w, a: f"emu_trap({_LINE});",
    "cvta.to.shared": lambda w, a: _set(_scalars(a, 2)[0], f"emu_to_shared((const void*){_scalars(a, 2)[1].name})"),
    "mov": _mov,
    "setp": _setp,
    "selp": _selp,
    "add": _binary("{a} + {b}"),
    "add.rn": _binary("emu::fadd({a}, {b})", "rn"),
    "sub": _binary("{a} - {b}"),
    "sub.rn": _binary("emu::fsub({a}, {b})", "rn"),
    "mul.lo": _binary("{a} * {b}", "lo"),
    "mul.rn": _binary("emu::fmul({a}, {b})", "rn"),
    "mul": _binary("{a} * {b}"),
    "div.rn": _binary("{a} / {b}", "rn"),
    "fma.rn": _three("__builtin_fmaf({a}, {b}, {c})", "rn"),
    "mad.lo": _three("{a} * {b} + {c}", "lo"),
    "sqrt.rn": _unary("sqrtf({a})", modifier="rn"),
    "and": _binary("{a} & {b}"),
    "or": _binary("{a} | {b}"),
    "xor": _binary("{a} ^ {b}"),
    "not": _unary("~{a}"),
    "neg": _unary("-{a}"),
    "abs": _unary("{a} < 0 ? -{a} : {a}"),
    "min": _binary("min({a}, {b})"),
    "max": _binary("max({a}, {b})"),
    "shl": _binary("{b} >= {bits} ? 0 : {a} << {b}"),
    "shr": _binary("{b} >= {bits} ? ({a} < 0 ? -1 : 0) : {a} >> {b}"),
    "popc": _unary("__builtin_popcountll((uint64_t){a})", "uint32_t"),
    "brev": _unary("__builtin_bitreverse32({a})"),
    "clz": _unary("__clz({a})", "uint32_t"),
    "lop3": _lop3,
    "prmt": _three("emu::prmt({a}, {b}, {c})"),
    "shf": _funnel,
    "dp4a": _dp4a,
    "cvt": _cvt,
    "ld": _load,
    "st": _store,
}
