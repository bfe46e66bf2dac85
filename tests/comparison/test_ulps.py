"""Units in the last place against numpy's spacing, and the bootstrap against a ratio that is known."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from moecompiler.comparison.ulps import ratio_of_means, summary, ulps, unit

TYPES = {"float16": np.float16, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("dtype", TYPES)
def test_unit_is_the_spacing(dtype: str) -> None:
    kind = TYPES[dtype]
    info = ml_dtypes.finfo(kind)
    values = np.array([1.0, 1.5, 3.99, 0.1, float(info.tiny), float(info.smallest_subnormal), 0.0, 1000.0]).astype(kind)
    spacing = [float(np.nextafter(v, kind(np.inf))) - float(v) for v in values]
    np.testing.assert_array_equal(unit(values.astype(np.float64), dtype), spacing)


@pytest.mark.parametrize("dtype", TYPES)
def test_rounding_to_nearest_is_half_a_unit_at_most(dtype: str) -> None:
    exact = np.random.default_rng(0).standard_normal((64, 64))
    errors = ulps(exact.astype(TYPES[dtype]), exact, dtype)
    assert 0.1 < errors.mean() < errors.max() <= 0.5


def test_one_unit_off_is_one() -> None:
    exact = np.full((1, 4), 1.0)
    got = np.array([[1.0, 1 + 2**-10, 1 - 2**-10, 1 + 2**-9]])
    np.testing.assert_array_equal(ulps(got, exact, "float16"), [[0, 1, 1, 2]])


def test_what_cancels_is_measured_by_its_row() -> None:
    exact, got = np.array([[1.0, 1e-6]]), np.array([[1.0, 2e-6]])
    (_, small), (_, alone) = ulps(got, exact, "float16")[0], ulps(got.T, exact.T, "float16")[:, 0]
    assert small < 0.1 < 1 < alone


def test_infinities_and_nan() -> None:
    exact = np.array([[1e6, -1e6, 1e6, 1.0, np.nan, 1.0]])
    got = np.array([[np.inf, -np.inf, -np.inf, np.inf, np.nan, np.nan]])
    np.testing.assert_array_equal(ulps(got, exact, "float16"), [[0, 0, np.inf, np.inf, 0, np.inf]])
    assert summary(ulps(got, exact, "float16"), got, exact).max == np.inf


def test_codes_are_counted() -> None:
    assert ulps(np.array([[3, -127]], np.int8), np.array([[5.0, -127.0]]), "int8").tolist() == [[2, 0]]


def test_interval_holds_the_ratio() -> None:
    rng = np.random.default_rng(1)
    noise = rng.random((40, 32))
    ratio, interval = ratio_of_means(2 * rng.random((40, 32)), noise)
    assert ratio is not None
    assert interval is not None
    assert interval[0] < 2 < interval[1]
    assert interval[0] < ratio < interval[1]
    assert interval[1] - interval[0] < 0.3
    assert ratio_of_means(noise, noise)[1] == (1, 1)


def test_ratio_at_the_edges() -> None:
    nothing, some = np.zeros((2, 2)), np.ones((2, 2))
    assert ratio_of_means(nothing, nothing) == (None, None)
    assert ratio_of_means(some, nothing) == (np.inf, (np.inf, np.inf))
    assert ratio_of_means(nothing, some) == (0, (0, 0))
    assert ratio_of_means(some * np.inf, some) == (None, None)
    assert ratio_of_means(np.ones((1, 8)), 2 * np.ones((1, 8))) == (0.5, (0.5, 0.5))
