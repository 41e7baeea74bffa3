"""Vectors of exp, sigmoid, tanh and erf against float64, in units of the last place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bnncc.dialect import computes_float as F
from bnncc.dialect import functions

from .kernels import TARGETS, Kernel

SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40, 88.7, 88.73, -87.3, -103.9, -104.5], np.float32)


def _arguments(low: float, high: float) -> np.ndarray:
    """Evenly spaced ones, small ones of all magnitudes, special values; not a whole number of vectors."""
    small = np.geomspace(1e-38, 1.0, 5000)
    return np.concatenate([np.linspace(low, high, 30_001), small, -small, SPECIAL]).astype(np.float32)


# Bounds: what was measured over 700,000 arguments, rounded up. TVM fuses or does not fuse multiply-adds by target.
@pytest.mark.parametrize("target", [name for name in ("native", "x86-64-v3", "x86-64-v2") if name in TARGETS])
@pytest.mark.parametrize(
    ("name", "low", "high", "bound"),
    [("exp", -104, 89, 1.5), ("sigmoid", -86, 89, 4), ("tanh", -12, 12, 7), ("erf", -6, 6, 8)],
)
def test_errors(target: str, name: str, low: float, high: float, bound: float) -> None:
    x = _arguments(low, high)
    y = Kernel(TARGETS[target], lambda x: F.elementwise(getattr(functions, name), x), x)(x)
    exact = getattr(torch, name)(torch.from_numpy(x).double()).numpy()
    expected = getattr(torch, name)(torch.from_numpy(x)).numpy()
    compared = np.isfinite(expected) & ((x >= -87) if name == "sigmoid" else True)
    unit = np.spacing(np.maximum(np.abs(expected), np.finfo(np.float32).tiny))
    assert np.max(np.abs(y[compared].astype(np.float64) - exact[compared]) / unit[compared]) < bound
    np.testing.assert_array_equal(y[np.isinf(expected)], expected[np.isinf(expected)])
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    lowest = y[np.isneginf(x)]
    assert (0 <= lowest < 2e-38) if name == "sigmoid" else lowest == expected[np.isneginf(x)]


def test_exp_of_negative() -> None:
    x = np.concatenate([np.linspace(-87, 0, 10_000), [-88, -104, -1e4, -np.inf, np.nan]]).astype(np.float32)
    y = Kernel(TARGETS["native"], lambda x: F.elementwise(functions.exp_of_negative, x), x)(x)
    np.testing.assert_allclose(y[:-5], np.exp(x[:-5].astype(np.float64)), rtol=2e-7)  # 1.5 units of the last place
    np.testing.assert_array_equal(y[-5:], np.array([0, 0, 0, 0, np.nan], np.float32))
