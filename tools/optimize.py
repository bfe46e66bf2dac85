"""Verb ``optimize``: runs passes over every rank's graph, or over somebody else's ONNX file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from moecompiler.artifact import Artifact
from moecompiler.artifact_writer import writing
from moecompiler.atomic import fingerprint, temporary_path
from moecompiler.config import ModelConfig
from moecompiler.errors import UserError
from moecompiler.packed import packed_from
from moecompiler.passes.selection import identity
from moecompiler.pipeline import PassResult
from moecompiler.room import PROCESS
from moecompiler.tools import options as opt
from moecompiler.tools.flags import InstrumentFlags, SelectionFlags, WorkFlags
from moecompiler.tools.groups import grouped
from moecompiler.tools.instruments import Watcher, check_instruments, show
from moecompiler.tools.job import Job, code_fingerprint, ranks_asked_for
from moecompiler.tools.kv_cache import with_cache
from moecompiler.tools.quantization import checked_recipe
from moecompiler.tools.room import workers_here
from moecompiler.workers import ProgressFn, run_ranks

DUMPS = "passes"  # the folder for graphs between passes in the output directory


@grouped
def optimize(
    passes: SelectionFlags,
    instruments: InstrumentFlags,
    work: WorkFlags,
    onnx_file: Annotated[Path | None, typer.Argument(help="An ONNX file of somebody else, instead.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Where that file's result goes; its weights go beside it.")
    ] = None,
    checkpoint_dir: opt.OptionalCheckpointDir = None,
    output_dir: opt.OptionalOutputDir = None,
) -> None:
    """Run graph passes over what `export` wrote, or over any ONNX file: `optimize IN.onnx --output OUT.onnx`."""
    if onnx_file is not None:
        from moecompiler.tools.optimize_foreign import run_optimize_foreign

        if checkpoint_dir is not None or output_dir is not None or output is None:
            raise UserError("optimize IN.onnx takes --output OUT.onnx, and neither --checkpoint_dir nor --output_dir")
        run_optimize_foreign(onnx_file, output, passes, instruments)
        return
    if checkpoint_dir is None or output_dir is None or output is not None:
        raise UserError("give --checkpoint_dir and --output_dir, or an ONNX file and --output")
    source = Artifact.open(checkpoint_dir, ("export",))
    run_optimize(source, output_dir, passes, instruments, work)
    print(f"optimized {len(ranks_asked_for(source.world_size, work.rank))} rank(s) to {output_dir}")


def run_optimize(
    source: Artifact, output_dir: Path, passes: SelectionFlags, instruments: InstrumentFlags, work: WorkFlags
) -> None:
    """Optimizes what of ``source`` is not in ``output_dir`` yet, quantizing as the options say, or without any, as those of the
    export did. A pass that should have matched and did not is an error, or a
    note on stderr with ``allow_missed``."""
    job = Job.of(source)
    recipe = passes.recipe
    if recipe is None:
        recipe = checked_recipe(passes, job.model, job.mapping, job.source) or job.quantization
        recipe = with_cache(recipe, passes, job.model, job.source)
    passes, job = replace(passes, recipe=recipe), replace(job, quantization=recipe)
    check_instruments(instruments, passes.selection)
    steps = passes.selection.passes()
    ranks = ranks_asked_for(source.world_size, work.rank)
    source.check(ranks)
    if instruments.verify_each:
        from moecompiler.tools.passes.verify import require_verified

        require_verified(source.directory, passes)
    header = (
        source.header | job.header() | {"pipeline": passes.selection.pipeline, "passes": [step.name for step in steps]}
    )
    made_by = (
        code_fingerprint(),
        identity(steps),
        passes.allow_missed,
        instruments.dump_passes,
        instruments.dump_weights,
    )
    keys = {r: _key(source, r, made_by) for r in ranks}
    with writing(output_dir, "optimize", source.world_size, header) as writer:
        missing = [r for r in ranks if instruments.shows or not writer.is_done(r, keys[r])]

        def commit(rank: int, result: _Optimized) -> None:
            packed = packed_from(source.rank_info(rank), source.directory, output_dir)
            writer.commit_rank(rank, keys[rank], result.staged, result.info | packed)

        task = _OptimizeRank(source, output_dir, passes, instruments, job.source, job.model)
        workers = workers_here("optimize", work.workers, len(missing), PROCESS)
        done = run_ranks(task, missing, workers, "optimize", on_result=commit)
        for rank, result in done.items():  # in their order, whichever was done first
            show(result.results, result.text, instruments, _whose(rank))


def _key(source: Artifact, rank: int, made_by: tuple[Any, ...]) -> str:
    inputs = {name: record.sha256 for name, record in source.rank_files(rank).items()}
    return fingerprint("optimize", made_by, inputs)


def _whose(rank: int) -> str:
    return f"rank {rank}"


def _remove_dumps(staged: Mapping[str, Path], folder: Path) -> None:
    """Removes unfinished files, and folders that nothing else is in."""
    for path in staged.values():
        path.unlink(missing_ok=True)
    for each in (folder, folder.parent):
        with suppress(OSError):
            each.rmdir()


@dataclass(frozen=True)
class _Optimized:
    """One rank's files, under temporary names, what ``inspect`` shows of them, what the passes did, and what is to be printed."""

    staged: dict[str, Path]
    info: dict[str, Any]
    results: Sequence[PassResult]
    text: str


@dataclass(frozen=True)
class _OptimizeRank:
    """The task."""

    source: Artifact
    directory: Path
    passes: SelectionFlags
    instruments: InstrumentFlags
    identity: dict[str, Any]
    model: ModelConfig

    def __call__(self, rank: int, progress: ProgressFn) -> _Optimized:
        from moecompiler.graph import load_program, serialize
        from moecompiler.packed import open_rank_source
        from moecompiler.pipeline import run_passes
        from moecompiler.quantized import quantized_weights

        stem = f"rank{rank}"
        exported = load_program(self.source.directory / f"{stem}.onnx")
        steps = self.passes.selection.passes()
        watcher = Watcher(self.instruments, exported, _whose(rank))
        with watcher.printed_if_it_fails():
            program, results = run_passes(
                steps,
                exported,
                lambda done: progress(watcher.share * done),
                allow_missed=self.passes.allow_missed,
                watch=watcher.watch,
            )
        staged = {name: temporary_path(self.directory / name) for name in (f"{stem}.onnx", f"{stem}.weights.json")}
        for path, content in zip(staged.values(), serialize(program, stem), strict=True):
            path.write_bytes(content)

        folder = self.directory / DUMPS / stem

        def path_of(name: str) -> Path:
            folder.mkdir(parents=True, exist_ok=True)
            return staged.setdefault(f"{DUMPS}/{stem}/{name}", temporary_path(folder / name))

        try:
            watcher.write(
                lambda: open_rank_source(self.source.directory, self.source.rank_info(rank), self.identity, self.model),
                path_of,
                progress,
            )
        except BaseException:
            _remove_dumps(staged, folder)
            raise
        info: dict[str, Any] = {"passes": [result.to_json() for result in results]}
        if self.passes.recipe is not None:
            info["quantized"] = quantized_weights(program.weights, self.passes.recipe)
        return _Optimized(staged, info, results, watcher.text)
