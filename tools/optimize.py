"""Verb ``optimize``: runs a pipeline of passes over every rank's graph."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecompiler.artifact import Artifact
from moecompiler.artifact_writer import writing
from moecompiler.atomic import fingerprint, temporary_path
from moecompiler.passes.pipelines import OPTIMIZE, find_pipeline
from moecompiler.tools import options as opt
from moecompiler.tools.job import code_fingerprint, ranks_asked_for
from moecompiler.workers import ProgressFn, run_ranks


def optimize(
    checkpoint_dir: opt.CheckpointDir,
    output_dir: opt.OutputDir,
    pipeline: opt.Pipeline = OPTIMIZE,
    allow_missed: opt.AllowMissed = False,
    workers: opt.Workers = 1,
    rank: opt.Rank = None,
) -> None:
    """Run the graph passes over what `export` wrote."""
    source = Artifact.open(checkpoint_dir, ("export",))
    run_optimize(source, output_dir, pipeline, workers, rank, allow_missed)
    print(f"optimized {source.world_size} rank(s) to {output_dir}")


def run_optimize(
    source: Artifact,
    output_dir: Path,
    pipeline: str,
    workers: int = 1,
    rank: int | None = None,
    allow_missed: bool = False,
) -> None:
    """Optimizes what of ``source`` is not in ``output_dir`` yet. A pass that should have matched and did not is an error, or a
    note on stderr with ``allow_missed``."""
    passes = [step.name for step in find_pipeline(pipeline)]
    ranks = ranks_asked_for(source.world_size, rank)
    source.check(ranks)
    header = source.header | {"pipeline": pipeline}
    code = code_fingerprint()
    keys = {r: _key(source, r, code, passes, allow_missed) for r in ranks}
    with writing(output_dir, "optimize", source.world_size, header) as writer:
        missing = [r for r in ranks if not writer.is_done(r, keys[r])]

        def commit(rank: int, result: tuple[dict[str, Path], dict[str, Any]]) -> None:
            writer.commit_rank(rank, keys[rank], *result)
            for each in result[1]["passes"]:
                for missed in each.get("missed", ()):
                    print(f"note: rank {rank}: pass {each['name']} did not match in {missed}", file=sys.stderr)

        task = _OptimizeRank(source.directory, output_dir, pipeline, allow_missed)
        run_ranks(task, missing, workers, "optimize", on_result=commit)


def _key(source: Artifact, rank: int, code: str, passes: list[str], allow_missed: bool) -> str:
    inputs = {name: record.sha256 for name, record in source.rank_files(rank).items()}
    return fingerprint("optimize", code, inputs, passes, allow_missed)


@dataclass(frozen=True)
class _OptimizeRank:
    """The task: one rank's files, under temporary names, and what the passes did."""

    source: Path
    directory: Path
    pipeline: str
    allow_missed: bool

    def __call__(self, rank: int, progress: ProgressFn) -> tuple[dict[str, Path], dict[str, Any]]:
        from moecompiler.graph import load_program, serialize
        from moecompiler.pipeline import run_passes

        stem = f"rank{rank}"
        exported = load_program(self.source / f"{stem}.onnx")
        passes = find_pipeline(self.pipeline)
        program, results = run_passes(passes, exported, progress, allow_missed=self.allow_missed)
        staged = {name: temporary_path(self.directory / name) for name in (f"{stem}.onnx", f"{stem}.weights.json")}
        for path, content in zip(staged.values(), serialize(program, stem), strict=True):
            path.write_bytes(content)
        return staged, {"passes": [result.to_json() for result in results]}
