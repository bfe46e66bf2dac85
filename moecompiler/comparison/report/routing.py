"""Which experts were chosen otherwise: a heat map of layers and experts, and each flip with the gate's margin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moecompiler.comparison.report.axes import LogAxis, across, numbered
from moecompiler.comparison.report.plots import Curve, Mark, Plot, pointer
from moecompiler.comparison.report.programs import Shown
from moecompiler.comparison.result import Flip, RoutingLevel
from moecompiler.pages.figures import counted, significant

_MOST_FLIPS = 100  # that are listed
_MOST_MARKS = 1500  # that are drawn
_SHADES = 5


@dataclass(frozen=True)
class Cell:
    """``shade``: 0 for none, then 1 to 5 by the share of the largest count of all heat maps."""

    count: int
    shade: int
    source: str
    tip: str


@dataclass(frozen=True)
class HeatRow:
    layer: int
    cells: tuple[Cell, ...]
    total: int


@dataclass(frozen=True)
class Heat:
    """A program's flips; ``columns``: sums over layers."""

    program: Shown
    rerouted: float
    total: int
    beyond: int
    rows: tuple[HeatRow, ...]
    columns: tuple[int, ...]
    summary: str


@dataclass(frozen=True)
class ListedFlip:
    program: Shown
    flip: Flip
    after: str


def heats(level: RoutingLevel, programs: Mapping[str, Shown]) -> list[Heat]:
    most = max((count for each in level.programs for row in each.flip_counts for count in row), default=0)
    found = []
    for number, each in enumerate(level.programs):
        rows = tuple(
            HeatRow(
                layer,
                tuple(
                    Cell(
                        count,
                        -(-_SHADES * count // most) if most else 0,
                        pointer("routing", "programs", number, "flip_counts", place, expert),
                        f"layer {layer}, expert {expert}: {counted(count, 'flip')}",
                    )
                    for expert, count in enumerate(counts)
                ),
                sum(counts),
            )
            for place, (layer, counts) in enumerate(zip(level.layers, each.flip_counts, strict=True))
        )
        total = sum(row.total for row in rows)
        decided = len(level.layers) * len(level.tokens) * level.top_k
        found.append(
            Heat(
                programs[each.program],
                each.rerouted,
                total,
                sum(not flip.within for flip in each.flips),
                rows,
                tuple(sum(column) for column in zip(*each.flip_counts, strict=True)),
                f"{total} of {decided} choices are other experts, over {counted(len(rows), 'layer')}"
                f" and {counted(level.experts, 'expert')}",
            )
        )
    return found


def listed_flips(level: RoutingLevel, programs: Mapping[str, Shown]) -> list[ListedFlip]:
    """Those that rounding does not explain first, then by falling margin; at most a hundred."""
    every = [(each.program, flip) for each in level.programs for flip in each.flips]
    every.sort(key=lambda pair: (pair[1].within, -pair[1].relative_margin))
    return [
        ListedFlip(programs[name], flip, level.tokens[flip.token].text if flip.token < len(level.tokens) else "")
        for name, flip in every[:_MOST_FLIPS]
    ]


def margin_plot(level: RoutingLevel, programs: Mapping[str, Shown]) -> Plot | None:
    """Each flip by its layer and the gate's margin; None where there are none. Of very many, those with the largest margins."""
    if not any(each.flips for each in level.programs):
        return None
    axis = LogAxis.of(flip.relative_margin for each in level.programs for flip in each.flips)
    places = {layer: place for place, layer in enumerate(level.layers)}
    curves = []
    for number, each in enumerate(level.programs):
        program = programs[each.program]
        largest = sorted(enumerate(each.flips), key=lambda pair: -pair[1].relative_margin)[:_MOST_MARKS]
        shift = (number - (len(level.programs) - 1) / 2) * 30 / len(level.layers)
        marks = tuple(
            Mark(
                across(places[flip.layer], len(places)) + shift,
                axis.at(flip.relative_margin),
                pointer("routing", "programs", number, "flips", index, "relative_margin"),
                f"{program.title}, layer {flip.layer}: expert {flip.wanted} → {flip.got}\n{_margin(flip)}",
                "" if flip.within else "beyond",
            )
            for index, flip in largest
        )
        curves.append(Curve(program.style, marks, line=False))
    return Plot(
        "Margin of the gate at each flip",
        f"{sum(len(each.flips) for each in level.programs)} flips by layer; relative margins"
        f" from 1e{axis.low} to 1e{axis.high}",
        "layer",
        "relative margin",
        numbered([str(layer) for layer in level.layers]),
        axis.ticks(),
        tuple(curves),
    )


def _margin(flip: Flip) -> str:
    return (
        f"margin {significant(flip.margin)}, relative {significant(flip.relative_margin)}:"
        f" {'rounding may decide' if flip.within else 'more than rounding'}"
    )
