"""The last step: a module of kernel calls becomes a `Plan`, every buffer with its place in memory.

    y = call_tir(kernel, (x, W))   -->   Step(kernel, args=(x, W, y)); y at an offset of the arena

Buffers that are alive at the same time do not overlap; everything else may share. Placement is first fit, in the best
of some orders, over lifetimes counted in steps, all offsets multiples of 64 bytes. A kernel that reads constants only
runs once, when an instance is made, and writes persistent memory, unless it writes an output. A reshape or a view is
another descriptor of the same memory.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

from tvm import relax
from tvm.ir import GenericConst, IRModule

from bnncc.dialect.ops import is_call, op_name
from bnncc.dialect.plan import Layer, Plan, Space, Step, Tensor, Value
from bnncc.passes.form_kernels import ALIASES, STEPS, returned_memory
from bnncc.passes.rewriter import LAYERS, Origin, numpy_of, operands, origins_of

ALIGNMENT = 64


@dataclass
class Buffer:
    """A piece of memory. It is alive from step `first` to step `last`, both included; `offset` is found by `place`."""

    size: int
    space: Space
    offset: int = 0
    first: int = 0
    last: int = -1


@dataclass
class _Builder:
    """Collects the rows of a plan while it walks over the bindings of `main`."""

    origins: dict[str, Origin]
    rows: list[tuple[str, tuple[int, ...], str, Buffer, Value | None]] = field(default_factory=list)
    ids: dict[Any, list[int]] = field(default_factory=dict)  # variable → tensor ids (several for a tuple)
    blob: bytearray = field(default_factory=bytearray)
    constants: dict[tuple[tuple[int, ...], str, bytes], int] = field(default_factory=dict)

    def add(self, name: str, ty: Any, buffer: Buffer) -> int:
        self.rows.append((name, _shape(ty), str(ty.dtype), buffer, self.value(name)))
        return len(self.rows) - 1

    def value(self, name: str) -> Value | None:
        origin = self.origins.get(name)
        return Value(origin.node, origin.order, origin.bits, origin.step) if origin and origin.node else None

    def constant(self, const: GenericConst) -> int:
        array = numpy_of(const)
        key = (array.shape, str(array.dtype), array.tobytes())
        if key not in self.constants:
            buffer = Buffer(array.nbytes, "weights", len(self.blob))
            self.blob += key[2] + b"\0" * (-array.nbytes % ALIGNMENT)
            self.constants[key] = self.add(f"weight{len(self.constants)}", const.ty, buffer)
        return self.constants[key]

    def argument(self, expr: Any) -> int:
        return self.constant(expr) if isinstance(expr, GenericConst) else self.ids[expr][0]

    def name_output(self, var: Any, tensor: int) -> None:
        """One output of a kernel that has several gets its own name, and so its value."""
        _, shape, dtype, buffer, _ = self.rows[tensor]
        self.rows[tensor] = (var.name, shape, dtype, buffer, self.value(var.name))
        self.ids[var] = [tensor]

    def add_alias(self, var: Any, source: int, *, same_value: bool) -> None:
        alias = self.add(var.name, var.ty, self.buffer(source))
        if same_value:
            self.rows[alias] = (*self.rows[alias][:4], self.rows[source][4])
        self.ids[var] = [alias]

    def buffer(self, tensor: int) -> Buffer:
        return self.rows[tensor][3]

    def is_constant(self, expr: Any) -> bool:
        """Whether an argument is the same in every run."""
        return self.buffer(self.argument(expr)).space in ("weights", "persistent")


def plan_memory(mod: IRModule, name: str) -> Plan:
    """The plan of a module that `FormKernels` returned; `name` is the model's."""
    func = mod["main"]
    notes = {str(var): json.loads(str(note)) for var, note in func.attrs[STEPS].items()}
    b = _Builder(origins_of(func))
    for index, param in enumerate(func.params):
        b.ids[param] = [b.add(param.name, param.ty, Buffer(_bytes(param.ty), "input", index))]
    steps: list[Step] = []
    init: list[Step] = []
    returned = returned_memory(func)
    for binding in (binding for block in func.body.blocks for binding in block.bindings):
        var, value = binding.var, binding.value
        if isinstance(value, relax.Var):
            b.ids[var] = b.ids[value]
        elif isinstance(value, relax.Tuple):
            b.ids[var] = [b.argument(field_) for field_ in value.fields]
        elif isinstance(value, relax.TupleGetItem):
            b.name_output(var, b.ids[value.tuple_value][value.index])
        elif op_name(value) in ALIASES:
            b.add_alias(var, b.argument(value.args[0]), same_value=is_call(value, "memory.view"))
        elif is_call(value, "call_tir"):
            once = var not in returned and all(b.is_constant(arg) for arg in value.args[1].fields)
            _add_step(b, var, value, notes[var.name], init if once else steps, "persistent" if once else "arena")
        else:
            raise ValueError(f"plan_memory: {var.name} is no kernel call: {value}")
    outputs = [tensor for field_ in operands(func.body.body) for tensor in b.ids[field_]]
    for index, tensor in enumerate(outputs):
        b.buffer(tensor).space, b.buffer(tensor).offset = "output", index
    _measure_lifetimes(b, steps)
    buffers = list({id(row[3]): row[3] for row in b.rows}.values())
    persistent = 0
    for buffer in (x for x in buffers if x.space == "persistent"):
        buffer.offset, persistent = persistent, persistent + _aligned(buffer.size)
    arena = place([x for x in buffers if x.space == "arena"])
    tensors = [
        Tensor(i, name_, shape, dtype, buffer.space, buffer.offset, value_)
        for i, (name_, shape, dtype, buffer, value_) in enumerate(b.rows)
    ]
    return Plan(
        name=name, tensors=tuple(tensors), init=tuple(init), steps=tuple(steps),
        inputs=tuple(b.ids[p][0] for p in func.params), outputs=tuple(outputs),
        arena_bytes=arena, persistent_bytes=persistent, weights=bytes(b.blob), layers=_layers(func, steps),
    )  # fmt: skip


def _add_step(b: _Builder, var: Any, value: relax.Call, note: dict[str, Any], steps: list[Step], space: Space) -> None:
    args = [b.argument(arg) for arg in value.args[1].fields]
    types = list(value.ty_args[0].fields) if isinstance(value.ty_args[0], relax.TupleType) else [value.ty_args[0]]
    made = [b.add(var.name if len(types) == 1 else f"{var.name}.{i}", ty, Buffer(_bytes(ty), space))
            for i, ty in enumerate(types)]  # fmt: skip
    b.ids[var] = made
    steps.append(
        Step(
            str(value.args[0].name_hint),
            note["op"],
            (*args, *made),
            len(made),
            tuple(note["layers"]),
            note["exact"],
            note.get("opt_in"),
        )
    )


def _measure_lifetimes(b: _Builder, steps: list[Step]) -> None:
    for index, step in enumerate(steps):
        for position, tensor in enumerate(step.args):
            buffer = b.buffer(tensor)
            if position >= len(step.args) - step.outputs and buffer.last < 0:
                buffer.first = index
            buffer.last = max(buffer.last, index)


#: Orders that `place` tries before it settles for an arena larger than what is alive at once.
_TRIES = 500


def place(buffers: list[Buffer]) -> int:
    """Gives every buffer an offset such that no two alive at once overlap; returns the arena's size in bytes.

    First fit, the largest buffers first, or those that live longest: the better of both. As long as an order takes more
    than ever is alive at once, single buffers are moved to other places in it. Deterministic.
    """
    least, draw = _most_alive(buffers), random.Random(0)
    found: list[tuple[int, list[Buffer]]] = []
    for key in (lambda x: (-x.size, x.first)), (lambda x: (x.first - x.last, -x.size)):
        order = sorted(buffers, key=key)
        best = _first_fit(order)
        for _ in range(_TRIES):
            if best <= least:
                break
            moved = list(order)
            moved.insert(draw.randrange(len(order)), moved.pop(draw.randrange(len(order))))
            total = _first_fit(moved)
            if total <= best:
                best, order = total, moved
        found.append((best, order))
    return _first_fit(min(found, key=lambda pair: pair[0])[1])


def _most_alive(buffers: list[Buffer]) -> int:
    """Bytes of the buffers alive at once, at most."""
    return max((sum(_aligned(x.size) for x in buffers if x.first <= b.first <= x.last) for b in buffers), default=0)


def _first_fit(order: list[Buffer]) -> int:
    """Places the buffers in this order, each as low as it can lie; returns the bytes that all take."""
    placed: list[Buffer] = []
    total = 0
    for buffer in order:
        offset = 0
        for other in sorted(placed, key=lambda x: x.offset):
            if other.last < buffer.first or buffer.last < other.first:
                continue
            if offset + _aligned(buffer.size) <= other.offset:
                break
            offset = max(offset, other.offset + _aligned(other.size))
        buffer.offset = offset
        placed.append(buffer)
        total = max(total, offset + _aligned(buffer.size))
    return total


def _layers(func: relax.Function, steps: list[Step]) -> tuple[Layer, ...]:
    """The rows of the per-layer table, in the order in which the layers run."""
    rows = [json.loads(str(row)) for row in func.attrs[LAYERS]]
    first = {path: i for i, step in reversed(list(enumerate(steps))) for path in step.layers[:1]}
    rows.sort(key=lambda row: first.get(row["path"], len(steps)))
    return tuple(Layer(**{**row, "output_shape": tuple(row["output_shape"])}) for row in rows)


def _shape(ty: Any) -> tuple[int, ...]:
    return tuple(int(extent) for extent in ty.shape)


def _bytes(ty: Any) -> int:
    size = 1 if str(ty.dtype) == "bool" else int(str(ty.dtype).lstrip("uintfloa")) // 8
    for extent in _shape(ty):
        size *= extent
    return size


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
