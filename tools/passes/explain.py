"""Verb ``passes explain``: which passes touched a node or a module, and why the others did not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moecompiler.errors import UserError
from moecompiler.tools import options as opt
from moecompiler.tools.flags import SelectionFlags
from moecompiler.tools.groups import grouped
from moecompiler.tools.job import Job, ranks_asked_for
from moecompiler.tools.passes.target import Target, for_target, open_export

if TYPE_CHECKING:
    from moecompiler.graph import Program

Subject = Annotated[
    str,
    typer.Argument(
        help="A node, as model.layers.0.mlp/Mul_7, or a module, as model.layers.0.mlp.", metavar="NODE|MODULE"
    ),
]


@grouped
def explain(
    target: Target, subject: Subject, passes: SelectionFlags, rank: opt.Rank = None, as_json: opt.Json = False
) -> None:
    """Show which passes touched a node or a module, and why the others did not.

    The node may be one that a pass makes. Without --rank it is looked for in the first rank of each pipeline stage.
    """
    from moecompiler.debugging.explain import explain as run
    from moecompiler.debugging.explain_text import explained_text

    passes = for_target(passes, target)
    steps = passes.selection.passes()
    unknown = None
    for which, program in _programs(target, rank, subject):
        try:
            found = run(program, steps, subject)
        except UserError as error:
            unknown = unknown or error
            continue
        if as_json:
            print(json.dumps({"rank": which} | found.to_json(), indent=2))
        else:
            print(f"rank {which}, {explained_text(found)}" if which is not None else explained_text(found), end="")
        return
    assert unknown is not None
    raise unknown


def _programs(target: Path, rank: int | None, subject: str) -> Iterator[tuple[int | None, Program]]:
    """The graphs to look in, with their ranks, one that has such a node to begin with before others."""
    if target.suffix == ".onnx":
        from moecompiler.foreign import open_foreign

        if rank is not None:
            raise UserError(f"--rank {rank}: an ONNX file has no ranks; give an output directory")
        yield None, open_foreign(target)[0]
        return
    from moecompiler.debugging.explain import is_of
    from moecompiler.graph import load_program

    artifact = open_export(target)
    ranks = ranks_asked_for(artifact.world_size, rank)
    if rank is None:  # the tensor-parallel ranks of a stage have the same graph
        ranks = ranks[:: Job.of(artifact).mapping.tp_size]
    artifact.check(ranks)
    programs = [(each, load_program(artifact.directory / f"rank{each}.onnx")) for each in ranks]
    programs.sort(key=lambda each: not any(is_of(subject, node.name) for node in each[1].model.graph.node))
    yield from programs
