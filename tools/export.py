"""Verb ``export``: a checkpoint → one ONNX graph per rank, weights by reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moecompiler.artifact_writer import writing
from moecompiler.atomic import fingerprint, temporary_path
from moecompiler.tools import options as opt
from moecompiler.tools.awq import smoothed
from moecompiler.tools.calibration import calibrate_beside
from moecompiler.tools.flags import (
    CalibrationFlags,
    GraphFlags,
    MappingFlags,
    QuantizationFlags,
    SourceFlags,
    WorkFlags,
)
from moecompiler.tools.groups import grouped
from moecompiler.tools.job import Job, code_fingerprint, make_job, ranks_asked_for, versions
from moecompiler.workers import ProgressFn, run_ranks


@grouped
def export(
    output_dir: opt.OutputDir,
    source: SourceFlags,
    parallel: MappingFlags,
    graph: GraphFlags,
    quantization: QuantizationFlags,
    calibration: CalibrationFlags,
    work: WorkFlags,
) -> None:
    """Export a checkpoint to ONNX, rank by rank (the old convert_checkpoint)."""
    job = make_job(source, parallel, graph, quantization, partial(calibrate_beside, output_dir, calibration))
    job = smoothed(job, quantization, calibration, output_dir)
    run_export(job, output_dir, work)
    print(f"exported {len(ranks_asked_for(job.mapping.world_size, work.rank))} rank(s) to {output_dir}")


def run_export(job: Job, output_dir: Path, work: WorkFlags) -> None:
    """Exports what of ``job`` is not in ``output_dir`` yet. A stage's ranks share a graph, so stages are the unit of work."""
    ranks = ranks_asked_for(job.mapping.world_size, work.rank)
    header = job.header() | {"versions": versions("torch", "onnx", "onnxscript")}
    with writing(output_dir, "export", job.mapping.world_size, header) as writer:
        keys = _keys(job, ranks, header["versions"])
        missing = [r for r in ranks if not writer.is_done(r, keys[r])]
        by_stage: dict[int, list[int]] = {}
        for each in missing:
            by_stage.setdefault(job.mapping.pp_rank(each), []).append(each)

        def commit(label: str, files: dict[int, dict[str, Path]]) -> None:
            for each, staged in files.items():
                writer.commit_rank(each, keys[each], staged, {"stage": job.mapping.pp_rank(each)})

        labels = {_label(members): tuple(members) for members in by_stage.values()}
        run_ranks(_ExportStage(job, output_dir, labels), list(labels), work.workers, "export", on_result=commit)


def _label(ranks: Sequence[int]) -> str:
    return "rank " + ("–".join(map(str, (ranks[0], ranks[-1]))) if len(ranks) > 1 else str(ranks[0]))


def _keys(job: Job, ranks: Sequence[int], made_with: dict[str, str]) -> dict[int, str]:
    """What each rank's graph depends on; the weights' files are not among it, for the graph only names tensors."""
    code, options = code_fingerprint(), (job.model.to_json(), job.mapping.to_json(), job.export.to_json())
    return {rank: fingerprint("export", code, *options, rank, made_with) for rank in ranks}


@dataclass(frozen=True)
class _ExportStage:
    """The task: exports one stage and writes its ranks' files under temporary names."""

    job: Job
    directory: Path
    ranks: dict[str, tuple[int, ...]]

    def __call__(self, label: str, progress: ProgressFn) -> dict[int, dict[str, Path]]:
        from moecompiler.export import export_rank, with_recipes
        from moecompiler.graph import serialize

        job, ranks = self.job, self.ranks[label]
        program = export_rank(job.model, job.mapping, ranks[0], job.export)
        progress(0.9)
        files = {}
        for rank in ranks:
            mine = with_recipes(program.model, job.model, job.mapping, rank, job.export)
            names = (f"rank{rank}.onnx", f"rank{rank}.weights.json")
            files[rank] = {name: temporary_path(self.directory / name) for name in names}
            for path, content in zip(files[rank].values(), serialize(mine, f"rank{rank}"), strict=True):
                path.write_bytes(content)
        return files
