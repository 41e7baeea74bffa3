"""What sums over planes of bits are made of on tensor cores: identities of popcounts, on NumPy alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bnncc.passes.pack_planes import constants
from bnncc.targets.cuda.rules.bilinear import Bilinear, Counts, of_planes, of_signs


def _count(counts: Counts, a: np.ndarray, w: np.ndarray) -> int:
    """The sum of bits a [P, K] and w [Q, K] by popcounts."""
    operation = {"and": np.bitwise_and, "xor": np.bitwise_xor}[counts.operation]
    total = sum(c * int(operation(a[i], w[j]).sum()) for i, row in enumerate(counts.pairs) for j, c in enumerate(row))
    total += sum(c * int(plane.sum()) for c, plane in zip(counts.rows, a, strict=True))
    total += sum(c * int(plane.sum()) for c, plane in zip(counts.columns, w, strict=True))
    assert total % (1 << counts.shift) == 0
    return total >> counts.shift


def _check(form: Bilinear, a: np.ndarray, w: np.ndarray, expected: int, padding: int) -> None:
    """Both ways of counting, with bits beyond the depth, which are 0 in all planes."""
    a, w = (np.pad(planes, ((0, 0), (0, padding))) for planes in (a, w))
    assert _count(form.by_and(), a, w) == expected
    assert _count(form.by_xor(), a, w) == expected


def _bits(depth: int, planes: int) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.uint8, (planes, depth), elements=st.integers(0, 1))


_DEPTHS = st.integers(1, 70)
_PADDING = st.integers(0, 40)


@settings(deadline=None)
@given(st.data(), _PADDING, st.integers(1, 3), st.integers(1, 3))
def test_popcounts_of_single_planes_replace_an_operation(data, padding, p, q):
    depth = data.draw(_DEPTHS)
    a, w = data.draw(_bits(depth, p)), data.draw(_bits(depth, q))
    factors = [tuple(data.draw(st.lists(st.integers(-9, 9), min_size=n, max_size=n))) for n in (p, q, q)]
    offset = data.draw(st.integers(-9, 9))
    form = Bilinear(factors[0], factors[1], offset, factors[2])
    windows, weights = np.array(factors[0]) @ a, np.array(factors[1]) @ w + offset
    _check(form, a, w, int(windows @ weights + np.array(factors[2]) @ w.sum(1, dtype=int)), padding)


@settings(deadline=None)
@given(st.data(), _PADDING)
def test_products_of_signs(data, padding):
    depth = data.draw(_DEPTHS)
    a, w = data.draw(_bits(depth, 1)), data.draw(_bits(depth, 1))
    dot = int((2 * a[0].astype(int) - 1) @ (2 * w[0].astype(int) - 1))
    _check(of_signs(False, False, products=False), a, w, (depth - dot) // 2, padding)
    # K − 2·pc(a) − 2·pc(w) + 4·pc(a ∧ w)
    counts = of_signs(False, False, products=False).by_and()
    assert depth - 2 * _count(counts, a, w) == dot
    assert (counts.pairs, counts.rows, counts.columns) == (((-2,),), (1,), (1,))


def _ternary(depth: int) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.int64, depth, elements=st.integers(-1, 1))


@settings(deadline=None)
@given(st.data(), _PADDING)
def test_products_of_ternary_values(data, padding):
    depth = data.draw(_DEPTHS)
    values = data.draw(_ternary(depth)), data.draw(_ternary(depth))
    signs = tuple(np.where(v < 0, -1, 1) for v in values)
    two = [np.stack([v > 0, v != 0]).astype(np.uint8) for v in values]
    one = [(s[None] > 0).astype(np.uint8) for s in signs]
    _check(of_signs(True, True, products=True), two[0], two[1], int(values[0] @ values[1]), padding)
    _check(of_signs(True, False, products=True), two[0], one[1], int(values[0] @ signs[1]), padding)
    _check(of_signs(False, True, products=True), one[0], two[1], int(signs[0] @ values[1]), padding)
    # Terms whose weight is 0 are no mismatch, whatever the activation.
    mismatches = int(((signs[0] != values[1]) & (values[1] != 0)).sum())
    _check(of_signs(False, True, products=False), one[0], two[1], mismatches, padding)


@settings(deadline=None)
@given(st.data(), _PADDING, st.integers(1, 4), st.integers(1, 4), st.sampled_from(["xor", "and", "and-"]))
def test_products_of_planes(data, padding, p, q, form):
    """S of `bnncc.dialect.computes_planes`, and with the constants of the passes the sum of levels times integers."""
    depth = data.draw(_DEPTHS)
    a, w = data.draw(_bits(depth, p)), data.draw(_bits(depth, q))
    operation = np.bitwise_xor if form == "xor" else np.bitwise_and
    signs = [-1 if form == "and-" and j == q - 1 else 1 for j in range(q)]
    weighted = sum(signs[j] * int(operation(a[i], w[j]).sum()) << (i + j) for i in range(p) for j in range(q))
    _check(of_planes(p, q, form), a, w, weighted, padding)
    levels = (1 << np.arange(p)) @ a
    bits = 2 * w.astype(int) - 1 if form == "xor" else w * np.array(signs)[:, None]
    integers = (1 << np.arange(q)) @ bits
    base, factor = constants(integers.reshape(1, -1, 1, 1), form, q, p, first=-3, every=2)
    assert base[0] + factor * weighted == (2 * levels - 3) @ integers
