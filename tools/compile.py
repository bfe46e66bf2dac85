"""Verb ``compile``: export, optimize and build in one go; going on where an earlier run stopped."""

from __future__ import annotations

from pathlib import Path

from moecompiler.artifact import Artifact
from moecompiler.backends.choose import find_backend
from moecompiler.mapping import Mapping
from moecompiler.passes.pipelines import OPTIMIZE, find_pipeline
from moecompiler.tools import options as opt
from moecompiler.tools.build import EngineOptions, resolve_limits, run_build
from moecompiler.tools.export import run_export
from moecompiler.tools.job import Job, check_engine_dir, make_job, resolve_export, resolve_source
from moecompiler.tools.optimize import run_optimize


def compile_(
    output_dir: opt.OutputDir,
    model_dir: opt.ModelDir = None,
    model: opt.Model = None,
    num_layers: opt.NumLayers = None,
    dummy_seed: opt.DummySeed = 0,
    check_finite: opt.CheckFinite = False,
    dtype: opt.DataType = opt.DType.auto,
    tp_size: opt.TpSize = 1,
    pp_size: opt.PpSize = 1,
    moe_tp_size: opt.MoeTpSize = None,
    moe_ep_size: opt.MoeEpSize = None,
    moe_normalization_mode: opt.NormalizationOption = opt.Normalization.renormalize,
    max_seq_len: opt.MaxSeqLen = None,
    gather_context_logits: opt.GatherContextLogits = False,
    pipeline: opt.Pipeline = OPTIMIZE,
    allow_missed: opt.AllowMissed = False,
    backend: opt.Backend = "onnxruntime",
    max_batch_size: opt.MaxBatchSize = 8,
    max_input_len: opt.MaxInputLen = None,
    gemm_plugin: opt.GemmPlugin = opt.PluginDType.auto,
    workers: opt.Workers = 1,
    rank: opt.Rank = None,
) -> None:
    """Compile a checkpoint into engines: export + optimize + build."""
    mapping = Mapping.create(tp_size, pp_size, moe_tp_size, moe_ep_size)
    find_pipeline(pipeline)
    config, source = resolve_source(model_dir, model, num_layers, dummy_seed, check_finite)
    graph = resolve_export(config, dtype, moe_normalization_mode, max_seq_len, gather_context_logits)
    job = make_job(config, source, mapping, graph)
    engine = EngineOptions(backend, max_batch_size, max_input_len, None, gemm_plugin)
    for note in run_compile(job, output_dir, engine, pipeline, workers, rank, allow_missed):
        print(note)
    print(f"compiled {mapping.world_size} rank(s) ({mapping}, {graph.dtype}) into {output_dir}")


def run_compile(
    job: Job,
    output_dir: Path,
    engine: EngineOptions,
    pipeline: str = OPTIMIZE,
    workers: int = 1,
    rank: int | None = None,
    allow_missed: bool = False,
) -> list[str]:
    """Makes ``output_dir`` an engine directory, with ``export`` and ``optimize`` in it; returns notes for the user."""
    resolve_limits(job, engine)
    find_backend(engine.backend)
    check_engine_dir(output_dir)
    run_export(job, output_dir / "export", workers, rank)
    exported = Artifact.open(output_dir / "export", ("export",))
    run_optimize(exported, output_dir / "optimize", pipeline, workers, rank, allow_missed)
    optimized = Artifact.open(output_dir / "optimize", ("optimize",))
    return run_build(optimized, output_dir, engine, workers, rank)
