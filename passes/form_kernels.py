"""Operators become kernels: an anchor, the elementwise operators behind it and the packing of its result are one.

    a = bnncc.xnor_conv2d(p, W); y = scale_shift(astype(a), …); z = add(y, r)        kernel(p, W, …, r) → z, q
    q = bnncc.pack(z)                                                          -->   (z as well, if something reads it)

Last of the graph passes: what follows plans memory. TVM's FuseOps is not used, because it neither gives two outputs
(floats and bits of the same value) nor keeps whose layer a kernel computes; the TE computes are fused as its FuseTIR
would. A group grows from its anchor, operator by operator, as long as one value alone leaves it; it takes in a whole
diamond (PReLU as `where(x > 0, x, w · x)`) or none of it, and never an operator that depends on the group through
another kernel. Values that leave a group are its outputs. Two things are computed where they are read, not stored: a
concatenation, if every reader is elementwise, a pack or a pool without overlap, and the elementwise operators before
such a pool. Declines nothing: what cannot join starts a kernel of its own, and an operator that nobody has a kernel
for is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import tvm_ffi
from tvm import relax, te, tirx
from tvm.ir import GenericConst, IRModule

from bnncc.dialect.kernels import ELEMENTWISE, is_anchor, is_exact, literal, lower
from bnncc.dialect.ops import attributes, is_call, op_name, shape_of
from bnncc.passes.rewriter import LAYERS, ORIGINS, Rewriter, module_pass, numpy_of, operands, opt_ins_of
from bnncc.runtime.errors import BnnccError

#: Attribute of `main`: variable of a kernel call → JSON of its `op`, `layers` and `exact` (`bnncc.dialect.plan.Step`).
STEPS = "bnncc.steps"

#: Operators that only rename memory.
ALIASES = ("reshape", "memory.view")

_PACKS = ("bnncc.pack", "bnncc.pack_levels", "bnncc.pack_bytes", "bnncc.threshold_pack", "bnncc.lookup_pack")

_CONVOLUTIONS = ("bnncc.conv2d", "bnncc.xnor_conv2d", "bnncc.plane_conv2d", "bnncc.byte_conv2d")
_TO_NCHW = (0, 3, 1, 2)

# How many bindings a diamond behind an anchor may span before the search for its end is given up.
_DIAMOND = 16

# Expressions of a kernel are trees: what an operator reads several times stands there several times, so that a chain of
# such operators grows with their number as a power. Reads of one operand, where there are more than one.
_READS = {
    "maximum": 4, "minimum": 4, "clip": 4, "nn.relu": 2, "nn.leakyrelu": 3, "nn.silu": 2, "nn.gelu": 2,
    "nn.gelu_tanh": 5,
}  # fmt: skip
# Operators of a tree from which on a kernel ends, and the next one reads its result from memory. Real networks have
# some tens; of some thousands LLVM takes minutes.
_MOST_OPERATORS = 512


class _Group:
    def __init__(self, members: list[Any]):
        self.members = members


def returned_memory(func: relax.Function) -> set[Any]:
    """The variables whose memory the caller provides: those that are returned, and those that these rename."""
    definition = {b.var: b.value for block in func.body.blocks for b in block.bindings}
    returned = set()
    pending = operands(func.body.body)
    while pending:
        var = pending.pop()
        returned.add(var)
        value = definition.get(var)
        if op_name(value) in ALIASES or not isinstance(value, relax.Call):
            pending += operands(value)
    return returned


def renamings(memory: set[Any], definition: dict[Any, Any]) -> set[Any]:
    """These variables and all that only rename their memory. Definitions come in program order."""
    renamed = set(memory)
    for var, value in definition.items():
        if op_name(value) in ALIASES and value.args[0] in renamed:
            renamed.add(var)
    return renamed


class _Form(Rewriter):
    def __init__(self, mod: IRModule, target: Any):
        super().__init__(mod)
        self.target = target
        self.position = {b.var: i for i, b in enumerate(self.bindings)}
        self.outputs = returned_memory(self.func)
        self.opt_ins = opt_ins_of(self.func)
        self.group_of: dict[Any, _Group] = {}
        # Variables whose memory is the caller's, old and new: it is aligned to its elements only.
        self.callers_memory = renamings({*self.func.params, *self.outputs}, self.definition)
        self.callers_values: set[Any] = set(self.func.params)
        self.operators: dict[Any, int] = {}  # of the tree that computes a variable in its kernel

    # -- grouping ------------------------------------------------------------------------------------------------

    def form_groups(self) -> list[_Group]:
        groups = []
        for binding in self.bindings:
            name = op_name(binding.value)
            if binding.var in self.group_of or name is None or name in ALIASES or self.is_joined(binding.var):
                continue
            if not is_ours(binding.value) and not has_kernel(binding.value):
                raise self.unsupported(binding.var, name)
            group = _Group([binding.var])
            self.group_of[binding.var] = group
            if name == "permute_dims" and self.feeds_pad(binding.var):
                self.take(group, self.users[binding.var][:1])
            self.extend(group)
            if name in ELEMENTWISE and (pool := self.pool_after(group.members[-1])) is not None:
                self.take(group, [pool])
                self.extend(group)
            groups.append(group)
        return groups

    def is_joined(self, var: Any) -> bool:
        """Whether a concatenation is computed in the kernels that read it."""
        value = self.definition.get(var)
        if not is_call(value, "concat") or not is_anchor(value) or var in self.outputs:
            return False
        return all(self.reads_once(self.definition[user]) for user in self.users.get(var, []))

    def reads_once(self, value: Any) -> bool:
        """Whether a call reads each element of its one operand once, so that this may be computed while it reads."""
        if op_name(value) in ELEMENTWISE or op_name(value) == "bnncc.pack":
            # Of several operands, others may be an anchor's, in whose kernel the call then is.
            return len(operands(value)) == 1 and attributes(value).get("data_layout", "NHWC") == "NHWC"
        if op_name(value) not in ("nn.max_pool2d", "nn.avg_pool2d") or not is_anchor(value):
            return False
        a = attributes(value)
        return all(size <= stride for size, stride in zip(a["pool_size"], a["strides"], strict=True))

    def pool_after(self, var: Any) -> Any | None:
        """The pool that alone reads a value, and each element of it once."""
        users = self.users.get(var, [])
        if var in self.outputs or len(users) != 1 or users[0] in self.group_of:
            return None
        value = self.definition[users[0]]
        return users[0] if op_name(value) not in (*ELEMENTWISE, "bnncc.pack") and self.reads_once(value) else None

    def feeds_pad(self, var: Any) -> bool:
        """A transposition that only a pad reads is done while padding."""
        users = self.users.get(var, [])
        pad = self.definition[users[0]] if len(users) == self.uses[var] == 1 else None
        return is_call(pad, "nn.pad") and is_anchor(pad)

    def take(self, group: _Group, new: Iterable[Any]) -> None:
        for var in new:
            group.members.append(var)
            self.group_of[var] = group

    def extend(self, group: _Group) -> None:
        tail = group.members[-1]
        if op_name(self.definition[tail]) in _PACKS or not is_ours(self.definition[tail]):
            return
        while (new := self.next_region(group, tail)) is not None:
            self.take(group, new)
            tail = new[-1]
        packs = [u for u in self.users.get(tail, []) if self.is_packing_of(u, tail)]
        self.take(group, packs[:1] or self.turning(group, tail))

    def is_packing_of(self, user: Any, tail: Any) -> bool:
        value = self.definition[user]
        return (
            op_name(value) in _PACKS and user not in self.group_of and value.args[0].same_as(tail)
            and attributes(value).get("data_layout", "NHWC") == "NHWC"
        )  # fmt: skip

    def turning(self, group: _Group, tail: Any) -> list[Any]:
        """The transposition to NCHW that alone reads a convolution's result, where the target computes both at once."""
        anchor, users = self.definition[group.members[0]], self.users.get(tail, [])
        if self.target is None or op_name(anchor) not in _CONVOLUTIONS or len(users) != 1 or tail in self.outputs:
            return []
        value = self.definition[users[0]]
        turns = is_call(value, "permute_dims") and tuple(attributes(value)["axes"] or ()) == _TO_NCHW
        groups = 1 if attributes(anchor).get("in_lanes") else shape_of(anchor.args[1])[0]
        return users if turns and self.target.turns_results(shape_of(tail), groups, str(tail.ty.dtype)) else []

    def next_region(self, group: _Group, tail: Any) -> list[Any] | None:
        """The shortest run of elementwise readers after which one new value alone leaves the group, if there is one."""
        inside = set(group.members)
        region: list[Any] = []
        start = self.position[tail]
        for binding in self.bindings[start + 1 : start + 1 + 4 * _DIAMOND]:
            var, value = binding.var, binding.value
            reads = operands(value)
            if not any(v in inside for v in reads) or op_name(value) in _PACKS:
                continue
            if not self.joins(group, inside, var, value):
                return None if not region else self.closed(inside, region)
            region.append(var)
            inside.add(var)
            if self.is_closed(inside, var):
                return region
            if len(region) == _DIAMOND:
                return None
        return None

    def closed(self, inside: set[Any], region: list[Any]) -> list[Any] | None:
        return region if self.is_closed(inside, region[-1]) else None

    def is_closed(self, inside: set[Any], last: Any) -> bool:
        return all(
            v.same_as(last) or (v not in self.outputs and all(u in inside for u in self.users.get(v, [])))
            for v in inside
        )

    def joins(self, group: _Group, inside: set[Any], var: Any, value: Any) -> bool:
        if op_name(value) not in ELEMENTWISE or var in self.group_of or shape_of(var) != shape_of(group.members[-1]):
            return False
        others = [v for v in operands(value) if v not in inside]
        if any(self.depends_on(v, group, inside) for v in others):
            return False
        within = [self.operators.get(v, 1) for v in operands(value) if v in inside]
        self.operators[var] = 1 + _READS.get(str(op_name(value)), 1) * sum(within)
        return self.operators[var] <= _MOST_OPERATORS

    def depends_on(self, var: Any, group: _Group, inside: set[Any]) -> bool:
        """Whether computing `var` needs the group, through whatever kernels there are."""
        pending, seen = [var], set()
        while pending:
            current = pending.pop()
            if current in inside:
                return True
            if current in seen or current not in self.definition:
                continue
            seen.add(current)
            own = self.group_of.get(current)
            for member in own.members if own else [current]:
                seen.add(member)
                pending += operands(self.definition[member])
        return False

    # -- emission ------------------------------------------------------------------------------------------------

    def run(self) -> IRModule:
        groups = self.form_groups()
        self.steps: dict[str, str] = {}
        with self.builder.function("main", list(self.func.params)):
            with self.builder.dataflow():
                for unit in self.ordered(groups):
                    if isinstance(unit, _Group):
                        self.emit_kernel(unit)
                    elif not self.is_joined(unit):
                        self.made(unit, self._bind(unit, self._substituted(self.definition[unit])))
                result = self.builder.emit_output(self.replaced(self.func.body.body))
            self.builder.emit_func_output(result)
        built = self.builder.get()
        attrs = {
            ORIGINS: {name: origin.fields() for name, origin in sorted(self.origins.items())},
            LAYERS: self.layers,
            STEPS: self.steps,
        }
        main = built["main"].with_attrs(attrs)
        # Equal kernels are one up to here, because they carry no name of their own.
        named = {gv: f.with_attr("global_symbol", gv.name_hint) for gv, f in built.functions_items()}
        return IRModule({gv: main if gv.name_hint == "main" else f for gv, f in named.items()})

    def ordered(self, groups: list[_Group]) -> list[Any]:
        """Groups and lone bindings, each after what it reads, otherwise in program order."""
        order: list[Any] = []
        done: set[Any] = set()

        def visit(var: Any) -> None:
            pending = [(var, False)]
            while pending:
                current, ready = pending.pop()
                if current in done or current not in self.definition:
                    continue
                group = self.group_of.get(current)
                members = group.members if group else [current]
                if ready:
                    done.update(members)
                    order.append(group if group else current)
                    continue
                pending.append((current, True))
                reads = [v for m in members for v in operands(self.definition[m]) if v not in members]
                pending += [(v, False) for v in sorted(reads, key=lambda v: -self.position.get(v, 0))]

        for binding in self.bindings:
            visit(binding.var)
        return order

    def emit_kernel(self, group: _Group) -> None:
        if is_ours(self.definition[group.members[0]]):
            self.emit_fused(group)
        else:
            self.emit_by_tvm(group)

    def emit_fused(self, group: _Group) -> None:
        inputs: list[Any] = []
        tensors: dict[Any, Any] = {}
        placeholders: list[te.Tensor] = []

        def tensor(arg: Any, elementwise: bool) -> Any:
            if isinstance(arg, GenericConst):
                array = numpy_of(arg)
                if array.ndim == 0:
                    return literal(array)
                if elementwise:
                    array = _channel_vector(array)
                return placeholder(relax.const(array, str(array.dtype)), array.shape, str(array.dtype))
            if arg not in tensors and self.is_joined(arg):
                joined = self.definition[arg]
                tensors[arg] = lower(joined, [tensor(field, False) for field in joined.args[0].fields])
            if arg not in tensors:
                tensors[arg] = placeholder(self.replaced(arg), shape_of(arg), str(arg.ty.dtype))
            return tensors[arg]

        def placeholder(value: Any, shape: Any, dtype: str) -> te.Tensor:
            inputs.append(value)
            placeholders.append(te.placeholder(shape, dtype, f"p{len(inputs)}"))
            return placeholders[-1]

        anchor = op_name(self.definition[group.members[0]])
        for var in group.members:
            value = self.definition[var]
            elementwise = op_name(value) in ELEMENTWISE
            parts = value.args[0].fields if is_call(value, "concat") else value.args
            args = [tensor(a, elementwise) for a in parts if isinstance(a, (relax.Var, GenericConst))]
            tensors[var] = lower(value, args)
        results = [v for v in group.members if self.leaves(v, group)]
        function = te.create_prim_func([*placeholders, *(tensors[v] for v in results)])
        callers = [i for i, arg in enumerate(inputs) if arg in self.callers_values]
        callers += [len(inputs) + i for i, v in enumerate(results) if v in self.callers_memory]
        function = _declared(function, [str(param.name) for param in function.params], callers)
        name = _kernel_name(group.members, self.definition)
        kernel = self.builder.add_func(function.with_attr({"tirx.noalias": True, "bnncc.kind": anchor}), name)
        types = [relax.TensorType(shape_of(v), str(v.ty.dtype)) for v in results]
        call = relax.call_tir(kernel, inputs, types[0] if len(types) == 1 else types)
        made = self.builder.emit(call, results[0].name if len(results) == 1 else f"{results[0].name}__kernel")
        self.steps[made.name] = json.dumps(self.step(group))
        self.widen_steps(group, results)
        for index, var in enumerate(results):
            single = made if len(results) == 1 else self.builder.emit(relax.TupleGetItem(made, index), var.name)
            self.made(var, single)

    def emit_by_tvm(self, group: _Group) -> None:
        """A kernel for an operator without a compute of ours: TVM's own, for our rules to schedule."""
        (var,) = group.members
        value = self._substituted(self.definition[var])
        call = self.builder.normalize(value.op.get_attr("FLegalize")(self.builder, value))
        if not is_call(call, "call_tir"):
            raise self.unsupported(var, str(op_name(value)))
        kernel, arguments = call.args[0], call.args[1].fields
        callers = [i for i, arg in enumerate(arguments) if arg in self.callers_values]
        callers += [len(arguments)] if var in self.callers_memory else []
        # TVM's own names are those of variables, of which one may be read twice.
        names = [*(f"p{i}" for i in range(1, len(arguments) + 1)), str(op_name(value)).split(".")[-1]]
        function = _declared(self.builder.get()[kernel], names, callers)
        self.builder.update_func(kernel, function)
        made = self.builder.emit(call, var.name)
        self.made(var, made)
        self.steps[made.name] = json.dumps(self.step(group))

    def made(self, old: Any, new: Any) -> None:
        """Lets `new` stand for `old` from here on."""
        self._new[old] = new
        if old in self.callers_memory:
            self.callers_values.add(new)

    def widen_steps(self, group: _Group, results: list[Any]) -> None:
        """A value quantized twice on its way may be off by a step of each quantizer."""
        inner = {o.step for v in group.members if str(v.ty.dtype) == "float32" and (o := self.origin(v)) and o.step}
        for var in results:
            if (origin := self.origin(var)) and origin.step:
                self.origins[var.name] = replace(origin, step=sum(inner | {origin.step}))

    def leaves(self, var: Any, group: _Group) -> bool:
        return var in self.outputs or any(u not in group.members for u in self.users.get(var, []))

    def step(self, group: _Group) -> dict[str, Any]:
        calls = [self.definition[v] for v in group.members]
        paths = [o.path for v in group.members if (o := self.origin(v)) and o.path]
        ops = [str(op_name(c)).split(".")[-1] for c in calls]
        opt_in = next((self.opt_ins[v.name] for v in group.members if v.name in self.opt_ins), None)
        exact = opt_in is None and all(is_exact(c) for c in calls)
        note = {"op": "+".join(ops), "layers": list(dict.fromkeys(paths)), "exact": exact}
        return note | {"opt_in": opt_in} if opt_in else note

    def unsupported(self, var: Any, name: str) -> BnnccError:
        origin = self.origin(var)
        where = f"module '{origin.path}'" if origin and origin.path else "the model itself"
        return BnnccError(
            f"cannot compile {name} of {where} (node {var.name}): there is no kernel for it; supported are "
            "convolutions, linear layers, pooling, normalisation and elementwise operators: replace it, or keep it "
            "outside the network"
        )


def is_ours(call: Any) -> bool:
    """Whether the dialect has a compute for the call."""
    return is_anchor(call) or op_name(call) in ELEMENTWISE


def has_kernel(call: relax.Call) -> bool:
    """Whether TVM knows how to compute the operator."""
    return call.op.has_attr("FLegalize")


def _declared(function: Any, names: list[str], unaligned: list[int]) -> Any:
    """The function with its parameters under these names; those at some positions may lie anywhere. TVM assumes 64
    bytes."""
    buffers = {
        param: tirx.decl_buffer(
            param.shape, str(param.dtype), name, data_alignment=4 if i in unaligned else 64, layout=None
        )
        for i, (param, name) in enumerate(zip(function.params, names, strict=True))
    }
    return tvm_ffi.structural_map(function, (tirx.Var, lambda var: buffers.get(var, var)))


def _channel_vector(array: np.ndarray) -> np.ndarray:
    """[1, …, 1, C] as [C]; other shapes as they are."""
    lone = array.ndim > 1 and array.size == array.shape[-1]
    return np.ascontiguousarray(array.reshape(-1) if lone else array)


def _kernel_name(members: list[Any], definition: dict[Any, Any]) -> str:
    ops = [str(op_name(definition[v])).split(".")[-1] for v in members]
    return "fused_" + "_".join(dict.fromkeys(ops))[:80]


def FormKernels(target: Any = None) -> Any:
    """The pass. target: says which transpositions are computed with a convolution; without one, none are."""
    return module_pass(lambda mod: _Form(mod, target).run(), "FormKernels")
