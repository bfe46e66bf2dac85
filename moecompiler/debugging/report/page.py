"""The report as one HTML page that asks nothing of anybody: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

import jinja2

from moecompiler.debugging.report.kinds import Kind
from moecompiler.debugging.report.model import PassReport, Report
from moecompiler.debugging.report.picture import SIGNS, counted, draw

_MANY_KINDS = 8  # of one pass: from here on those that did the same are put together


def render(report: Report) -> str:
    """The page. Names in it may be anybody's: all are escaped, and no script runs but the page's own."""
    resources = files(__package__) / "page"
    script, style = ((resources / name).read_text(encoding="utf-8") for name in ("script.js", "style.css"))
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (resources / name).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "figure": figure,
        "duration": duration,
        "groups": groups,
        "counted": counted,
        "percent": "{:.2%}".format,
    }
    return environment.get_template("page.html.j2").render(
        report=report,
        data=report.to_json(),
        draw=draw,
        signs=SIGNS,
        longest=max((each.seconds for each in report.passes), default=0.0),
        most=max([report.nodes, *(each.nodes_after for each in report.passes)]),
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def figure(value: float) -> str:
    """An error, in two digits."""
    return "0" if value == 0 else f"{value:.1e}"


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def groups(step: PassReport) -> list[tuple[str, list[Kind]]]:
    """The kinds by what was done, where there are many; else all, under no name."""
    if len(step.kinds) < _MANY_KINDS:
        return [("", list(step.kinds))]
    found: dict[str, list[Kind]] = {}
    for kind in step.kinds:
        found.setdefault(kind.what, []).append(kind)
    return list(found.items())
