"""Formats of few bits against ml_dtypes, torch and the definition of rounding to nearest even."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from moecompiler.quantization.encodings import (
    E2M1_MAX,
    E4M3,
    E4M3_MAX,
    decode_e2m1,
    decode_e4m3,
    encode_e2m1,
    encode_e4m3,
    encode_integer,
    largest_magnitude,
    widen,
)

FLOATS = st.floats(width=32, allow_nan=False)
ALL_HALVES = np.arange(1 << 16, dtype=np.uint16)


def every_tie(decode, count: int) -> np.ndarray:
    """The format's numbers, what lies midway between neighbours, and float32's neighbours of these; both signs."""
    numbers = np.sort(decode(np.arange(count, dtype=np.uint8)))
    midway = (numbers[1:] + numbers[:-1]) / 2
    points = np.concatenate([numbers, midway])
    near = np.concatenate([points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(np.inf))])
    return np.concatenate([near, -near]).astype(np.float32)


@pytest.mark.parametrize(
    ("encode", "decode", "count", "largest", "dtype"),
    [
        (encode_e4m3, decode_e4m3, 0x7F, E4M3_MAX, ml_dtypes.float8_e4m3fn),
        (encode_e2m1, decode_e2m1, 8, E2M1_MAX, ml_dtypes.float4_e2m1fn),
    ],
)
def test_minifloats_are_those_of_ml_dtypes(encode, decode, count, largest, dtype) -> None:
    values = np.concatenate(
        [every_tie(decode, count), widen(ALL_HALVES.view(np.float16)), widen(ALL_HALVES.view(ml_dtypes.bfloat16))]
    )
    values = values[np.isfinite(values)]
    expected = np.clip(values, -largest, largest).astype(dtype)  # ml_dtypes makes NaN of what is too large for E4M3
    np.testing.assert_array_equal(encode(values).view(np.uint8), expected.view(np.uint8))
    codes = np.arange(2 * (count if count == 8 else 128), dtype=np.uint8)
    np.testing.assert_array_equal(decode(codes), codes.view(dtype).astype(np.float32))


def test_e4m3_is_that_of_torch() -> None:
    values = np.clip(every_tie(decode_e4m3, 0x7F), -E4M3_MAX, E4M3_MAX)
    theirs = torch.from_numpy(values).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(encode_e4m3(values).view(np.uint8), theirs.view(torch.uint8).numpy())
    bits = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(decode_e4m3(bits.numpy()), bits.view(torch.float8_e4m3fn).float().numpy())


@given(arrays.arrays(np.float32, 8, elements=FLOATS))
def test_a_minifloat_is_the_nearest_one(values: np.ndarray) -> None:
    for encode, decode, count in ((encode_e4m3, decode_e4m3, 0x7F), (encode_e2m1, decode_e2m1, 8)):
        positive = decode(np.arange(count, dtype=np.uint8))
        numbers = np.concatenate([-positive, positive]).astype(np.float64)
        ours = decode(encode(values)).astype(np.float64)
        nearest = np.min(np.abs(values[:, None] - numbers), axis=1)
        np.testing.assert_array_equal(np.abs(ours - values), nearest)
        np.testing.assert_array_equal(np.signbit(ours), np.signbit(values))


def test_what_has_no_number() -> None:
    odd = np.array([np.inf, -np.inf, np.nan, 1e30], np.float32)
    np.testing.assert_array_equal(decode_e4m3(encode_e4m3(odd)), [448, -448, np.nan, 448])
    np.testing.assert_array_equal(decode_e2m1(encode_e2m1(odd[[0, 1, 3]])), [6, -6, 6])
    with pytest.raises(ValueError, match="NaN has no E2M1 code"):
        encode_e2m1(odd)
    assert encode_e4m3(odd).dtype == E4M3


@given(arrays.arrays(np.float32, 8, elements=st.floats(-300, 300, width=16)))
def test_integers_round_to_even_and_saturate(values: np.ndarray) -> None:
    ties = np.arange(-4, 20, 0.5, dtype=np.float32)
    for some, dtype, low, high in ((values, np.int8, -128, 127), (ties, np.uint8, 0, 15), (ties, np.int8, -8, 7)):
        codes = np.empty(some.shape, dtype)
        encode_integer(some.copy(), codes, low, high)
        np.testing.assert_array_equal(
            codes, [max(low, min(high, round(float(v)))) for v in some]
        )  # Python's ties are even


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_widening_and_the_largest_magnitude(dtype: type) -> None:
    every = ALL_HALVES.view(dtype)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(widen(every), every.astype(np.float32))
    finite = every[np.isfinite(every.astype(np.float32))]
    np.testing.assert_array_equal(widen(finite).view(np.uint32), finite.astype(np.float32).view(np.uint32))
    some = np.random.default_rng(0).permutation(finite)[:60].reshape(3, 20)
    np.testing.assert_array_equal(largest_magnitude(some), np.abs(some.astype(np.float32)).max(axis=-1))
    for odd in (np.inf, -np.inf, np.nan):
        with_odd = np.append(some, np.array(odd, dtype))
        assert not np.isfinite(largest_magnitude(with_odd))
    assert largest_magnitude(every[:0]) == 0


def test_no_other_dtype_is_widened() -> None:
    np.testing.assert_array_equal(widen(np.float32([1.5, -0.0])), np.float32([1.5, -0.0]))
    with pytest.raises(TypeError, match="float64"):
        widen(np.zeros(2))
