"""Nodes by themselves: whose output is further from the truth, and what each op takes of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moecompiler.comparison.report.axes import LinearAxis, LogAxis
from moecompiler.comparison.report.plots import Bar, Bars, pointer
from moecompiler.comparison.report.programs import Shown
from moecompiler.comparison.report.summary import UNKNOWN
from moecompiler.comparison.result import OpCase, OpLevel, Ulps
from moecompiler.pages.figures import counted, significant

FIGURES = ("max", "mean", "p99", "row")  # of ``Ulps``, in this order


@dataclass(frozen=True)
class Whisker:
    """A ratio and its interval along an axis of ratios, in percent; None where there is none to be drawn."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class CaseRow:
    """``errors``: of each program ``FIGURES``, in units in the last place. ``source``: the case in the result."""

    case: OpCase
    source: str
    errors: tuple[tuple[str, ...], ...]
    ratio: str
    whisker: Whisker | None


@dataclass(frozen=True)
class OpTable:
    """``rows``: all, the worst first; ``worst``: of each op and case the worst; ratios are drawn from ``low`` to ``high``,
    ``one``: where 1 is."""

    programs: tuple[Shown, ...]
    rows: tuple[CaseRow, ...]
    worst: tuple[CaseRow, ...]
    low: float
    high: float
    one: float

    @property
    def failed(self) -> int:
        return sum(not row.case.no_further for row in self.rows)


def op_table(level: OpLevel, programs: Mapping[str, Shown]) -> OpTable:
    names = [name for name in programs if any(name in case.errors for case in level.cases)]
    axis = _ratio_axis(level.cases)
    rows = sorted((_row(case, index, names, axis) for index, case in enumerate(level.cases)), key=_badness)
    worst: dict[tuple[str, str], CaseRow] = {}
    for row in rows:
        worst.setdefault((row.case.op, row.case.case), row)
    return OpTable(
        tuple(programs[name] for name in names),
        tuple(rows),
        tuple(worst.values()),
        10.0**axis.low,
        10.0**axis.high,
        axis.at(1.0),
    )


def time_bars(level: OpLevel, programs: Mapping[str, Shown]) -> list[Bars]:
    """By op, what takes the longest first."""
    longest_time = max((each.milliseconds for each in level.times), default=0.0) or 1.0
    axis = LinearAxis(0.0, longest_time, longest_time)
    found: dict[str, list[Bar]] = {}
    longest = sorted(enumerate(level.times), key=lambda pair: -pair[1].milliseconds)
    order = {name: place for place, name in enumerate(programs)}
    for op in dict.fromkeys(each.op for _, each in longest):
        mine = [pair for pair in enumerate(level.times) if pair[1].op == op]
        for index, each in sorted(mine, key=lambda pair: order[pair[1].program]):
            program = programs[each.program]
            text = f"{milliseconds(each.milliseconds)} in {counted(each.nodes, 'node')}"
            found.setdefault(op, []).append(
                Bar(
                    program.style,
                    axis.at(each.milliseconds),
                    text,
                    pointer("op", "times", index, "milliseconds"),
                    f"{op}, {program.title}: {text}",
                )
            )
    return [Bars(op, tuple(bars)) for op, bars in found.items()]


def milliseconds(value: float) -> str:
    return f"{significant(1e3 * value)} µs" if value < 1 else f"{significant(value)} ms"


def _row(case: OpCase, index: int, names: Iterable[str], axis: LogAxis) -> CaseRow:
    errors = tuple(_errors(case.errors.get(name)) for name in names)
    source = pointer("op", "cases", index)
    if case.ratio is None:
        return CaseRow(case, source, errors, UNKNOWN, None)
    low, high = case.interval or (case.ratio, case.ratio)
    interval = f" [{significant(low)}, {significant(high)}]" if case.interval else ""
    whisker = Whisker(axis.at(low), axis.at(case.ratio), axis.at(high))
    return CaseRow(case, source, errors, significant(case.ratio) + interval, whisker)


def _errors(found: Ulps | None) -> tuple[str, ...]:
    return tuple(UNKNOWN if found is None else significant(getattr(found, key)) for key in FIGURES)


def _badness(row: CaseRow) -> tuple[bool, float]:
    """Those further from the truth first, then by falling ratio; what has none, or no number, before numbers of its kind where
    it is further and after them where it is not."""
    ratio = row.case.ratio
    if ratio is None or math.isnan(ratio):
        ratio = -math.inf if row.case.no_further else math.inf
    return row.case.no_further, -ratio


def _ratio_axis(cases: Iterable[OpCase]) -> LogAxis:
    """At least from a tenth to ten times."""
    drawn = [value for case in cases if case.ratio is not None for value in (case.ratio, *(case.interval or ()))]
    return LogAxis.of([0.1, 10.0, *drawn])
