"""The table of torch functions against TVM's own meaning of the same Relax operators."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op as R

from bnncc.dialect import torch_operators
from bnncc.dialect.torch_eval import (
    can_evaluate,
    evaluate,
    evaluate_call,
    evaluate_from,
    evaluate_function,
    to_constant,
    to_torch,
)

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, 4, 6, 6, generator=GENERATOR)
Y = torch.randn(2, 4, 6, 6, generator=GENERATOR)
P = X.abs() + 0.1
B = X > 0
I = torch.arange(-8, 8, dtype=torch.int32).reshape(2, 4, 2)  # noqa: E741
J = torch.full_like(I, 3)
V = torch.rand(4, generator=GENERATOR) + 0.5
ROW, VOLUME = X[..., 0].contiguous(), torch.randn(1, 4, 3, 4, 5, generator=GENERATOR)
W = torch.randn(6, 2, 3, 3, generator=GENERATOR)

# operator: Relax expressions over constants, whose value must be the same in PyTorch and in TVM.
CALLS = {
    **{name: [getattr(R, name), X, Y] for name in (
        "add", "subtract", "multiply", "divide", "maximum", "minimum",
        "equal", "not_equal", "less", "less_equal", "greater", "greater_equal",
    )},
    **{name: [getattr(R, name), X] for name in (
        "abs", "atan", "ceil", "cos", "erf", "exp", "floor", "isfinite", "isinf", "isnan", "negative", "round",
        "sigmoid", "sign", "sin", "square", "tanh", "trunc",
    )},
    "take": [lambda x: R.take(x, relax.const(np.array([[2, 0], [1, 1]], "int32")), 1), ROW],
    **{name: [getattr(R, name), P] for name in ("log", "rsqrt", "sqrt")},
    **{name: [getattr(R, name), B, B.flip(3)] for name in ("logical_and", "logical_or", "logical_xor")},
    **{name: [getattr(R, name), I, J] for name in ("bitwise_and", "bitwise_or", "bitwise_xor")},
    "argmax": [lambda x: R.argmax(x, 1), X],
    "astype": [lambda x: R.astype(x, "int32"), X * 5],
    "bitwise_not": [R.bitwise_not, I],
    "broadcast_to": [lambda x: R.broadcast_to(x, (3, 4)), V],
    "clip": [lambda x: R.clip(x, -0.5, 1.0), X],
    "concat": [lambda x, y: R.concat([x, y], 1), X, Y],
    "expand_dims": [lambda x: R.expand_dims(x, [0, -1]), V],
    "flip": [lambda x: R.flip(x, 1), X],
    "full": [lambda x: R.full((2, 3), x, "float32"), torch.tensor(0.1)],
    "full_like": [lambda x, y: R.full_like(x, y), X, torch.tensor(0.1)],
    "logical_not": [R.logical_not, B],
    "matmul": [R.matmul, X, Y],
    "max": [lambda x: R.max(x, [1, 2]), X],
    "mean": [lambda x: R.mean(x, [2, 3], True), X],
    "min": [lambda x: R.min(x), X],
    "nn.adaptive_avg_pool2d": [lambda x: R.nn.adaptive_avg_pool2d(x, (3, 2)), X],
    "nn.avg_pool1d": [lambda x: R.nn.avg_pool1d(x, 2, 2), ROW],
    "nn.avg_pool2d": [lambda x: R.nn.avg_pool2d(x, 3, 2, 1, count_include_pad=True), X],
    "nn.avg_pool3d": [lambda x: R.nn.avg_pool3d(x, 2, 1), VOLUME],
    "nn.batch_norm": [lambda x, v: R.nn.batch_norm(x, v, v, v, v, axis=1, training=False)[0], X, V],
    "nn.conv1d": [lambda x, w: R.nn.conv1d(x, w, padding=1), ROW, torch.ones(3, 4, 3)],
    "nn.conv1d_transpose": [lambda x, w: R.nn.conv1d_transpose(x, w, strides=2), ROW, torch.ones(4, 3, 2)],
    "nn.conv2d": [lambda x, w: R.nn.conv2d(x, w, strides=2, padding=[1, 0, 2, 1], groups=2), X, W],
    "nn.conv2d_transpose": [lambda x, w: R.nn.conv2d_transpose(x, w, strides=2), X, torch.ones(4, 3, 2, 2)],
    "nn.conv3d": [R.nn.conv3d, VOLUME, torch.ones(2, 4, 2, 2, 2)],
    "nn.gelu": [R.nn.gelu, X],
    "nn.gelu_tanh": [R.nn.gelu_tanh, X],
    "nn.leakyrelu": [lambda x: R.nn.leakyrelu(x, 0.3), X],
    "nn.log_softmax": [lambda x: R.nn.log_softmax(x, 1), X],
    "nn.max_pool1d": [lambda x: R.nn.max_pool1d(x, 2, 2), ROW],
    "nn.max_pool2d": [lambda x: R.nn.max_pool2d(x, 3, 2, 1), X],
    "nn.max_pool3d": [lambda x: R.nn.max_pool3d(x, 2, 1), VOLUME],
    "nn.pad": [lambda x: R.nn.pad(x, [0, 0, 1, 0, 0, 2, 3, 1], "constant", -1.0), X],
    "nn.prelu": [lambda x, v: R.nn.prelu(x, v, 1), X, V],
    "nn.relu": [R.nn.relu, X],
    "nn.silu": [R.nn.silu, X],
    "nn.softmax": [lambda x: R.nn.softmax(x, 1), X],
    "ones": [lambda x: R.add(R.ones((4,), "float32"), x), V],
    "ones_like": [R.ones_like, X],
    "permute_dims": [lambda x: R.permute_dims(x, [0, 2, 3, 1]), X],
    "power": [R.power, P, Y],
    "reshape": [lambda x: R.reshape(x, (8, 36)), X],
    "split": [lambda x: R.split(x, [1, 3], 1)[1], X],
    "squeeze": [lambda x: R.squeeze(x, [0]), VOLUME],
    "strided_slice": [lambda x: R.strided_slice(x, [1, 2], [1, 0], [3, 6], [1, 2]), X],
    "sum": [lambda x: R.sum(x, [1]), X],
    "where": [R.where, B, X, Y],
    "zeros": [lambda x: R.add(R.zeros((4,), "float32"), x), V],
    "zeros_like": [R.zeros_like, X],
}  # fmt: skip


def _function(name):
    """A Relax function of one expression, its inputs parameters."""
    build, *inputs = CALLS[name]
    builder = relax.BlockBuilder()
    dtypes = [str(value.dtype).removeprefix("torch.") for value in inputs]
    parameters = [
        relax.Var(f"x{i}", relax.TensorType(value.shape, dtype))
        for i, (value, dtype) in enumerate(zip(inputs, dtypes, strict=True))
    ]
    with builder.function("main", parameters):
        with builder.dataflow():
            result = builder.emit_output(build(*parameters))
        builder.emit_func_output(result)
    return builder.get(), inputs


def test_every_operator_has_a_call():
    # The dialect's own operators are compared with their NumPy meaning elsewhere; TVM does not know them.
    assert {f"relax.{name}" for name in CALLS} == {name for name in torch_operators.TABLE if "bnncc" not in name}


@pytest.mark.parametrize("name", CALLS)
def test_operator_means_what_tvm_computes(name):
    mod, inputs = _function(name)
    (got,) = evaluate_function(mod["main"], inputs)
    executable = tvm.compile(mod, target=tvm.target.Target({"kind": "llvm", "opt-level": 0}))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    want = machine["main"](*(tvm.runtime.tensor(value.numpy()) for value in inputs))
    torch.testing.assert_close(got, torch.from_numpy(want.numpy()), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", sorted(torch_operators.SHAPE_INDEPENDENT & {
    f"relax.{name}" for name, (_, *inputs) in CALLS.items() if all(value.shape == X.shape for value in inputs)
} - {"relax.concat", "relax.flip", "relax.permute_dims", "relax.reshape", "relax.split", "relax.strided_slice",
     "relax.nn.pad"}))  # fmt: skip
def test_shape_independent_operators_do_not_care_where_an_element_is(name):
    mod, inputs = _function(name.removeprefix("relax."))
    call = mod["main"].body.blocks[0].bindings[0].value
    several = [torch.cat([value.flatten()] * 3) for value in inputs]

    def run(values):
        return evaluate_call(call, dict(zip(mod["main"].params, values, strict=True)))

    whole = run(several)
    # An odd length, an unaligned start and a stride reach the scalar tails of ATen's kernels.
    assert torch.equal(run([value[1:278] for value in several]), whole[1:278])
    assert torch.equal(run([value[::3] for value in several]), whole[::3])
    assert torch.equal(torch.cat([run([value[i : i + 1] for value in several]) for i in range(50)]), whole[:50])


def test_batch_norm_does_not_care_where_an_element_is():
    statistics = [V, V - 1, V * 3, V + 0.25]

    def run(x):
        return evaluate("relax.nn.batch_norm", [x, *statistics], {"axis": 1, "epsilon": 1e-5})[0]

    x = torch.randn(3, 4, 17, 19, generator=GENERATOR) * 100
    whole = run(x)
    assert torch.equal(run(x.contiguous(memory_format=torch.channels_last)), whole)
    assert torch.equal(run(x[:1, :, :1, :3]), whole[:1, :, :1, :3])
    assert torch.equal(
        run(x.flatten(2).permute(0, 2, 1).reshape(-1, 4)), whole.flatten(2).permute(0, 2, 1).reshape(-1, 4)
    )


@given(
    hnp.arrays(st.sampled_from(["float32", "int8", "uint8", "int32", "int64", "bool"]), hnp.array_shapes(min_dims=0))
)
def test_constants_keep_shape_dtype_and_bits(array):
    array = np.asarray(array)
    constant = to_constant(torch.from_numpy(array.copy()))
    back = to_torch(constant).numpy()
    assert (back.shape, back.dtype) == (array.shape, array.dtype)
    assert back.tobytes() == array.tobytes()


def test_a_constant_is_a_copy():
    constant = to_constant(torch.zeros(3))
    to_torch(constant).add_(1)
    assert torch.equal(to_torch(constant), torch.zeros(3))


def test_attributes_may_be_a_mapping():
    padded = evaluate("relax.nn.pad", [V], {"pad_width": [1, 0], "pad_value": -1.0, "pad_mode": "constant"})
    assert torch.equal(padded, torch.cat([torch.tensor([-1.0]), V]))


def test_do_not_evaluate_other_layouts_and_unknown_operators():
    x = relax.Var("x", relax.TensorType((1, 6, 6, 4), "float32"))
    w = to_constant(torch.ones(2, 3, 3, 4))
    assert not can_evaluate(R.nn.conv2d(x, w, data_layout="NHWC", kernel_layout="OHWI"))
    assert not can_evaluate(R.sort(x))
    assert not can_evaluate(x)
    assert can_evaluate(R.nn.relu(x))


def test_values_from_values_in_between():
    """What is known is neither computed nor needed to compute; what nobody asked for is left out."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2,), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            a = builder.emit(R.add(x, x))
            b = builder.emit(R.multiply(a, a))
            c = builder.emit(relax.Tuple([a, b]))
            d = builder.emit(R.concat(c, 0))
            result = builder.emit_output(R.negative(d))
        builder.emit_func_output(result)
    main = builder.get()["main"]
    ones = torch.ones(2)
    values = evaluate_from(main, {a: 3 * ones}, [d])
    assert values[d].tolist() == [3, 3, 9, 9] and result not in values and x not in values
    assert evaluate_from(main, {x: ones, b: ones}, [d])[d].tolist() == [2, 2, 1, 1]
    assert evaluate_from(main, {x: ones})[result].tolist() == [-2, -2, -4, -4]
    with pytest.raises(KeyError):
        evaluate_from(main, {}, [b])
