"""Verb ``build``: optimized graphs → engines."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from moecompiler.artifact import Artifact
from moecompiler.artifact_writer import ArtifactWriter, writing
from moecompiler.atomic import fingerprint
from moecompiler.backends.base import BuildSettings, EngineLimits
from moecompiler.errors import UserError
from moecompiler.packed import PACKED
from moecompiler.plugin_switches import merge_legacy, parse_plugins
from moecompiler.tools import options as opt
from moecompiler.tools.backend import open_backend
from moecompiler.tools.flags import EngineFlags, InstrumentFlags, SelectionFlags, WorkFlags
from moecompiler.tools.groups import grouped
from moecompiler.tools.job import Job, check_engine_dir, code_fingerprint, ranks_asked_for
from moecompiler.tools.optimize import DUMPS, run_optimize
from moecompiler.tools.ranks_build import BuildRank, RankInputs, share_plans
from moecompiler.tools.room import workers_here
from moecompiler.workers import run_ranks

_PLUGIN_DTYPES = ("float16", "bfloat16")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)


@grouped
def build(
    checkpoint_dir: opt.CheckpointDir,
    output_dir: opt.OutputDir,
    passes: SelectionFlags,
    instruments: InstrumentFlags,
    engine: EngineFlags,
    work: WorkFlags,
    max_seq_len: opt.MaxSeqLen = None,
) -> None:
    """Build engines from what `export` or `optimize` wrote (the old trtllm-build)."""
    source = Artifact.open(checkpoint_dir, ("optimize", "export"))
    check_engine(Job.of(source), engine, max_seq_len)
    check_engine_dir(output_dir)
    if source.stage == "export":
        run_optimize(
            source, output_dir / "optimize", passes.for_backend(engine.backend, engine.plugins), instruments, work
        )
        source = Artifact.open(output_dir / "optimize", ("optimize",))
    for note in run_build(source, output_dir, engine, work, max_seq_len):
        print(note)
    print(f"built {len(ranks_asked_for(source.world_size, work.rank))} rank(s) into {output_dir}")


def resolve_limits(job: Job, engine: EngineFlags, max_seq_len: int | None = None) -> EngineLimits:
    """``max_seq_len`` in tokens, None: as long as the graph allows.

    Raises: UserError where the engine is asked for more than the graph holds, or for nothing."""
    slots = job.export.max_seq_len
    seq_len = slots if max_seq_len is None else max_seq_len
    if not 2 <= seq_len <= slots:
        raise UserError(f"--max_seq_len {seq_len}: the graph was exported for 2 to {slots}; export it anew for more")
    input_len = seq_len - 1 if engine.max_input_len is None else engine.max_input_len
    if not 1 <= input_len < seq_len:
        raise UserError(f"--max_input_len {input_len}: give 1 to {seq_len - 1}, less than --max_seq_len {seq_len}")
    if engine.max_batch_size < 1:
        raise UserError(f"--max_batch_size {engine.max_batch_size}: give 1 or more")
    if engine.max_num_tokens is not None and engine.max_num_tokens < max(input_len, engine.max_batch_size):
        raise UserError(
            f"--max_num_tokens {engine.max_num_tokens}: a step must hold a prompt of --max_input_len {input_len} and a token of"
            f" each of --max_batch_size {engine.max_batch_size} sequences; give at least"
            f" {max(input_len, engine.max_batch_size)}"
        )
    return EngineLimits(engine.max_batch_size, input_len, seq_len, job.model.vocab_size, engine.max_num_tokens)


def resolve_settings(job: Job, engine: EngineFlags, max_seq_len: int | None = None) -> BuildSettings:
    """Raises: UserError where an option cannot be, by itself or for this graph."""
    limits = resolve_limits(job, engine, max_seq_len)
    switches = merge_legacy(engine.plugins, job.export.dtype, engine.moe_plugin, engine.gpt_attention_plugin)
    return BuildSettings(limits, switches, engine.moe_weights, resolve_capabilities(engine), resolve_tactics(engine))


def resolve_tactics(engine: EngineFlags) -> tuple[str, ...]:
    """The names in ``whole,thin tiles``. Raises: UserError where there are no interpreted plugins to have them."""
    names = tuple(dict.fromkeys(name for each in engine.plugin_tactics.split(",") if (name := each.strip())))
    if names and not (engine.backend == "onnxruntime" and parse_plugins(engine.plugins).insists):
        raise UserError(
            f"--plugin_tactics {engine.plugin_tactics}: only interpreted plugins are told their plans; leave it out, or give"
            " --backend onnxruntime --plugins on"
        )
    return names


def resolve_capabilities(engine: EngineFlags) -> tuple[str, ...]:
    """``8.9,12.0`` as a list. Raises: UserError where that is no list of compute capabilities, or the backend takes none."""
    text = engine.compute_capability
    names = tuple(dict.fromkeys(each.strip() for each in text.split(","))) if text else ()
    if not all(re.fullmatch(r"\d+\.\d", name) for name in names):
        raise UserError(f"--compute_capability {text}: give compute capabilities as in 8.9,12.0")
    if names and engine.backend != "tensorrt-rtx":
        raise UserError(
            f"--compute_capability {text}: backend {engine.backend} builds for the machine it is on;"
            " leave it out, or give --backend tensorrt-rtx"
        )
    return names


def check_engine(job: Job, engine: EngineFlags, max_seq_len: int | None = None) -> None:
    """Raises: UserError where the engine cannot be built here, before any work is done."""
    open_backend(engine.backend).notes(job.export.dtype, resolve_settings(job, engine, max_seq_len))


def run_build(
    source: Artifact, output_dir: Path, engine: EngineFlags, work: WorkFlags, max_seq_len: int | None = None
) -> list[str]:
    """Builds what of ``source`` is not in ``output_dir`` yet; returns notes for the user."""
    job, backend = Job.of(source), open_backend(engine.backend)
    settings = resolve_settings(job, engine, max_seq_len)
    notes = [f"note: {note}" for note in (*backend.notes(job.export.dtype, settings), *_legacy_notes(engine))]
    ranks = ranks_asked_for(source.world_size, work.rank)
    source.check(ranks)
    header = source.header | {
        "backend": backend.name,
        "limits": settings.limits.to_json(),
        "runtime": backend.version(),
        **backend.header(),
    }
    made_by = (code_fingerprint(), backend.name, backend.version(), backend.identity(settings))
    keys = {r: _key(source, r, made_by, job) for r in ranks}
    with writing(output_dir, "engine", source.world_size, header) as writer:
        missing = [r for r in ranks if not writer.is_done(r, keys[r])]

        given = RankInputs(source, output_dir, engine.backend, job.source, job.model, settings)
        workers = workers_here("build", work.workers, len(missing), given.memory(missing) if missing else 0)
        plans = share_plans(given, missing, made_by, writer, workers)

        def commit(rank: int, result: tuple[dict[str, Path], dict[str, Any]]) -> None:
            staged, info = result
            kept = {key: value for key, value in source.rank_info(rank).items() if key != PACKED}
            writer.commit_rank(rank, keys[rank], staged, kept | info, plans.take(rank))
            for note in info.get("engine", {}).get("notes", ()):
                print(f"note: rank {rank}: {note}", file=sys.stderr)

        task = BuildRank(given, plans.stems)
        run_ranks(task, missing, workers, "build", on_result=commit, placed=task.on_device)
        _copy_tokenizer(job, writer)
    return notes


def _legacy_notes(engine: EngineFlags) -> list[str]:
    """What a script for TensorRT-LLM asks for and does not get."""
    asked = {"moe_plugin": engine.moe_plugin, "gpt_attention_plugin": engine.gpt_attention_plugin}
    notes = []
    if engine.gemm_plugin in _PLUGIN_DTYPES:
        reason = "has no plugins, so none is used"
        if engine.backend == "tensorrt":
            reason = "needs no plugin for matrix products and uses its own kernels"
        notes.append(f"--gemm_plugin {engine.gemm_plugin}: backend {engine.backend} {reason}")
    if engine.backend != "tensorrt":
        why = "has no plugins" if engine.backend != "onnxruntime" else "has plugins only where --plugins says on"
        notes += [
            f"--{option} {value}: backend {engine.backend} {why}, so none is used"
            for option, value in asked.items()
            if value in _PLUGIN_DTYPES
        ]
    return notes


def _key(source: Artifact, rank: int, made_by: tuple[Any, ...], job: Job) -> str:
    files = source.rank_files(rank).items()
    inputs = {name: record.sha256 for name, record in files if not name.startswith(f"{DUMPS}/")}
    return fingerprint("build", made_by, inputs, job.source, *source.rank_info(rank).get(PACKED, {}).values())


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
