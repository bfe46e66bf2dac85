"""Where error enters and how it grows: hidden states along the model, a plot for each stretch of the run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from moecompiler.comparison.report.axes import LogAxis, across, numbered
from moecompiler.comparison.report.plots import Curve, Mark, Plot, Rule, pointer
from moecompiler.comparison.report.programs import Shown
from moecompiler.comparison.result import Check, LayerErrors, LayerLevel, Stretch
from moecompiler.pages.figures import figure, significant

_ADDED = (".self_attn", ".mlp")  # modules whose outputs are added to the residual stream
_SEVERAL = 4  # stretches: from here on not all are shown at once
_NEAR = 20.0  # times the largest error: what is beyond would leave most of a plot empty


@dataclass(frozen=True)
class LayerRow:
    """A place; ``values``: of each program the relative error in each stretch, then its growth, each with its source."""

    place: str
    values: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class LayerTable:
    titles: tuple[str, ...]
    rows: tuple[LayerRow, ...]


def errors_of(level: LayerLevel | None) -> Iterator[float]:
    """All that is drawn of a level, to lay out an axis that several plots share."""
    for program in level.programs if level else ():
        for row in (*program.relative, *program.worst):
            yield from row


@dataclass(frozen=True)
class LayerPlots:
    """``first``: prefill, the last stretch of decode, and the last place along the run; ``others``: the stretches between."""

    first: tuple[Plot, ...]
    others: tuple[Plot, ...]


def bound_of(checks: Iterable[Check], level: str, name: str) -> float | None:
    """What all checks of that name are held to; None where there are none, or they differ."""
    bounds = {check.bound for check in checks if (check.level, check.name) == (level, name)}
    return bounds.pop() if len(bounds) == 1 else None


def axis_of(levels: Iterable[LayerLevel | None], bounds: Iterable[float | None]) -> LogAxis:
    """One axis for the plots of several levels. Bounds are on it where they are not far above every error."""
    errors = [error for level in levels for error in errors_of(level)]
    near = _NEAR * max((error for error in errors if math.isfinite(error)), default=0.0)
    return LogAxis.of([*errors, *(bound for bound in bounds if bound is not None and bound <= near)])


def layer_plots(
    level: LayerLevel, at: tuple[str, ...], programs: Mapping[str, Shown], axis: LogAxis, bound: float | None
) -> LayerPlots:
    """Along the layers, a plot for each stretch. ``at``: the keys under which the result holds the level; ``bound``: to be
    drawn."""
    near = (bound,) if bound is not None and bound <= 10.0**axis.high else ()
    rules = tuple(Rule(axis.at(each), f"bound {significant(each)}") for each in near)
    plots = [
        Plot(
            stretch_title(stretch),
            _summary(level, programs, index),
            "layer",
            "relative error",
            numbered(_layer_labels(level)),
            axis.ticks(),
            tuple(
                curve
                for number in range(len(level.programs))
                for curve in _layers(level, at, programs, axis, number, index)
            ),
            rules,
        )
        for index, stretch in enumerate(level.stretches)
    ]
    if len(plots) < _SEVERAL or not level.places:
        return LayerPlots(tuple(plots), ())
    last = len(level.places) - 1
    along = Plot(
        f"along the run, after {level.places[last]}",
        f"Relative error in {len(plots)} stretches of the run",
        "from position",
        "relative error",
        numbered([str(stretch.first) for stretch in level.stretches]),
        axis.ticks(),
        tuple(
            curve for number in range(len(level.programs)) for curve in _along(level, at, programs, axis, number, last)
        ),
        rules,
    )
    return LayerPlots((plots[0], plots[-1], along), tuple(plots[1:-1]))


def stretch_title(stretch: Stretch) -> str:
    one = stretch.first == stretch.last
    return f"{stretch.phase}, position {stretch.first}" + ("" if one else f" to {stretch.last}")


def layer_table(level: LayerLevel, at: tuple[str, ...], programs: Mapping[str, Shown]) -> LayerTable:
    """The same as figures."""
    titles = tuple(
        f"{programs[each.program].title}: {what}"
        for each in level.programs
        for what in (*(stretch_title(stretch) for stretch in level.stretches), "growth")
    )
    rows = []
    for place, name in enumerate(level.places):
        values: list[tuple[str, str]] = []
        for number, each in enumerate(level.programs):
            base: tuple[str | int, ...] = (*at, "programs", number)
            values += (
                (figure(value), pointer(*base, "relative", place, index))
                for index, value in enumerate(each.relative[place])
            )
            values.append((f"×{significant(each.growth[place])}", pointer(*base, "growth", place)))
        rows.append(LayerRow(name, tuple(values)))
    return LayerTable(titles, tuple(rows))


def steepest(level: LayerLevel, programs: Mapping[str, Shown]) -> list[str]:
    """Of each program: where error enters, and which place multiplies it the most."""
    said = []
    for each in level.programs:
        enters = next((place for place, row in enumerate(each.relative) if any(row)), None)
        if enters is None:
            said.append(f"{programs[each.program].title}: no error anywhere")
            continue
        grown = [(value, place) for place, value in enumerate(each.growth) if place > enters and math.isfinite(value)]
        most = max(grown, default=None)
        more = f", grows most at {level.places[most[1]]} (×{significant(most[0])})" if most else ""
        said.append(f"{programs[each.program].title}: enters at {level.places[enters]}{more}")
    return said


def _layers(
    level: LayerLevel, at: tuple[str, ...], programs: Mapping[str, Shown], axis: LogAxis, number: int, stretch: int
) -> Iterator[Curve]:
    """The residual stream as a line, which its worst token follows, and what is added to it as marks: its error is of another
    size, which no line should jump to and from."""
    style = programs[level.programs[number].program].style

    def marks(key: str, added: bool) -> tuple[Mark, ...]:
        return tuple(
            _mark(level, at, programs, axis, (number, key, place, stretch), across(place, len(level.places)))
            for place, name in enumerate(level.places)
            if name.endswith(_ADDED) == added
        )

    yield Curve(style, marks("worst", False), thin=True)
    yield Curve(style, marks("relative", False))
    if any(name.endswith(_ADDED) for name in level.places):
        yield Curve(style, marks("relative", True), line=False)


def _along(
    level: LayerLevel, at: tuple[str, ...], programs: Mapping[str, Shown], axis: LogAxis, number: int, place: int
) -> Iterator[Curve]:
    """One place, stretch by stretch."""
    count = len(level.stretches)
    for key in ("worst", "relative"):
        marks = (
            _mark(level, at, programs, axis, (number, key, place, stretch), across(stretch, count))
            for stretch in range(count)
        )
        yield Curve(programs[level.programs[number].program].style, tuple(marks), thin=key == "worst")


def _mark(
    level: LayerLevel,
    at: tuple[str, ...],
    programs: Mapping[str, Shown],
    axis: LogAxis,
    where: tuple[int, str, int, int],
    x: float,
) -> Mark:
    """``where``: the program's number, ``relative`` or ``worst``, the place and the stretch."""
    number, key, place, stretch = where
    errors = level.programs[number]
    value = (errors.worst if key == "worst" else errors.relative)[place][stretch]
    tip = _tip(level, programs, place, stretch)
    return Mark(x, axis.at(value), pointer(*at, "programs", *where), tip)


def _tip(level: LayerLevel, programs: Mapping[str, Shown], place: int, stretch: int) -> str:
    lines = [f"{level.places[place]}, {stretch_title(level.stretches[stretch])}"]
    for each in level.programs:
        relative, worst = each.relative[place][stretch], each.worst[place][stretch]
        lines.append(f"{programs[each.program].title}: {figure(relative)}, worst token {figure(worst)}")
    return "\n".join(lines)


def _layer_labels(level: LayerLevel) -> list[str]:
    """The layer's number where it begins."""
    labels: list[str] = []
    before: int | None = None
    for layer in level.layers:
        labels.append("" if layer is None or layer == before else str(layer))
        before = layer
    return labels


def _summary(level: LayerLevel, programs: Mapping[str, Shown], stretch: int) -> str:
    def said(program: LayerErrors) -> str:
        first, last = (program.relative[place][stretch] for place in (0, -1))
        return f"{programs[program.program].title} from {figure(first)} to {figure(last)}"

    if not level.places:
        return "no places"
    return f"Relative error after {len(level.places)} places: " + ", ".join(said(each) for each in level.programs)
