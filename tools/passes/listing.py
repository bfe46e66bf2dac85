"""Verb ``passes list``: which passes there are, in which order, and what each does, needs and guarantees."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moecompiler.errors import UserError
from moecompiler.passes.pipelines import named_pipelines, passes_by_name
from moecompiler.passes.selection import ENTRY_POINTS, label, load
from moecompiler.pipeline import Pass
from moecompiler.tools import options as opt
from moecompiler.tools.flags import SelectionFlags
from moecompiler.tools.groups import grouped
from moecompiler.tools.quantization import recipe_from_flags

SAID = ("needs", "must_match", "guarantees")


@grouped
def list_(passes: SelectionFlags, as_json: opt.Json = False) -> None:
    """List the passes of a pipeline in order, then those that stand in none: what each does, needs and guarantees."""
    passes = replace(passes, recipe=recipe_from_flags(passes))
    steps = passes.selection.passes()
    standing = {step.name for step in steps}
    mine = [describe(step, name) for name, step in passes_by_name().items() if name not in standing]
    theirs = [
        _described_entry(entry) for entry in sorted(entry_points(group=ENTRY_POINTS)) if entry.name not in standing
    ]
    rows = [describe(step, label(index, step.name)) for index, step in enumerate(steps, 1)]
    others = [*mine, *theirs]
    if as_json:
        print(json.dumps({"pipeline": passes.selection.pipeline, "passes": rows, "others": others}, indent=2))
        return
    console = Console(highlight=False)
    for title, each in ((f"pipeline {passes.selection.pipeline}", rows), ("others, by name", others)):
        console.print(title, style="bold", markup=False)
        console.print(_table(each))
    console.print(f"pipelines: {', '.join(named_pipelines())}", markup=False)


def describe(step: Pass, name: str) -> dict[str, Any]:
    """What a pass says of itself: the first paragraph of its docstring, and its ``needs``, ``must_match`` and ``guarantees``."""
    documented = inspect.getdoc(type(step)) or ""
    said = {key: getattr(step, key, "") for key in SAID}
    return {"name": name, "does": " ".join(documented.split("\n\n")[0].replace("``", "").split()), **said}


def _described_entry(entry: EntryPoint) -> dict[str, Any]:
    """Another package's pass; of one that cannot be loaded, why: it is no reason not to list the others."""
    try:
        return describe(load(entry), entry.name)
    except UserError as error:
        return {"name": entry.name, "does": "", **dict.fromkeys(SAID, ""), "error": str(error)}


def _table(rows: list[dict[str, Any]]) -> Table:
    """A name and, beside it, as many lines as the rest takes, however wide the terminal is."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    for row in rows:
        table.add_row(row["name"], Text(row["does"] or row.get("error", "")))
        for key in SAID:
            if row[key]:
                table.add_row("", Text.assemble((f"{key.replace('_', ' ')}: ", "dim"), row[key]))
    return table
