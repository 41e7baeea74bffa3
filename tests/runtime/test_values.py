"""Eager's arrays encoded into an artifact's tensors, and back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnncc.runtime.bits import BitLayout
from bnncc.runtime.errors import BnnccError
from bnncc.runtime.values import StoredValue


def entry(shape, dtype, order=None, bits=None, node="where"):
    return {
        "id": 3,
        "name": "t",
        "shape": list(shape),
        "dtype": dtype,
        "value": {"node": node, "order": order, "bits": bits},
    }


def test_scratch_memory_stands_for_nothing():
    assert StoredValue.of({"id": 0, "value": None}) is None


def test_plain_value_is_permuted():
    value = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    stored = StoredValue.of(entry((1, 3, 4, 2), "float32", [0, 2, 3, 1]))
    encoded = stored.encode(value)
    assert np.array_equal(encoded, value.transpose(0, 2, 3, 1)) and encoded.flags.c_contiguous
    assert stored.decode(encoded) is encoded


def test_integer_accumulator_takes_eager_floats():
    encoded = StoredValue.of(entry((2,), "int32")).encode(np.array([-3.0, 7.0], np.float32))
    assert encoded.dtype == np.int32 and encoded.tolist() == [-3, 7]


@settings(deadline=None, max_examples=40)
@given(
    group_channels=st.sampled_from([1, 2, 7, 8, 31, 32, 33, 64, 65, 130]),
    groups=st.sampled_from([1, 2, 3]),
    word_bits=st.sampled_from([8, 32, 64]),
    planes=st.sampled_from([1, 2]),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    pad_value=st.sampled_from([-1, 1]),
    dtype=st.sampled_from(["uint8", "word"]),
    seed=st.integers(0, 2**16),
)
def test_packed_value_round_trips(group_channels, groups, word_bits, planes, padding, pad_value, dtype, seed):
    layout = BitLayout.for_target(group_channels * groups, groups, word_bits, 16)
    last = layout.bytes if dtype == "uint8" else layout.words
    dtype = "uint8" if dtype == "uint8" else layout.word_dtype
    height, width = 3 + padding[0] + padding[2], 2 + padding[1] + padding[3]
    shape = (2, height, width, last) if planes == 1 else (2, height, width, 2, last)
    bits = {**layout.to_json(), "planes": planes, "padding": list(padding), "pad_value": pad_value}
    stored = StoredValue.of(entry(shape, dtype, [0, 2, 3, 1], bits))

    choices = [-1.0, 1.0] if planes == 1 else [-1.0, 0.0, 1.0]
    value = np.random.default_rng(seed).choice(choices, (2, layout.channels, 3, 2)).astype(np.float32)
    encoded = stored.encode(value)
    assert encoded.shape == shape and encoded.dtype == dtype
    assert np.array_equal(stored.decode(encoded), value.transpose(0, 2, 3, 1))

    whole = StoredValue.of(entry(shape, dtype, None, {**layout.to_json(), "planes": planes})).decode(encoded)
    border = np.ones((height, width), bool)
    border[padding[0] : padding[0] + 3, padding[1] : padding[1] + 2] = False
    assert (whole[:, border] == pad_value).all()


def test_a_reference_of_another_shape_is_refused():
    layout = BitLayout.for_target(8, 1, 8, 16)
    stored = StoredValue.of(entry((1, 1), "uint8", None, layout.to_json(), node="where_3"))
    with pytest.raises(BnnccError, match=r"'where_3' has shape \(1, 9\).*not the model that was compiled"):
        stored.encode(np.ones((1, 9), np.float32))
