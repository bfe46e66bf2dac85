"""Where error enters and how it grows: hidden states along the model, a plot for each stretch of the run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moecompiler.comparison.report.axes import LogAxis, across, numbered
from moecompiler.comparison.report.plots import Curve, Mark, Plot, pointer
from moecompiler.comparison.report.programs import Shown
from moecompiler.comparison.result import LayerErrors, LayerLevel, Stretch
from moecompiler.pages.figures import figure, significant


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


def layer_plots(level: LayerLevel, at: tuple[str, ...], programs: Mapping[str, Shown], axis: LogAxis) -> list[Plot]:
    """A plot for each stretch. ``at``: the keys under which the result holds the level."""
    return [
        Plot(
            stretch_title(stretch),
            _summary(level, programs, index),
            "layer",
            "relative error of hidden states",
            numbered(_layer_labels(level)),
            axis.ticks(),
            tuple(_curves(level, at, programs, axis, index)),
        )
        for index, stretch in enumerate(level.stretches)
    ]


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


def _curves(
    level: LayerLevel, at: tuple[str, ...], programs: Mapping[str, Shown], axis: LogAxis, stretch: int
) -> Iterator[Curve]:
    for number, program in enumerate(level.programs):
        style = programs[program.program].style
        for key, values, thin in (("worst", program.worst, True), ("relative", program.relative, False)):
            marks = (
                Mark(
                    across(place, len(level.places)),
                    axis.at(row[stretch]),
                    pointer(*at, "programs", number, key, place, stretch),
                    _tip(level, programs, place, stretch),
                )
                for place, row in enumerate(values)
            )
            yield Curve(style, tuple(marks), thin=thin)


def _tip(level: LayerLevel, programs: Mapping[str, Shown], place: int, stretch: int) -> str:
    lines = [level.places[place]]
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
