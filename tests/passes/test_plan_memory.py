"""The memory plan, against a checker that knows nothing of how it was made."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op as R_

from bnncc.dialect.ops import call
from bnncc.dialect.plan import Plan
from bnncc.passes.form_kernels import FormKernels
from bnncc.passes.own_outputs import OwnOutputs
from bnncc.passes.plan_memory import ALIGNMENT, Buffer, place, plan_memory


def size(tensor):
    return int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize


def check_plan(plan: Plan) -> None:
    """Replays a plan on a memory that knows who wrote each byte; every read must find what was written for it."""
    owner = {"arena": np.full(plan.arena_bytes, -1), "persistent": np.full(plan.persistent_bytes, -1)}
    written = {}  # where a tensor lies → the number of the write that filled it
    for number, step in enumerate((*plan.init, *plan.steps)):
        once = number < len(plan.init)
        read = step.args[: len(step.args) - step.outputs]
        places = [place_of(plan, t) for t in step.args]
        for mine in places[len(read) :]:
            for other in places:
                assert mine is other or not overlap(mine, other), f"{step.kernel} works in place"
        for tensor in read:
            space, start, end = place_of(plan, tensor)
            if space in owner:
                assert (owner[space][start:end] == written[space, start]).all(), f"{step.kernel} reads what is gone"
        for tensor in step.args[len(read) :]:
            space, start, end = place_of(plan, tensor)
            assert space == ("persistent" if once else space) and space in ("arena", "persistent", "output")
            if space in owner:
                owner[space][start:end] = number
                written[space, start] = number
    for tensor in plan.tensors:
        space, start, end = place_of(plan, tensor.id)
        if space in ("arena", "persistent", "weights"):
            assert start % ALIGNMENT == 0
            assert end <= {
                "arena": plan.arena_bytes, "persistent": plan.persistent_bytes, "weights": len(plan.weights),
            }[space]  # fmt: skip


def place_of(plan, index):
    tensor = plan.tensors[index]
    start = tensor.offset
    return tensor.space, start, start + size(tensor)


def overlap(a, b):
    if a[0] in ("input", "output", "weights"):
        return a[:2] == b[:2]
    return a[0] == b[0] and a[1] < b[2] and b[1] < a[2]


# -- placement alone -----------------------------------------------------------------------------------------------

buffers = st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 12), st.integers(0, 6)), max_size=30).map(
    lambda rows: [Buffer(size, "arena", first=first, last=first + length) for size, first, length in rows]
)


def aligned(size):
    return (size + 63) // 64 * 64


def peak(placed):
    """Bytes of the largest set of buffers that are alive at once: no plan needs less."""
    steps = {b.first for b in placed}
    return max((sum(aligned(b.size) for b in placed if b.first <= s <= b.last) for s in steps), default=0)


@settings(max_examples=200, deadline=None)
@given(buffers)
def test_no_two_live_buffers_overlap(placed):
    total = place(placed)
    for i, a in enumerate(placed):
        assert a.offset % ALIGNMENT == 0 and a.offset + a.size <= total
        for b in placed[:i]:
            together = a.first <= b.last and b.first <= a.last
            assert not (together and a.offset < b.offset + b.size and b.offset < a.offset + a.size)
    assert peak(placed) <= total <= sum(aligned(b.size) for b in placed)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 1 << 20), min_size=2, max_size=30), st.integers(0, 3))
def test_chains_need_no_more_than_their_peak(sizes, span):
    """A chain of layers, where every `span + 1`-th value lives on as a shortcut to the next one but one."""
    placed = [
        Buffer(size, "arena", first=i, last=i + 1 + (2 if span and i % (span + 1) == 0 else 0))
        for i, size in enumerate(sorted(sizes, reverse=True))  # images shrink as networks deepen
    ]
    assert place(placed) <= 1.05 * peak(placed)


def test_a_resnet_needs_no_more_than_its_peak():
    placed, step = [], 0
    for stage in range(4):
        image = (56 >> stage) ** 2 * (64 << stage) * 4
        for _block in range(4):
            bits = image // 32
            shortcut = Buffer(image, "arena", first=step, last=step + 2)
            placed += [
                shortcut,
                Buffer(bits, "arena", first=step, last=step + 1),
                Buffer(image, "arena", first=step + 1, last=step + 2),
                Buffer(bits + 7, "arena", first=step + 1, last=step + 2),
            ]
            step += 2
    assert place(placed) <= 1.05 * peak(placed)


# -- whole plans ---------------------------------------------------------------------------------------------------


def plan_of(module):
    return plan_memory(FormKernels()(OwnOutputs(module)), "model")


def emit(value, name=""):
    return relax.BlockBuilder.current().emit(value, name)


#: Operators that never fuse with each other, so that each becomes a kernel: a permutation and a softmax.
def kernel(x):
    return emit(R_.permute_dims(x, [0, 2, 3, 1]))


@st.composite
def graphs(draw):
    """Random straight lines of kernels over values that are read again later, with aliases between."""
    operators = st.sampled_from(["kernel", "alias", "sum"])
    steps = st.lists(st.tuples(operators, st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12)
    return draw(steps), draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))


@settings(max_examples=12, deadline=None)
@given(graphs())
def test_every_read_finds_what_was_written(graph):
    steps, outputs = graph
    shape = (2, 3, 4, 5)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            values = [x]
            for operator, i, j in steps:
                a, b = values[-1 - i % len(values)], values[-1 - j % len(values)]
                if operator == "alias":
                    values.append(emit(R_.reshape(emit(R_.reshape(a, (120,))), shape)))
                elif operator == "sum":
                    values.append(emit(R_.add(a, b)))
                else:
                    values.append(emit(R_.reshape(kernel(a), shape)))
            chosen = [values[-1 - o % len(values)] for o in outputs]
            result = builder.emit_output(relax.Tuple(chosen))
        builder.emit_func_output(result)
    plan = plan_of(builder.get())
    check_plan(plan)
    assert len({plan.tensors[t].offset for t in plan.outputs}) == len(outputs)
    assert all(plan.tensors[t].space == "output" for t in plan.outputs)


def test_aliases_share_their_memory(function):
    def body(x):
        flat = emit(R_.reshape(kernel(x), (120,)), "flat")
        words = emit(R_.memory.view(flat, (2, 60), "float32"), "words")
        return R_.nn.softmax(words)

    plan = plan_of(function((2, 3, 4, 5), body))
    rows = {t.name: t for t in plan.tensors}
    assert rows["flat"].offset == rows["words"].offset and rows["flat"].space == "arena"
    assert rows["flat"].shape == (120,) and rows["words"].shape == (2, 60)
    assert len(plan.steps) == 2 and plan.arena_bytes == 512
    check_plan(plan)


def test_kernels_of_constants_run_once(function):
    """The weights of a weight-only binary layer are unpacked when an instance is made."""
    bits = relax.const(np.zeros((1, 1, 1, 1, 4, 1), "uint8"))
    alpha = relax.const(np.ones((1, 1, 8), "float32"))

    def body(x):
        w = emit(call("unpack_weights", [bits, alpha], shape=(1, 1, 1, 1, 4, 8)), "w")
        common = {"out_channels": 8, "kernel_size": (1, 1), "strides": (1, 1), "dilation": (1, 1)}
        return call("conv2d", [x, w], **common)

    plan = plan_of(function((1, 3, 3, 4), body))
    assert [s.kernel for s in plan.init] == ["fused_unpack_weights"] and len(plan.steps) == 1
    made = plan.tensors[plan.init[0].args[-1]]
    assert made.space == "persistent" and plan.persistent_bytes == 128 and plan.arena_bytes == 0
    assert made.id in plan.steps[0].args
    check_plan(plan)


def test_constants_lie_once_in_the_weights(function):
    twice = np.arange(120, dtype="float32").reshape(2, 3, 4, 5)

    def body(x):
        moved = emit(R_.permute_dims(R_.add(x, relax.const(twice)), [0, 1, 3, 2]))
        return R_.add(R_.permute_dims(moved, [0, 1, 3, 2]), relax.const(twice.copy()))

    plan = plan_of(function((2, 3, 4, 5), body))
    (weights,) = [t for t in plan.tensors if t.space == "weights"]
    assert np.array_equal(np.frombuffer(plan.weights[: size(weights)], "float32"), twice.reshape(-1))
    assert len(plan.weights) % ALIGNMENT == 0


def test_outputs_are_the_callers_memory():
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 3, 4, 5), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(R_.nn.relu(x), "y")
            result = builder.emit_output(relax.Tuple([y, x, R_.reshape(y, (120,)), relax.const(np.ones(3, "float32"))]))
        builder.emit_func_output(result)
    plan = plan_of(builder.get())
    assert [plan.tensors[t].space for t in plan.outputs] == ["output"] * 4
    assert [plan.tensors[t].offset for t in plan.outputs] == [0, 1, 2, 3]
    assert [plan.tensors[t].shape for t in plan.outputs] == [(2, 3, 4, 5), (2, 3, 4, 5), (120,), (3,)]
    assert plan.init == (), "an output is written by every run, not once"
    check_plan(plan)


def test_an_unused_output_of_a_kernel_does_not_clobber():
    """Tensor ids are positions, and each step's outputs come last."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 3, 4, 5), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(R_.add(kernel(x), kernel(x)))
        builder.emit_func_output(result)
    plan = plan_of(builder.get())
    assert [t.id for t in plan.tensors] == list(range(len(plan.tensors)))
    assert all(step.outputs == 1 for step in plan.steps)
    check_plan(plan)
