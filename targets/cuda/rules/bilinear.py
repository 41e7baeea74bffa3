"""Sums over values in planes of bits, as sums of popcounts that the hardware has.

An activation's value is ``Σ p_i·a_i`` of its planes a_i, a weight's ``Σ q_j·w_j + q0``. With pc standing for a popcount
over the depth,

    Σ (Σ p_i·a_i)·(Σ q_j·w_j + q0) + Σ c_j·pc(w_j)
        = Σ_ij p_i·q_j·pc(a_i ∧ w_j) + Σ_i q0·p_i·pc(a_i) + Σ_j c_j·pc(w_j)

and, as ``2·pc(a ∧ w) = pc(a) + pc(w) − pc(a xor w)``,

        = Σ_ij −½·p_i·q_j·pc(a_i xor w_j) + Σ_i (q0 + ½·Σ q)·p_i·pc(a_i) + Σ_j (c_j + ½·q_j·Σ p)·pc(w_j)

Bits beyond the depth are 0 in every plane: they add nothing to any popcount.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """``(Σ pairs[i][j]·pc(a_i op w_j) + Σ rows[i]·pc(a_i) + Σ columns[j]·pc(w_j)) >> shift``.

    operation: "and" or "xor".
    """

    operation: str
    pairs: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    shift: int = 0

    @property
    def popcounts(self) -> int:
        """Popcounts that a word of the depth takes, those of the weights aside."""
        return sum(c != 0 for row in self.pairs for c in row) + sum(c != 0 for c in (*self.rows, *self.columns))


@dataclass(frozen=True)
class Bilinear:
    """``Σ (Σ windows[i]·a_i)·(Σ weights[j]·w_j + offset) + Σ columns[j]·pc(w_j)``."""

    windows: tuple[int, ...]
    weights: tuple[int, ...]
    offset: int = 0
    columns: tuple[int, ...] = ()

    @property
    def own_columns(self) -> tuple[int, ...]:
        return self.columns or (0,) * len(self.weights)

    def by_and(self) -> Counts:
        pairs = tuple(tuple(p * q for q in self.weights) for p in self.windows)
        return Counts("and", pairs, tuple(self.offset * p for p in self.windows), self.own_columns)

    def by_xor(self) -> Counts:
        """The same by exclusive ors; doubled and halved again where a coefficient is no integer."""
        pairs = tuple(tuple(-p * q for q in self.weights) for p in self.windows)
        rows = tuple((2 * self.offset + sum(self.weights)) * p for p in self.windows)
        columns = tuple(2 * c + q * sum(self.windows) for c, q in zip(self.own_columns, self.weights, strict=True))
        if any(c % 2 for c in (*rows, *columns, *(c for row in pairs for c in row))):
            return Counts("xor", pairs, rows, columns, shift=1)
        halves = tuple(tuple(c // 2 for c in row) for row in pairs)
        return Counts("xor", halves, tuple(c // 2 for c in rows), tuple(c // 2 for c in columns))


#: The mismatches of two operands of −1 and +1: pc(a xor w).
MISMATCHES = Bilinear((1,), (-2,), 1, (1,))
#: A plane of signs and one of values that are not 0 hold ``2·sign − nonzero``: −1, 0, +1.
_TERNARY = (2, -1)


def of_signs(ternary_windows: bool, ternary_weights: bool, products: bool) -> Bilinear:
    """What a binary convolution sums: products of −1, 0, +1, or the mismatches where no term of the windows is 0."""
    if not products:
        # (a xor t)·u of the sign t ≤ u of a weight: a·(u − 2·t) + t
        return Bilinear((1,), (-2, 1), 0, (1, 0)) if ternary_weights else MISMATCHES
    if not ternary_windows:
        # (2·a − 1)·v = 2·a·v − v
        weights, offset = (_TERNARY, 0) if ternary_weights else ((2,), -1)
        return Bilinear((2,), weights, offset, tuple(-q for q in weights))
    return Bilinear(_TERNARY, _TERNARY) if ternary_weights else Bilinear(_TERNARY, (2,), -1)


def of_planes(windows: int, weights: int, form: str) -> Bilinear:
    """The weighted popcounts of `bnncc.dialect.computes_planes` for so many planes."""
    powers, own = tuple(1 << i for i in range(windows)), [1 << j for j in range(weights)]
    if form == "xor":
        # a xor w = a + w − 2·a·w in every pair
        columns = tuple(sum(powers) * q for q in own)
        return Bilinear(powers, tuple(-2 * q for q in own), sum(own), columns)
    if form == "and-":
        own[-1] = -own[-1]
    return Bilinear(powers, tuple(own))
