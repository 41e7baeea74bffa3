"""Targets that take turns: `make test` runs each case on one of them, `make conformance` on the others as well."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pytest


def in_turns(targets: Sequence[str], *axes: Collection[Any]) -> Iterator[Any]:
    """Parameters (target, *values): every combination of the axes' values. Neighbours on any axis have other turns."""
    for places in itertools.product(*map(enumerate, axes)):
        turn = sum(place for place, _ in places) % len(targets)
        for index, target in enumerate(targets):
            later = [] if index == turn else [pytest.mark.conformance]
            yield pytest.param(target, *(value for _, value in places), marks=later)


__all__ = ["in_turns"]
