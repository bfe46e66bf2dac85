"""Verb ``export``: a checkpoint → one ONNX graph per rank, weights by reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moecompiler.artifact_writer import writing
from moecompiler.atomic import Staged, fingerprint, temporary_path
from moecompiler.errors import UserError
from moecompiler.packed import PACKED, packed_info, write_packed
from moecompiler.room import PROCESS
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
from moecompiler.tools.room import workers_here
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
    pack_weights: opt.PackWeights = False,
) -> None:
    """Export a checkpoint to ONNX, rank by rank (the old convert_checkpoint)."""
    job = make_job(source, parallel, graph, quantization, partial(calibrate_beside, output_dir, calibration))
    job = smoothed(job, quantization, calibration, output_dir)
    run_export(job, output_dir, work, pack_weights)
    print(f"exported {len(ranks_asked_for(job.mapping.world_size, work.rank))} rank(s) to {output_dir}")


def run_export(job: Job, output_dir: Path, work: WorkFlags, pack_weights: bool = False) -> None:
    """Exports what of ``job`` is not in ``output_dir`` yet. A stage's ranks share a graph, so stages are the unit of work; with
    ``pack_weights`` each rank gets a file of its weights too, those of a stage side by side.

    Raises: UserError where the weights are not to be packed so.
    """
    if pack_weights:
        _check_packing(job)
    ranks = ranks_asked_for(job.mapping.world_size, work.rank)
    header = job.header() | {"versions": versions("torch", "onnx", "onnxscript")}
    with writing(output_dir, "export", job.mapping.world_size, header) as writer:
        keys = _keys(job, ranks, header["versions"], pack_weights)
        missing = [r for r in ranks if not writer.is_done(r, keys[r])]
        by_stage: dict[int, list[int]] = {}
        for each in missing:
            by_stage.setdefault(job.mapping.pp_rank(each), []).append(each)

        graphs: dict[int, dict[str, Path]] = {}

        def commit(rank: int, weights: Staged | None) -> None:
            info: dict[str, Any] = {"stage": job.mapping.pp_rank(rank)}
            staged: dict[str, Path | Staged] = {**graphs[rank]}
            if weights is not None:
                staged[f"rank{rank}.safetensors"] = weights
                info[PACKED] = packed_info(f"rank{rank}.safetensors", weights.record)
            writer.commit_rank(rank, keys[rank], staged, info)

        def exported(label: str, files: dict[int, dict[str, Path]]) -> None:
            graphs.update(files)
            for each in () if pack_weights else files:
                commit(each, None)

        labels = {_label(members): tuple(members) for members in by_stage.values()}
        workers = workers_here("export", work.workers, len(labels), PROCESS)
        run_ranks(_ExportStage(job, output_dir, labels), list(labels), workers, "export", on_result=exported)
        if pack_weights:
            tables = {rank: files[f"rank{rank}.weights.json"] for rank, files in graphs.items()}
            workers = workers_here("pack", work.workers, len(missing), PROCESS)
            groups = {_label(group): group for group in packing_groups(list(by_stage.values()), workers)}

            def packed(label: str, files: dict[int, Staged]) -> None:
                for rank, staged in files.items():
                    commit(rank, staged)

            run_ranks(_PackRanks(job, output_dir, tables, groups), list(groups), workers, "pack", on_result=packed)


def packing_groups(stages: Sequence[Sequence[int]], workers: int) -> list[tuple[int, ...]]:
    """Ranks that are packed side by side: those of a stage, for they are cut out of the same tensors, in as many parts as leave
    no worker idle."""
    parts = -(-workers // max(1, len(stages)))
    groups = []
    for ranks in stages:
        each = -(-len(ranks) // parts)
        groups += [tuple(ranks[at : at + each]) for at in range(0, len(ranks), each)]
    return groups


def _check_packing(job: Job) -> None:
    """Raises: UserError where engines need more of the checkpoint than the numbers of its weights."""
    for key, what in (("quantization", "holds its weights as codes"), ("awq", "gets scales of AWQ")):
        if key in job.source:
            raise UserError(
                f"--pack_weights: the checkpoint {what}, and a packed rank would hold numbers alone;"
                " leave it out: building packs the codes"
            )


def _label(ranks: Sequence[int]) -> str:
    return "rank " + ("–".join(map(str, (ranks[0], ranks[-1]))) if len(ranks) > 1 else str(ranks[0]))


def _keys(job: Job, ranks: Sequence[int], made_with: dict[str, str], packs: bool) -> dict[int, str]:
    """What each rank's graph depends on; the weights' files are not among it, for the graph only names tensors, unless these are
    packed beside it."""
    code, options = code_fingerprint(), (job.model.to_json(), job.mapping.to_json(), job.export.to_json())
    weights = (job.source,) if packs else ()
    return {rank: fingerprint("export", code, *options, rank, made_with, *weights) for rank in ranks}


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


@dataclass(frozen=True)
class _PackRanks:
    """The task: the weights of each rank of a group in a file of its own. ``tables``: by rank, where the recipes of its weights
    lie."""

    job: Job
    directory: Path
    tables: dict[int, Path]
    groups: dict[str, tuple[int, ...]]

    def __call__(self, label: str, progress: ProgressFn) -> dict[int, Staged]:
        from moecompiler.dummy import open_source
        from moecompiler.graph import load_recipes

        reader = open_source(self.job.source, self.job.model)
        parts = {
            rank: (temporary_path(self.directory / f"rank{rank}.safetensors"), load_recipes(self.tables[rank]))
            for rank in self.groups[label]
        }
        return write_packed(parts, reader, progress)
