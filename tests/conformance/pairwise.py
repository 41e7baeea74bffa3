"""All-pairs designs: few points of a large grid that still hold every pair of values of two axes (Tatsumi 1987, and
the greedy construction of Cohen et al. 1997, "The AETG system", section 4)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Row = tuple[Any, ...]

# Completions of a pair that compete for covering most; random draws before all completions are tried in order.
_CANDIDATES, _DRAWS = 40, 200


def all_pairs(axes: Mapping[str, Sequence[Any]], valid: Callable[[Row], bool]) -> list[Row]:
    """Rows, one value of each axis in the mapping's order, that hold every pair of values which any valid row holds.

    Deterministic. valid: whether a row may be used at all.
    """
    values = [tuple(v) for v in axes.values()]
    generator = random.Random(0)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(range(len(values)), 2)
        for i, j in itertools.product(range(len(values[a])), range(len(values[b])))
    }
    chosen: list[Row] = []
    while missing:
        pair = min(missing)
        missing.discard(pair)
        rows = itertools.islice(_completions(dict(pair), values, valid, generator), _CANDIDATES)
        best = max(rows, key=lambda row: len(_pairs(row) & missing), default=None)
        if best is not None:  # otherwise no valid row holds this pair
            missing -= _pairs(best)
            chosen.append(tuple(v[i] for v, i in zip(values, best, strict=True)))
    return chosen


def _completions(
    fixed: Mapping[int, int], values: Sequence[Row], valid: Callable[[Row], bool], generator: random.Random
) -> Iterator[tuple[int, ...]]:
    """Valid rows, as indices of values, with some axes fixed: random ones, and if those are none the first of all."""
    choices = [[fixed[axis]] if axis in fixed else list(range(len(v))) for axis, v in enumerate(values)]

    def usable(row: tuple[int, ...]) -> bool:
        return valid(tuple(v[i] for v, i in zip(values, row, strict=True)))

    drawn = [row for _ in range(_DRAWS) if usable(row := tuple(generator.choice(c) for c in choices))]
    yield from drawn or itertools.islice(filter(usable, itertools.product(*choices)), 1)


def _pairs(row: Sequence[int]) -> set[tuple[tuple[int, int], tuple[int, int]]]:
    return {((a, row[a]), (b, row[b])) for a, b in itertools.combinations(range(len(row)), 2)}
