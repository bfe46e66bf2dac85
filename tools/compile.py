"""Verb ``compile``: export, optimize and build in one go; going on where an earlier run stopped."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from moecompiler.artifact import Artifact
from moecompiler.tools import options as opt
from moecompiler.tools.awq import smoothed
from moecompiler.tools.build import check_engine, run_build
from moecompiler.tools.calibration import calibrate_beside
from moecompiler.tools.export import run_export
from moecompiler.tools.flags import (
    CalibrationFlags,
    EngineFlags,
    GraphFlags,
    InstrumentFlags,
    MappingFlags,
    SelectionFlags,
    SourceFlags,
    WorkFlags,
)
from moecompiler.tools.groups import grouped
from moecompiler.tools.instruments import check_instruments
from moecompiler.tools.job import Job, check_engine_dir, make_job, ranks_asked_for
from moecompiler.tools.optimize import run_optimize


@grouped
def compile_(
    output_dir: opt.OutputDir,
    source: SourceFlags,
    parallel: MappingFlags,
    graph: GraphFlags,
    passes: SelectionFlags,
    calibration: CalibrationFlags,
    instruments: InstrumentFlags,
    engine: EngineFlags,
    work: WorkFlags,
    pack_weights: opt.PackWeights = False,
) -> None:
    """Compile a checkpoint into engines: export + optimize + build."""
    job = make_job(source, parallel, graph, passes, partial(calibrate_beside, output_dir, calibration))
    job = smoothed(job, passes, calibration, output_dir)
    passes = replace(passes.for_backend(engine.backend, engine.plugins), recipe=job.quantization)
    check_instruments(instruments, passes.selection)
    for note in run_compile(job, output_dir, engine, passes, instruments, work, pack_weights):
        print(note)
    ranks = ranks_asked_for(job.mapping.world_size, work.rank)
    print(f"compiled {len(ranks)} rank(s) ({job.mapping}, {job.export.dtype}) into {output_dir}")


def run_compile(
    job: Job,
    output_dir: Path,
    engine: EngineFlags,
    passes: SelectionFlags,
    instruments: InstrumentFlags,
    work: WorkFlags,
    pack_weights: bool = False,
) -> list[str]:
    """Makes ``output_dir`` an engine directory, with ``export`` and ``optimize`` in it; returns notes for the user."""
    check_engine(job, engine)
    check_engine_dir(output_dir)
    run_export(job, output_dir / "export", work, pack_weights)
    exported = Artifact.open(output_dir / "export", ("export",))
    run_optimize(exported, output_dir / "optimize", passes, instruments, work)
    optimized = Artifact.open(output_dir / "optimize", ("optimize",))
    return run_build(optimized, output_dir, engine, work)
