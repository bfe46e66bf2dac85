"""Verb ``passes verify``: numbers after every pass, all ranks together."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from moecompiler.errors import UserError
from moecompiler.passes.selection import label
from moecompiler.tools import options as opt
from moecompiler.tools.flags import SelectionFlags
from moecompiler.tools.groups import grouped
from moecompiler.tools.passes.target import Target, for_target, open_subject
from moecompiler.tools.printing import wide_console

if TYPE_CHECKING:
    from moecompiler.debugging.subject import Subject
    from moecompiler.debugging.verify import Verified
    from moecompiler.validation.difference import Difference

OUT_OF_TOLERANCE = 1
Seed = Annotated[int, typer.Option("--seed", help="Seed of random inputs.")]
AgainstHF = Annotated[bool, typer.Option("--hf/--no_hf", help="Compare with Hugging Face's model too.")]


@grouped
def verify(
    target: Target, passes: SelectionFlags, hf: AgainstHF = True, seed: Seed = 0, as_json: opt.Json = False
) -> int:
    """Run the passes one by one, and after each compare the numbers with the graph before it and with Hugging Face's model.

    Exit status 1 where a pass is out of tolerance: the first such pass is the last that runs.
    """
    rows = verified_rows(open_subject(target, seed), for_target(passes, target), hf)
    if as_json:
        print(json.dumps([row.to_json() for row in rows], indent=2))
    else:
        wide_console().print(verified_table(rows))
        print(_verdict(rows))
    return 0 if rows[-1].passed else OUT_OF_TOLERANCE


def verified_rows(subject: Subject, passes: SelectionFlags, hf: bool = True) -> list[Verified]:
    """Every pass's numbers, to the first that is out of tolerance; shows on stderr which pass runs, if that is a terminal."""
    from moecompiler.debugging.verify import verify as run

    errors = Console(stderr=True)
    rows = []
    with errors.status("running passes") if errors.is_terminal else nullcontext() as status:
        for row, _ in run(subject, passes.selection.passes(), against_hf=hf):
            rows.append(row)
            if status is not None:
                status.update(f"after {label(row.index, row.name)}")
    return rows


def verified_table(rows: list[Verified]) -> Table:
    table = Table(
        "after",
        "rewrites",
        "before: max",
        "relative",
        "top-1",
        "KL",
        "HF: max",
        "relative",
        "top-1",
        "KL",
        "",
        box=None,
    )
    for row in rows:
        mark = "[green]ok[/green]" if row.passed else "[red]FAIL[/red]"
        table.add_row(label(row.index, row.name), str(row.matches), *_cells(row.before), *_cells(row.hf), mark)
    return table


def _cells(found: Difference | None) -> tuple[str, ...]:
    if found is None:
        return ("", "", "", "")
    return f"{found.max_abs:.1e}", f"{found.relative:.1e}", f"{found.top1:.2%}", f"{found.kl:.1e}"


def _verdict(rows: list[Verified]) -> str:
    last = rows[-1]
    if last.passed:
        return f"within tolerance after each of {len(rows) - 1} passes"
    if last.index == 0:
        return "OUT OF TOLERANCE before any pass: the export differs from Hugging Face's model"
    where = f": it shows first in {last.enters}" if last.enters else ""
    return (
        f"OUT OF TOLERANCE after {label(last.index, last.name)}{where}; `moecompiler passes bisect` finds the rewrite"
    )


def require_verified(target: Path, passes: SelectionFlags) -> None:
    """``--verify_each``: prints the numbers after each pass on stderr. Raises: UserError where one is out of tolerance."""
    rows = verified_rows(open_subject(target), passes)
    Console(file=sys.stderr, width=120).print(verified_table(rows))
    if not rows[-1].passed:
        raise UserError(f"{target}: {_verdict(rows)}")
