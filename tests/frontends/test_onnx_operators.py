"""Every ONNX operator the frontend converts, against ONNX Runtime; the QONNX ones against their NumPy definition."""

import math

import numpy as np
import pytest
import torch
import tvm
from onnx import TensorProto, helper
from tvm import relax

import bnncc.dialect.kernels  # noqa: F401  (lets TVM's own pipeline compile the dialect)
from bnncc.dialect.torch_eval import evaluate_function
from bnncc.frontends.onnx import supported_operators, to_relax
from bnncc.onnx_reference import OnnxReference

from .onnx_models import QONNX, model, node

GENERATOR = np.random.default_rng(0)


def normal(*shape):
    return (GENERATOR.standard_normal(shape) * 2).astype("float32")


def f32(*values):
    return np.array(values, "float32")


def i64(*values):
    return np.array(values, "int64")


SPECIAL = f32(0, -0.0, 1, -1, 0.5, -0.5, 1.5, 2.5, -2.5, 1e-40, -1e-40, 3e38, -3e38, math.inf, -math.inf, 1e-9, 7, 0.25)
SPECIAL = SPECIAL.reshape(2, 9)
MATRIX, OTHER = normal(2, 9), normal(2, 9)
POSITIVE = np.abs(MATRIX) + np.float32(0.1)
IMAGE = normal(2, 4, 9, 8)
SEQUENCE, VOLUME = normal(2, 4, 11), normal(1, 4, 5, 6, 7)
VECTOR = f32(0.5, -1.5, 0, 2)
TRUE = MATRIX > 0


class Case:
    """inputs: what the caller gives, as x0, x1, …; a `const` stands for a weight. They are the node's, in order."""

    def __init__(self, *operands, opset=17, outputs="y", tolerance=0.0, domain="", **attributes):
        self.operands = operands
        self.opset = opset
        self.outputs = outputs
        self.tolerance = tolerance
        self.domain = domain
        self.attributes = attributes

    def build(self, kind):
        """(model, the inputs' arrays)"""
        names, inputs, weights = [], {}, {}
        for index, operand in enumerate(self.operands):
            name = "-" if operand is None else f"x{index}"
            names.append(name)
            if isinstance(operand, const):
                weights[name] = operand.value
            elif operand is not None:
                inputs[name] = operand
        made = node(kind, " ".join(names), self.outputs, name=f"the_{kind}", domain=self.domain, **self.attributes)
        outputs = [name for name in made.output if name]
        built = model([made], inputs, weights, outputs, opset=self.opset)
        for value in built.graph.output:
            value.type.Clear()
            value.type.tensor_type.elem_type = _element(kind, self)
        return built, list(inputs.values())


class const:
    def __init__(self, value):
        self.value = np.asarray(value)


def _element(kind, case):
    if kind in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or", "Xor"):
        return TensorProto.BOOL
    if kind == "Cast":
        return case.attributes["to"]
    if kind == "DequantizeLinear":
        return TensorProto.FLOAT
    if kind == "ArgMax":
        return TensorProto.INT64
    if kind == "QuantizeLinear":
        return helper.np_dtype_to_tensor_dtype(case.operands[2].value.dtype)
    return helper.np_dtype_to_tensor_dtype(_array(case.operands[1 if kind == "Where" else 0]).dtype)


def _array(operand):
    return operand.value if isinstance(operand, const) else operand


ULPS = 1e-6  # exp, tanh, … differ in the last bits
SUMS = 1e-5  # sums in another order

CASES = {
    "Abs": [Case(SPECIAL)],
    "Add": [Case(MATRIX, OTHER), Case(MATRIX, const(f32(0.5))), Case(IMAGE, const(normal(4, 1, 1)))],
    "And": [Case(TRUE, TRUE[::-1].copy())],
    "ArgMax": [Case(MATRIX, axis=1), Case(MATRIX, axis=0, keepdims=0)],
    "AveragePool": [
        Case(IMAGE, kernel_shape=[2, 2], strides=[2, 2], tolerance=ULPS),
        Case(IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], tolerance=ULPS),
        Case(IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1, tolerance=ULPS),
        Case(IMAGE, kernel_shape=[3, 2], strides=[2, 3], ceil_mode=1, tolerance=ULPS, opset=19),
        Case(IMAGE, kernel_shape=[2, 2], pads=[0, 1, 1, 0], tolerance=ULPS),
        Case(IMAGE, kernel_shape=[2, 3], auto_pad="SAME_UPPER", strides=[2, 2], tolerance=ULPS),
        Case(SEQUENCE, kernel_shape=[3], strides=[2], tolerance=ULPS),
        Case(VOLUME, kernel_shape=[2, 2, 2], tolerance=ULPS),
    ],
    "BatchNormalization": [
        Case(x, const(VECTOR), const(VECTOR[::-1]), const(VECTOR + 1), const(VECTOR**2 + f32(0.1)), epsilon=1e-3)
        for x in (IMAGE, SEQUENCE, normal(3, 4))
    ],
    "Cast": [
        Case(MATRIX, to=TensorProto.INT32),
        Case(SPECIAL, to=TensorProto.BOOL),
        Case(TRUE, to=TensorProto.FLOAT),
        Case(i64(1, -7, 3), to=TensorProto.FLOAT),
    ],
    "Ceil": [Case(SPECIAL)],
    "Clip": [
        Case(SPECIAL, const(np.float32(-1)), const(np.float32(1))),
        Case(SPECIAL, const(np.float32(-1))),
        Case(SPECIAL, None, const(np.float32(1))),
        Case(SPECIAL, min=-0.5, max=0.5, opset=9),
        Case(SPECIAL),
        Case(np.arange(-4, 4, dtype="int32"), const(np.int32(-1)), const(np.int32(2)), opset=13),
    ],
    "Concat": [Case(MATRIX, OTHER, axis=1), Case(MATRIX, const(OTHER), MATRIX, axis=-2)],
    "Conv": [
        Case(IMAGE, const(normal(6, 4, 3, 3)), const(normal(6)), pads=[1, 1, 1, 1], tolerance=SUMS),
        Case(IMAGE, const(normal(6, 2, 3, 2)), group=2, strides=[2, 1], dilations=[1, 2], tolerance=SUMS),
        Case(IMAGE, const(normal(6, 4, 3, 3)), auto_pad="SAME_UPPER", strides=[2, 2], tolerance=SUMS),
        Case(IMAGE, const(normal(6, 4, 2, 2)), auto_pad="SAME_LOWER", tolerance=SUMS),
        Case(IMAGE, const(normal(6, 4, 2, 2)), auto_pad="VALID", tolerance=SUMS),
        Case(IMAGE, const(normal(6, 4, 3, 3)), pads=[0, 1, 2, 3], tolerance=SUMS),
        Case(IMAGE, const(normal(4, 1, 3, 3)), const(normal(4)), group=4, tolerance=SUMS),
        Case(SEQUENCE, const(normal(6, 4, 3)), const(normal(6)), pads=[2, 1], tolerance=SUMS),
        Case(VOLUME, const(normal(6, 4, 2, 3, 3)), pads=[1, 0, 1, 0, 1, 1], tolerance=SUMS),
    ],
    "ConvTranspose": [
        Case(IMAGE, const(normal(4, 3, 3, 3)), const(normal(3)), strides=[2, 2], pads=[1, 1, 1, 1], tolerance=SUMS),
        Case(IMAGE, const(normal(4, 3, 3, 3)), strides=[2, 3], output_padding=[1, 2], tolerance=SUMS),
        Case(IMAGE, const(normal(4, 3, 2, 3)), group=2, dilations=[2, 1], pads=[0, 1, 2, 0], tolerance=SUMS),
        Case(IMAGE, const(normal(4, 3, 3, 3)), strides=[2, 2], output_shape=[18, 16], tolerance=SUMS),
        Case(IMAGE, const(normal(4, 3, 4, 4)), strides=[2, 2], auto_pad="SAME_UPPER", tolerance=SUMS),
        Case(SEQUENCE, const(normal(4, 2, 3)), strides=[3], tolerance=SUMS),
        Case(VOLUME, const(normal(4, 2, 2, 2, 2)), strides=[2, 1, 2], tolerance=SUMS),
    ],
    "DepthToSpace": [Case(IMAGE, blocksize=2), Case(IMAGE, blocksize=2, mode="CRD")],
    "DequantizeLinear": [
        Case(np.arange(16, dtype="uint8").reshape(2, 8), const(np.float32(0.037)), const(np.uint8(3))),
        Case(np.arange(-8, 8, dtype="int8").reshape(4, 4), const(VECTOR), const(np.zeros(4, "int8")), axis=0),
        Case(np.arange(-8, 8, dtype="int32"), const(np.float32(0.5))),
    ],
    "Div": [Case(MATRIX, POSITIVE)],
    "Dropout": [Case(MATRIX)],
    "Elu": [Case(MATRIX, alpha=0.5, tolerance=ULPS)],
    "Equal": [Case(SPECIAL, const(np.float32(0))), Case(i64(1, 2), const(i64(1, 3)))],
    "Erf": [Case(MATRIX, tolerance=ULPS)],
    "Exp": [Case(MATRIX, tolerance=ULPS)],
    "Expand": [Case(normal(4, 1), const(i64(2, 1, 3)))],
    "Flatten": [Case(IMAGE), Case(IMAGE, axis=3), Case(IMAGE, axis=-2), Case(IMAGE, axis=0)],
    "Floor": [Case(SPECIAL)],
    "Gather": [
        Case(IMAGE, const(np.int64(2)), axis=1),
        Case(IMAGE, const(i64(2, 0, 0)), axis=1),
        Case(IMAGE, const(i64(-1, 1)), axis=2),
        Case(IMAGE, const(i64(1, 2)), axis=2),
        Case(MATRIX, const(np.array([[0, 1], [1, 0]])), axis=0),
    ],
    "Gelu": [Case(MATRIX, tolerance=ULPS, opset=20), Case(MATRIX, approximate="tanh", tolerance=ULPS, opset=20)],
    "Gemm": [
        Case(MATRIX, const(normal(9, 5)), const(normal(5)), tolerance=SUMS),
        Case(MATRIX, const(normal(5, 9)), const(normal(5)), transB=1, tolerance=SUMS),
        Case(MATRIX, const(normal(2, 5)), transA=1, tolerance=SUMS),
        Case(MATRIX, const(normal(9, 5)), const(normal(1, 5)), alpha=0.5, beta=2.0, tolerance=SUMS),
    ],
    "GlobalAveragePool": [Case(x, tolerance=ULPS) for x in (IMAGE, SEQUENCE, VOLUME)],
    "GlobalMaxPool": [Case(x) for x in (IMAGE, SEQUENCE, VOLUME)],
    "Greater": [Case(SPECIAL, const(np.float32(0)))],
    "GreaterOrEqual": [Case(SPECIAL, const(np.float32(0)))],
    "HardSigmoid": [Case(SPECIAL), Case(MATRIX, alpha=0.1, beta=0.25)],
    "HardSwish": [Case(MATRIX)],
    "Identity": [Case(MATRIX)],
    "LayerNormalization": [
        Case(MATRIX, const(normal(9)), const(normal(9)), tolerance=SUMS),
        Case(IMAGE, const(normal(9, 8)), axis=2, epsilon=1e-3, tolerance=SUMS),
    ],
    "LeakyRelu": [Case(SPECIAL, alpha=0.1), Case(SPECIAL)],
    "Less": [Case(SPECIAL, const(np.float32(0)))],
    "LessOrEqual": [Case(SPECIAL, const(np.float32(0)))],
    "Log": [Case(POSITIVE, tolerance=ULPS)],
    "LogSoftmax": [Case(MATRIX, axis=1, tolerance=ULPS)],
    "MatMul": [
        Case(MATRIX, const(normal(9, 5)), tolerance=SUMS),
        Case(normal(2, 3, 9), const(normal(9, 5)), tolerance=SUMS),
        Case(normal(2, 3, 4), normal(2, 4, 5), tolerance=SUMS),
    ],
    "Max": [Case(MATRIX, OTHER), Case(SPECIAL, const(f32(0.25))), Case(MATRIX, OTHER, const(f32(0.5)))],
    "MaxPool": [
        Case(IMAGE, kernel_shape=[2, 2], strides=[2, 2]),
        Case(IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        Case(IMAGE, kernel_shape=[3, 2], dilations=[2, 1]),
        Case(IMAGE, kernel_shape=[3, 2], strides=[2, 3], ceil_mode=1, opset=12),
        Case(IMAGE, kernel_shape=[2, 2], pads=[0, 1, 1, 0]),
        Case(IMAGE, kernel_shape=[2, 2], auto_pad="SAME_LOWER"),
        Case(SEQUENCE, kernel_shape=[3], strides=[2]),
        Case(VOLUME, kernel_shape=[2, 2, 2]),
    ],
    "Mean": [Case(MATRIX, OTHER, MATRIX)],
    "Min": [Case(MATRIX, OTHER)],
    "Mul": [Case(MATRIX, OTHER), Case(IMAGE, const(normal(1, 4, 1, 1)))],
    "Neg": [Case(SPECIAL)],
    "Not": [Case(TRUE)],
    "Or": [Case(TRUE, TRUE[::-1].copy())],
    "PRelu": [Case(IMAGE, const(normal(4, 1, 1))), Case(SPECIAL, const(f32(-0.5)))],
    "Pad": [
        Case(IMAGE, const(i64(0, 0, 1, 2, 0, 0, 0, 3)), const(np.float32(-1))),
        Case(IMAGE, const(i64(0, 0, 1, 2, 0, 0, 0, 3))),
        Case(IMAGE, const(i64(0, 0, -1, 2, 0, 0, 0, -3)), const(np.float32(1))),
        Case(IMAGE, pads=[0, 0, 1, 2, 0, 0, 0, 3], value=1.0, opset=10),
        Case(IMAGE, const(i64(1, 2)), None, const(i64(2)), opset=18),
        *(Case(IMAGE, const(i64(0, 0, 1, 2, 0, 0, 3, 1)), mode=mode) for mode in ("reflect", "edge")),
        Case(IMAGE, const(i64(0, 0, 1, 2, 0, 0, 3, 1)), mode="wrap", opset=19),
    ],
    "Pow": [
        *(Case(MATRIX, const(np.float32(power))) for power in (1, 2, 3)),
        Case(POSITIVE, const(f32(0.5)), tolerance=ULPS),
        Case(POSITIVE, OTHER, tolerance=ULPS),
    ],
    "QuantizeLinear": [
        Case(MATRIX, const(np.float32(0.037)), const(np.uint8(3))),
        Case(SPECIAL, const(np.float32(0.5)), const(np.int8(-3))),
        Case(IMAGE, const(np.abs(VECTOR) + f32(0.1)), const(np.zeros(4, "int8")), axis=1),
    ],
    "Reciprocal": [Case(POSITIVE)],
    "ReduceMax": [Case(IMAGE, axes=[1, 2]), Case(IMAGE, const(i64(-1)), keepdims=0, opset=18)],
    "ReduceMean": [
        Case(IMAGE, axes=[2, 3], tolerance=ULPS),
        Case(IMAGE, keepdims=0, tolerance=ULPS),
        Case(IMAGE, const(i64(-1, 1)), keepdims=0, opset=18, tolerance=ULPS),
    ],
    "ReduceMin": [Case(IMAGE, axes=[1, 2])],
    "ReduceSum": [
        Case(IMAGE, const(i64(1)), keepdims=0, tolerance=SUMS),
        Case(MATRIX, const(i64()), noop_with_empty_axes=1),
        Case(IMAGE, axes=[0], opset=11, tolerance=SUMS),
    ],
    "Relu": [Case(SPECIAL)],
    "Reshape": [
        Case(IMAGE, const(i64(0, -1))),
        Case(IMAGE, const(i64(9, 2, 32))),
        Case(MATRIX, const(i64(18))),
    ],
    "Resize": [
        Case(IMAGE, None, const(f32(1, 1, 2, 3)), coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
        Case(IMAGE, None, const(f32(1, 1, 1.7, 0.6))),
        Case(IMAGE, None, None, const(i64(2, 4, 5, 20)), coordinate_transformation_mode="pytorch_half_pixel"),
        Case(IMAGE, None, const(f32(1, 1, 2, 2)), coordinate_transformation_mode="align_corners", nearest_mode="ceil"),
        Case(IMAGE, const(f32(1, 1, 2, 2)), opset=10),
    ],
    "Round": [Case(SPECIAL)],
    "Sigmoid": [Case(MATRIX, tolerance=ULPS)],
    "Sign": [Case(SPECIAL)],
    "Slice": [
        Case(IMAGE, const(i64(1, 2)), const(i64(3, -1)), const(i64(1, 2))),
        Case(IMAGE, const(i64(0)), const(i64(2**60)), const(i64(-1)), const(i64(3))),
        Case(IMAGE, const(i64(-1)), const(i64(-(2**60))), const(i64(2)), const(i64(-2))),
        Case(IMAGE, starts=[1], ends=[3], axes=[1], opset=9),
        Case(MATRIX, const(i64(0)), const(i64(2))),
    ],
    "Softmax": [
        Case(MATRIX, axis=1, tolerance=ULPS),
        Case(IMAGE, axis=1, tolerance=ULPS),
        Case(IMAGE, axis=2, opset=11, tolerance=ULPS),
        Case(MATRIX, tolerance=ULPS),
    ],
    "Softplus": [Case(MATRIX * f32(40), tolerance=ULPS)],
    "SpaceToDepth": [Case(normal(2, 3, 4, 6), blocksize=2)],
    "Split": [
        Case(MATRIX, const(i64(4, 5)), axis=1, outputs="a b"),
        Case(MATRIX, axis=1, outputs="a b c"),
        Case(MATRIX, split=[1, 8], axis=-1, outputs="a b", opset=11),
        Case(MATRIX, axis=1, num_outputs=2, outputs="a b", opset=18),
    ],
    "Sqrt": [Case(POSITIVE, tolerance=ULPS)],  # torch's own, which evaluates the graph here, is not IEEE's
    "Squeeze": [
        Case(normal(1, 3, 1, 2), const(i64(0, -2))),
        Case(normal(1, 3, 1, 2)),
        Case(normal(1, 3, 1, 2), axes=[2], opset=11),
    ],
    "Sub": [Case(MATRIX, OTHER), Case(const(np.float32(1)), MATRIX)],
    "Sum": [Case(MATRIX, OTHER, MATRIX), Case(MATRIX)],
    "Tanh": [Case(MATRIX, tolerance=ULPS)],
    "Tile": [Case(MATRIX, const(i64(2, 3)))],
    "Transpose": [Case(IMAGE, perm=[0, 2, 3, 1]), Case(IMAGE)],
    "Unsqueeze": [Case(MATRIX, const(i64(0, -1))), Case(MATRIX, axes=[1], opset=11)],
    "Upsample": [Case(IMAGE, const(f32(1, 1, 2, 3)), opset=9)],
    "Where": [Case(TRUE, MATRIX, OTHER), Case(TRUE, const(np.float32(1)), const(np.float32(-1)))],
    "Xor": [Case(TRUE, TRUE[::-1].copy())],
}


def _quant(x, scale, zero, bits, **attributes):
    return Case(x, const(f32(scale).reshape(())), const(np.float32(zero)), const(np.float32(bits)), **attributes)


TIES = (np.arange(-24, 24) / 8).astype("float32").reshape(3, 16)
ROUNDINGS = ("ROUND", "CEIL", "FLOOR", "UP", "DOWN", "HALF_UP", "HALF_DOWN", "HALF_EVEN", "round")
QONNX_CASES = {
    "BipolarQuant": [
        Case(SPECIAL, const(np.float32(1))),
        Case(SPECIAL, const(np.float32(0.3))),
        Case(IMAGE, const(np.abs(normal(1, 4, 1, 1)))),
    ],
    "Quant": [
        *(_quant(TIES, 0.25, 0, 3, signed=s, narrow=n) for s in (0, 1) for n in (0, 1)),
        *(_quant(TIES, 0.5, 0, 4, signed=1, narrow=0, rounding_mode=mode) for mode in ROUNDINGS),
        _quant(TIES, 0.3, 2, 4, signed=0, narrow=0),
        *(_quant(SPECIAL, scale, 0, 1, signed=1, narrow=0) for scale in (0.5, 3.0)),
        _quant(SPECIAL, 0.5, 0, 1, signed=0, narrow=0),
        _quant(MATRIX, 0.7, 0, 2, signed=1, narrow=1),
        Case(IMAGE, const(np.abs(normal(1, 4, 1, 1))), const(np.float32(0)), const(np.float32(4)), signed=1, narrow=1),
        Case(IMAGE, const(np.float32(0.5)), const(np.float32(0)), const(f32(2, 3, 4, 5).reshape(4, 1, 1)), signed=1),
    ],
    "IntQuant": [_quant(TIES, 0.25, 0, 3, signed=1, narrow=0)],
    "Trunc": [
        _quant(TIES, 0.25, 0, 6, rounding_mode="FLOOR"),
        _quant(TIES, 0.25, 0, 6, rounding_mode="ROUND"),
    ],
}
for _case in QONNX_CASES["Trunc"]:
    _case.operands += (const(np.float32(4)),)
QONNX_CASES["Trunc"].append(
    Case(
        TIES, *map(const, (f32(0.25), f32(4), f32(6), f32(1.0), f32(1), f32(3))), signed=1, narrow=0,
        rounding_mode="FLOOR",
    )
)  # fmt: skip


def test_every_supported_operator_has_cases():
    names = {name for name in supported_operators() if "::" not in name}
    assert names == set(CASES)
    assert {name.rpartition("::")[2] for name in supported_operators() if "::" in name} == set(QONNX_CASES)


def _points(cases):
    return [pytest.param(kind, case, id=f"{kind}-{i}") for kind, group in cases.items() for i, case in enumerate(group)]


@pytest.mark.parametrize(("kind", "case"), _points(CASES))
def test_operator_is_onnx_runtimes(kind, case):
    built, inputs = case.build(kind)
    _compare(built, inputs, case.tolerance, "onnxruntime")


@pytest.mark.parametrize(("kind", "case"), _points(QONNX_CASES))
def test_operator_is_qonnxs(kind, case):
    case.domain = QONNX
    built, inputs = case.build(kind)
    _compare(built, inputs, 0, "reference")


def _compare(built, inputs, tolerance, runtime):
    imported = to_relax(built)
    relax.analysis.well_formed(imported.mod)
    expected = OnnxReference(built, runtime=runtime).outputs(inputs)
    found = _run(imported.mod, inputs)
    for got, want, port in zip(found, expected, imported.outputs, strict=True):
        assert (port.shape, port.dtype) == (want.shape, str(want.dtype)) == (tuple(got.shape), str(got.dtype))
        if tolerance:
            np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)
        else:
            np.testing.assert_array_equal(got, want)


def _run(mod, inputs):
    try:
        return [tensor.numpy() for tensor in evaluate_function(mod["main"], [torch.tensor(x) for x in inputs])]
    except (KeyError, NotImplementedError):  # no table entry, or padding that torch cannot do
        return _run_with_tvm(mod, inputs)


def _run_with_tvm(mod, inputs):
    executable = tvm.compile(mod, target=tvm.target.Target({"kind": "llvm", "opt-level": 0}))
    result = relax.VirtualMachine(executable, tvm.cpu())["main"](*map(tvm.runtime.tensor, inputs))
    return [tensor.numpy() for tensor in ([result] if isinstance(result, tvm.runtime.Tensor) else list(result))]


@pytest.mark.parametrize("kind", ["BatchNormalization", "HardSigmoid", "HardSwish", "LeakyRelu", "PRelu", "Mean"])
def test_the_numpy_reference_rounds_as_onnx_runtime(kind):
    for case in CASES[kind]:
        built, inputs = case.build(kind)
        runtime, reference = (OnnxReference(built, runtime=r).outputs(inputs) for r in ("onnxruntime", "reference"))
        np.testing.assert_array_equal(reference[0], runtime[0])
