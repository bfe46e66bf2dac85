"""Verb ``passes reduce``: a folder that reproduces a rewrite by itself."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moecompiler.errors import UserError
from moecompiler.pages.figures import byte_size
from moecompiler.passes.selection import label
from moecompiler.tools.flags import SelectionFlags
from moecompiler.tools.groups import grouped
from moecompiler.tools.passes.bisect import accuracy_check, culprit_json, describe
from moecompiler.tools.passes.target import Target, for_target, open_subject
from moecompiler.tools.passes.verify import Seed

if TYPE_CHECKING:
    from moecompiler.debugging.bisect import Culprit
    from moecompiler.debugging.reduce import Reduced
    from moecompiler.debugging.subject import Subject

Output = Annotated[Path, typer.Option("--output", help="The folder to write; it must not be there yet.")]
Number = Annotated[
    int | None, typer.Option("--rewrite", help="The number of the rewrite (default: the one that bisect finds).")
]
OnRank = Annotated[int, typer.Option("--rank", help="The rank that --rewrite is counted on.")]


@grouped
def reduce(
    target: Target, output: Output, passes: SelectionFlags, rewrite: Number = None, rank: OnRank = 0, seed: Seed = 0
) -> None:
    """Write a folder with the smallest graph around a rewrite, its weights and inputs, and a script that shows the error."""
    from moecompiler.debugging.bisect import bisect, culprit_of

    if output.exists():
        raise UserError(f"--output {output}: is there already; give a new folder")
    subject = open_subject(target, seed)
    passes = for_target(passes, target)
    steps = passes.selection.passes()
    given = culprit_of(subject, steps, rank, rewrite) if rewrite is not None else None
    culprit = given or bisect(subject, steps, accuracy_check(subject))
    print(describe(culprit))
    write_reduced(subject, passes, culprit, output)


def write_reduced(subject: Subject, passes: SelectionFlags, culprit: Culprit, output: Path) -> None:
    """Writes the folder, whole or not at all, and says what is in it.

    Raises: UserError where it is there already or cannot be written, or the rewrite cannot be cut out.
    """
    from moecompiler.debugging.reduce import errors, reduce_rewrite
    from moecompiler.debugging.reduced_folder import write_folder

    steps = passes.selection.passes()
    reduced = reduce_rewrite(subject, steps, culprit)
    facts = culprit_json(culprit) | {
        "pass": culprit.name,
        "passes": [label(index, step.name) for index, step in enumerate(steps, 1)],
    }
    temporary = output.with_name(f".tmp-{os.getpid()}-{output.name}")
    try:
        temporary.mkdir(parents=True)
        write_folder(reduced, subject.reader, temporary, facts, _readme(culprit, reduced))
        os.rename(temporary, output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = sum(path.stat().st_size for path in output.iterdir())
    worst = max(errors(reduced.actual, reduced.expected).values())
    counts = " → ".join(str(len(part.model.graph.node)) for part in (reduced.before, reduced.after))
    print(f"{output}: {counts} nodes, {byte_size(size)}, largest relative error {worst:.2e}; python {output}/repro.py")


def _readme(culprit: Culprit, reduced: Reduced) -> str:
    weights = "random weights of a seed, for the true ones are large" if reduced.seeded else "the true weights"
    inputs = ", ".join(f"`{name}` {list(array.shape)}" for name, array in reduced.inputs.items())
    outputs = ", ".join(f"`{name}` {list(array.shape)}" for name, array in reduced.expected.items())
    return f"""# A rewrite by itself

{describe(culprit)}

`before.onnx` and `after.onnx` should compute the same: {outputs}
from {inputs or "constants alone"}, with {weights}.

    python repro.py           # both graphs on inputs.npz; exit status 1 where they differ
    python repro.py --rerun   # the pass as it is installed now, on before.onnx: is it mended?

| file | |
|---|---|
| `before.onnx`, `after.onnx` | the graph around the rewrite, without it and with it |
| `*.weights.json` | what their weights are made of |
| `weights.safetensors` | the weights (not there where they are random) |
| `inputs.npz`, `expected.npz`, `actual.npz` | inputs, and what each computed when this was written (`/` in names is `%2F`) |
| `rewrite.json` | the pass list, the pass, the rewrite, the errors |
"""
