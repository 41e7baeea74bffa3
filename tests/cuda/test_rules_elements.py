"""Elementwise kernels, pools, padding, transpositions and sums: the emulator against the naive loops of a CPU."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import numpy as np
import pytest
from emulated import Cases
from tvm import te, tirx

from bnncc.dialect import computes, computes_bytes, computes_float, computes_images, kernels
from bnncc.runtime.bits import BitLayout, ByteLayout

#: What the two compilers contract differently: functions are polynomials, sums and averages have products in them.
_ULPS = 64


def _identifier(name: str) -> str:
    return name.replace(".", "_")


INEXACT = {_identifier(name) for name in kernels._INEXACT} | {"chain"}


def _functions() -> Cases:
    """Every elementwise operator, on vectors of four lanes."""
    cases = Cases()
    shape = (3, 5, 16)
    floats = partial(cases.floats, *shape)

    def add(name: str, function: Any, *inputs: np.ndarray) -> None:
        def compute(*tensors: te.Tensor) -> te.Tensor:
            return te.compute(shape, lambda *at: function(*(t(*at) for t in tensors)), name="out")

        cases.add(_identifier(name), compute, *inputs)

    for name, function in kernels._SCALAR.items():
        needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
        inputs = [floats() for _ in needed]
        if name.startswith("logical"):
            inputs = [x > 0 for x in inputs]
        if name == "where":
            inputs[0] = inputs[0] > 0
        if name == "bnncc.threshold":
            inputs[1] = cases.integers(-3, 3, *shape)
        if name in ("bnncc.log1p", "log", "sqrt", "rsqrt"):
            inputs[0] = np.abs(inputs[0])
        if name in ("sin", "cos"):  # two libraries agree on small arguments only
            inputs[0] = cases.plain(*shape)
        add(name, function, *inputs)
    for predicate in ("not_lt", "gt", "ge", "not_le", "ternary"):
        add(f"sign_{predicate}", partial(computes_float.sign_value, predicate=predicate), floats())
    add("equal_itself", lambda a: kernels._equal(a, a), floats())
    for i, bounds in enumerate(((-1.0, 1.0), (0.0, 6.0), (-np.inf, 0.5))):
        add(f"clip_{i}", kernels._clip(*bounds), floats())
    add("leaky_relu", kernels._leaky_relu(0.1), floats())
    add("quantize", kernels._quantize(0.25, -3, 7), floats())
    add("unless_nan", computes_float.unless_nan, floats(), floats())
    add("to_integer", lambda a: tirx.Cast("int32", a * tirx.const(100, "float32")), cases.plain(*shape))
    add("from_integer", lambda a: tirx.Cast("float32", a), cases.integers(-(1 << 31), 1 << 31, *shape, dtype="int64"))
    add("chain", lambda a, b: computes_float.relu_value(kernels._clip(-1.0, 1.0)(a) * a + b), floats(), floats())
    return cases


FUNCTIONS = _functions()


def _same_bits(got: np.ndarray, wanted: np.ndarray) -> None:
    """Equal, −0 apart from 0; NaN is NaN, whatever its bits."""
    np.testing.assert_array_equal(got, wanted)
    if got.dtype.kind == "f":
        known = ~np.isnan(wanted)
        np.testing.assert_array_equal(np.signbit(got[known]), np.signbit(wanted[known]))


def _close(got: np.ndarray, wanted: np.ndarray, ulps: int, least: float) -> None:
    np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(got[~finite], wanted[~finite])
    size = np.maximum(np.abs(wanted[finite]), np.float32(least))
    assert (np.abs(got[finite] - wanted[finite]) <= ulps * np.finfo(np.float32).eps * size).all()


@pytest.mark.parametrize("name", FUNCTIONS.names)
def test_functions(name: str) -> None:
    ((got, wanted),) = FUNCTIONS.compared(name)
    if name in INEXACT:
        # 1 + erf(x) cancels for negative x: what is left is as exact as 1 is.
        _close(got, wanted, _ULPS, 1.0 if "gelu" in name else 1e-30)
    else:
        _same_bits(got, wanted)


@pytest.mark.parametrize("name", FUNCTIONS.names)
def test_functions_read_and_write_vectors(name: str) -> None:
    source = FUNCTIONS.source_of(name)
    if not any(str(p.dtype) in ("bool", "int64") for p in FUNCTIONS.mod[name].params):
        assert "4*)(" in source, "float4, int4"
    assert len(FUNCTIONS.emulated.lowered.calls[name]) == 1


def test_text_grows_as_a_chain_does() -> None:
    """Of maxima and minima, whose operands CUDA C would compare and then name once more."""

    def chain(links: int, a: te.Tensor, b: te.Tensor) -> te.Tensor:
        def at(*i: Any) -> Any:
            value = a(*i)
            for n in range(links):
                value = tirx.max(value * b(*i), tirx.const(-n - 1, "float32"))
                value = tirx.min(value, b(*i) + tirx.const(n, "float32"))
            return value

        return te.compute(a.shape, at, name="out")

    cases = Cases()
    for links in (3, 6, 12):
        cases.add(f"links_{links}", partial(chain, links), cases.floats(3, 5, 16), cases.floats(3, 5, 16))
    for name in cases.names:
        ((got, wanted),) = cases.compared(name)
        _same_bits(got, wanted)
    three, six, twelve = (len(cases.source_of(name)) for name in cases.names)
    assert twelve - six <= 2.2 * (six - three), "each link adds the same"


def _images(channels: int) -> dict[str, tuple[Any, tuple[str, tuple[int, ...]]]]:
    """name → (compute, input)."""
    c, bits = channels, BitLayout.for_target(channels, 1, 32, 1)
    nhwc, nchw = (2, 6, 8, c), (2, c, 6, 8)
    f = computes_float
    return {
        "max": (lambda x: f.max_pool2d(x, (3, 3), (2, 2), (1, 1, 1, 1)), ("floats", nhwc)),
        "max_dilated": (lambda x: f.max_pool2d(x, (2, 2), (1, 1), (1, 1, 1, 1), dilation=(2, 2)), ("floats", nhwc)),
        "pad": (lambda x: f.pad(x, (3, 3, 2, 2), 0.5), ("floats", nhwc)),
        "to_nchw": (lambda x: f.permute(x, (0, 3, 1, 2)), ("floats", nhwc)),
        "to_nhwc_relu": (lambda x: f.relu(f.permute(x, (0, 2, 3, 1))), ("floats", (2, c, 9, 35))),
        "to_nhwc_pad": (lambda x: f.pad(f.permute(x, (0, 2, 3, 1)), (3, 3, 2, 2), 0.5), ("floats", (2, c, 9, 13))),
        # A tile's first rows are all outside the image: what is declared where they are read is dropped with them.
        "to_nhwc_pad_line": (lambda x: f.pad(f.permute(x, (0, 2, 3, 1)), (1, 1, 1, 1), 0.5), ("floats", (2, 8, 19, 1))),
        "zeros": (lambda x: computes_images.insert_zeros(x, (2, 3)), ("floats", nchw)),
        "pad_bits": (lambda x: computes.pad_bits(x, bits, (1, 2, 0, 1), 1), ("bytes", (2, 5, 6, bits.bytes))),
        "max_bits": (
            lambda x: computes.max_pool2d_bits(x, (3, 3), (2, 2), (1, 1, 1, 1)),
            ("bytes", (2, 5, 6, bits.bytes)),
        ),
        "max_ternary": (
            lambda x: computes.max_pool2d_bits(x, (3, 3), (2, 2), (1, 1, 1, 1), planes=2),
            ("bytes", (2, 5, 6, 2, bits.bytes)),
        ),
        "bytes": (
            lambda x: computes_bytes.pack_bytes(
                x, tirx.const(-0.3, "float32"), tirx.const(30.0, "float32"), ByteLayout(c, 1, 128),
                most=200, padding=(1, 1, 0, 0), pad_level=7,
            ),
            ("floats", nhwc),
        ),
        "unfold": (
            lambda x: computes_images.unfold_depth(
                x, depth=2, kernel=2, stride=1, dilation=1, padding=(1, 0), groups=1,
                outside=lambda _: tirx.const(0.5, "float32"),
            ),
            ("floats", (4, 3, 5, c)),
        ),
    }  # fmt: skip


def _moved() -> Cases:
    cases = Cases()
    for channels in (3, 32, 64, 70):
        for name, (function, (kind, shape)) in _images(channels).items():
            data = cases.floats(*shape) if kind == "floats" else cases.integers(0, 256, *shape, dtype="uint8")
            cases.add(f"{name}_{channels}", function, data)
    cases.add("concat", computes_images.concat, cases.floats(2, 5, 32), cases.floats(2, 5, 16), cases.floats(2, 5, 48))
    take = partial(computes_images.take, axis=1, trusted=False)
    cases.add("take", take, cases.floats(4, 9, 16), cases.integers(-3, 14, 5, dtype="int64"))
    return cases


MOVED = _moved()


@pytest.mark.parametrize("name", MOVED.names)
def test_every_bit(name: str) -> None:
    for got, wanted in MOVED.compared(name):
        _same_bits(got, wanted)
    assert len(MOVED.emulated.lowered.calls[name]) == 1


def test_neighbouring_lanes_load_and_store_whole_vectors() -> None:
    for name in ("max_64", "pad_64", "unfold_64"):
        source = MOVED.source_of(name)
        assert "*(float4*)(x0" in source and source.count("*(float4*)") >= 3, name
    for name in ("pad_bits_64", "max_bits_64"):
        assert "*(uint2*)(x0" in MOVED.source_of(name), name  # 64 channels are eight bytes
    for name in ("to_nchw_64", "to_nhwc_relu_64", "to_nhwc_pad_64"):
        assert "tile_ptr[1056]" in MOVED.source_of(name), f"{name}: 32 rows of 33"


def _sums() -> Cases:
    cases = Cases()
    for c in (3, 32, 70):
        x = cases.plain(2, 8, 9, c)
        cases.add(f"mean_{c}", lambda x: computes_float.mean(x, (1, 2)), x)
        cases.add(f"mean_of_channels_{c}", lambda x: computes_float.mean(x, (3,), keepdims=True), x)
        average = partial(computes_float.avg_pool2d, pool_size=(3, 3), strides=(2, 2), padding=(1, 1, 1, 1))
        cases.add(f"average_{c}", partial(average, count_include_pad=False), x)
        depthwise = partial(computes_float.depthwise_conv2d, padding=(1, 1, 1, 1))
        cases.add(f"depthwise_{c}", depthwise, cases.plain(2, 8, 8, c), cases.plain(3, 3, c))
    for rows, size in ((3, 10), (2, 4), (1, 70), (5, 1000), (2, 5000)):
        cases.add(f"softmax_{rows}_{size}", computes_float.softmax, 4 * cases.plain(rows, size))
    return cases


SUMS = _sums()


@pytest.mark.parametrize("name", SUMS.names)
def test_sums(name: str) -> None:
    """In another order than the CPU's, or with other contractions."""
    ((got, wanted),) = SUMS.compared(name)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    assert len(SUMS.emulated.lowered.calls[name]) == 1


def test_rows_with_special_values() -> None:
    """Softmax of rows with NaN, with infinities, and of −∞ alone, as on a CPU."""
    cases = Cases()
    x = cases.plain(4, 70)
    x[0, 3], x[1, 5], x[2, 60] = np.nan, np.inf, -np.inf
    x[3] = -np.inf
    cases.add("rows", computes_float.softmax, x)
    ((got, wanted),) = cases.compared("rows")
    np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
    np.testing.assert_allclose(got[2], wanted[2], rtol=1e-5)
