"""4-bit codes packed and unpacked; ONNX's order against ONNX, the words against their definition."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from moecompiler.quantization.packing import (
    AWQ_ORDER,
    IN_ORDER,
    less_eight,
    pack_bytes,
    pack_words,
    signed,
    unpack_bytes,
    unpack_words,
)

CODES = arrays.arrays(
    np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 4).map(lambda n: 8 * n)), elements=st.integers(0, 15)
)


@given(CODES)
def test_packing_loses_nothing(codes: np.ndarray) -> None:
    np.testing.assert_array_equal(unpack_bytes(pack_bytes(codes)), codes)
    for order in (IN_ORDER, AWQ_ORDER):
        np.testing.assert_array_equal(unpack_words(pack_words(codes, order), order), codes)
    eight_less = less_eight(codes)
    np.testing.assert_array_equal(eight_less, codes.astype(np.int64) - 8)
    np.testing.assert_array_equal(signed(unpack_bytes(pack_bytes(eight_less))), eight_less)


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.float4_e2m1fn])
def test_bytes_are_those_of_onnx(dtype: type) -> None:
    bits = np.random.default_rng(0).integers(0, 16, (3, 6), np.uint8)
    theirs = onnx.numpy_helper.from_array(signed(bits).astype(dtype) if dtype == ml_dtypes.int4 else bits.view(dtype))
    assert pack_bytes(bits).tobytes() == theirs.raw_data
    assert pack_bytes(signed(bits)).tobytes() == theirs.raw_data


def test_words_hold_elements_where_their_order_says() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (2, 16), np.uint8)
    for order in (IN_ORDER, AWQ_ORDER):
        words = pack_words(codes, order)
        assert words.dtype == np.int32
        assert words.shape == (2, 2)
        for row in range(2):
            for word in range(2):
                value = sum(int(codes[row, 8 * word + element]) << (4 * i) for i, element in enumerate(order))
                assert np.uint32(value).view(np.int32) == words[row, word]


def test_what_fills_no_bytes_or_words() -> None:
    with pytest.raises(ValueError, match="3 codes do not fill whole bytes"):
        pack_bytes(np.zeros((2, 3), np.uint8))
    with pytest.raises(ValueError, match="12 codes do not fill whole words"):
        pack_words(np.zeros((2, 12), np.uint8))
