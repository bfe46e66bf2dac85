"""Axes of plots: where a value is drawn, in percent of the way along, and what is written beside."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count

_SLOT = 7.0  # percent of a logarithmic axis for what it cannot hold: zeros at its start, what is not finite at its end
_MOST_TICKS = 7


@dataclass(frozen=True)
class Tick:
    place: float
    text: str


@dataclass(frozen=True)
class LogAxis:
    """From ``10 ** low`` to ``10 ** high``; ``zeros`` and ``beyond``: whether there is a place for 0 and for what is no finite
    number."""

    low: int
    high: int
    zeros: bool = False
    beyond: bool = False

    @staticmethod
    def of(values: Iterable[float]) -> LogAxis:
        """The whole decades that hold the values; one below 0, which rounding makes of a small one, counts as 0."""
        known = list(values)
        positive = [value for value in known if value > 0 and math.isfinite(value)]
        low = math.floor(math.log10(min(positive, default=1e-3)))
        high = max(math.ceil(math.log10(max(positive, default=1.0))), low + 1)
        return LogAxis(low, high, any(value <= 0 for value in known), any(not math.isfinite(value) for value in known))

    def at(self, value: float) -> float:
        """Percent from the axis's start."""
        if not math.isfinite(value):
            return 100 - _SLOT / 4
        if value <= 0:
            return _SLOT / 4
        return self._decade(math.log10(value))

    def ticks(self) -> tuple[Tick, ...]:
        step = math.ceil((self.high - self.low) / (_MOST_TICKS - 1))
        decades = [Tick(self._decade(power), f"1e{power}") for power in range(self.low, self.high + 1, step)]
        zero = [Tick(self.at(0), "0")] if self.zeros else []
        return (*zero, *decades, *([Tick(self.at(math.inf), "∞")] if self.beyond else []))

    def _decade(self, power: float) -> float:
        start, end = (_SLOT if self.zeros else 0.0), 100 - (_SLOT if self.beyond else 0.0)
        return start + (end - start) * (power - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class LinearAxis:
    """From ``low`` to ``high``, with a tick at each ``step``."""

    low: float
    high: float
    step: float

    @staticmethod
    def of(values: Iterable[float]) -> LinearAxis:
        """From 0 to the next 1, 2 or 5 times a power of ten; what is no finite number is drawn at the end."""
        most = max((value for value in values if math.isfinite(value)), default=0.0)
        high = _round_up(most) if most > 0 else 1.0
        return LinearAxis(0.0, high, high / 4)

    @staticmethod
    def around(values: Iterable[float]) -> LinearAxis:
        """Between round numbers about the values, for what has no natural zero."""
        known = [value for value in values if math.isfinite(value)] or [0.0]
        step = _round_up((max(known) - min(known)) / 4 or abs(known[0]) / 10 or 1.0)
        low, high = math.floor(min(known) / step), math.ceil(max(known) / step)
        return LinearAxis(low * step, max(high, low + 1) * step, step)

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return 100 * min(share, 1.0) if math.isfinite(value) else 100.0

    def ticks(self, written: Callable[[float], str]) -> tuple[Tick, ...]:
        values = [self.low + index * self.step for index in range(round((self.high - self.low) / self.step) + 1)]
        return tuple(Tick(self.at(value), written(value)) for value in values)

    def percents(self) -> tuple[Tick, ...]:
        """Ticks for an axis of shares."""
        return self.ticks(lambda value: f"{100 * value:.3g}%")


def _round_up(value: float) -> float:
    """1, 2 or 5 times a power of ten, the next that is not less."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(part * power for part in (1, 2, 5, 10) if part * power >= value)


def numbered(labels: Sequence[str], most: int = 9) -> tuple[Tick, ...]:
    """Ticks for things side by side, of which at most ``most`` are named, every 1st, 2nd, 5th, 10th …; a label may be empty."""
    return tuple(Tick(across(index, len(labels)), labels[index]) for index in _some(labels, most))


def bounds(labels: Sequence[str], most: int = 7) -> tuple[Tick, ...]:
    """Ticks between things side by side: one label more than there are things; see ``numbered``."""
    return tuple(Tick(100 * index / max(len(labels) - 1, 1), labels[index]) for index in _some(labels, most))


def _some(labels: Sequence[str], most: int) -> list[int]:
    named = [index for index, label in enumerate(labels) if label]
    steps = (part * 10**power for power in count() for part in (1, 2, 5))
    return named[:: next(step for step in steps if step * most >= len(named))]


def across(index: int, things: int) -> float:
    """Where the middle of the ``index``-th of ``things`` side by side is."""
    return 100 * (index + 0.5) / things
