"""Quantized values in the parity check: planes of levels, and what one quantization step excuses."""

import numpy as np
import pytest

from bnncc.runtime.bits import BitLayout, ByteLayout, Levels
from bnncc.runtime.report import Difference, ParityReport, StepParity
from bnncc.runtime.values import StoredValue

LEVELS = (np.arange(-3, 5) * np.float32(0.1)).astype("float32")


@pytest.mark.parametrize("channels", [1, 8, 33, 64])
@pytest.mark.parametrize("planes", [1, 3])
def test_levels_round_trip(channels, planes):
    levels = LEVELS[: 2**planes]
    layout = BitLayout.for_target(channels, 1, 32, 16)
    bits = {**layout.to_json(), "planes": planes, "padding": [1, 0, 0, 2], "levels": levels.tolist()}
    value = {"node": "div", "order": [0, 2, 3, 1], "bits": bits, "step": 0.1}
    shape = [2, 4, 4, planes, layout.bytes]
    stored = StoredValue.of({"id": 0, "name": "t", "shape": shape, "dtype": "uint8", "value": value})
    array = np.random.default_rng(0).choice(levels, (2, channels, 3, 2))
    encoded = stored.encode(array)
    assert list(encoded.shape) == shape and stored.step == 0.1
    np.testing.assert_array_equal(stored.decode(encoded), array.transpose(0, 2, 3, 1))
    assert not encoded[:, 0].any() and not encoded[:, :, 2:].any()  # pixels of the padding have level 0


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (8, 1), (10, 2)])
@pytest.mark.parametrize("offset", [0, 128])
def test_bytes_round_trip(channels, groups, offset):
    layout = ByteLayout(channels, groups, offset)
    bits = {**layout.to_json(), "padding": [1, 0, 0, 2], "pad_level": 3, "levels": LEVELS.tolist()}
    value = {"node": "mul", "order": [0, 2, 3, 1], "bits": bits, "step": 0.1}
    shape = [2, 4, 4, layout.bytes]
    stored = StoredValue.of({"id": 0, "name": "t", "shape": shape, "dtype": layout.dtype, "value": value})
    array = np.random.default_rng(0).choice(LEVELS, (2, channels, 3, 2))
    encoded = stored.encode(array)
    assert list(encoded.shape) == shape and encoded.dtype == layout.dtype
    np.testing.assert_array_equal(stored.decode(encoded), array.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(layout.unpack(encoded[:, 0]), 3)


def test_levels_of_any_value():
    levels = Levels.affine(0.5, -2, 7)
    np.testing.assert_array_equal(levels.values, np.arange(-2, 6) * np.float32(0.5))
    assert (levels.lowest, levels.most, levels.inverse) == (-1.0, 7, 2.0)
    x = np.array([-9, -1, -0.76, -0.75, -0.25, 0, 0.2, 2.5, 2.6, np.inf, -np.inf, np.nan], np.float32)
    # Ties go to the even level.
    np.testing.assert_array_equal(levels.of(x), [0, 0, 0, 0, 2, 2, 2, 7, 7, 7, 0, 0])


def _step(exact, **difference):
    isolated = Difference(1000, **difference)
    return StepParity(0, "conv2d+round", ("conv",), exact, False, True, step=0.1, isolated=isolated, whole=isolated)


@pytest.mark.parametrize(
    ("step", "ok"),
    [
        (_step(False, mismatches=3, max_abs=0.1, max_rel=0.02), True),
        (_step(False, mismatches=3, max_abs=0.100001, max_rel=0.02), True),
        (_step(False, mismatches=3, max_abs=0.2, max_rel=0.04), False),
        (_step(False), True),
        (_step(True, mismatches=1, max_abs=0.1, max_rel=0.02), False),
    ],
)
def test_one_step_is_excused_where_a_float_sum_precedes(step, ok):
    assert step.ok(1e-4) is ok


def test_values_that_differ_are_counted():
    report = ParityReport("m", "native", "local", steps=[_step(False, mismatches=3, max_abs=0.1, max_rel=0.02)])
    assert "quantized values: 3 of 1,000 differ in the whole run, 3 when each step is fed with" in "\n".join(
        report.summary()
    )
    assert report.to_json()["quantized"] == {"values": 1000, "differ": 3}
