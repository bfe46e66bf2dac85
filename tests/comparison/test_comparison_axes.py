"""Where values are drawn."""

from __future__ import annotations

import math

import pytest

from moecompiler.comparison.report.axes import LinearAxis, LogAxis, bounds, numbered
from moecompiler.comparison.report.plots import pointer
from moecompiler.pages.figures import byte_size, significant


def test_logarithmic() -> None:
    axis = LogAxis.of([2e-4, 0.05, 0.9])
    assert (axis.low, axis.high, axis.zeros, axis.beyond) == (-4, 0, False, False)
    assert [axis.at(10.0**power) for power in (-4, -3, -2, -1, 0)] == pytest.approx([0, 25, 50, 75, 100])
    assert [tick.text for tick in axis.ticks()] == ["1e-4", "1e-3", "1e-2", "1e-1", "1e0"]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 0.02], ["0", "1e-2", "1e-1"]),
        ([0.02, math.inf, math.nan], ["1e-2", "1e-1", "∞"]),
        ([-1e-12, 0.02], ["0", "1e-2", "1e-1"]),
        ([1.0], ["1e0", "1e1"]),
        ([0.0], ["0", "1e-3", "1e-2", "1e-1", "1e0"]),
        ([], ["1e-3", "1e-2", "1e-1", "1e0"]),
        ([1e-30, 1e6], ["1e-30", "1e-24", "1e-18", "1e-12", "1e-6", "1e0", "1e6"]),
    ],
)
def test_what_a_logarithm_has_not(values: list[float], ticks: list[str]) -> None:
    """Has a place of its own, in order with the others."""
    axis = LogAxis.of(values)
    assert [tick.text for tick in axis.ticks()] == ticks
    places = [tick.place for tick in axis.ticks()]
    assert places == sorted(places)
    assert all(0 <= axis.at(value) <= 100 for value in values)
    assert axis.at(0.0) < axis.at(10.0**axis.low) or not axis.zeros


@pytest.mark.parametrize(
    ("values", "high"), [([0.3], 0.5), ([3.0, 12.0], 20.0), ([100.0], 100.0), ([], 1.0), ([0.0], 1.0), ([7e-4], 1e-3)]
)
def test_linear(values: list[float], high: float) -> None:
    axis = LinearAxis.of(values)
    assert axis.high == pytest.approx(high)
    assert axis.at(axis.high / 2) == 50
    assert axis.at(math.inf) == 100


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([78.42, 79.08], ["78.4", "78.6", "78.8", "79", "79.2"]),
        ([3.4], ["3", "3.5"]),
        ([5.0, 5.0], ["5", "5.5"]),
        ([-1.0, 1.0, math.nan], ["-1", "-0.5", "0", "0.5", "1"]),
        ([], ["0", "1"]),
    ],
)
def test_linear_without_zero(values: list[float], ticks: list[str]) -> None:
    axis = LinearAxis.around(values)
    assert [tick.text for tick in axis.ticks("{:.3g}".format)] == ticks
    assert axis.ticks(str)[0].place == 0
    assert axis.ticks(str)[-1].place == pytest.approx(100)
    assert all(0 <= axis.at(value) <= 100 for value in values)


def test_ticks_of_things_side_by_side() -> None:
    assert [tick.text for tick in numbered([str(each) for each in range(32)])] == [
        "0",
        "5",
        "10",
        "15",
        "20",
        "25",
        "30",
    ]
    assert [(tick.place, tick.text) for tick in numbered(["", "0", "", "1"])] == [(37.5, "0"), (87.5, "1")]
    assert numbered([]) == ()
    assert [(tick.place, tick.text) for tick in bounds(["a", "b", "c"])] == [(0, "a"), (50, "b"), (100, "c")]
    assert len(bounds([str(each) for each in range(14)])) == 7


def test_words() -> None:
    assert pointer("a/b", 3, "c~") == "/a~1b/3/c~0"
    assert [significant(value) for value in (0.5, 1234.5, math.inf, -math.inf, math.nan)] == [
        *("0.5", "1.23e+03", "∞", "−∞", "NaN")
    ]
    assert [byte_size(count) for count in (0, 999, 1500, 31_200_000, 2_800_000_000)] == [
        *("0 B", "999 B", "1.5 kB", "31.2 MB", "2.8 GB")
    ]
