"""Single layers of every kind, bit for bit as eager PyTorch computed them where they were compiled."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.cuda_inputs import image
from bnncc.runtime.session import load

from .built import as_tuple

pytestmark = pytest.mark.gpu


def test_the_exactness_grid(built):
    """Pairs of shapes, filters, groups, strides, dilations, paddings, quantizers, epilogues: no value differs."""
    wrong, cases, elements = [], 0, 0
    for name, entry in built.section("grid").items():
        with load(built.path(entry["artifact"]), device="cuda") as session:
            actual = as_tuple(session(*built.inputs(entry)))
        for case, got, wanted in zip(entry["cases"], actual, built.expected(entry), strict=True):
            cases, elements = cases + 1, elements + wanted.size
            if got.dtype != wanted.dtype or not np.array_equal(got, wanted, equal_nan=True):
                differ = int(np.count_nonzero((got != wanted) & ~(np.isnan(got) & np.isnan(wanted))))
                wrong.append(f"{name}: {case}: {differ} of {wanted.size} differ")
    print(f"{len(wrong)} mismatches in {cases} layers, {elements:,} values")
    assert cases
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


@pytest.mark.parametrize("shape", ["56²×64", "28²×128", "14²×256", "7²×512"])
def test_convolutions_at_every_batch(shape, built):
    """What is timed is right: the same image at every place of the batch, the same sums at every place."""
    entry = built.section("convolutions", shape)
    (sums,) = np.load(built.path(entry["expected"]))["arr_0"]
    for row in entry["batches"].values():
        with load(built.path(row["artifact"]), device="cuda") as session:
            batch, *rest = session.inputs[0]["shape"]
            outputs = session(np.repeat(image((1, *rest), 7), batch, axis=0))
        assert len(outputs) == batch
        assert all(np.array_equal(output, sums) for output in outputs), f"batch {batch}"
