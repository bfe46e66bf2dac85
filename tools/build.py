"""Verb ``build``: optimized graphs → engines."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecompiler.artifact import Artifact
from moecompiler.artifact_writer import ArtifactWriter, writing
from moecompiler.atomic import fingerprint
from moecompiler.backends.base import EngineLimits
from moecompiler.backends.choose import find_backend
from moecompiler.config import ModelConfig
from moecompiler.errors import UserError
from moecompiler.passes.pipelines import OPTIMIZE
from moecompiler.tools import options as opt
from moecompiler.tools.job import Job, check_engine_dir, code_fingerprint, ranks_asked_for
from moecompiler.tools.optimize import run_optimize
from moecompiler.workers import ProgressFn, run_ranks

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class EngineOptions:
    """What a build is asked for; ``max_input_len`` and ``max_seq_len`` in tokens, None: as large as the graph allows."""

    backend: str = "onnxruntime"
    max_batch_size: int = 8
    max_input_len: int | None = None
    max_seq_len: int | None = None
    gemm_plugin: str = "auto"


def build(
    checkpoint_dir: opt.CheckpointDir,
    output_dir: opt.OutputDir,
    backend: opt.Backend = "onnxruntime",
    max_batch_size: opt.MaxBatchSize = 8,
    max_input_len: opt.MaxInputLen = None,
    max_seq_len: opt.MaxSeqLen = None,
    gemm_plugin: opt.GemmPlugin = opt.PluginDType.auto,
    pipeline: opt.Pipeline = OPTIMIZE,
    allow_missed: opt.AllowMissed = False,
    workers: opt.Workers = 1,
    rank: opt.Rank = None,
) -> None:
    """Build engines from what `export` or `optimize` wrote (the old trtllm-build)."""
    source = Artifact.open(checkpoint_dir, ("optimize", "export"))
    engine = EngineOptions(backend, max_batch_size, max_input_len, max_seq_len, gemm_plugin)
    resolve_limits(Job.of(source), engine)
    find_backend(backend)
    check_engine_dir(output_dir)
    if source.stage == "export":
        run_optimize(source, output_dir / "optimize", pipeline, workers, rank, allow_missed)
        source = Artifact.open(output_dir / "optimize", ("optimize",))
    for note in run_build(source, output_dir, engine, workers, rank):
        print(note)
    print(f"built {source.world_size} rank(s) into {output_dir}")


def resolve_limits(job: Job, engine: EngineOptions) -> EngineLimits:
    """Raises: UserError where the engine is asked for more than the graph holds, or for nothing."""
    slots = job.export.max_seq_len
    seq_len = slots if engine.max_seq_len is None else engine.max_seq_len
    if not 2 <= seq_len <= slots:
        raise UserError(f"--max_seq_len {seq_len}: the graph was exported for 2 to {slots}; export it anew for more")
    input_len = seq_len - 1 if engine.max_input_len is None else engine.max_input_len
    if not 1 <= input_len < seq_len:
        raise UserError(f"--max_input_len {input_len}: give 1 to {seq_len - 1}, less than --max_seq_len {seq_len}")
    if engine.max_batch_size < 1:
        raise UserError(f"--max_batch_size {engine.max_batch_size}: give 1 or more")
    return EngineLimits(engine.max_batch_size, input_len, seq_len, job.model.vocab_size)


def run_build(
    source: Artifact, output_dir: Path, engine: EngineOptions, workers: int = 1, rank: int | None = None
) -> list[str]:
    """Builds what of ``source`` is not in ``output_dir`` yet; returns notes for the user."""
    job, backend = Job.of(source), find_backend(engine.backend)
    limits = resolve_limits(job, engine)
    ranks = ranks_asked_for(source.world_size, rank)
    source.check(ranks)
    header = source.header | {"backend": backend.name, "limits": limits.to_json(), "runtime": backend.version()}
    made_by = (code_fingerprint(), backend.name, backend.version())
    keys = {r: _key(source, r, made_by, job) for r in ranks}
    with writing(output_dir, "engine", source.world_size, header) as writer:
        missing = [r for r in ranks if not writer.is_done(r, keys[r])]

        def commit(rank: int, result: tuple[dict[str, Path], dict[str, Any]]) -> None:
            staged, info = result
            writer.commit_rank(rank, keys[rank], staged, source.rank_info(rank) | info)

        task = _BuildRank(source.directory, output_dir, engine.backend, job.source, job.model)
        run_ranks(task, missing, workers, "build", on_result=commit)
        _copy_tokenizer(job, writer)
    notes = [f"note: {note}" for note in backend.notes(job.export.dtype)]
    if engine.gemm_plugin not in ("auto", "disable"):
        notes.append(
            f"note: --gemm_plugin {engine.gemm_plugin}: backend {backend.name} has no plugins, so none is used"
        )
    return notes


def _key(source: Artifact, rank: int, made_by: tuple[str, ...], job: Job) -> str:
    inputs = {name: record.sha256 for name, record in source.rank_files(rank).items()}
    return fingerprint("build", made_by, inputs, job.source)


def _copy_tokenizer(job: Job, writer: ArtifactWriter) -> None:
    """An engine directory should run where the checkpoint is not; what there is of a tokenizer is small."""
    if job.source["kind"] != "hf":
        return
    folder = Path(job.source["model_dir"])
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return
    for name in _TOKENIZER_FILES:
        file = folder / name
        if file.is_file():
            temporary = writer.temp(f"tokenizer/{name}")
            shutil.copyfile(file, temporary)
            writer.commit_file(f"tokenizer/{name}", temporary)


@dataclass(frozen=True)
class _BuildRank:
    """The task: one rank's engine files under temporary names, and what ``inspect`` shows of them."""

    source: Path
    directory: Path
    backend: str
    identity: dict[str, Any]
    model: ModelConfig

    def __call__(self, rank: int, progress: ProgressFn) -> tuple[dict[str, Path], dict[str, Any]]:
        from moecompiler.dummy import open_source
        from moecompiler.graph import load_program

        program = load_program(self.source / f"rank{rank}.onnx")
        reader = open_source(self.identity, self.model)
        try:
            staged = find_backend(self.backend).build(program, reader, f"rank{rank}", self.directory, progress)
        except OverflowError as error:
            raise UserError(str(error)) from None
        weights = sum(recipe.nbytes for recipe in program.weights.values())
        return staged, {"nodes": len(program.model.graph.node), "weight_bytes": weights}
