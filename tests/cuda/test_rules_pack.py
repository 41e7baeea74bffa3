"""Packing by ballot, run by the emulator, against the same function's naive loops: every bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from emulated import Cases
from tvm import tirx

from bnncc.dialect import computes, computes_float, computes_planes
from bnncc.targets.cuda.descriptor import CUDA_TARGETS

layout = CUDA_TARGETS["cuda-sm_90"].bit_layout
PREDICATES = ["not_lt", "gt", "ge", "not_le", "ternary"]
CHANNELS = [1, 31, 32, 33, 64, 70, 128]


def _number(value: float) -> Any:
    return tirx.const(value, "float32")


def _padded(channels: int, predicate: str) -> Callable[..., Any]:
    return lambda x: computes.pack(x, layout(channels, 1), predicate, padding=(1, 2, 1, 0), pad_bit=1)


def _with_values(channels: int, predicate: str) -> Callable[..., Any]:
    def f(x: Any, a: Any, b: Any) -> list[Any]:
        z = computes_float.scale_shift(x, a, b)
        return [z, computes.pack(z, layout(channels, 1), predicate, padding=(1, 0, 0, 1))]

    return f


def _levels(channels: int, planes: int) -> Callable[..., Any]:
    return lambda x: computes_planes.pack_levels(
        x, _number(-0.3), _number(3.0), layout(channels, 1), planes=planes, padding=(1, 1, 1, 1)
    )


def _planar(channels: int, predicate: str) -> Callable[..., Any]:
    return lambda x: computes.pack(
        x, layout(channels, 1), predicate, padding=(1, 0, 1, 0), pad_bit=1, data_layout="NCHW"
    )


def _grouped(channels: int, groups: int) -> Callable[..., Any]:
    return lambda x: computes.pack(x, layout(channels, groups), "gt", padding=(1, 1, 1, 1), pad_bit=1)


def _of_maxima(x: Any) -> Any:
    return computes.pack(computes_float.max_pool2d(x, (2, 2), (2, 2)), layout(70, 1), "ge")


def _all() -> Cases:
    cases = Cases()
    floats, integers = cases.floats, cases.integers
    for c in CHANNELS:
        bits = layout(c, 1)
        cases.add(f"plain_{c}", lambda x, bits=bits: computes.pack(x, bits, "not_lt"), floats(2, 5, 7, c))
        cases.add(f"planar_{c}", _planar(c, "ge"), floats(2, c, 5, 7))
        cases.add(f"levels_{c}", _levels(c, 3), floats(2, 3, 7, c))
        cases.add(f"values_{c}", _with_values(c, "ternary"), floats(2, 3, 7, c), floats(c), floats(c))
        sums, thresholds = integers(-9, 9, 2, 3, 7, c), integers(-9, 9, c)
        cases.add(f"threshold_{c}", lambda acc, t, bits=bits: computes.threshold_pack(acc, t, bits), sums, thresholds)
    for predicate in PREDICATES:
        cases.add(f"padded_{predicate}", _padded(70, predicate), floats(2, 5, 7, 70))
        cases.add(f"planar_{predicate}", _planar(33, predicate), floats(2, 33, 5, 7))
    for channels, groups in ((64, 2), (20, 4), (96, 3)):
        cases.add(f"groups_{channels}_{groups}", _grouped(channels, groups), floats(2, 5, 7, channels))
    cases.add("of_maxima", _of_maxima, floats(2, 6, 8, 70))
    table = integers(0, 2, 33, 19, dtype="uint8")
    by_table = partial(computes.lookup_pack, layout=layout(33, 1), lowest=-9, step=1)
    cases.add("by_table", by_table, integers(-9, 10, 2, 3, 7, 33), table)
    return cases


CASES = _all()


@pytest.mark.parametrize("name", CASES.names)
def test_bits(name: str) -> None:
    for got, wanted in CASES.compared(name):
        np.testing.assert_array_equal(got, wanted)


def test_one_launch_by_ballots() -> None:
    for name in CASES.names:
        assert len(CASES.emulated.lowered.calls[name]) == 1
        votes = CASES.source_of(name).count("ballot_sync(")
        assert (votes == 0) == name.startswith("planar"), name


def test_a_warp_stores_several_words_together() -> None:
    """128 channels of 7 · 7 pixels on enough images: the loads of eight words are under way at once."""
    cases = Cases()
    cases.add("many", lambda x: computes.pack(x, layout(128, 1), "ge"), cases.floats(128, 7, 7, 128))
    assert cases.source_of("many").count("ballot_sync(") == 8
