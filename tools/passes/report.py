"""Verb ``passes report``: one HTML page of what the passes did, with numbers and pictures."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moecompiler.errors import UserError
from moecompiler.pages.figures import byte_size, counted
from moecompiler.passes.selection import label
from moecompiler.tools.flags import SelectionFlags
from moecompiler.tools.groups import grouped
from moecompiler.tools.passes.target import Target, for_target, open_subject
from moecompiler.tools.passes.verify import OUT_OF_TOLERANCE, AgainstHF, Seed

Output = Annotated[Path, typer.Option("--output", help="The page to write, an .html file.")]
Verify = Annotated[
    bool, typer.Option("--verify/--no_verify", help="Take numbers after each pass, which reads the weights.")
]


@grouped
def report(
    target: Target,
    output: Output,
    passes: SelectionFlags,
    verify: Verify = True,
    hf: AgainstHF = True,
    seed: Seed = 0,
) -> int:
    """Write one HTML page: times, counts, numbers after each pass, and each kind of rewrite as a picture before and after.

    Exit status 1 where a pass is out of tolerance: the first such pass is the last that runs, and the page is written.
    """
    from moecompiler.atomic import write_text_atomic
    from moecompiler.debugging.report.model import make_report
    from moecompiler.debugging.report.page import render

    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"--output {output}: {'is a directory' if output.is_dir() else 'its directory is not there'}")
    passes = for_target(passes, target)
    steps = passes.selection.passes()
    subject = open_subject(target, seed)
    errors = Console(stderr=True)
    with errors.status("running passes") if errors.is_terminal else nullcontext() as status:
        made = make_report(
            subject,
            steps,
            str(target),
            passes.selection.pipeline,
            checked=verify,
            against_hf=hf,
            told=lambda row: status.update(f"after {label(row.index, row.name)}") if status is not None else None,
        )
        page = render(made)
    try:
        write_text_atomic(output, page)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror or error}") from None
    verdict = "" if not verify else ", within tolerance" if made.passed else ", OUT OF TOLERANCE"
    print(
        f"wrote {output} ({byte_size(len(page.encode()))}): {counted(len(made.passes), 'pass', 'es')},"
        f" {counted(made.matches, 'rewrite')} of {counted(made.kinds, 'kind')}{verdict}"
    )
    return 0 if made.passed else OUT_OF_TOLERANCE
