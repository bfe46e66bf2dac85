"""Verb ``passes diff``: what changed between two graphs, or two output directories, rank by rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moecompiler.artifact import Artifact
from moecompiler.errors import UserError
from moecompiler.tools import options as opt
from moecompiler.tools.job import ranks_asked_for

if TYPE_CHECKING:
    from moecompiler.debugging.diff import GraphDiff

DIFFERENT = 1
_METAVAR = "DIR|FILE.onnx"
Before = Annotated[
    Path,
    typer.Argument(help="An ONNX file, or what `export`, `optimize`, `build` or `compile` wrote.", metavar=_METAVAR),
]
After = Annotated[Path, typer.Argument(help="The same kind of thing, to compare it with.", metavar=_METAVAR)]


def diff(before: Before, after: After, rank: opt.Rank = None, as_json: opt.Json = False) -> int:
    """Show what changed: nodes by HF module, how many of each op, inputs and outputs, weights.

    Of what `compile` wrote, the optimized graphs are compared. Exit status 1 where there is a difference.
    """
    from moecompiler.debugging.diff import diff as compare
    from moecompiler.debugging.held import Side

    pairs = _pairs(before, after, rank)
    diffs = {name: compare(Side.read(a), Side.read(b)) for name, (a, b) in pairs.items()}
    if as_json:
        json.dump([{"rank": name} | each.to_json() for name, each in diffs.items()], sys.stdout, indent=2)
        print()
    else:
        _print(diffs)
    return 0 if all(each.equal for each in diffs.values()) else DIFFERENT


def _print(diffs: dict[int | None, GraphDiff]) -> None:
    """Ranks whose differences read the same are written once."""
    from moecompiler.debugging.diff_text import diff_text, ranges

    alike: dict[str, list[int | None]] = {}
    for rank, each in diffs.items():
        alike.setdefault(diff_text(each), []).append(rank)
    for text, ranks in alike.items():
        numbers = [rank for rank in ranks if rank is not None]
        if numbers:
            print(f"--- rank {ranges(numbers)}")
        sys.stdout.write(text)


def _pairs(before: Path, after: Path, rank: int | None) -> dict[int | None, tuple[Path, Path]]:
    """The files to compare, by rank; None where they are files.

    Raises: UserError where one is a file and the other a directory, or they hold different ranks.
    """
    files = [path for path in (before, after) if not path.is_dir()]
    if len(files) == 1:
        raise UserError(f"{files[0]}: is no output directory; compare two ONNX files, or two output directories")
    if files:
        if rank is not None:
            raise UserError(f"--rank {rank}: ONNX files have no ranks; give output directories")
        return {None: (before, after)}
    old, new = (_graphs_in(path) for path in (before, after))
    if old.world_size != new.world_size:
        raise UserError(
            f"{before} holds {old.world_size} rank(s) and {after} {new.world_size}: compile both for the same mapping"
        )
    ranks = ranks_asked_for(old.world_size, rank)
    for artifact in (old, new):
        artifact.check(ranks, hashes=False)
    return {each: (old.path(f"rank{each}.onnx"), new.path(f"rank{each}.onnx")) for each in ranks}


def _graphs_in(directory: Path) -> Artifact:
    """The directory's graphs: those of a compile are in ``optimize``."""
    artifact = Artifact.open(directory)
    if artifact.stage == "engine" and (directory / "optimize").is_dir():
        return Artifact.open(directory / "optimize", ("optimize",))
    if any(name.endswith(".onnx") for name in artifact.manifest.named_files()):
        return artifact
    raise UserError(f"{directory}: holds engines without their graphs; give what `moecompiler optimize` wrote")
