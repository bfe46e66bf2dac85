"""The report as one HTML page that asks nothing of anybody: no network, no other file."""

from __future__ import annotations

from moecompiler.debugging.report.kinds import Kind
from moecompiler.debugging.report.model import PassReport, Report
from moecompiler.debugging.report.picture import SIGNS, draw
from moecompiler.pages.page import render_page

_MANY_KINDS = 8  # of one pass: from here on those that did the same are put together


def render(report: Report) -> str:
    """The page. Names in it may be anybody's: all are escaped, and no script runs but the page's own."""
    return render_page(
        __package__,
        {"groups": groups},
        report=report,
        data=report.to_json(),
        draw=draw,
        signs=SIGNS,
        longest=max((each.seconds for each in report.passes), default=0.0),
        most=max([report.nodes, *(each.nodes_after for each in report.passes)]),
    )


def groups(step: PassReport) -> list[tuple[str, list[Kind]]]:
    """The kinds by what was done, where there are many; else all, under no name."""
    if len(step.kinds) < _MANY_KINDS:
        return [("", list(step.kinds))]
    found: dict[str, list[Kind]] = {}
    for kind in step.kinds:
        found.setdefault(kind.what, []).append(kind)
    return list(found.items())
