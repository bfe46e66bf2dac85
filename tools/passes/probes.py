"""A probe's folder: what somebody's own check is given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moecompiler.artifact import Artifact
from moecompiler.artifact_writer import writing
from moecompiler.tools.build import run_build
from moecompiler.tools.flags import EngineFlags, WorkFlags
from moecompiler.tools.passes.target import open_export

if TYPE_CHECKING:
    from moecompiler.debugging.subject import Subject
    from moecompiler.graph import Program


def write_probe(folder: Path, programs: Sequence[Program], subject: Subject, target: Path) -> None:
    """Writes ``rankN.onnx`` and their weights, and, where they come from an export, an engine directory in ``engine``."""
    from moecompiler.dumps import write_dumps

    alone = target.suffix == ".onnx"
    names = ["model"] if alone else [f"rank{rank}" for rank in range(len(programs))]
    named = {f"{name}.onnx": program for name, program in zip(names, programs, strict=True)}
    write_dumps(named, subject.reader, lambda name: folder / name)
    if not alone:
        _build(folder / "engine", programs, open_export(target))


def _build(directory: Path, programs: Sequence[Program], exported: Artifact) -> None:
    from moecompiler.graph import serialize

    optimized = directory / "optimize"
    with writing(optimized, "optimize", exported.world_size, exported.header) as writer:
        for rank, program in enumerate(programs):
            names = (f"rank{rank}.onnx", f"rank{rank}.weights.json")
            staged = {name: writer.temp(name) for name in names}
            for path, content in zip(staged.values(), serialize(program, f"rank{rank}"), strict=True):
                path.write_bytes(content)
            writer.commit_rank(rank, "probe", staged, {"passes": []})
    run_build(Artifact.open(optimized, ("optimize",)), directory, EngineFlags(), WorkFlags())
