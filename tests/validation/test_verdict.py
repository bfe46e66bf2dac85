"""What ``validate`` says of engines that cannot be run in parts."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from moecompiler.tools.validate import print_report, verdict
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


def test_ties_of_logits_are_reported() -> None:
    console = Console(width=200, file=StringIO(), record=True)
    tie = replace(QUALITY, top1=11 / 12, tokens=12, ties=1, passed=True)
    print_report(console, Report(TOLERANCES["float16"], (), (), (tie, QUALITY)))
    text = console.export_text()
    assert "91.67% (1 at a tie)" in text
    assert text.count("at a tie") == 1


def test_tokens_that_are_left_out_are_reported() -> None:
    logits = replace(output(1, "logits", passed=True), rerouted=2, rerouted_margin=1.2e-3)
    console = Console(width=200, file=StringIO(), record=True)
    print_report(console, Report(TOLERANCES["float16"], (output(0, "logits", passed=True), logits), (), ()))
    (line,) = (line for line in console.export_text().splitlines() if "routed otherwise" in line)
    assert line.startswith("rank 1, text: 2 token(s) of logits routed otherwise and left out")
    assert "1.2e-03" in line
