"""What ``validate`` says of engines that cannot be run in parts."""

from __future__ import annotations

import pytest

from moecompiler.tools.validate import verdict
from moecompiler.validation.quality import Quality
from moecompiler.validation.runners import OutputReport
from moecompiler.validation.tolerances import TOLERANCES
from moecompiler.validation.validate import Report

QUALITY = Quality("text", 8, 9.0, 0.5, 0.1, 50.0, 7.0, passed=False)


def output(rank: int, name: str, passed: bool = False) -> OutputReport:
    return OutputReport(rank, "text", name, 0.5, 0.25, passed)


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        (
            ("logits", "present.10.key", "present.2.value"),
            "3 outputs, first present.2.value of rank 1 (relative 2.50e-01)",
        ),
        (("next_hidden_states",), "1 outputs, first next_hidden_states of rank 1"),
        ((), "no rank's outputs alone are"),
    ],
)
def test_the_first_output_that_is_off_is_named(outputs: tuple[str, ...], says: str) -> None:
    good = output(0, "present.0.key", passed=True)
    report = Report(TOLERANCES["float16"], (good, *(output(1, name) for name in outputs)), (), (QUALITY,))
    assert says in verdict(report)
    assert verdict(report).startswith("OUT OF TOLERANCE")
