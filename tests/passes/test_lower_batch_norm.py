"""Batch norm becomes the fused multiply-add that ATen evaluates, to the last bit."""

from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op as R_

from bnncc.dialect.ops import attributes, is_call
from bnncc.passes.lower_batch_norm import LowerBatchNorm
from bnncc.passes.rewriter import numpy_of

EPS = 1e-5


def norm(x, gamma, beta, mean, variance, axis=1):
    statistics = [a if isinstance(a, relax.Expr) else relax.const(a) for a in (gamma, beta, mean, variance)]
    normalized = R_.nn.batch_norm(x, *statistics, axis=axis, epsilon=EPS, training=False)
    return relax.TupleGetItem(relax.BlockBuilder.current().emit(normalized), 0)


def lowered(mod):
    (call,) = [b.value for b in mod["main"].body.blocks[0].bindings if isinstance(b.value, relax.Call)]
    assert is_call(call, "bnncc.scale_shift")
    return call


def fma(x, a, b):
    """x·a + b rounded once, in exact arithmetic."""
    return np.float32(round_to_float32(Fraction(float(x)) * Fraction(float(a)) + Fraction(float(b))))


def round_to_float32(exact: Fraction) -> float:
    near = np.float32(float(exact))  # at most one step off, through float64
    around = [np.nextafter(near, np.float32(d)) for d in (-np.inf, np.inf)]
    candidates = [float(c) for c in (near, *around) if np.isfinite(c)]
    distance = min(abs(Fraction(c) - exact) for c in candidates)
    nearest = [c for c in candidates if abs(Fraction(c) - exact) == distance]
    return min(nearest, key=lambda c: np.float32(c).view("uint32") & 1)  # ties to even


finite = st.floats(-100, 100, width=32)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(finite, finite, finite, st.floats(0, 2.0**60, width=32)), min_size=1, max_size=3),
    st.lists(st.integers(-5000, 5000), min_size=1, max_size=8),
)
def test_equal_to_aten_bit_for_bit(statistics, values):
    gamma, beta, mean, variance = (np.array(column, "float32") for column in zip(*statistics, strict=True))
    channels = len(gamma)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, channels, 1, len(values)), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_output(norm(x, gamma, beta, mean, variance))
        builder.emit_func_output(y)
    call = lowered(LowerBatchNorm(builder.get()))
    a, b = (numpy_of(c) for c in call.args[1:])
    image = torch.tensor(values, dtype=torch.float32).expand(1, channels, 1, -1).contiguous()
    eager = F.batch_norm(image, *map(torch.from_numpy, (mean, variance, gamma, beta)), eps=EPS)
    ours = [[fma(v, a[c], b[c]) for v in values] for c in range(channels)]
    assert np.array_equal(np.array(ours, "float32"), eager[0, :, 0].numpy())


def test_the_axis_stays(function, apply):
    vectors = [np.ones(4, "float32")] * 4
    assert attributes(lowered(apply(LowerBatchNorm, function((2, 4), lambda x: norm(x, *vectors))))) == {"axis": 1}


def test_do_not_lower_statistics_that_are_computed(function, apply, calls):
    def body(x, y):
        ones = np.ones(4, "float32")
        return norm(x, ones, ones, y, ones)

    builder = relax.BlockBuilder()
    x, y = (relax.Var(n, relax.TensorType(s, "float32")) for n, s in (("x", (2, 4)), ("y", (4,))))
    with builder.function("main", [x, y]):
        with builder.dataflow():
            out = builder.emit_output(body(x, y))
        builder.emit_func_output(out)
    assert calls(apply(LowerBatchNorm, builder.get())) == ["nn.batch_norm"]
