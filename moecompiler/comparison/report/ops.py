"""Nodes by themselves: whose output is further from the truth, and what each op takes of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moecompiler.comparison.report.axes import LinearAxis, LogAxis, Tick
from moecompiler.comparison.report.plots import Bar, Bars, pointer
from moecompiler.comparison.report.programs import Shown
from moecompiler.comparison.result import OpCase, OpLevel
from moecompiler.pages.figures import counted, significant

_LAST = 1e300  # sorts after every finite number


@dataclass(frozen=True)
class Errors:
    """A program's, in units in the last place. ``source``: of the whole object; ``values``: to sort by."""

    texts: tuple[str, str, str]
    values: tuple[float, float, float]
    source: str


@dataclass(frozen=True)
class Whisker:
    """A ratio and its interval along an axis of ratios, in percent; None where there is none to be drawn."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class CaseRow:
    case: OpCase
    index: int
    errors: tuple[Errors | None, ...]
    ratio: str
    whisker: Whisker | None

    @property
    def source(self) -> str:
        return pointer("op", "cases", self.index, "ratio")

    @property
    def sort_ratio(self) -> float:
        """To sort by: without a ratio last, but first where it is further from the truth."""
        ratio = self.case.ratio
        if ratio is None:
            return -1.0 if self.case.no_further else _LAST
        return ratio if math.isfinite(ratio) else _LAST


@dataclass(frozen=True)
class OpTable:
    """``rows``: all, the worst first; ``worst``: of each op and case the worst; ``one``: where a ratio of 1 is drawn."""

    programs: tuple[Shown, ...]
    rows: tuple[CaseRow, ...]
    worst: tuple[CaseRow, ...]
    one: float
    ticks: tuple[Tick, ...]

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
        tuple(programs[name] for name in names), tuple(rows), tuple(worst.values()), axis.at(1.0), axis.ticks()
    )


def time_bars(level: OpLevel, programs: Mapping[str, Shown]) -> list[Bars]:
    """By op, what takes the longest first."""
    axis = LinearAxis(max((each.milliseconds for each in level.times), default=0.0) or 1.0)
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
    errors = []
    for name in names:
        found = case.errors.get(name)
        if found is None:
            errors.append(None)
            continue
        values = found.max, found.mean, found.p99
        texts = significant(found.max), significant(found.mean), significant(found.p99)
        largest, mean, p99 = (value if math.isfinite(value) else _LAST for value in values)
        errors.append(Errors(texts, (largest, mean, p99), pointer("op", "cases", index, "errors", name)))
    whisker = None
    ratio = "–"
    if case.ratio is not None:
        low, high = case.interval or (case.ratio, case.ratio)
        whisker = Whisker(axis.at(low), axis.at(case.ratio), axis.at(high))
        ratio = significant(case.ratio)
        if case.interval:
            ratio += f" [{significant(low)}, {significant(high)}]"
    return CaseRow(case, index, tuple(errors), ratio, whisker)


def _badness(row: CaseRow) -> tuple[bool, float, int]:
    return row.case.no_further, -row.sort_ratio, row.index


def _ratio_axis(cases: Iterable[OpCase]) -> LogAxis:
    """At least from a tenth to ten times."""
    drawn = [value for case in cases if case.ratio is not None for value in (case.ratio, *(case.interval or ()))]
    return LogAxis.of([0.1, 10.0, *drawn])
