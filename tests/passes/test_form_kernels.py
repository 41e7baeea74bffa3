"""Which operators share a kernel, what leaves it, and that the kernels compute what the operators did."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op as R_

from bnncc.dialect.ops import call
from bnncc.passes.form_kernels import STEPS, FormKernels
from bnncc.passes.own_outputs import OwnOutputs
from bnncc.passes.plan_memory import plan_memory
from bnncc.passes.rewriter import LAYERS, ORIGINS, Origin
from bnncc.runtime.bits import BitLayout
from bnncc.runtime.errors import BnnccError

SHAPE = (1, 5, 5, 16)
LAYOUT = BitLayout(16, 1, 8, 2)


def emit(value, name=""):
    return relax.BlockBuilder.current().emit(value, name)


def const(value, dtype="float32"):
    return relax.const(np.asarray(value, dtype))


def vector(seed=0):
    return const(np.random.default_rng(seed).normal(size=(1, 1, 1, 16)))


def move(x, name=""):
    """An anchor: it starts a kernel of its own."""
    return emit(R_.permute_dims(x, [0, 2, 1, 3]), name)


def pack(x, **attrs):
    defaults = {"predicate": "ge", "planes": 1, "padding": (0, 0, 0, 0), "pad_bit": 0, "data_layout": "NHWC"}
    return emit(call("pack", [x], **{**defaults, **LAYOUT.to_json(), **attrs}))


def product(bits, name="acc"):
    weight = relax.const(np.random.default_rng(1).integers(0, 256, (1, 2, 3, 3, 2, 8), "uint8"))
    common = {"strides": (1, 1), "dilation": (1, 1), "n_eff": 0, "corrected": 0}
    attrs = {"out_channels": 16, "depth": 144, "kernel_size": (3, 3), **common}
    return emit(call("xnor_conv2d", [bits, weight], **attrs), name)


def prelu(x, slope):
    positive = emit(R_.greater(x, const(0.0)))
    scaled = emit(R_.multiply(x, slope))
    return emit(R_.where(positive, x, scaled))


def several(shape, body):
    """A module with several outputs."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(relax.Tuple(list(body(x))))
        builder.emit_func_output(result)
    return builder.get()


@pytest.fixture
def steps(apply):
    """steps(module) → (what each kernel computes, how many values it writes), in order; no step reads ahead."""

    def of(mod):
        plan = plan_memory(apply(FormKernels(), mod), "model")
        written = set(plan.inputs)
        for step in (*plan.init, *plan.steps):
            (*read,) = step.args[: len(step.args) - step.outputs]
            assert all(buffer_of(plan, t) in {buffer_of(plan, w) for w in written} or is_weight(plan, t) for t in read)
            written |= set(step.args[len(read) :])
        return [(step.op, step.outputs) for step in plan.steps]

    return of


def buffer_of(plan, index):
    return plan.tensors[index].space, plan.tensors[index].offset


def is_weight(plan, index):
    return plan.tensors[index].space == "weights"


def test_a_layer_is_one_kernel(function, steps):
    def body(x):
        accumulator = product(pack(x, padding=(1, 1, 1, 1)))
        floats = emit(R_.astype(accumulator, "float32"))
        scaled = emit(call("scale_shift", [floats, const(np.ones(16)), const(np.ones(16))], axis=3))
        return pack(emit(R_.nn.relu(scaled)))

    assert steps(function(SHAPE, body)) == [("pack", 1), ("xnor_conv2d+astype+scale_shift+relu+pack", 1)]


def test_a_residual_with_two_readers_leaves_as_floats_and_bits(steps):
    def body(x):
        moved = move(x)
        total = emit(R_.add(moved, x), "total")
        return move(total), product(pack(total, padding=(1, 1, 1, 1)))

    assert steps(several(SHAPE, body)) == [
        ("permute_dims+add+pack", 2), ("permute_dims", 1), ("xnor_conv2d", 1),
    ]  # fmt: skip


def test_a_value_that_only_its_bits_need_is_not_written(function, steps):
    assert steps(function(SHAPE, lambda x: pack(emit(R_.add(move(x), x))))) == [("permute_dims+add+pack", 1)]


def test_a_diamond_goes_in_whole(function, steps):
    assert steps(function(SHAPE, lambda x: R_.nn.relu(prelu(move(x), vector())))) == [
        ("permute_dims+greater+multiply+where+relu", 1)
    ]


def test_two_diamonds_after_each_other(function, steps):
    body = lambda x: prelu(prelu(move(x), vector(1)), vector(2))  # noqa: E731
    assert steps(function(SHAPE, body)) == [("permute_dims+greater+multiply+where+greater+multiply+where", 1)]


def test_an_operator_that_reads_the_kernel_twice(function, steps):
    assert steps(function(SHAPE, lambda x: R_.multiply(*[move(x)] * 2))) == [("permute_dims+multiply", 1)]


def test_elementwise_operators_without_an_anchor(function, steps):
    assert steps(function(SHAPE, lambda x: R_.abs(emit(R_.nn.relu(x))))) == [("relu+abs", 1)]


def test_a_pad_takes_in_the_transposition_before_it(function, steps):
    body = lambda x: R_.nn.pad(move(x), [0, 0, 1, 1, 1, 1, 0, 0])  # noqa: E731
    assert steps(function(SHAPE, body)) == [("permute_dims+pad", 1)]


def join(*parts):
    return emit(R_.concat(list(parts), axis=3))


def pool(x, size=2, stride=2):
    return emit(R_.nn.max_pool2d(x, [size, size], [stride, stride], layout="NHWC"))


def scale(x, channels=32):
    values = np.random.default_rng(3).normal(size=(2, channels))
    return emit(call("scale_shift", [x, *map(const, values)], axis=3))


def test_readers_of_a_concatenation_compute_it_themselves(steps, evaluate, execute):
    def body(x):
        joined = join(x, move(x))
        return emit(R_.nn.relu(emit(R_.multiply(joined, const(2.0))))), emit(R_.abs(joined))

    mod = several(SHAPE, body)
    assert steps(mod) == [("permute_dims", 1), ("multiply+relu", 1), ("abs", 1)]
    check_values(mod, evaluate, execute)


def test_elementwise_operators_go_into_the_pool_that_alone_reads_them(function, steps):
    assert steps(function(SHAPE, lambda x: R_.nn.relu(pool(scale(join(x, x)))))) == [("scale_shift+max_pool2d+relu", 1)]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda x: move(join(x, x)), "concat permute_dims"),
        (lambda x: emit(R_.add(join(x, x), join(x, x))), "concat concat+add"),
        (lambda x: emit(R_.abs(join(x, emit(R_.strided_slice(x, [3], [0], [8]))))), "strided_slice concat abs"),
        (lambda x: join(x, x), "concat"),
    ],
    ids=["an anchor", "two operands", "parts of vectors", "an output"],
)
def test_do_not_compute_where_it_is_read(body, expected, steps, evaluate, execute):
    mod = several(SHAPE, lambda x: [body(x)])
    assert " ".join(op for op, _ in steps(mod)) == expected
    check_values(mod, evaluate, execute)


def test_do_not_compute_an_element_twice_or_for_one_of_two_readers(steps):
    def body(x):
        scaled = scale(x, 16)
        return pool(scaled), pool(emit(R_.abs(scaled)), 3, 1)

    assert steps(several(SHAPE, body)) == [("scale_shift", 1), ("max_pool2d", 1), ("abs", 1), ("max_pool2d", 1)]


# What must stay apart.


def test_do_not_fuse_the_classic_cycle(function, steps, evaluate, execute):
    """a → relu(a) and a → anchor → add: with the sum inside, the kernel would need what needs the kernel."""

    def body(x):
        a = move(x)
        other = move(emit(R_.abs(a)))
        return R_.add(emit(R_.nn.relu(a)), other)

    mod = function(SHAPE, body)
    assert sum(op.count("permute_dims") for op, _ in steps(mod)) == 2
    assert not any(op.startswith("permute_dims") and "abs" in op and "add" in op for op, _ in steps(mod))
    check_values(mod, evaluate, execute)


def test_do_not_fuse_half_of_a_diamond(function, steps, evaluate, execute):
    """One arm goes through another anchor: the sum belongs to that one."""

    def body(x):
        total = emit(R_.add(x, const(1.0)))
        return R_.add(total, move(total))

    mod = function(SHAPE, body)
    assert steps(mod) == [("add", 1), ("permute_dims+add", 1)]
    check_values(mod, evaluate, execute)


def test_do_not_fuse_through_a_chain_of_kernels(function, steps, evaluate, execute):
    def body(x):
        a = move(x)
        b = move(a)
        c = move(emit(R_.abs(b)))
        return R_.add(emit(R_.multiply(a, c)), b)

    mod = function(SHAPE, body)
    assert [op for op, _ in steps(mod)] == ["permute_dims", "permute_dims", "abs+permute_dims+multiply+add"] or (
        len(steps(mod)) == 4
    )
    check_values(mod, evaluate, execute)


@pytest.mark.parametrize("operator", ["multiply", "maximum"])
def test_do_not_fuse_a_chain_whose_tree_doubles_with_every_link(operator, function, steps, evaluate, execute):
    def body(x):
        for _ in range(24):  # a tree of 2^24 or 4^24 operators, if all were one kernel
            x = emit(getattr(R_, operator)(x, emit(R_.abs(x))))
        return R_.nn.relu(x)

    mod = function((1, 2, 3, 4), body)
    links = [op.count(operator) for op, _ in steps(mod)]
    assert sum(links) == 24 and max(links) <= 12
    check_values(mod, evaluate, execute)


def test_do_not_fuse_a_chain_whose_links_read_one_operand_several_times(function, steps, evaluate, execute):
    def body(x):
        for _ in range(24):  # a tree of 3^24 operators, if all were one kernel
            x = emit(R_.nn.leakyrelu(x, 0.5))
        return R_.nn.relu(x)

    mod = function((1, 2, 3, 4), body)
    links = [op.count("leakyrelu") for op, _ in steps(mod)]
    assert sum(links) == 24 and max(links) <= 6
    check_values(mod, evaluate, execute)


def test_do_not_fuse_past_a_value_that_leaves(steps):
    def body(x):
        a = emit(R_.nn.relu(move(x)))
        return a, emit(R_.abs(a))

    assert steps(several(SHAPE, body)) == [("permute_dims+relu", 1), ("abs", 1)]


def test_do_not_fuse_another_shape(function, steps):
    def body(x):
        pooled = emit(R_.mean(x, axis=[1, 2], keepdims=True))
        return R_.multiply(x, emit(R_.nn.relu(pooled)))

    assert steps(function(SHAPE, body)) == [("mean+relu", 1), ("multiply", 1)]


def test_do_not_join_a_packing_of_the_models_layout(function, steps):
    body = lambda x: pack(emit(R_.nn.relu(x)), data_layout="NCHW", channels=5, word_bits=8, lanes=1)  # noqa: E731
    assert steps(function(SHAPE, body)) == [("relu", 1), ("pack", 1)]


def test_do_not_pad_by_a_transposition_that_others_read(steps):
    def body(x):
        moved = move(x)
        return emit(R_.nn.pad(moved, [0, 0, 1, 1, 1, 1, 0, 0])), moved

    assert steps(several(SHAPE, body)) == [("permute_dims", 1), ("pad", 1)]


# Notes, names and values.


def with_attributes(mod, origins):
    table = {name: Origin(*origin).fields() for name, origin in origins.items()}
    mod["main"] = mod["main"].with_attrs({ORIGINS: table, LAYERS: []})
    return mod


def test_only_the_callers_memory_may_lie_anywhere(apply, steps):
    """Kernels that read an input or write an output declare an alignment of a float there; the arena is aligned."""

    def body(x):
        middle = emit(R_.nn.softmax(emit(R_.nn.relu(x))))
        return emit(R_.reshape(middle, (3, 16))), emit(R_.abs(emit(R_.mean(middle, axis=[1]))))

    after = apply(FormKernels(), several((3, 16), body))
    kernels = {gv.name_hint: f for gv, f in after.functions_items() if gv.name_hint != "main"}
    declared = {name: [p.data_alignment for p in f.params] for name, f in kernels.items()}
    assert declared == {"fused_relu": [4, 64], "fused_softmax": [64, 4], "fused_mean_abs": [4, 4]}


def test_notes_name_the_layers_and_say_what_is_exact(apply):
    def body(x):
        a = move(x, "a")
        b = emit(R_.nn.relu(a), "b")
        c = emit(R_.exp(b), "c")
        return c, move(c, "d")

    origins = {"a": ("a", "stem.conv"), "b": ("b", "stem.relu"), "c": ("c", "stem.relu"), "d": ("d", "head")}
    after = apply(FormKernels(), with_attributes(several(SHAPE, body), origins))
    notes = [json.loads(str(note)) for _, note in sorted(after["main"].attrs[STEPS].items(), key=lambda i: str(i[0]))]
    assert notes == [
        {"op": "permute_dims+relu+exp", "layers": ["stem.conv", "stem.relu"], "exact": False},
        {"op": "permute_dims", "layers": ["head"], "exact": True},
    ]


def test_every_output_of_a_kernel_keeps_the_name_of_its_value():
    def body(x):
        total = emit(R_.add(move(x), x), "total")
        return move(total, "moved"), product(pack(total, padding=(1, 1, 1, 1)), "acc")

    mod = with_attributes(several(SHAPE, body), {"total": ("add_3", "block"), "acc": ("conv", "block.conv")})
    plan = plan_memory(FormKernels()(mod), "model")
    nodes = {t.name: t.value.node for t in plan.tensors if t.value}
    assert nodes == {"total": "add_3", "acc": "conv"}


def test_equal_layers_share_their_kernel(function, apply):
    """But for the first and the last, which use the caller's memory."""

    def body(x):
        for _ in range(4):
            x = move(x)
        return x

    plan = plan_memory(apply(FormKernels(), function(SHAPE, body)), "model")
    first, second, third, last = (step.kernel for step in plan.steps)
    assert second == third and len({first, second, last}) == 3


BY_TVM = {
    "softmax of an image": (lambda x: R_.nn.softmax(x, axis=-1), 1e-6),
    "adaptive pool of odd windows": (lambda x: R_.nn.adaptive_avg_pool2d(x, (2, 3), layout="NHWC"), 1e-6),
    "a pad of channels": (lambda x: R_.nn.pad(x, [0, 0, 0, 0, 0, 0, 1, 2], pad_value=3.0), 0),
    "a pad by reflection": (lambda x: R_.nn.pad(x, [0, 0, 2, 2, 2, 2, 0, 0], pad_mode="reflect"), 0),
    "a pad of a matrix": (lambda x: R_.nn.pad(R_.reshape(x, (5, 80)), [1, 0, 0, 2], pad_value=-1.0), 0),
    "a permutation before a pad of channels": (
        lambda x: R_.nn.pad(R_.permute_dims(x, [0, 2, 1, 3]), [0, 0, 0, 0, 0, 0, 1, 2]), 0,
    ),
}  # fmt: skip


def by_torch(name, x):
    image = x.permute(0, 3, 1, 2)
    return {
        "softmax of an image": lambda: x.softmax(-1),
        "adaptive pool of odd windows": lambda: F.adaptive_avg_pool2d(image, (2, 3)).permute(0, 2, 3, 1),
        "a pad of channels": lambda: F.pad(x, (1, 2), value=3.0),
        "a pad by reflection": lambda: F.pad(image, (2, 2, 2, 2), mode="reflect").permute(0, 2, 3, 1),
        "a pad of a matrix": lambda: F.pad(x.reshape(5, 80), (0, 2, 1, 0), value=-1.0),
        "a permutation before a pad of channels": lambda: F.pad(x.permute(0, 2, 1, 3), (1, 2)),
    }[name]()


@pytest.mark.parametrize("name", BY_TVM)
def test_uses_that_our_computes_do_not_serve(name, function, apply, execute):
    """They go to TVM's own computes, never into a compute of ours that would ignore an attribute."""
    body, tolerance = BY_TVM[name]
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    (ours,) = execute(apply(FormKernels(), function(SHAPE, body)), x.numpy())
    np.testing.assert_allclose(ours, by_torch(name, x).numpy(), rtol=tolerance, atol=tolerance)


def test_an_operator_without_a_kernel_is_one_clear_line(monkeypatch, function):
    monkeypatch.setattr("bnncc.passes.form_kernels.has_kernel", lambda call: False)
    mod = with_attributes(
        several((4, 4), lambda x: [emit(R_.cumsum(x, axis=1), "y")]), {"y": ("cumsum", "layer2.0.sums")}
    )
    with pytest.raises(BnnccError, match=r"^cannot compile cumsum of module 'layer2.0.sums' \(node y\): .*$"):
        FormKernels()(mod)


@pytest.mark.parametrize(
    "weight",
    [(1, 1, 1, 1, 1, 8), (1, 1, 1, 1, 2, 8), (1, 1, 3, 3, 2, 8)],
    ids=["one word", "one position", "a window"],
)
def test_weights_keep_their_axes(weight, function, apply):
    """Only elementwise constants are vectors; a weight whose axes but the last are 1 stays a weight."""
    channels = 8 * weight[4]
    size = weight[2]

    def body(x):
        bits = pack(x, **BitLayout(channels, 1, 8, weight[4]).to_json())
        words = relax.const(np.zeros(weight, "uint8"))
        attrs = {"strides": (1, 1), "dilation": (1, 1), "n_eff": 0, "corrected": 0}
        return call(
            "xnor_conv2d",
            [bits, words],
            out_channels=8,
            depth=channels * size * size,
            kernel_size=(size, size),
            **attrs,
        )

    plan = plan_memory(apply(FormKernels(), function((1, 5, 5, channels), body)), "model")
    assert [t.shape for t in plan.tensors if t.space == "weights"] == [weight]


def check_values(mod, evaluate, execute):
    shape = [int(e) for e in mod["main"].params[0].ty.shape]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    eager = evaluate(mod, x)
    ours = execute(FormKernels()(OwnOutputs(mod)), x.numpy())
    for mine, theirs in zip(ours, eager if isinstance(eager, tuple) else (eager,), strict=True):
        assert np.array_equal(mine, theirs.numpy())


OPERATORS = {
    "relu": lambda a, b: R_.nn.relu(a),
    "abs": lambda a, b: R_.abs(a),
    "add": R_.add,
    "scale": lambda a, b: R_.multiply(a, vector(3)),
    "where": lambda a, b: R_.where(emit(R_.greater(a, b)), a, b),
    "move": lambda a, b: R_.permute_dims(a, [0, 2, 1, 3]),
}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(OPERATORS)), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=14
    ),
    st.lists(st.integers(0, 5), min_size=1, max_size=2),
)
def test_any_graph_computes_what_it_did(evaluate, execute, operators, outputs):
    def body(x):
        values = [x]
        for name, i, j in operators:
            values.append(emit(OPERATORS[name](values[-1 - i % len(values)], values[-1 - j % len(values)])))
        return [values[-1 - o % len(values)] for o in outputs]

    check_values(several(SHAPE, body), evaluate, execute)


SPECIAL = {
    "maximum": lambda x: R_.maximum(x, R_.negative(x)),
    "maximum of a constant": lambda x: R_.maximum(x, const(0.5)),
    "minimum of a constant": lambda x: R_.minimum(x, const(0.5)),
    "a NaN constant": lambda x: R_.maximum(x, const(np.nan)),
    "relu": R_.nn.relu,
    "clip": lambda x: R_.clip(x, -1.0, 1.0),
    "negative": R_.negative,
    "abs": R_.abs,
    "leaky relu": lambda x: R_.nn.leakyrelu(x, 0.1),
    "x·a + b rounds twice": lambda x: R_.add(R_.multiply(x, const(1.1)), const(0.3)),
    "x·a − x rounds twice": lambda x: R_.subtract(R_.multiply(x, const(1.1)), x),
    "equal": lambda x: R_.where(R_.equal(x, x), const(1.0), const(2.0)),
    "not equal": lambda x: R_.where(R_.not_equal(x, x), const(1.0), const(2.0)),
    "equal to 1": lambda x: R_.where(R_.equal(x, const(1.0)), const(1.0), const(2.0)),
    "not equal to 1": lambda x: R_.where(R_.not_equal(x, const(1.0)), const(1.0), const(2.0)),
    "greater": lambda x: R_.where(R_.greater(x, const(0.0)), const(1.0), const(2.0)),
    "less or equal": lambda x: R_.where(R_.less_equal(x, const(0.0)), const(1.0), const(2.0)),
    "divide": lambda x: R_.divide(x, const(3.0)),
    "round": R_.round,
    "floor": R_.floor,
    "sign": lambda x: call("sign", [x], predicate="not_lt"),
    "sign, ternary": lambda x: call("sign", [x], predicate="ternary"),
    "NaN to −1": lambda x: call("sign", [x], predicate="ge"),
}


def test_special_values_through_elementwise_kernels(special, evaluate, execute):
    """NaN, both zeros, infinities and denormals, all operators in one module; −0 counts as 0."""
    x = torch.cat([special, torch.randn(64, generator=torch.Generator().manual_seed(0))])
    mod = several(tuple(x.shape), lambda x: [emit(body(x)) for body in SPECIAL.values()])
    ours = execute(FormKernels()(mod), x.numpy())
    for name, mine, theirs in zip(SPECIAL, ours, evaluate(mod, x), strict=True):
        assert np.array_equal(mine, theirs.numpy(), equal_nan=True), name


class _Planes:
    """A target whose convolutions bring their results to NCHW if they have 16 channels."""

    @staticmethod
    def turns_results(shape, groups, dtype):
        assert groups == 1 and dtype == "float32"
        return shape[-1] == 16


def _turned(channels, axes=(0, 3, 1, 2), *, read=False, relu=True):
    """A convolution, a ReLU and a transposition; `read`: the ReLU's result is read besides."""
    weight = relax.const(np.ones((1, 1, 1, 1, 4, channels), "float32"))
    attrs = {"out_channels": channels, "kernel_size": (1, 1), "strides": (1, 1), "dilation": (1, 1)}

    def body(x):
        y = emit(call("conv2d", [x, weight], **attrs))
        y = emit(R_.nn.relu(y)) if relu else y
        planes = emit(R_.permute_dims(y, axes))
        return (planes, emit(R_.sqrt(y))) if read else (planes,)

    return several((2, 5, 6, 4), body)


@pytest.mark.parametrize("relu", [True, False])
def test_a_convolution_brings_its_result_to_nchw(apply, relu):
    plan = plan_memory(apply(FormKernels(_Planes()), _turned(16, relu=relu)), "model")
    assert [step.op for step in plan.steps] == ["conv2d+relu+permute_dims" if relu else "conv2d+permute_dims"]
    assert plan.tensors[plan.outputs[0]].shape == (2, 16, 5, 6)


@pytest.mark.parametrize(
    ("target", "channels", "axes", "read"),
    [
        (None, 16, (0, 3, 1, 2), False), (_Planes(), 8, (0, 3, 1, 2), False), (_Planes(), 16, (0, 3, 2, 1), False),
        (_Planes(), 16, (0, 3, 1, 2), True),
    ],
)  # fmt: skip
def test_do_not_fuse_a_transposition(apply, target, channels, axes, read):
    """No such target, other channels, another order, a result that is read in NHWC, too."""
    plan = plan_memory(apply(FormKernels(target), _turned(channels, axes, read=read)), "model")
    assert "permute_dims" in [step.op for step in plan.steps]
