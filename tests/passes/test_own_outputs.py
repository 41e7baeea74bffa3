"""Outputs get memory that is theirs alone."""

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op as R_
from tvm.script import ir as I
from tvm.script import relax as R

from bnncc.passes.own_outputs import OwnOutputs


def several(body):
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 6), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(R_.nn.relu(x), "y")
            result = builder.emit_output(relax.Tuple([builder.emit(e) if isinstance(e, relax.Call) else e
                                                      for e in body(x, y)]))  # fmt: skip
        builder.emit_func_output(result)
    return builder.get()


def test_an_input_a_value_and_its_reshape(check):
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((2, 6), "float32")):
            with R.dataflow():
                y = R.nn.relu(x)
                z = R.reshape(y, (12,))
                out = (x, y, z)
                R.output(out)
            return out

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((2, 6), "float32")):
            with R.dataflow():
                y = R.nn.relu(x)
                z = R.reshape(y, (12,))
                a = R.bnncc.copy(x)
                b = R.bnncc.copy(z)
                out = (a, y, b)
                R.output(out)
            return out

    check(OwnOutputs, Before, Expected)


CONSTANT = relax.const(np.ones(3, "float32"))
COPIES = {
    "one value": (lambda x, y: [y], 0),
    "two values": (lambda x, y: [y, R_.abs(y)], 0),
    "a value twice": (lambda x, y: [y, y], 1),
    "a value three times": (lambda x, y: [y, y, y], 2),
    "the input": (lambda x, y: [x], 1),
    "the input renamed": (lambda x, y: [R_.reshape(x, (12,))], 1),
    "the input twice": (lambda x, y: [x, x], 2),
    "a reshape alone": (lambda x, y: [R_.reshape(y, (12,))], 0),
    "two reshapes of a value": (lambda x, y: [R_.reshape(y, (12,)), R_.reshape(y, (3, 4))], 1),
    "a constant": (lambda x, y: [CONSTANT], 1),
}


@pytest.mark.parametrize("outputs", COPIES)
def test_copies(outputs, apply, calls):
    body, copies = COPIES[outputs]
    assert calls(apply(OwnOutputs, several(body))).count("bnncc.copy") == copies


def test_do_not_copy_a_value_of_its_own(function, check_unchanged):
    check_unchanged(OwnOutputs, function((2, 6), lambda x: R_.reshape(R_.nn.relu(x), (12,))))
