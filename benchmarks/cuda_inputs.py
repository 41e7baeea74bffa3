"""Inputs that are the same wherever they are made: NumPy's raw random words are fixed for ever, its distributions are
not. So an expectation travels without the input it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Ties of every quantizer among them, both zeros, NaN and the infinities.
_AWKWARD = np.array([*np.arange(-13, 14) / 4, -0.0, 0.0, np.nan, np.inf, -np.inf], np.float32)


def _words(count: int, seed: int) -> np.ndarray:
    return np.random.PCG64(seed).random_raw(count)


def awkward(shape: Sequence[int], seed: int) -> np.ndarray:
    """float32 of all kinds: quarters, signed zeros, NaN, infinities."""
    return _AWKWARD[_words(math.prod(shape), seed) >> np.uint64(59)].reshape(shape)


def image(shape: Sequence[int], seed: int) -> np.ndarray:
    """float32 between −2 and 2, as a normalized image has them: multiples of 2⁻²²."""
    return ((_words(math.prod(shape), seed) >> np.uint64(40)).astype(np.float32) / 2**22 - 2).reshape(shape)
