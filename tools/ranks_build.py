"""What ``build`` does for ranks, in processes of their own: plans that several of them share, and each rank's engine files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecompiler.artifact import Artifact
from moecompiler.artifact_writer import ArtifactWriter
from moecompiler.atomic import fingerprint
from moecompiler.backends.base import Backend, BuildSettings
from moecompiler.config import ModelConfig
from moecompiler.errors import UserError
from moecompiler.tools.backend import open_backend
from moecompiler.workers import ProgressFn, run_ranks

if TYPE_CHECKING:
    from moecompiler.graph import Program


@dataclass(frozen=True)
class RankInputs:
    """What engines are built from, and where to: ``source``, the graphs; ``identity``, the checkpoint's."""

    source: Artifact
    directory: Path
    backend: str
    identity: dict[str, Any]
    model: ModelConfig
    settings: BuildSettings
    device: int = 0  # the GPU to build on, counted round: workers that run at one time have different ones

    def on_device(self, device: int) -> RankInputs:
        return replace(self, device=device)

    def open_backend(self) -> Backend:
        return open_backend(self.backend, self.device)

    def memory(self, ranks: Iterable[int]) -> int:
        """About how many bytes of memory building one of ``ranks`` takes; those of a stage take the same."""
        from moecompiler.graph import load_recipes

        one_of_each = {self.source.rank_info(rank).get("stage"): rank for rank in ranks}.values()
        tables = [load_recipes(self.source.directory / f"rank{rank}.weights.json") for rank in one_of_each]
        return max((self.open_backend().build_memory(each, self.settings) for each in tables), default=0)

    def program(self, rank: int) -> Program:
        from moecompiler.graph import load_program

        return load_program(self.source.directory / f"rank{rank}.onnx")


@dataclass(frozen=True)
class BuildRank:
    """The task: one rank's engine files under temporary names, and what ``inspect`` shows of them. ``shared``: by rank, the stem
    of a plan that it shares."""

    given: RankInputs
    shared: Mapping[int, str]

    def on_device(self, device: int) -> BuildRank:
        return replace(self, given=self.given.on_device(device))

    def __call__(self, rank: int, progress: ProgressFn) -> tuple[dict[str, Path], dict[str, Any]]:
        from moecompiler.packed import open_rank_source

        given, program = self.given, self.given.program(rank)
        reader = open_rank_source(given.source.directory, given.source.rank_info(rank), given.identity, given.model)
        try:
            staged = given.open_backend().build(
                program, reader, f"rank{rank}", given.directory, given.settings, progress, self.shared.get(rank)
            )
        except OverflowError as error:
            raise UserError(str(error)) from None
        weights = sum(recipe.nbytes for recipe in program.weights.values())
        info: dict[str, Any] = {"nodes": len(program.model.graph.node), "weight_bytes": weights}
        if record := staged.get(f"rank{rank}.engine.json"):
            info["engine"] = json.loads(record.read_text())
        return staged, info


@dataclass(frozen=True)
class _SharedGraph:
    """The task: see ``Backend.shared_graph``."""

    given: RankInputs

    def __call__(self, rank: int, progress: ProgressFn) -> str | None:
        return self.given.open_backend().shared_graph(self.given.program(rank), self.given.settings)


@dataclass(frozen=True)
class _BuildPlan:
    """The task: the plan of a rank's graph, and of all others that have it, under temporary names."""

    given: RankInputs
    stems: Mapping[int, str]

    def on_device(self, device: int) -> _BuildPlan:
        return replace(self, given=self.given.on_device(device))

    def __call__(self, rank: int, progress: ProgressFn) -> dict[str, Path]:
        given = self.given
        return given.open_backend().build_shared(
            given.program(rank), self.stems[rank], given.directory, given.settings, progress
        )


class SharedPlans:
    """``stems``: by rank, the stem of the plan that it shares. ``files``: of each stem, as ``ArtifactWriter.commit_rank`` takes
    them for the first rank that has it."""

    def __init__(self, stems: Mapping[int, str], files: Mapping[str, Mapping[str, Path | None]]):
        self.stems, self._files = stems, dict(files)

    def take(self, rank: int) -> dict[str, Path | None]:
        """The files that a rank shares; those that are put in place with it are there for the next."""
        if rank not in self.stems:
            return {}
        files = dict(self._files[self.stems[rank]])
        self._files[self.stems[rank]] = dict.fromkeys(files)
        return files


def share_plans(
    given: RankInputs, ranks: Sequence[int], made_by: tuple[Any, ...], writer: ArtifactWriter, workers: int
) -> SharedPlans:
    """Builds the plans that ``ranks`` share and that are not there yet, each once. A plan's name says what it was made of and by
    (``made_by``), so another run finds it."""
    if given.settings.moe_weights != "all":
        return SharedPlans({}, {})
    graphs = run_ranks(_SharedGraph(given), ranks, workers, "prepare")
    stems = {rank: f"plan-{fingerprint(made_by, graph)[:16]}" for rank, graph in graphs.items() if graph is not None}
    first = {stem: rank for rank, stem in reversed(stems.items())}
    there = {stem: writer.whole_files(f"{stem}.") for stem in first}
    missing = sorted(rank for stem, rank in first.items() if not there[stem])
    task = _BuildPlan(given, stems)
    built = run_ranks(task, missing, workers, "build the plan of", placed=task.on_device)
    files: dict[str, Mapping[str, Path | None]] = {stem: dict.fromkeys(names) for stem, names in there.items()}
    return SharedPlans(stems, files | {stems[rank]: staged for rank, staged in built.items()})
