"""Verb ``passes list``: which passes there are, in which order, and what each does, needs and guarantees."""

from __future__ import annotations

import inspect
import json
from importlib.metadata import entry_points
from typing import Any

from rich.table import Table

from moecompiler.passes.pipelines import named_pipelines, passes_by_name
from moecompiler.passes.selection import ENTRY_POINTS, label, load
from moecompiler.pipeline import Pass
from moecompiler.tools import options as opt
from moecompiler.tools.flags import SelectionFlags
from moecompiler.tools.groups import grouped
from moecompiler.tools.printing import wide_console


@grouped
def list_(passes: SelectionFlags, as_json: opt.Json = False) -> None:
    """List the passes of a pipeline in order, then those that stand in none: what each does, needs and guarantees."""
    steps = passes.selection.passes()
    standing = {step.name for step in steps}
    mine = [step for name, step in passes_by_name().items() if name not in standing]
    theirs = [load(entry) for entry in entry_points(group=ENTRY_POINTS) if entry.name not in standing]
    rows = [describe(step, label(index, step.name)) for index, step in enumerate(steps, 1)]
    others = [describe(step, step.name) for step in (*mine, *theirs)]
    if as_json:
        print(json.dumps({"pipeline": passes.pipeline, "passes": rows, "others": others}, indent=2))
        return
    console = wide_console()
    console.print(_table(f"pipeline {passes.pipeline}", rows))
    console.print(_table("others, by name", others))
    console.print(f"pipelines: {', '.join(named_pipelines())}", highlight=False)


def describe(step: Pass, name: str) -> dict[str, Any]:
    """What a pass says of itself: the first paragraph of its docstring, and its ``needs``, ``must_match`` and ``guarantees``."""
    documented = inspect.getdoc(type(step)) or ""
    said = {key: getattr(step, key, "") for key in ("needs", "must_match", "guarantees")}
    return {"name": name, "does": " ".join(documented.split("\n\n")[0].split()), **said}


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "pass", "does", "needs", "must match", "guarantees", title=title, title_justify="left", show_lines=True
    )
    for row in rows:
        table.add_row(*(row[key] for key in ("name", "does", "needs", "must_match", "guarantees")))
    return table
