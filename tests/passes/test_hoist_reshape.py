"""Reshapes and permutations move above a sign."""

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op as R_
from tvm.script import ir as I
from tvm.script import relax as R

from bnncc.dialect.ops import call
from bnncc.passes.hoist_reshape import HoistReshape


def test_flatten_before_a_binary_linear_layer(check):
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((2, 4, 3, 3), "float32")) -> R.Tensor((2, 36), "float32"):
            with R.dataflow():
                s = R.bnncc.sign(x, predicate="gt")
                y = R.reshape(s, (2, 36))
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((2, 4, 3, 3), "float32")) -> R.Tensor((2, 36), "float32"):
            with R.dataflow():
                r = R.reshape(x, (2, 36))
                y = R.bnncc.sign(r, predicate="gt")
                R.output(y)
            return y

    check(HoistReshape, Before, Expected)


def test_a_chain_of_moves(function, check):
    def before(x):
        signs = call("sign", [x], predicate="ternary", straight_through=1)
        return R_.squeeze(R_.expand_dims(R_.permute_dims(signs, [0, 2, 1]), axis=1), axis=[1])

    def expected(x):
        moved = R_.squeeze(R_.expand_dims(R_.permute_dims(x, [0, 2, 1]), axis=1), axis=[1])
        return call("sign", [moved], predicate="ternary", straight_through=1)

    check(HoistReshape, function((2, 3, 4), before), function((2, 3, 4), expected))


def test_a_sign_with_other_readers_stays_for_them(function, check):
    def emit(value):
        return relax.BlockBuilder.current().emit(value)

    def before(x):
        signs = emit(call("sign", [x], predicate="gt"))
        return R_.add(R_.reshape(signs, (12,)), R_.reshape(R_.negative(signs), (12,)))

    def expected(x):
        signs = emit(call("sign", [x], predicate="gt"))
        flat = call("sign", [R_.reshape(x, (12,))], predicate="gt")
        return R_.add(flat, R_.reshape(R_.negative(signs), (12,)))

    check(HoistReshape, function((3, 4), before), function((3, 4), expected))


def test_do_not_move_above_anything_else(function, check_unchanged):
    check_unchanged(HoistReshape, function((3, 4), lambda x: R_.reshape(R_.nn.relu(x), (12,))))


def test_signs_side_by_side(function, check):
    def before(x):
        return R_.concat([call("sign", [x], predicate="gt"), call("sign", [R_.negative(x)], predicate="gt")], axis=1)

    def expected(x):
        return call("sign", [R_.concat([x, R_.negative(x)], axis=1)], predicate="gt")

    check(HoistReshape, function((3, 4), before), function((3, 4), expected))


@pytest.mark.parametrize(
    "move",
    [
        lambda x: R_.strided_slice(x, [1], [1], [3]),
        lambda x: R_.flip(x, 2),
        lambda x: R_.broadcast_to(x, (2, 4, 3, 3)),
        lambda x: R_.take(x, relax.const(np.array([2, 0], "int32")), axis=1),
    ],
    ids=["slice", "flip", "broadcast", "chosen channels"],
)
def test_other_moves(move, function, check):
    check(
        HoistReshape,
        function((2, 4, 3, 3), lambda x: move(call("sign", [x], predicate="gt"))),
        function((2, 4, 3, 3), lambda x: call("sign", [move(x)], predicate="gt")),
    )


@pytest.mark.parametrize(
    "body",
    [
        lambda s, x: R_.concat([s, x], axis=0),
        lambda s, x: R_.concat([s, call("sign", [x], predicate="ge")], axis=0),
        lambda s, x: R_.take(s, relax.const(np.array([2, 0], "int32")), axis=2),
    ],
    ids=["a sign beside floats", "signs that differ at zero", "pixels, which move as bits"],
)
def test_do_not_move(body, function, check_unchanged):
    check_unchanged(HoistReshape, function((2, 4, 3), lambda x: body(call("sign", [x], predicate="gt"), x)))


def test_a_concatenation_of_one_vanishes(function, check):
    alone = function((2, 3, 4), lambda x: R_.negative(R_.concat([R_.nn.relu(x)], axis=1)))
    check(HoistReshape, alone, function((2, 3, 4), lambda x: R_.negative(R_.nn.relu(x))))


def test_a_reshape_to_the_same_shape_vanishes(function, check):
    def before(x):
        return R_.negative(R_.reshape(R_.nn.relu(x), (2, 3, 4)))

    def do_not_drop(x):
        return R_.negative(R_.reshape(R_.nn.relu(x), (2, 4, 3)))

    check(HoistReshape, function((2, 3, 4), before), function((2, 3, 4), lambda x: R_.negative(R_.nn.relu(x))))
    check(HoistReshape, function((2, 3, 4), do_not_drop), function((2, 3, 4), do_not_drop))
