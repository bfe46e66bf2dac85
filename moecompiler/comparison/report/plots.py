"""Plots as shapes with places, in percent of their area: what the template writes as SVG. Each mark says which number of
``result.json`` it shows."""

from __future__ import annotations

from dataclasses import dataclass

from moecompiler.comparison.report.axes import Tick

_FEW_MARKS = 70  # of a curve; of more the line is thin and without dots


@dataclass(frozen=True)
class Mark:
    """A value at ``x`` percent from the left and ``y`` from the bottom. ``source`` is a JSON pointer (RFC 6901) into the result;
    ``tip`` all that can be said of it. ``style``: a CSS class more; ``label``: what is written beside;
    ``begins``: no line leads to it."""

    x: float
    y: float
    source: str
    tip: str
    style: str = ""
    label: str = ""
    begins: bool = False


@dataclass(frozen=True)
class Curve:
    """``style`` is the program's CSS class; ``line``: whether marks are joined; ``thin``: a line without marks of its own."""

    style: str
    marks: tuple[Mark, ...]
    line: bool = True
    thin: bool = False

    @property
    def path(self) -> str:
        """An SVG path in a square of 100."""
        marks = self.marks if self.line else ()
        return "".join(
            f"{'M' if mark.begins or index == 0 else 'L'}{mark.x:.2f} {100 - mark.y:.2f}"
            for index, mark in enumerate(marks)
        )

    @property
    def dense(self) -> bool:
        """Whether marks would cover each other."""
        return len(self.marks) > _FEW_MARKS


@dataclass(frozen=True)
class Rule:
    """A horizontal line, as of a bound."""

    y: float
    text: str


@dataclass(frozen=True)
class Plot:
    """``summary`` is what the plot shows in words, for who does not see it."""

    title: str
    summary: str
    x_title: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    curves: tuple[Curve, ...]
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class Bar:
    """``share``: its length, in percent of the longest there may be."""

    style: str
    share: float
    text: str
    source: str
    tip: str


@dataclass(frozen=True)
class Bars:
    """Bars side by side under one label."""

    label: str
    bars: tuple[Bar, ...]


def pointer(*parts: str | int) -> str:
    """A JSON pointer; the parts are keys and places."""
    return "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in parts)
