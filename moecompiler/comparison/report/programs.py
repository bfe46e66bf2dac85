"""What programs are called in a report, and how they look: by colour, and by shape for who sees no colour."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moecompiler.comparison.result import OOTB, PLUGINS, REFERENCE, Result

TITLES = {PLUGINS: "plugins on", OOTB: "plugins off", REFERENCE: "reference"}


@dataclass(frozen=True)
class Shown:
    """``style``: the CSS class, ``p1`` for the first program, ``p2`` for the second."""

    name: str
    title: str
    style: str


def shown(result: Result) -> dict[str, Shown]:
    """The programs that are held against the reference, by name, in the result's order."""
    labels = {each.name: each.label for each in result.meta.programs}
    names = [name for name in dict.fromkeys(_named(result)) if name != REFERENCE]
    return {name: Shown(name, _title(name, labels), f"p{place}") for place, name in enumerate(names, 1)}


def _title(name: str, labels: dict[str, str]) -> str:
    known = TITLES.get(name)
    return known or (f"{name}: {labels[name]}" if labels.get(name, name) != name else name)


def _named(result: Result) -> Iterator[str]:
    yield from (each.name for each in result.meta.programs)
    for level in (result.layer, result.model, result.routing):
        yield from (each.program for each in level.programs) if level else ()
    for case in result.op.cases if result.op else ():
        yield from case.errors
    for time in result.op.times if result.op else ():
        yield time.program
