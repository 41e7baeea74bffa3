"""The design that `make test` relies on: nothing missing, nothing invalid, the same every time."""

import itertools

from .pairwise import all_pairs


def _pairs(rows):
    return {(a, row[a], b, row[b]) for row in rows for a, b in itertools.combinations(range(len(row)), 2)}


def test_holds_every_pair_in_few_rows():
    axes = {"a": range(7), "b": range(9), "c": range(3), "d": range(2), "e": range(2)}
    rows = all_pairs(axes, lambda row: True)
    assert _pairs(rows) == _pairs(itertools.product(*axes.values()))
    assert 7 * 9 <= len(rows) <= 80


def test_leaves_out_only_pairs_that_no_valid_row_holds():
    axes = {"a": range(5), "b": range(5), "c": range(4)}

    def valid(row):
        return row[0] != row[1] and not (row[0] == 4 and row[2] != 3)

    rows = all_pairs(axes, valid)
    assert all(map(valid, rows))
    assert _pairs(rows) == _pairs(filter(valid, itertools.product(*axes.values())))


def test_is_deterministic():
    axes = {"a": "xyz", "b": range(6), "c": (True, False)}
    assert all_pairs(axes, lambda row: True) == all_pairs(axes, lambda row: True)
